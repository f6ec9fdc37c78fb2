"""The compiled extension: loading it, what was built, and why it is unavailable where it is."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

PACKAGE = Path(__file__).resolve().parent.parent
REPORT = "_build_report.json"


@dataclass(frozen=True)
class Library:
    """One compiled library of the package.

    Attributes:
        name: ``"cpu"`` or ``"cuda"``.
        path: the file that was loaded, or None.
        reason: why it was not loaded, empty where it was.
    """

    name: str
    path: Path | None
    reason: str


@cache
def load(name: str) -> Library:
    """Loads the library of the CPU or the CUDA kernels once per process; never raises for a missing one."""
    stem = {"cpu": "_native", "cuda": "_cuda"}[name]
    files = sorted(PACKAGE.glob(f"{stem}*.so"))
    if not files:
        return Library(name, None, build_report().get(name, {}).get("reason") or _not_built())
    try:
        torch.ops.load_library(str(files[0]))
    except OSError as error:
        return Library(name, None, f"{files[0].name} does not load: {error}")
    return Library(name, files[0], "")


def _not_built() -> str:
    folder = PACKAGE.parent
    if not (folder / "setup.py").is_file() or build_report():
        return "was not built at install"
    return (
        f"was not built in the source folder {folder}, which hides an installed package: leave the folder, or install "
        "it with pip install -e"
    )


def build_report() -> dict[str, dict]:
    """What the install built and why it did not build the rest, as ``setup.py`` wrote it down."""
    path = PACKAGE / REPORT
    return json.loads(path.read_text()) if path.is_file() else {}

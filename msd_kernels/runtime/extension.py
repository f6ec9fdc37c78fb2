"""The compiled modules: loading them, how they are called, what was built, and why one is unavailable where it is."""

from __future__ import annotations

import json
import sysconfig
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from msd_kernels.layouts import Layout

PACKAGE = Path(__file__).resolve().parent.parent
REPORT = "_build_report.json"

# As csrc/ numbers them; an absent tensor may have any.
TYPE_CODES = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.uint8: 3,
    torch.float64: 4,
    None: 0,
}


@dataclass(frozen=True)
class Library:
    """One compiled module of the package.

    Attributes:
        name: ``"cpu"`` or ``"cuda"``.
        module: with the functions that ``csrc/bindings.h`` describes, or None.
        reason: why it was not loaded, empty where it was.
    """

    name: str
    module: ModuleType | None
    reason: str


@cache
def load(name: str) -> Library:
    """Loads the module of the CPU or the CUDA kernels once per process; never raises for a missing one.

    PyTorch, whose threads the CPU kernels run in, is loaded before.
    """
    stem = {"cpu": "_native", "cuda": "_cuda"}[name]
    file = PACKAGE / f"{stem}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not file.is_file():
        return Library(name, None, build_report().get(name, {}).get("reason") or _not_built())
    try:
        return Library(name, import_module(f"{PACKAGE.name}.{stem}"), "")
    except ImportError as error:
        return Library(name, None, f"{file.name} does not load: {error}")


def cannot_run_on_cpu(dtype: torch.dtype) -> str | None:
    """Why no compiled CPU kernel of a norm or a filter can serve tensors of a dtype, or None."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"takes float32, bfloat16 and float16, got {dtype}"
    return load("cpu").reason or None


def compiled_layout(kind: type, layout: Layout, *tensors: Tensor | None) -> Any:
    """A layout and its tensors' types as the kernels take them; made once. ``kind`` is its class in their module."""
    key = (kind, *[t if t is None else t.dtype for t in tensors])
    return layout.derived(key, lambda: kind(*layout, [TYPE_CODES[dtype] for dtype in key[1:]]))


def addresses(*tensors: Tensor | None) -> list[int]:
    """Where the kernels find the tensors, 0 for an absent one. The caller keeps them alive during the call.

    Raises:
        ValueError: a tensor's memory was given back, as by sharded training.
    """
    return [0 if t is None else t.data_ptr() or address(t) for t in tensors]


def address(tensor: Tensor) -> int:
    """Where kernels find a tensor; errors as of :func:`addresses`."""
    found = tensor.data_ptr()
    if not found and tensor.numel():
        raise ValueError(
            f"a tensor of shape {list(tensor.shape)} has no memory: it was given back to be gathered anew"
        )
    return found


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

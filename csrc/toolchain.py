"""Finds the compilers and runs them, compiling only what changed. Used by setup.py and scripts/."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ARCHITECTURE = re.compile(r"(\d+)\.(\d+)([af]?)(\+PTX)?")
# The kernels copy asynchronously, which older GPUs cannot.
OLDEST_ARCHITECTURE = (8, 0)
# PyTorch's names.
NAMED_ARCHITECTURES = {
    "Maxwell": "5.0;5.2+PTX",
    "Maxwell+Tegra": "5.3",
    "Pascal": "6.0;6.1+PTX",
    "Volta": "7.0+PTX",
    "Volta+Tegra": "7.2",
    "Turing": "7.5+PTX",
    "Ampere": "8.0;8.6+PTX",
    "Ampere+Tegra": "8.7",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell": "10.0;10.3;12.0;12.1+PTX",
    "Blackwell+Tegra": "11.0",
}


class BuildError(Exception):
    """A target cannot be built; the message is what the user is told."""


@dataclass(frozen=True)
class Compilation:
    """One source with the command that compiles it, up to the names of the files."""

    source: Path
    command: tuple[str, ...]
    object: Path

    def is_current(self) -> bool:
        """Whether the object is of this very command and newer than everything it was made from."""
        stamp, dependencies = self._stamp(), self.object.with_suffix(".d")
        if not (self.object.exists() and stamp.exists() and dependencies.exists()):
            return False
        if json.loads(stamp.read_text()) != list(self.command):
            return False
        made = self.object.stat().st_mtime_ns
        files = dependencies.read_text().replace("\\\n", " ").partition(":")[2].split()
        return all(os.path.exists(f) and os.stat(f).st_mtime_ns <= made for f in files)

    def run(self) -> str:
        """Compiles; returns what the compiler said."""
        self.object.parent.mkdir(parents=True, exist_ok=True)
        self._stamp().unlink(missing_ok=True)
        dependencies = ("-MMD", "-MF", str(self.object.with_suffix(".d")))
        output = run((*self.command, *dependencies, "-c", str(self.source), "-o", str(self.object)))
        self._stamp().write_text(json.dumps(self.command))
        return output

    def _stamp(self) -> Path:
        return self.object.with_suffix(".json")


def max_jobs() -> int:
    """How many compilers may run at a time: $MAX_JOBS, else two."""
    text = os.environ.get("MAX_JOBS", "").strip() or "2"
    if not re.fullmatch(r"0*[1-9][0-9]*", text):
        raise BuildError(f"MAX_JOBS={text}: needs a whole number of at least 1")
    return int(text)


def compile_changed(compilations: list[Compilation]):
    """Compiles what is not current."""
    outdated = [c for c in compilations if not c.is_current()]
    with ThreadPoolExecutor(max_workers=max_jobs()) as pool:
        for output in pool.map(Compilation.run, outdated):
            print(output, end="", flush=True)


def run(command: tuple[str, ...]) -> str:
    """What a command printed; a BuildError with its first error line if it fails."""
    print(shlex.join(command), flush=True)
    try:
        done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    except OSError as error:
        raise BuildError(f"{command[0]} does not run: {error}") from error
    if done.returncode != 0:
        print(done.stdout, flush=True)
        lines = done.stdout.strip().splitlines() or [f"exit status {done.returncode}"]
        cause = next((line for line in lines if "error" in line.lower()), lines[-1]).strip()
        raise BuildError(f"{command[0]} failed: {cause}")
    return done.stdout


def find_cxx(configured: str | None) -> tuple[str, ...]:
    """The C++ compiler: $CXX, else the one Python was built with, else the usual names."""
    if named := shlex.split(os.environ.get("CXX", "")):
        return tuple(named)
    for candidate in (*shlex.split(configured or "")[:1], "g++", "c++", "clang++"):
        if shutil.which(candidate):
            return (candidate,)
    raise BuildError("no C++ compiler found: install g++ or clang++, or set CXX")


def find_nvcc() -> str | None:
    """The CUDA compiler: of $CUDA_HOME, else on the path, else of the usual place."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    candidates = [f"{home}/bin/nvcc" for home in homes if home]
    candidates += ["nvcc", "/usr/local/cuda/bin/nvcc"]
    return next((path for path in map(shutil.which, candidates) if path), None)


def cuda_sources(root: Path) -> list[Path]:
    """Every CUDA source of the repository."""
    return sorted((root / "csrc" / "cuda").glob("*.cu"))


def select_architectures(names: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The GPU architectures of a list in the format of TORCH_CUDA_ARCH_LIST: those that can be compiled for, and those
    that are too old.

    Raises:
        BuildError: an architecture of another form, or none that can be compiled for.
    """
    kept, too_old = {}, {}
    for name in names.replace(";", " ").split():
        for number in NAMED_ARCHITECTURES.get(name, name).split(";"):
            match = ARCHITECTURE.fullmatch(number)
            if match is None:
                raise BuildError(
                    f"TORCH_CUDA_ARCH_LIST: {name!r} is neither of the form 9.0, 9.0a or 9.0+PTX nor one of "
                    f"{', '.join(NAMED_ARCHITECTURES)}"
                )
            (kept if (int(match[1]), int(match[2])) >= OLDEST_ARCHITECTURE else too_old)[number] = None
    if not kept:
        raise BuildError(f"TORCH_CUDA_ARCH_LIST={names}: the CUDA kernels need an architecture from 8.0 on")
    return tuple(kept), tuple(too_old)


def gencode(architectures: Sequence[str]) -> tuple[str, ...]:
    """nvcc's flags for architectures such as ``9.0``, ``9.0a`` or ``10.0+PTX``."""
    flags = []
    for name in architectures:
        match = ARCHITECTURE.fullmatch(name)
        number = "".join(match.group(1, 2, 3))
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if match.group(4):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return tuple(flags)

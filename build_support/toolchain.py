"""Finds the compilers and lets ninja run them on what changed. For setup.py, scripts/ and the tests."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

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

RULES = """\
rule compile
  command = $compiler -MD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = $linker -shared $in $libraries -o $out"""


class BuildError(Exception):
    """A target cannot be built; the message is what the user is told."""


class Compilation(NamedTuple):
    """One source with the command that compiles it, up to the names of the files."""

    source: Path
    command: tuple[str, ...]
    object: Path


def max_jobs() -> int:
    """How many compilers may run at a time: $MAX_JOBS, else two."""
    text = os.environ.get("MAX_JOBS", "").strip() or "2"
    if not re.fullmatch(r"0*[1-9][0-9]*", text):
        raise BuildError(f"MAX_JOBS={text}: needs a whole number of at least 1")
    return int(text)


def run_ninja(
    folder: Path,
    compilations: Sequence[Compilation],
    library: Path | None = None,
    linker: Sequence[str] = (),
    libraries: Sequence[str] = (),
) -> None:
    """Compiles, and links to a shared library, what is not of these very commands or is older than what it was made
    from: one run of ninja on ``folder/build.ninja``, with its output as it comes.

    Raises:
        BuildError: a command fails; with its first error line.
    """
    lines = [RULES, f"builddir = {_path(folder)}"]
    for source, command, target in compilations:
        lines += [f"build {_path(target)}: compile {_path(source)}", f"  compiler = {_words(command)}"]
    if library:
        objects = " ".join(_path(compilation.object) for compilation in compilations)
        lines += [f"build {_path(library)}: link {objects}", f"  linker = {_words(linker)}"]
        lines += [f"  libraries = {_words(libraries)}"]
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "build.ninja"
    file.write_text("\n".join(lines) + "\n")
    command = (find_ninja(), "-f", str(file), "-j", str(max_jobs()))
    output = []
    with subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as ninja:
        for line in ninja.stdout:
            print(line, end="", flush=True)
            output.append(line.strip())
    if ninja.returncode != 0:
        raise BuildError(_failure(output))


def _words(command: Sequence[str]) -> str:
    """A command as the value of a variable of ninja's, which hands it to a shell."""
    return shlex.join(command).replace("$", "$$")


def _path(path: Path) -> str:
    return re.sub(r"([$ :])", r"$\1", str(path))


def _failure(output: list[str]) -> str:
    """The first command that failed, and the first line with an error of what it printed."""
    at = next((i for i, line in enumerate(output) if line.startswith("FAILED:")), None)
    if at is None:
        return f"ninja failed: {' '.join(output[-1:])}"
    command, *lines = output[at + 1 :]
    cause = next((line for line in lines if "error" in line.lower()), lines[0])
    return f"{shlex.split(command)[0]} failed: {cause}"


def find_ninja() -> str:
    """Ninja: of the wheel of that name, else on the path."""
    try:
        from ninja import BIN_DIR
    except ImportError:
        BIN_DIR = ""
    if found := shutil.which(os.path.join(BIN_DIR, "ninja")) or shutil.which("ninja"):
        return found
    raise BuildError("no ninja found: pip install ninja")


def find_cxx(configured: str | None) -> tuple[str, ...]:
    """The C++ compiler: $CXX, else the one Python was built with, else the usual names."""
    if named := shlex.split(os.environ.get("CXX", "")):
        return tuple(named)
    for candidate in (*shlex.split(configured or "")[:1], "g++", "c++", "clang++"):
        if shutil.which(candidate):
            return (candidate,)
    raise BuildError("no C++ compiler found: install g++ or clang++, or set CXX")


def torch_folder() -> Path:
    """Where PyTorch is, without seconds of importing it."""
    found = find_spec("torch")
    if found is None:
        raise BuildError("no torch at build time: install it and use --no-build-isolation")
    return Path(found.origin).parent


def python_includes() -> tuple[str, ...]:
    """What a module for this Python includes: Python, and pybind11 of its wheel, else PyTorch's copy."""
    try:
        from pybind11 import get_include
    except ImportError:
        pybind11 = str(torch_folder() / "include")
    else:
        pybind11 = get_include()
    return "-isystem", pybind11, "-isystem", sysconfig.get_path("include")


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

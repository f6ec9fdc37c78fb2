"""Builds the CUDA kernels for the CPU and runs the library's ops with them: logic, indices and barriers without a GPU.

What it cannot show: speed, the instructions in ptx.cuh, and memory ordering inside of a warp.
"""

from __future__ import annotations

import ctypes
import fcntl
import itertools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from unittest import mock

from msd_kernels.dispatch.backends import OpBackends
from msd_kernels.dispatch.layout_cache import LAYOUTS
from msd_kernels.runtime import cuda

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent
SOURCES = REPOSITORY / "csrc"

_device_numbers = itertools.count()

sys.path.append(str(REPOSITORY / "build_support"))


@dataclass(frozen=True)
class Device:
    """What an emulated device has; each one is new to the library, so that nothing is remembered of another."""

    multiprocessors: int = 4
    shared_per_block: int = 100 << 10
    clusters: bool = True
    order: int = 0  # of the threads: 0 forwards, 1 backwards, else random


def missing() -> str:
    """Why the kernels cannot be built here, or an empty string."""
    if not (SOURCES / "cuda").is_dir():
        return "the CUDA sources are not part of an install"
    from toolchain import BuildError, find_cxx, find_ninja

    try:
        find_cxx(None), find_ninja()
    except BuildError as error:
        return str(error)
    return ""


class Emulator:
    """The library of emulated kernels."""

    def __init__(self, library: Path) -> None:
        spec = spec_from_file_location(f"{__name__}._cuda", library)
        self.kernels = module_from_spec(spec)
        spec.loader.exec_module(self.kernels)
        self._library = ctypes.CDLL(str(library))

    def use(self, device: Device) -> None:
        self._library.emulator_configure(
            next(_device_numbers),
            device.multiprocessors,
            device.shared_per_block,
            device.clusters,
            device.order,
        )

    def launches(self) -> tuple[int, int]:
        """Without and with clusters, since the last :meth:`use`."""
        return self._library.emulator_launches(0), self._library.emulator_launches(1)

    def fault(self, name: str) -> str:
        """What the emulator says of a kernel that is wrong on purpose (faults.cpp)."""
        function = self._library.emulator_fault
        function.restype = ctypes.c_char_p
        return function(name.encode()).decode()


def build(folder: Path) -> Path:
    """Compiles what has changed since the last time; returns the library. Other processes wait meanwhile."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _build(folder)


def _build(folder: Path) -> Path:
    from toolchain import Compilation, find_cxx, python_includes, run_ninja

    # Addresses that a GPU would refuse.
    checks = ("-fsanitize=alignment", "-fno-sanitize-recover=all")
    compiler = find_cxx(None)
    cxx = (*compiler, "-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", f"-I{HERE}")
    cxx = (*cxx, "-include", str(HERE / "ptx.cuh"), "-Wno-unknown-pragmas")
    sources = [path for pattern in ("*.cu", "*.cpp") for path in sorted((SOURCES / "cuda").glob(pattern))]
    commands = dict.fromkeys(sources, (*cxx, *checks, "-x", "c++"))
    commands |= {HERE / name: (*cxx, *checks) for name in ("emulator.cpp", "faults.cpp")}
    commands[SOURCES / "cuda_ops.cpp"] = (*cxx, *python_includes(), '-DMSD_CUDA_ARCHITECTURES=""')
    compilations = [
        Compilation(path, command, folder / f"{path.name}.o") for path, command in commands.items()
    ]
    library = folder / "libcuda_emulator.so"
    run_ninja(folder, compilations, library, (*compiler, *checks))
    return library


@contextmanager
def served_by(emulator: Emulator, backends: OpBackends) -> Iterator[None]:
    """Lets the candidate ``cuda`` of an op serve CPU tensors with the emulated kernels, whether or not the extension
    was built.
    """
    before = backends.candidates
    backends.candidates = [
        replace(c, devices=("cpu",), cannot=lambda call: None) if c.name == "cuda" else c for c in before
    ]
    LAYOUTS.clear()
    replaced = mock.patch.object
    try:
        # There are no streams.
        with (
            replaced(cuda, "kernels", lambda: emulator.kernels),
            replaced(cuda, "run", lambda launch, on: launch(0, 0)),
        ):
            yield
    finally:
        backends.candidates = before
        LAYOUTS.clear()

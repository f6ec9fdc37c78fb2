"""Builds the extensions; everything else about the package is in pyproject.toml.

What cannot be built is left out with a warning, and ``msd_kernels/_build_report.json`` says why.
Environment: CXX, CXXFLAGS, LDFLAGS, MAX_JOBS, CUDA_HOME, TORCH_CUDA_ARCH_LIST and
MSD_KERNELS_CUDA: 0 (no CUDA kernels), 1 (fail without them) or auto (where there is a compiler).
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import sys
import sysconfig
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "build_support"))

from toolchain import (  # noqa: E402
    BuildError,
    Compilation,
    find_cxx,
    find_nvcc,
    gencode,
    python_includes,
    run_ninja,
    select_architectures,
    torch_folder,
)

PACKAGE = "msd_kernels"
REPORT = "_build_report.json"
TARGETS = {f"{PACKAGE}._cuda": "cuda", f"{PACKAGE}._native": "cpu"}

CXX_FLAGS = ("-std=c++17", "-O3", "-DNDEBUG", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra")
CUDA_FLAGS = (
    "-std=c++17",
    "-O3",
    "-DNDEBUG",
    "-lineinfo",
    "-Xfatbin=-compress-all",
    "-Xcompiler=-fPIC,-fvisibility=hidden",
)
CUDA_ARCHITECTURES = "8.0;9.0a;10.0+PTX"
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"

# For the sources named *_<set>.cpp. GCC takes the undefined operands of its own AVX-512 intrinsics
# for uninitialised variables.
AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = (
    *AVX2,
    "-mavx512f",
    "-mavx512bw",
    "-mavx512dq",
    "-mavx512vl",
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
)
X86_ISAS = {"avx512bf16": (*AVX512, "-mavx512bf16"), "avx512": AVX512, "avx2": AVX2}


def cpu_isas() -> dict[str, tuple[str, ...]]:
    """The instruction sets to compile for, best first, with their compiler flags."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return {**(X86_ISAS if x86 else {}), "portable": ()}


def cuda_architectures() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The GPU architectures to compile for, and those asked for that are too old."""
    return select_architectures(os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip() or CUDA_ARCHITECTURES)


def define(**facts: str) -> tuple[str, ...]:
    return tuple(f'-D{macro}="{value}"' for macro, value in facts.items())


class BuildKernels(build_ext):
    """Builds every target that this machine can build and reports on the others."""

    def run(self):
        self.report, self.notes = {}, {}
        self.source_package = None
        if self.inplace:
            self.source_package = Path(self.get_finalized_command("build_py").get_package_dir(PACKAGE))
        super().run()
        report = Path(self.build_lib, PACKAGE, REPORT)
        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_text(json.dumps(self.report, indent=2) + "\n")
        if self.source_package:
            shutil.copy(report, self.source_package)

    def build_extensions(self):
        built = []
        for extension in self.extensions:
            target = TARGETS[extension.name]
            try:
                getattr(self, f"build_{target}")(extension)
            except BuildError as error:
                self.leave_out(extension, target, str(error))
            else:
                self.report[target] = {"built": True, "reason": "", **self.notes.pop(target, {})}
                built.append(extension)
        self.extensions = built

    def leave_out(self, extension: Extension, target: str, reason: str):
        if target == "cuda" and os.environ.get("MSD_KERNELS_CUDA") == "1":
            raise SystemExit(f"MSD_KERNELS_CUDA=1, but the CUDA kernels cannot be built: {reason}")
        self.report[target] = {"built": False, "reason": reason}
        warning = f"WARNING: {PACKAGE} is built without its {target} extension: {reason}"
        print(warning, file=sys.stderr, flush=True)
        library = Path(self.get_ext_fullpath(extension.name))
        library.unlink(missing_ok=True)
        if self.source_package:
            (self.source_package / library.name).unlink(missing_ok=True)

    def build_cuda(self, extension: Extension):
        choice = os.environ.get("MSD_KERNELS_CUDA", "auto")
        if choice not in ("0", "1", "auto"):
            raise SystemExit(f"MSD_KERNELS_CUDA={choice} is none of 0, 1, auto")
        if choice == "0":
            raise BuildError("MSD_KERNELS_CUDA=0")
        nvcc = find_nvcc()
        if nvcc is None:
            raise BuildError("no nvcc found: install the CUDA toolkit or set CUDA_HOME")
        architectures, too_old = cuda_architectures()
        if too_old:
            note = f"left out the architectures {' '.join(too_old)} of TORCH_CUDA_ARCH_LIST: the kernels need 8.0"
            self.notes["cuda"] = {"note": note}
            print(f"WARNING: {PACKAGE}'s cuda extension: {note}", file=sys.stderr, flush=True)
        device_command = (nvcc, *CUDA_FLAGS, *gencode(architectures))
        host_command = (*self.cxx(), *self.cxx_flags(), *python_includes())
        facts = define(MSD_CUDA_ARCHITECTURES=" ".join(architectures))

        def command_for(source: str) -> tuple[str, ...]:
            if source.endswith(".cu"):
                return device_command
            return (*host_command, *(facts if source.endswith("cuda_ops.cpp") else ()))

        self.build(extension, command_for, (nvcc,))

    def build_cpu(self, extension: Extension):
        """PyTorch gives the threads, by the part of its stable ABI that is C."""
        torch = torch_folder()
        includes = (*python_includes(), "-isystem", str(torch / "include"))
        command = (*self.cxx(), *self.cxx_flags(), *includes, STABLE_ABI)
        isas = cpu_isas()
        facts = define(
            MSD_FLAGS=" ".join(self.cxx_flags()),
            MSD_CPU_ISAS=" ".join(isas),
            MSD_TORCH_VERSION=metadata.version("torch"),
        )

        def command_for(source: str) -> tuple[str, ...]:
            stem = Path(source).stem
            return (*command, *(facts if stem == "ops" else isas.get(stem.rpartition("_")[2], ())))

        self.build(extension, command_for, self.cxx(), (f"-L{torch / 'lib'}", "-ltorch_cpu"))

    def cxx(self) -> tuple[str, ...]:
        return find_cxx(sysconfig.get_config_var("CXX"))

    def cxx_flags(self) -> tuple[str, ...]:
        return (*CXX_FLAGS, *shlex.split(os.environ.get("CXXFLAGS", "")))

    def build(
        self, extension: Extension, command_for: Callable[[str], tuple[str, ...]], linker, libraries=()
    ):
        """Compiles each source by ``command_for(source)`` and links them, where needed."""
        folder = Path(
            "build", "objects", f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}", extension.name
        )
        compilations = [
            Compilation(Path(source), command_for(source), folder / f"{Path(source).name}.o")
            for source in extension.sources
        ]
        library = Path(self.get_ext_fullpath(extension.name))
        flags = shlex.split(os.environ.get("LDFLAGS", ""))
        run_ninja(folder, compilations, library, linker, (*libraries, *flags))


def extension(name: str, *patterns: str) -> Extension:
    """A target of the sources under csrc/ that match."""
    csrc = ROOT / "csrc"
    sources = sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in csrc.glob(pattern))
    shared = [ROOT / "build_support" / "toolchain.py", *csrc.rglob("*.h"), *csrc.rglob("*.cuh")]
    depends = sorted(str(path.relative_to(ROOT)) for path in shared)
    return Extension(f"{PACKAGE}.{name}", sources, depends=depends, optional=True)


setup(
    ext_modules=[
        extension("_cuda", "cuda_ops.cpp", "cuda/*.cpp", "cuda/*.cu"),
        extension("_native", "ops.cpp", "cpu/*.cpp"),
    ],
    cmdclass={"build_ext": BuildKernels},
)

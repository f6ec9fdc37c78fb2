"""Builds the CPU kernels with AddressSanitizer and UndefinedBehaviorSanitizer and runs the ops' tests on them.

The package is copied to ``build/sanitize`` and built there, so that the ordinary build stays as it is. The exit status
is 0 only if the tests pass and neither sanitizer finds anything; what they find is shown. Needs GCC with the libraries
of its sanitizers; where they are missing, it says so and does nothing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COPY = ROOT / "build" / "sanitize"
sys.path.insert(0, str(ROOT / "build_support"))

from toolchain import BuildError, find_cxx  # noqa: E402

FILES = ("setup.py", "pyproject.toml", "README.md", "LICENSE")
SOURCES = (*FILES, "build_support", "csrc", "msd_kernels", "python", "tests")
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=all"
# After -O3, which is setup.py's: -O1 keeps the accesses that a report names apart.
CXXFLAGS = f"-O1 -g1 -fno-omit-frame-pointer {FLAGS}"
# Python does not load the C++ library, whose exceptions AddressSanitizer wants to watch from the start.
PRELOADED = ("libasan.so", "libubsan.so", "libstdc++.so.6")
TESTS = ("-m", "not slow and not full", "-k", "cpu or test_arguments", "tests/ops")


def main() -> int:
    try:
        cxx = find_cxx(None)
    except BuildError as error:
        print(f"nothing to do: {error}")
        return 0
    libraries = [find_library(cxx, name) for name in PRELOADED]
    if missing := [name for name, path in zip(PRELOADED, libraries, strict=True) if path is None]:
        print(f"nothing to do: {cxx[0]} has no {', '.join(missing)}")
        return 0
    copy_sources()
    build = {**os.environ, "CXXFLAGS": CXXFLAGS, "LDFLAGS": FLAGS, "MSD_KERNELS_CUDA": "0"}
    subprocess.run([sys.executable, "setup.py", "build_ext", "--inplace"], cwd=COPY, env=build, check=True)
    if not list((COPY / "msd_kernels").glob("_native*.so")):
        print("the CPU kernels were not built: the tests would skip them")
        return 1
    return run_tests([str(path) for path in libraries])


def find_library(cxx: tuple[str, ...], name: str) -> Path | None:
    """The compiler's own library of that name; it prints the bare name where it has none."""
    path = Path(subprocess.check_output([*cxx, f"-print-file-name={name}"], text=True).strip())
    return path if path.is_absolute() else None


def copy_sources() -> None:
    """Copies what the build and the tests need. Times stay, so that only what has changed is compiled again."""
    for name in SOURCES:
        source, target = ROOT / name, COPY / name
        if source.is_dir():
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            COPY.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)


def run_tests(libraries: list[str]) -> int:
    """Their exit status. A finding ends its process, and with it a test, after a report on the standard error."""
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(libraries),
        # The interpreter frees little at its end; PyTorch asks for more memory than there is and copes.
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": f"{COPY}{os.pathsep}{COPY / 'python'}",
        "OMP_NUM_THREADS": "2",
    }
    parallel = ("-n", str(min(2, os.cpu_count() or 1)))
    # Pytest must leave the standard error alone, or the reports would be lost with the process.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--capture=sys", "--maxfail=3"]
    return subprocess.run([*command, *parallel, *TESTS], cwd=COPY, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())

"""Compiles every CUDA source for the supported architectures, without a GPU, and shows what each kernel uses.

Exit status 1 if a source fails to compile, warns, or a kernel spills registers or indexes an array in local memory; 0
with a plain message where there is nothing to compile or no compiler. Shared memory is what a kernel declares: more is
asked for at its launch.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "cuda-check"
sys.path.insert(0, str(ROOT / "build_support"))

from toolchain import BuildError, Compilation, cuda_sources, find_nvcc, gencode, run_ninja  # noqa: E402

ARCHITECTURES = ("8.0", "9.0a", "10.0")
FLAGS = ("-std=c++17", "-O3", "-Xptxas=-v", "-Werror=all-warnings")
# Runs a command whose output goes to the file named first, and is shown if it fails.
LOGGED = ("sh", "-c", '"$@" > "$0" 2>&1 || { cat "$0"; exit 1; }')


@dataclass(frozen=True)
class Kernel:
    """What ptxas reports of one kernel on one architecture; sizes in bytes."""

    source: str
    architecture: str
    name: str
    registers: int
    spills: int
    stack: int
    shared: int

    def row(self) -> tuple[str, ...]:
        return (
            self.source,
            f"sm_{self.architecture}",
            self.name,
            *map(str, (self.registers, self.spills, self.stack, self.shared)),
        )


def parse_ptxas(source: str, output: str) -> list[Kernel]:
    """The kernels in the output of ``-Xptxas=-v``."""
    kernels = []
    blocks = re.split(r"Compiling entry function ", output)[1:]
    for block in blocks:
        name, architecture = re.match(r"'([^']+)' for 'sm_(\w+)'", block).groups()
        spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", block)
        kernels.append(
            Kernel(
                source,
                architecture,
                demangle(name),
                _number(r"Used (\d+) registers", block),
                sum(map(int, spilled.groups())) if spilled else 0,
                _number(r"(\d+) bytes stack frame", block),
                _number(r"(\d+) bytes smem", block),
            )
        )
    return kernels


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found.group(1)) if found else 0


def demangle(name: str) -> str:
    try:
        done = subprocess.run(("c++filt", name), text=True, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return name
    plain = done.stdout.strip().replace("(anonymous namespace)::", "").replace("msd::cuda::", "")
    return re.sub(r"\(.*", "", plain).removeprefix("void ")


def compile_sources(nvcc: str, sources: Sequence[Path]) -> list[Kernel]:
    """The kernels of all sources for all architectures; only what has changed since the last time is compiled."""
    compilations = [
        Compilation(source, (*LOGGED, f"{target}.log", nvcc, *FLAGS, *gencode([number])), target)
        for source in sources
        for number in ARCHITECTURES
        for target in [FOLDER / f"{source.stem}-{number}.o"]
    ]
    run_ninja(FOLDER, compilations)
    return [k for c in compilations for k in parse_ptxas(c.source.name, Path(f"{c.object}.log").read_text())]


def print_table(kernels: list[Kernel]):
    rows = [
        ("source", "arch", "kernel", "registers", "spill bytes", "stack bytes", "shared bytes"),
        *(k.row() for k in kernels),
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def main(arguments: Sequence[str] | None = None) -> int:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args(arguments)
    sources = cuda_sources(ROOT)
    if not sources:
        print("no CUDA sources")
        return 0
    nvcc = find_nvcc()
    if nvcc is None:
        print("no nvcc found: CUDA sources not compiled")
        return 0
    try:
        kernels = compile_sources(nvcc, sources)
    except BuildError as error:
        print(error)
        return 1
    print_table(kernels)
    failures = [
        f"{k.source} for sm_{k.architecture}: {k.name} spills {k.spills} bytes, keeps {k.stack} bytes on the stack"
        for k in kernels
        if k.spills or k.stack
    ]
    print(*failures, sep="\n", end="\n" if failures else "")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

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
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "csrc"))

from toolchain import BuildError, cuda_sources, find_nvcc, gencode, max_jobs, run  # noqa: E402

ARCHITECTURES = ("8.0", "9.0a", "10.0")
FLAGS = ("-std=c++17", "-O3", "-Xptxas=-v", "-Werror=all-warnings")


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


def compile_source(nvcc: str, source: Path, architecture: str, folder: Path) -> list[Kernel]:
    target = folder / f"{source.stem}-{architecture}.o"
    output = run((nvcc, *FLAGS, *gencode([architecture]), "-c", str(source), "-o", str(target)))
    return parse_ptxas(source.name, output)


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
    try:
        jobs_at_a_time = max_jobs()
    except BuildError as error:
        print(error)
        return 1
    sources = cuda_sources(ROOT)
    if not sources:
        print("no CUDA sources")
        return 0
    nvcc = find_nvcc()
    if nvcc is None:
        print("no nvcc found: CUDA sources not compiled")
        return 0
    kernels, failures = [], []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(max_workers=jobs_at_a_time) as pool:
        jobs = {
            (source.name, architecture): pool.submit(compile_source, nvcc, source, architecture, Path(folder))
            for source in sources
            for architecture in ARCHITECTURES
        }
        for (source, architecture), job in jobs.items():
            try:
                kernels += job.result()
            except BuildError as error:
                failures.append(f"{source} for {architecture}: {error}")
    print_table(kernels)
    failures += [
        f"{k.source} for sm_{k.architecture}: {k.name} spills {k.spills} bytes, keeps {k.stack} bytes on the stack"
        for k in kernels
        if k.spills or k.stack
    ]
    print(*failures, sep="\n", end="\n" if failures else "")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

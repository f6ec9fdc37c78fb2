"""Compiles every Triton kernel of the package for given GPUs, with no GPU present, and reports what came out.

    python -m msd_kernels.aot --arch 80 --arch 90 --arch 100

prints one line per kernel, configuration of the committed launch tables and architecture: registers per thread, bytes
spilled, shared memory, the tensor-core instruction of the innermost loops, how many instructions are issued per cycle
that the tensor cores need (they wait from 1 on), and which part of the bytes that the loops load comes in 16-byte
loads. Exit status 1 if a kernel does not compile, spills, takes more shared memory than there is, or multiplies without
tensor cores where it must use them; 2 for bad arguments.
"""

from __future__ import annotations

import argparse
import os
import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from pkgutil import walk_packages

from msd_kernels import ops, runtime
from msd_kernels.runtime import launch, tuned
from msd_kernels.runtime.compilation import OPTIONS, Compilation
from msd_kernels.tools import machine_code

SUFFIX = "kernels"
WARP_SIZE = 32
# Bytes of shared memory that a program may have. The table of sm_80 serves the smaller GPUs of 99 KiB too.
SHARED_LIMITS = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
TENSOR_CORES = {"wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma", "mma": "mma.sync"}
WORK = re.compile(r"\bld\.global|\bcp\.async\.c[ag]|\bmma\.sync|\bmma_async|\btcgen05\.mma")


@dataclass(frozen=True)
class Report:
    """What became of one :class:`Compilation`.

    Attributes:
        kernel, configuration, architecture: which.
        registers: per thread.
        spilled: bytes of local memory per thread.
        shared: bytes of shared memory per program.
        multiplies: tensor-core instruction in the innermost loops: ``wgmma``, ``tcgen05``, ``mma``, or ``-``.
        issue: issue slots per cycle of the tensor cores in the loop that multiplies most, where known, else 0.
        loaded: bytes loaded from global memory by the instructions of the innermost loops, per thread and pass.
        loaded_wide: those of them in loads of 16 bytes.
        error: why it did not compile, or what is wrong with the result; empty if all is well.
    """

    kernel: str
    configuration: str
    architecture: int
    registers: int = 0
    spilled: int = 0
    shared: int = 0
    multiplies: str = "-"
    issue: float = 0.0
    loaded: int = 0
    loaded_wide: int = 0
    error: str = ""


def kernel_modules() -> list[str]:
    """The modules of the package that hold Triton kernels."""
    modules = (
        m for package in (ops, runtime) for m in walk_packages(package.__path__, f"{package.__name__}.")
    )
    return sorted(module.name for module in modules if module.name.endswith(SUFFIX))


def compilations(module: str, architecture: int) -> list[Compilation]:
    """What a module wants compiled for an architecture."""
    return list(import_module(module).compilations(architecture))


def compile_all(architectures: Sequence[int], only: str = "", workers: int | None = None) -> Iterator[Report]:
    """Compiles in parallel processes; ``only`` picks the kernels whose module or name contains it."""
    tasks = [
        (module, architecture, index)
        for architecture in architectures
        for module in kernel_modules()
        for index, compilation in enumerate(compilations(module, architecture))
        if only in f"{module}.{compilation.kernel.__name__}"
    ]
    with ProcessPoolExecutor(workers or os.cpu_count()) as pool:
        yield from pool.map(_compile_task, *zip(*tasks, strict=True)) if tasks else ()


def _compile_task(module: str, architecture: int, index: int) -> Report:
    return compile_one(compilations(module, architecture)[index], architecture)


def compile_one(compilation: Compilation, architecture: int) -> Report:
    """Compiles one kernel and reads its machine code."""
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    name, configuration = compilation.kernel.__name__, compilation.configuration
    source = ASTSource(
        compilation.kernel, compilation.signature(), compilation.constexprs(), compilation.attributes()
    )
    try:
        compiled = compile(
            source,
            target=GPUTarget("cuda", architecture, WARP_SIZE),
            options=OPTIONS | dict(compilation.options),
        )
    except (
        Exception
    ) as error:  # the compiler raises whatever its passes raise; each is a finding of this report
        return Report(
            name, configuration, architecture, error=f"{type(error).__name__}: {error}".splitlines()[0]
        )
    loops = innermost_loops(compiled.asm["ptx"])
    registers, spilled = _resources(compiled.asm["cubin"])
    loaded, loaded_wide = _loads(loops)
    multiplies = sorted(
        {n for n, text in TENSOR_CORES.items() for loop in loops if any(text in i for i in loop)}
    )
    wrong = [f"spills {spilled} bytes"] if spilled else []
    if compilation.tensor_cores and not multiplies:
        wrong.append("multiplies without tensor cores")
    if compiled.metadata.shared > SHARED_LIMITS.get(architecture, SHARED_LIMITS[80]):
        wrong.append("takes too much shared memory")
    return Report(
        name,
        configuration,
        architecture,
        registers,
        spilled,
        compiled.metadata.shared,
        "+".join(multiplies) or "-",
        machine_code.issue_share(compiled.asm["cubin"], architecture) if multiplies else 0.0,
        loaded,
        loaded_wide,
        ", ".join(wrong),
    )


def innermost_loops(ptx: str) -> list[list[str]]:
    """The instructions between each backward branch and its label, for the innermost loops that load or multiply.

    Loops that only wait for a barrier do not count.
    """
    lines = [line.strip() for line in ptx.splitlines()]
    labels = {match[1]: i for i, line in enumerate(lines) if (match := re.match(r"(\$\w+):", line))}
    last_branch = {}
    for end, line in enumerate(lines):
        branch = re.search(r"\bbra(?:\.uni)?\s+(\$\w+);", line)
        if branch and labels.get(branch[1], end) < end:
            last_branch[labels[branch[1]]] = end
    spans = [s for s in last_branch.items() if any(WORK.search(line) for line in lines[s[0] : s[1]])]
    return [lines[start : end + 1] for start, end in machine_code.innermost(spans)]


def _loads(loops: list[list[str]]) -> tuple[int, int]:
    """Bytes per thread that the loops' load instructions fetch from global memory: all, and in pieces of 16."""
    sizes = []
    for line in (line for loop in loops for line in loop):
        if copy := re.search(
            r"cp\.async\.c[ag]\.shared\.global\b.*?\],\s*\[.*?\],\s*(0x[0-9a-f]+|\d+)", line
        ):
            sizes.append(int(copy[1], 0))
        elif load := re.search(r"\bld\.global\S*?(?:\.v(\d))?\.[bsuf](\d+)\s", line):
            sizes.append(int(load[1] or 1) * int(load[2]) // 8)
    return sum(sizes), sum(size for size in sizes if size >= 16)


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers per thread and bytes of local memory (stack and spills)."""
    text = machine_code.run_on(cubin, "cuobjdump", "--dump-resource-usage")
    usage = [
        {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)} for line in text.splitlines()
    ]
    found = next(u for u in usage if "REG" in u)
    return found["REG"], found.get("STACK", 0) + found.get("LOCAL", 0)


def format_table(reports: Sequence[Report]) -> str:
    """One aligned line per report."""
    header = (
        "kernel",
        "configuration",
        "arch",
        "registers",
        "spilled",
        "shared",
        "multiplies",
        "issue",
        "16-byte loads",
        "",
    )
    rows = [header]
    for r in reports:
        share = f"{r.loaded_wide}/{r.loaded}" if r.loaded else "-"
        cells = (
            r.kernel,
            r.configuration,
            f"sm_{r.architecture}",
            r.registers,
            r.spilled,
            r.shared,
            r.multiplies,
            f"{r.issue:.2f}" if r.issue else "-",
            share,
        )
        rows.append((*map(str, cells), r.error or "ok"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m msd_kernels.aot", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--arch",
        type=int,
        action="append",
        help="compute capability without its point; default: all with a table",
    )
    parser.add_argument("--only", default="", help="only kernels whose module or name contains this")
    parser.add_argument("--workers", type=int, help="parallel compilations; default: one per core")
    options = parser.parse_args(arguments)
    if options.workers is not None and options.workers < 1:
        parser.error(f"--workers {options.workers}: must be at least 1")
    if reason := launch.unavailable():
        parser.exit(1, f"aot: {reason}\n")
    if launch.interpreted():
        parser.exit(1, "aot: TRITON_INTERPRET is set, and the interpreter compiles nothing\n")
    started = time.perf_counter()
    reports = list(compile_all(options.arch or tuned.architectures(), options.only, options.workers))
    if not reports:
        parser.error(f"--only {options.only}: no kernel's module or name contains it")
    print(format_table(reports))
    failed = sum(bool(r.error) for r in reports)
    print(f"{len(reports)} compiled, {failed} not well, {time.perf_counter() - started:.0f} s")
    return 1 if failed else 0

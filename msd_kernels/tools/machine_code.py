"""What the machine code of a kernel says about its speed, read without running it.

A loop that feeds tensor cores also computes addresses and masks. Each of a multiprocessor's four schedulers issues one
instruction a cycle, so a loop of more instructions than its products take cycles keeps the tensor cores waiting.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

# Cycles that one instruction keeps the tensor core of a scheduler busy, dense operands: ``wgmma`` of N columns half as
# many as it has columns (H100: 1024 multiply-adds a cycle and multiprocessor for tf32, 2048 for 16 bits), an ``mma`` of
# sm_80 eight (A100: 512 and 1024).
WGMMA = re.compile(r"\bHGMMA\.64x(\d+)x\d+\.")
MMA = re.compile(r"\bHMMA\.(16816|1688)\.")
MMA_CYCLES = {80: 8}
ARCHITECTURES = (80, 90)


def tool(name: str) -> Path:
    """One of the programs for machine code that Triton brings."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def run_on(cubin: bytes, name: str, *options: str) -> str:
    """What a tool prints about a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool(name), *options, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def issue_share(cubin: bytes, architecture: int) -> float:
    """Issue slots per cycle of the tensor cores in the loop that multiplies most, or 0 where that is not known."""
    if architecture not in ARCHITECTURES:
        return 0.0
    loops = innermost_loops(run_on(cubin, "nvdisasm", "--print-code"))
    cycles = [sum(tensor_cycles(line, architecture) for line in loop) for loop in loops]
    if not any(cycles):
        return 0.0
    most = cycles.index(max(cycles))
    return len(loops[most]) / cycles[most]


def tensor_cycles(instruction: str, architecture: int) -> float:
    """How long an instruction keeps a tensor core busy."""
    if found := WGMMA.search(instruction):
        return int(found[1]) / 2
    if MMA.search(instruction):
        return MMA_CYCLES.get(architecture, 0)
    return 0.0


def innermost_loops(disassembly: str) -> list[Sequence[str]]:
    """The instructions of each loop that multiplies on tensor cores and holds no other such loop."""
    instructions, labels = _parse(disassembly)
    spans = {}
    for end, line in enumerate(instructions):
        if found := re.search(r"\bBRA\b.*?(\.L_x_\d+)", line):
            start = labels.get(found[1], end + 1)
            if start <= end:
                spans[start] = end
    working = [s for s in spans.items() if any("MMA" in line for line in instructions[s[0] : s[1] + 1])]
    return [instructions[start : end + 1] for start, end in innermost(working)]


def innermost(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The spans, first and last line, that hold no other one."""
    return [s for s in spans if not any(s != t and s[0] <= t[0] and t[1] <= s[1] for t in spans)]


def _parse(disassembly: str) -> tuple[list[str], dict[str, int]]:
    """The instructions in order, and the number of the one behind each label."""
    instructions, labels = [], {}
    for line in _without_comments(disassembly):
        if line.endswith(":"):
            labels[line[:-1]] = len(instructions)
        elif line.endswith(";"):
            instructions.append(line)
    return instructions, labels


def _without_comments(disassembly: str) -> Iterator[str]:
    for line in disassembly.splitlines():
        yield re.sub(r"/\*.*?\*/", "", line).strip()

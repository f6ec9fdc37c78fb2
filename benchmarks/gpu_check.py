"""Builds, tests and measures on this machine's GPU in under nine minutes: ``make gpu-check``.

Uses the interpreter it is started with, installs nothing and needs no network. Every part runs in a process of its own
within its share of the time; what fails, is stopped or does not fit is listed. Writes
``benchmarks/results/gpu-<name of the GPU>.json`` and prints a short table last. Without a GPU it says so and ends.
Exit status 1 if the build or a test fails, or compute-sanitizer finds an error.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT), str(ROOT / "python")]

import torch  # noqa: E402
from sanitize_cuda import FOUND  # noqa: E402

import harness  # noqa: E402

TOTAL_SECONDS = 520.0
# The most that a part may take; what one leaves over is there for the next.
BUILD_SECONDS, TEST_SECONDS, SANITIZER_SECONDS = 200.0, 140.0, 45.0
BENCHMARK_SECONDS = {
    "group_norm": 110.0,
    "grouped_conv2d": 80.0,
    "attention": 50.0,
    "grouped_linear": 30.0,
    "resample2d": 35.0,
}
# The folders that need no package beyond PyTorch, Triton, NumPy and pytest.
GPU_TESTS = ("-m", "gpu", "tests/ops", "tests/gpu")
LOG_LINES = 30


@dataclass
class Part:
    """What became of one part."""

    name: str
    status: str  # "passed", "failed", "stopped" or "not run"
    seconds: float = 0.0
    detail: str = ""


class Clock:
    def __init__(self, seconds: float) -> None:
        self._deadline = time.monotonic() + seconds

    def left(self) -> float:
        return self._deadline - time.monotonic()


def run_part(name: str, command: Sequence[str], limit: float, clock: Clock, **environment: str) -> Part:
    """Runs a command within a limit, and within what is left of all time; shows the end of its output if it fails."""
    limit = min(limit, clock.left())
    if limit < 10:
        return Part(name, "not run", detail="no time was left")
    print(f"{name}: at most {limit:.0f} s", flush=True)
    paths = [str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]
    start = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=limit)
        status = "failed" if process.returncode else "passed"
        detail = f"exit status {process.returncode}" if process.returncode else ""
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # a compiler's children, too
        output, _ = process.communicate()
        status, detail = "stopped", f"after {limit:.0f} s"
    if status != "passed":
        print("\n".join(f"  | {line}" for line in output.splitlines()[-LOG_LINES:]), flush=True)
    return Part(name, status, time.monotonic() - start, detail)


def build(clock: Clock) -> Part:
    """Compiles the extension in place, for this GPU alone unless TORCH_CUDA_ARCH_LIST says otherwise."""
    major, minor = torch.cuda.get_device_capability()
    architecture = f"{major}.{minor}" + ("a" if major >= 9 else "")
    part = run_part(
        "build",
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        BUILD_SECONDS,
        clock,
        MSD_KERNELS_CUDA="auto",
        TORCH_CUDA_ARCH_LIST=os.environ.get("TORCH_CUDA_ARCH_LIST", architecture),
    )
    report = ROOT / "msd_kernels" / "_build_report.json"
    if part.status == "passed" and report.is_file():
        targets = json.loads(report.read_text())
        part.detail = "; ".join(
            f"{name} built" if target["built"] else f"{name} left out: {target['reason']}"
            for name, target in targets.items()
        )
    return part


def test(clock: Clock, folder: Path) -> Part:
    """The tests that are marked ``gpu``."""
    report = folder / "tests.xml"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "gpu",
        "-q",
        "-p",
        "no:cacheprovider",
        f"--junitxml={report}",
    ]
    part = run_part("tests", command, TEST_SECONDS, clock)
    if report.is_file():
        part.detail = test_counts(report)
    return part


def test_counts(report: Path) -> str:
    suites = list(ElementTree.parse(report).getroot().iter("testsuite"))
    total, failures, errors, skipped = (
        sum(int(suite.get(name, 0)) for suite in suites)
        for name in ("tests", "failures", "errors", "skipped")
    )
    return f"{total - failures - errors - skipped} passed, {failures + errors} failed, {skipped} skipped"


def sanitize(tool: str, clock: Clock) -> Part:
    """The compiled CUDA kernels under compute-sanitizer, where it is installed and knows the device."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        return Part(tool, "not run", detail="there is no compute-sanitizer")
    script = ROOT / "benchmarks" / "sanitize_cuda.py"
    command = [program, "--tool", tool, "--error-exitcode", str(FOUND), sys.executable, str(script)]
    part = run_part(tool, command, SANITIZER_SECONDS, clock, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    if part.status == "failed" and part.detail != f"exit status {FOUND}":
        part.status, part.detail = "not run", f"compute-sanitizer cannot work here: {part.detail}"
    return part


def benchmark(name: str, clock: Clock, folder: Path) -> tuple[Part, list[dict]]:
    """One benchmark's part and results; it stops itself a little before it would be stopped."""
    out = folder / f"{name}.jsonl"
    limit = min(BENCHMARK_SECONDS[name], clock.left())
    races = [sys.executable, str(ROOT / "benchmarks" / "gpu_races.py"), name]
    part = run_part(name, [*races, "--seconds", f"{limit * 0.7:.0f}", "--out", str(out)], limit, clock)
    results = [json.loads(line) for line in out.read_text().splitlines()] if out.is_file() else []
    missing = [result["not_run"] for result in results if "not_run" in result]
    wrong = [f"{result['failed']} failed: {result['error']}" for result in results if "failed" in result]
    part.detail = "; ".join(
        [*filter(None, [part.detail]), *wrong, *(f"not run: {label}" for label in missing)]
    )
    if wrong:
        part.status = "failed"
    return part, results


def summary(parts: Sequence[Part], results: Sequence[dict]) -> str:
    """The tables that are printed last."""
    rows = [
        (result["benchmark"], result["case"], result["backend"] or "", result["l2"],
         f"{result['seconds']['ours'][0] * 1e6:.1f}", f"{result['share_of_floor']:.2f}",
         "  ".join(f"{peer} {ratio[0]:.2f}x" for peer, ratio in result["ratio"].items()))
        for result in results
        if "case" in result and result["l2"] == "cold"
    ]  # fmt: skip
    header = ("benchmark", "case", "backend", "L2", "ours us", "floor / ours", "peer / ours")
    lines = [harness.table(rows, header)] if rows else []
    for measured in (result for result in results if "copy_bytes_per_second" in result):
        lines.append(
            f"{measured['benchmark']}: copy {measured['copy_bytes_per_second'] / 1e12:.2f} TB/s, bf16 matrix product "
            f"{measured['matmul_operations_per_second'] / 1e12:.0f} TFLOP/s"
        )
    state = [(part.name, part.status, f"{part.seconds:.0f}", part.detail) for part in parts]
    width = max(len(name) for name, *_ in state)
    lines += [
        f"{name:{width}}  {status:7}  {seconds:>4} s  {detail}" for name, status, seconds, detail in state
    ]
    return "\n".join(lines)


def result_file(gpu: str) -> Path:
    slug = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    return harness.RESULTS / f"gpu-{slug}.json"


def main() -> int:
    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        print(
            f"gpu-check: no GPU here (torch {torch.__version__}, {built}, sees no device); nothing was checked"
        )
        return 0
    clock = Clock(TOTAL_SECONDS)
    facts = harness.machine_facts()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parts, results = [build(clock), test(clock, folder)], []
        parts += [sanitize(tool, clock) for tool in ("memcheck", "racecheck")]
        for bench in BENCHMARK_SECONDS:
            part, found = benchmark(bench, clock, folder)
            parts.append(part)
            results += found
    path = result_file(str(facts["gpu"]))
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"machine": facts, "parts": [asdict(part) for part in parts], "results": results}
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written: {path.relative_to(ROOT)}\n")
    print(summary(parts, results))
    must_pass = [part.status == "passed" for part in parts[:2]]
    must_not_fail = [part.status != "failed" for part in parts[2:4]]
    return int(not all(must_pass + must_not_fail))


if __name__ == "__main__":
    sys.exit(main())

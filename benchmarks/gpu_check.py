"""Builds, tests and measures on this machine's GPU in under nine minutes: ``make gpu-check``.

Uses the interpreter it is started with, installs nothing and needs no network. Every part runs in a process of its own
within its share of the time; what fails, is stopped or does not fit is listed. After every part it writes
``benchmarks/results/gpu-<name of the GPU>.json``; a short table comes last. Without a GPU it says so and ends.
Exit status 1 if the build or a test fails, or compute-sanitizer finds an error.

Environment: OUT, the folder for the logs and a copy of the result, else ``benchmarks/results/gpu-logs.local`` for the
logs alone; MAX_JOBS, the compilers at a time, else one per core; TORCH_CUDA_ARCH_LIST, else this GPU alone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / name) for name in ("benchmarks", "", "python", "csrc")]

import torch  # noqa: E402
from sanitize_cuda import FOUND, no_gpu  # noqa: E402
from toolchain import find_nvcc  # noqa: E402

import harness  # noqa: E402

TOTAL_SECONDS = 520.0
# Below this nothing is worth starting.
LEAST_SECONDS = 10.0
# The end of a part's time, in which what was interrupted may write its report.
GRACE_SECONDS = 8.0
# The parts in their order, with the seconds that each gets if all before it use up theirs. What is left is shared
# anew before every part, so a part that ends early gives its time to the others. Compiled networks come last, because
# nobody knows how long their compilation takes: they get all that is left, and are cut off where it is too little.
SECONDS = {
    "build": 110.0,
    "tests cuda": 42.0,
    "tests triton": 42.0,
    "group_norm": 42.0,
    "grouped_conv2d": 40.0,
    "attention": 26.0,
    "grouped_linear": 15.0,
    "resample2d": 18.0,
    "tests rest": 28.0,
    "memcheck": 27.0,
    "racecheck": 15.0,
    "sampling_step": 32.0,
    "training_step": 38.0,
    "compiled_steps": 45.0,
}
BENCHMARKS = (
    "group_norm",
    "grouped_conv2d",
    "attention",
    "grouped_linear",
    "resample2d",
    "sampling_step",
    "training_step",
    "compiled_steps",
)
SANITIZERS = {"memcheck": ("--report-api-errors", "no"), "racecheck": ()}
# Every file with a test marked ``gpu`` belongs to one suite. Each runs in processes of its own: after an illegal access
# nothing more works in a process.
SUITES = {
    "tests cuda": ("tests/gpu/test_group_norm_cuda.py", "tests/gpu/test_cuda.py"),
    "tests triton": (
        "tests/gpu/test_grouped_triton_gpu.py",
        "tests/gpu/test_attention_triton_gpu.py",
        "tests/gpu/test_network_graphs.py",
    ),
    "tests rest": (
        "tests/gpu/test_resample2d_gpu.py",
        "tests/ops",
        "tests/multistage_diffusion/test_training.py",
    ),
}
# The tests that need more than PyTorch, Triton, NumPy and pytest are left out where that is not installed.
NEEDS = {"tests/multistage_diffusion/test_training.py": ("safetensors", "tqdm")}
MAX_WORKERS = 12
LOG_LINES = 30
# Begins the output of a part in a log.
MARK = "\n##### "
BUILD_REPORT = ROOT / "msd_kernels" / "_build_report.json"
# The line of a test in pytest's verbose output, with and without pytest-xdist.
VERBOSE_LINE = re.compile(r"(?:\[gw\d+\] \[ *\d+%\] |tests/\S+::.* )(PASSED|FAILED|ERROR|SKIPPED)\b")


@dataclass
class Part:
    """What became of one part."""

    name: str
    status: str  # "passed", "failed", "stopped" or "not run"
    seconds: float = 0.0
    detail: str = ""


class Clock:
    """Shares the seconds that are left among the parts that are still to run."""

    def __init__(self, seconds: float) -> None:
        self._deadline = time.monotonic() + seconds
        self._names = list(SECONDS)

    def share(self, name: str) -> float:
        """The seconds for a part; those before it in the order are over."""
        self._names = self._names[self._names.index(name) :]
        left = self._deadline - time.monotonic()
        return left * SECONDS[name] / sum(SECONDS[other] for other in self._names)


@dataclass
class Record:
    """Everything found so far, in a file per folder."""

    machine: dict
    folders: Sequence[Path]
    parts: list[Part] = field(default_factory=list)
    results: list[dict] = field(default_factory=list)

    def add(self, part: Part, results: Sequence[dict] = ()) -> None:
        self.parts.append(part)
        self.results += results
        self.write()

    def write(self) -> None:
        """A reader, or a kill at any moment, finds a whole file."""
        record = {
            "machine": self.machine,
            "parts": [asdict(part) for part in self.parts],
            "results": self.results,
        }
        for file in self.files():
            file.parent.mkdir(parents=True, exist_ok=True)
            unfinished = file.with_suffix(".unfinished")
            unfinished.write_text(json.dumps(record, indent=1) + "\n")
            os.replace(unfinished, file)

    def files(self) -> list[Path]:
        slug = re.sub(r"[^a-z0-9]+", "-", str(self.machine["gpu"]).lower()).strip("-")
        return [folder / f"gpu-{slug}.json" for folder in self.folders]


def log_file(name: str) -> Path:
    """Few files: the benchmarks share one, and so do the sanitizers."""
    groups = {**dict.fromkeys(BENCHMARKS, "benchmarks"), **dict.fromkeys(SANITIZERS, "sanitizers")}
    folder = Path(os.environ.get("OUT") or harness.RESULTS / "gpu-logs.local")
    return folder / f"{groups.get(name, name).replace(' ', '-')}.log"


def log_end(log: Path) -> str:
    """The output of the part that wrote last."""
    return log.read_text(errors="replace").rpartition(MARK)[2]


def show_end(log: Path) -> None:
    print("\n".join(f"  | {line}" for line in log_end(log).splitlines()[-LOG_LINES:]), flush=True)


def run_part(name: str, command: Sequence[str], limit: float, **environment: str) -> Part:
    """Runs a command within a limit; its output goes to its log, and the end of it is shown if it fails."""
    if limit < LEAST_SECONDS:
        return Part(name, "not run", detail="no time was left")
    print(f"{name}: at most {limit:.0f} s", flush=True)
    paths = [str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]
    path = os.pathsep.join(filter(None, paths))
    log = log_file(name)
    log.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with log.open("a") as output:
        print(f"{MARK}{name}", file=output, flush=True)
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=heed_interrupts,
        )
        try:
            code = process.wait(limit - GRACE_SECONDS)
            status, detail = ("failed", f"exit status {code}") if code else ("passed", "")
        except subprocess.TimeoutExpired:
            status, detail = "stopped", f"after {limit - GRACE_SECONDS:.0f} s"
        finally:
            end(process)
    if status != "passed":
        show_end(log)
    return Part(name, status, time.monotonic() - start, detail)


def heed_interrupts() -> None:
    """A shell's background jobs ignore SIGINT, and so would all that they start."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def end(process: subprocess.Popen) -> None:
    """Interrupts a process that still runs, then kills what is left of its group, such as a compiler's children."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, signal.SIGINT)
            process.wait(GRACE_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def build(limit: float) -> Part:
    """Compiles the extension in place, for this GPU alone unless TORCH_CUDA_ARCH_LIST says otherwise."""
    major, minor = torch.cuda.get_device_capability()
    architecture = f"{major}.{minor}" + ("a" if major >= 9 else "")
    part = run_part(
        "build",
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        limit,
        MSD_KERNELS_CUDA="auto",
        MAX_JOBS=os.environ.get("MAX_JOBS", str(os.cpu_count())),
        TORCH_CUDA_ARCH_LIST=os.environ.get("TORCH_CUDA_ARCH_LIST", architecture),
    )
    if part.status == "passed" and BUILD_REPORT.is_file():
        judge_build(part, json.loads(BUILD_REPORT.read_text()))
    return part


def judge_build(part: Part, targets: dict[str, dict]) -> None:
    """The build leaves out what does not compile and still ends well; with nvcc here, that is a failure."""
    part.detail = "; ".join(
        f"{name} built" if target["built"] else f"{name} left out: {target['reason']}"
        for name, target in targets.items()
    )
    if not targets["cuda"]["built"] and find_nvcc():
        part.status = "failed"
        show_end(log_file(part.name))


def test(name: str, limit: float, folder: Path) -> Part:
    """One suite of the tests that are marked ``gpu``."""
    report = folder / f"{name}.xml"
    options = ["-v", "--tb=short", "-p", "no:cacheprovider", f"--junitxml={report}"]
    if find_spec("xdist"):
        options += ["-n", str(min(MAX_WORKERS, os.cpu_count() or 1)), "--dist", "worksteal"]
    left_out = {path: missing for path in SUITES[name] if (missing := missing_packages(path))}
    paths = [path for path in SUITES[name] if path not in left_out]
    part = run_part(name, [sys.executable, "-m", "pytest", "-m", "gpu", *options, *paths], limit)
    if part.status != "not run":
        counts = report_counts(report) or verbose_counts(log_end(log_file(name)))
        reasons = [f"{path} left out: no {', '.join(missing)}" for path, missing in left_out.items()]
        part.detail = "; ".join(filter(None, [counts, part.detail, *reasons]))
    return part


def missing_packages(path: str) -> list[str]:
    return [package for package in NEEDS.get(path, ()) if find_spec(package) is None]


def report_counts(report: Path) -> str:
    """What pytest's XML says, or nothing where there is none or half of one."""
    try:
        suites = list(ElementTree.parse(report).getroot().iter("testsuite"))
    except (OSError, ElementTree.ParseError):
        return ""
    total, failures, errors, skipped = (
        sum(int(suite.get(name, 0)) for suite in suites)
        for name in ("tests", "failures", "errors", "skipped")
    )
    return count_text(total - failures - errors - skipped, failures + errors, skipped)


def verbose_counts(output: str) -> str:
    """What the lines of a pytest that was killed say."""
    found = Counter(match[1] for line in output.splitlines() if (match := VERBOSE_LINE.match(line)))
    return count_text(found["PASSED"], found["FAILED"] + found["ERROR"], found["SKIPPED"])


def count_text(passed: int, failed: int, skipped: int) -> str:
    return f"{passed} passed, {failed} failed, {skipped} skipped"


def sanitize(tool: str, limit: float) -> Part:
    """The compiled CUDA kernels under compute-sanitizer, where it is installed and knows the device."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        return Part(tool, "not run", detail="there is no compute-sanitizer")
    options = ["--tool", tool, "--print-limit", "20", *SANITIZERS[tool], "--error-exitcode", str(FOUND)]
    command = [program, *options, sys.executable, str(ROOT / "benchmarks" / "sanitize_cuda.py")]
    part = run_part(tool, command, limit, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    if part.status == "failed" and part.detail != f"exit status {FOUND}":
        part.status, part.detail = "not run", f"compute-sanitizer cannot work here: {part.detail}"
    return part


def benchmark(name: str, limit: float, folder: Path) -> tuple[Part, list[dict]]:
    """One benchmark's part and results; it stops itself a little before it would be stopped."""
    out = folder / f"{name}.jsonl"
    races = [sys.executable, str(ROOT / "benchmarks" / "gpu_races.py"), name]
    part = run_part(name, [*races, "--seconds", f"{limit * 0.7:.0f}", "--out", str(out)], limit)
    results = read_results(out)
    missing = [result["not_run"] for result in results if "not_run" in result]
    wrong = [f"{result['failed']} failed: {result['error']}" for result in results if "failed" in result]
    part.detail = "; ".join(
        [*filter(None, [part.detail]), *wrong, *(f"not run: {label}" for label in missing)]
    )
    if wrong:
        part.status = "failed"
    return part, results


def read_results(path: Path) -> list[dict]:
    """The whole lines of a benchmark, which may have been killed while it wrote the last one."""
    results = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        with contextlib.suppress(json.JSONDecodeError):
            results.append(json.loads(line))
    return results


def summary(parts: Sequence[Part], results: Sequence[dict]) -> str:
    """The tables that are printed last."""
    rows = [
        (result["benchmark"], result["case"], result["backend"] or "", result["l2"],
         f"{result['seconds']['ours'][0] * 1e6:.1f}", f"{result['share_of_floor']:.2f}",
         "  ".join(f"{peer} {ratio[0]:.2f}x" for peer, ratio in result["ratio"].items()))
        for result in results
        if "case" in result and result["l2"] != "warm"
    ]  # fmt: skip
    header = ("benchmark", "case", "backend", "L2", "ours us", "floor / ours", "peer / ours")
    lines = [harness.table(rows, header)] if rows else []
    for result in (result for result in results if "peak_bytes" in result):
        sizes = "  ".join(f"{name} {size / 2**30:.2f} GiB" for name, size in result["peak_bytes"].items())
        lines.append(f"{result['benchmark']}, {result['case']}: peak memory beside the weights: {sizes}")
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


def run_all(record: Record, folder: Path) -> None:
    """Every part in its order, each written down as soon as it is over."""
    clock = Clock(TOTAL_SECONDS)
    runs = {"build": build}
    runs |= {name: partial(test, name, folder=folder) for name in SUITES}
    runs |= {name: partial(sanitize, name) for name in SANITIZERS}
    for name in SECONDS:
        limit = clock.share(name)
        if name in BENCHMARKS:
            record.add(*benchmark(name, limit, folder))
        else:
            record.add(runs[name](limit))


def exit_status(parts: Sequence[Part]) -> int:
    must_pass = [part.status == "passed" for part in parts if part.name in ("build", *SUITES)]
    must_not_fail = [part.status != "failed" for part in parts if part.name in SANITIZERS]
    return int(not all(must_pass + must_not_fail))


def main() -> int:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    if reason := no_gpu():
        print(f"gpu-check: {reason}")
        return 0
    for name in SECONDS:
        log_file(name).unlink(missing_ok=True)
    copies = [Path(os.environ["OUT"])] if os.environ.get("OUT") else []
    record = Record(harness.machine_facts(), [harness.RESULTS, *copies])
    with tempfile.TemporaryDirectory() as name:
        run_all(record, Path(name))
    print(f"logs: {log_file('build').parent}")
    print(f"written: {', '.join(map(str, record.files()))}\n")
    print(summary(record.parts, record.results))
    return exit_status(record.parts)


if __name__ == "__main__":
    sys.exit(main())

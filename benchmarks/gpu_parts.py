"""What ``make gpu-smoke`` and ``make gpu-check`` share: parts in processes of their own, and a file of results.

A part has a share of the time; what fails, is stopped or does not fit is listed. The file of results has one line of
JSON per result, written as soon as it is there, by the part itself: who reads it, or a kill at any moment, finds whole
lines.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / name) for name in ("benchmarks", "", "python", "build_support")]

import torch  # noqa: E402
from toolchain import find_nvcc  # noqa: E402

import harness  # noqa: E402

# Below this nothing is worth starting.
LEAST_SECONDS = 5.0
# The end of a part's time, in which what was interrupted may end by itself.
GRACE_SECONDS = 4.0
LOG_LINES = 30
# Begins the output of a part in a log.
MARK = "\n##### "
BUILD_REPORT = ROOT / "msd_kernels" / "_build_report.json"


@dataclass
class Part:
    """What became of one part."""

    name: str
    status: str  # "passed", "failed", "stopped" or "not run"
    seconds: float = 0.0
    detail: str = ""


class Clock:
    """Shares the seconds that are left among the parts that are still to run.

    Args:
        parts: in their order, the seconds that each gets if all before it use up theirs. A part that ends early gives
            its time to the others.
    """

    def __init__(self, parts: Mapping[str, float]) -> None:
        self._parts = dict(parts)
        self._deadline = time.monotonic() + sum(parts.values())
        self._names = list(parts)

    def share(self, name: str) -> float:
        """The seconds for a part; those before it in the order are over."""
        self._names = self._names[self._names.index(name) :]
        left = self._deadline - time.monotonic()
        return left * self._parts[name] / sum(self._parts[other] for other in self._names)


@dataclass
class Record:
    """The files of results, one per folder, all the same; a new one begins with the facts about the machine."""

    target: str
    machine: dict
    folders: Sequence[Path]
    parts: list[Part] = field(default_factory=list)

    def __post_init__(self) -> None:
        for file in self.files:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.unlink(missing_ok=True)
        append(self.files, {"machine": self.machine})

    @property
    def files(self) -> list[Path]:
        slug = re.sub(r"[^a-z0-9]+", "-", str(self.machine.get("gpu", "rehearsal")).lower()).strip("-")
        return [folder / f"gpu-{self.target}-{slug}.jsonl" for folder in self.folders]

    def add(self, part: Part) -> None:
        """Ends a part."""
        self.parts.append(part)
        for file in self.files:
            drop_torn_line(file)
        append(self.files, {"part": asdict(part)})

    def results(self, key: str) -> list[dict]:
        """What the parts have written so far, as far as it has a ``key``."""
        return [line for line in read_lines(self.files[0]) if key in line]


def append(files: Iterable[Path], result: dict) -> None:
    """A line at a time, in one call of the system."""
    line = (json.dumps(result) + "\n").encode()
    for file in files:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(descriptor, line)
        finally:
            os.close(descriptor)


def drop_torn_line(file: Path) -> None:
    """Cuts off what a process that was killed while it wrote has left behind the last whole line."""
    content = file.read_bytes()
    if content and not content.endswith(b"\n"):
        file.write_bytes(content[: content.rfind(b"\n") + 1])


def read_lines(file: Path) -> list[dict]:
    """The whole lines of a file of results."""
    found = []
    for line in file.read_text().splitlines() if file.is_file() else []:
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


def folders() -> list[Path]:
    """Where results go: beside the other results, and to the folder that OUT names."""
    copies = [Path(os.environ["OUT"])] if os.environ.get("OUT") else []
    return [*copies, harness.RESULTS]


def log_file(target: str) -> Path:
    folder = Path(os.environ.get("OUT") or harness.RESULTS / "gpu-logs.local")
    return folder / f"gpu-{target}.log"


def log_end(log: Path) -> str:
    """The output of the part that wrote last."""
    return log.read_text(errors="replace").rpartition(MARK)[2]


def show_end(log: Path) -> None:
    print("\n".join(f"  | {line}" for line in log_end(log).splitlines()[-LOG_LINES:]), flush=True)


def run_part(name: str, command: Sequence[str], limit: float, log: Path, **environment: str) -> Part:
    """Runs a command within a limit; its output goes to the log, and the end of it is shown if it fails."""
    if limit < LEAST_SECONDS:
        return Part(name, "not run", detail="no time was left")
    print(f"{name}: at most {limit:.0f} s", flush=True)
    paths = [str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]
    path = os.pathsep.join(filter(None, paths))
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


def build(limit: float, log: Path) -> Part:
    """Compiles the extension in place, for this GPU alone unless TORCH_CUDA_ARCH_LIST says otherwise."""
    major, minor = torch.cuda.get_device_capability()
    architecture = f"{major}.{minor}" + ("a" if major >= 9 else "")
    part = run_part(
        "build",
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        limit,
        log,
        MSD_KERNELS_CUDA="auto",
        MAX_JOBS=os.environ.get("MAX_JOBS", str(os.cpu_count())),
        TORCH_CUDA_ARCH_LIST=os.environ.get("TORCH_CUDA_ARCH_LIST", architecture),
    )
    if part.status == "passed" and BUILD_REPORT.is_file():
        judge_build(part, json.loads(BUILD_REPORT.read_text()), log)
    return part


def judge_build(part: Part, targets: dict[str, dict], log: Path) -> None:
    """The build leaves out what does not compile and still ends well; with nvcc here, that is a failure."""
    part.detail = "; ".join(
        f"{name} built" if target["built"] else f"{name} left out: {target['reason']}"
        for name, target in targets.items()
    )
    if not targets["cuda"]["built"] and find_nvcc():
        part.status = "failed"
        show_end(log)


def state(parts: Sequence[Part]) -> str:
    """A line per part."""
    width = max(len(part.name) for part in parts)
    return "\n".join(
        f"{part.name:{width}}  {part.status:7}  {part.seconds:>4.0f} s  {part.detail}" for part in parts
    )


def plan_text(target: str, parts: Mapping[str, float], cases: Mapping[str, Sequence[str]]) -> str:
    """What a run would do: the parts with their seconds and their cases."""
    lines = [f"{target}: {sum(parts.values()):.0f} s in {len(parts)} parts"]
    for name, seconds in parts.items():
        lines.append(f"{name}: {seconds:.0f} s")
        lines += [f"    {case}" for case in cases.get(name, ())]
    return "\n".join(lines)

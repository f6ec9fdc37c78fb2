"""Times functions against each other: interleaved in one process, medians with quartiles, ratios round by round.

Needs PyTorch only, so that it also runs where pytest-benchmark is missing.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch
from torch import Tensor

Function = Callable[[], object]
Timer = Callable[[Function], float]

OURS = "ours"
ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

# Largest error of a result, as a share of the largest element of the exact one: a few roundings.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        if len(values) == 1:
            return Spread(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return Spread(median, low, high)


@dataclass(frozen=True)
class Comparison:
    """The seconds of every case, one entry per round."""

    seconds: dict[str, list[float]]

    @property
    def peers(self) -> list[str]:
        return [name for name in self.seconds if name != OURS]

    def time(self, name: str = OURS) -> Spread:
        return Spread.of(self.seconds[name])

    def ratio(self, peer: str) -> Spread:
        """How many times as long as ours the peer takes, from the pairs of one round: above 1, ours is faster."""
        return Spread.of([p / o for p, o in zip(self.seconds[peer], self.seconds[OURS], strict=True)])

    def best_ratio(self, peer: str) -> float:
        """The ratio of the fastest runs, which other processes on the same cores disturb least."""
        return min(self.seconds[peer]) / min(self.seconds[OURS])

    def as_dict(self) -> dict:
        """Median and quartiles of the seconds and of the ratios, and the ratios of the fastest runs."""
        return {
            "rounds": len(self.seconds[OURS]),
            "seconds": {name: _rounded(self.time(name)) for name in self.seconds},
            "ratio": {name: _rounded(self.ratio(name)) for name in self.peers},
            "ratio_of_fastest": {name: float(f"{self.best_ratio(name):.4g}") for name in self.peers},
        }


def _rounded(spread: Spread) -> list[float]:
    return [float(f"{value:.4g}") for value in (spread.median, spread.low, spread.high)]


def wall_clock(function: Function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


class Rounds:
    """Runs the cases in turn: the peers, then ours, then the peers again, each round from another one on.

    So nobody always comes after the same one, which may leave little in the caches.

    Args:
        cases: functions by name; the one called ``"ours"`` is compared with all the others.
        timer: runs a function and returns its seconds.
    """

    def __init__(self, cases: dict[str, Function], timer: Timer = wall_clock) -> None:
        self._cases, self._timer = cases, timer
        self.forget()

    def forget(self) -> None:
        self._seconds: dict[str, list[float]] = {name: [] for name in self._cases}

    def run(self, name: str) -> None:
        self._seconds[name].append(self._timer(self._cases[name]))

    def peers(self) -> None:
        peers = [name for name in self._cases if name != OURS]
        first = len(self._seconds[OURS]) % len(peers)
        for name in peers[first:] + peers[:first]:
            self.run(name)

    def ours(self) -> None:
        self.run(OURS)

    def calibrate(self, seconds: float, fewest: int = 5, most: int = 200) -> int:
        """Warms every case up and says how many rounds fit into ``seconds``."""
        for _ in range(2):
            self.forget()
            self.peers()
            self.ours()
        one_round = sum(values[-1] for values in self._seconds.values())
        self.forget()
        return min(most, max(fewest, int(seconds / one_round)))

    def comparison(self) -> Comparison:
        return Comparison(self._seconds)


def compare(cases: dict[str, Function], seconds: float, timer: Timer = wall_clock) -> Comparison:
    """Interleaves the cases for about so many seconds."""
    rounds = Rounds(cases, timer)
    for _ in range(rounds.calibrate(seconds)):
        rounds.peers()
        rounds.ours()
    return rounds.comparison()


def check(name: str, found: Sequence[Tensor], exact: Sequence[Tensor], dtype: torch.dtype) -> None:
    """Refuses to time a function whose results are off.

    Raises:
        AssertionError: a tensor differs by more than :data:`TOLERANCE` of the largest element of the exact one.
    """
    for position, (a, b) in enumerate(zip(found, exact, strict=True)):
        error = (a.double() - b.double().to(a.device)).abs().max().item()
        allowed = TOLERANCE[dtype] * b.abs().max().item()
        if not error <= allowed:
            raise AssertionError(
                f"{name}: result {position} is off by {error:.2e}, allowed {allowed:.2e}; a wrong kernel has no speed"
            )


def copy_bandwidth(device: str = "cpu", timer: Timer = wall_clock, megabytes: int = 128) -> float:
    """Bytes per second that a copy reads and writes, in a buffer larger than the caches."""
    source = torch.ones(megabytes * 2**18, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    seconds = statistics.median(timer(lambda: target.copy_(source)) for _ in range(15))
    return 2 * source.nbytes / seconds


def machine_facts() -> dict[str, object]:
    """What a figure depends on: processor, threads, versions, commit, date. No names of hosts, users or folders."""
    facts: dict[str, object] = {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "simd": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "gpu": properties.name,
            "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
            "compute_capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
        }
    return facts


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def commit() -> str:
    """The commit that is checked out, with a plus where the tree differs from it."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--exclude=*"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return described.stdout.strip()


def table(rows: Sequence[Sequence[str]], header: Sequence[str]) -> str:
    """Rows of text in aligned columns; the first is left-aligned."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = [
        "  ".join(
            cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in (header, *rows)
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3f}"


def ratio_text(ratio: Spread) -> str:
    return f"{ratio.median:.2f}x [{ratio.low:.2f}, {ratio.high:.2f}]"

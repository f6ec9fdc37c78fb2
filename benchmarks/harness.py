"""Times functions against each other: they take turns in one process; medians with quartiles, ratios round by round.

Needs neither pytest nor pytest-benchmark, so that it also runs where they are missing.
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
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

Function = Callable[[], object]
Timer = Callable[[Function], float]

OURS = "ours"
ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

# The device sleeps while the host launches a case, so that it is timed without gaps: as long as that took the host
# at best, and some more, but at most so many seconds.
LONGEST_SLEEP = 5e-3
CYCLES_PER_SECOND = 2e9

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
    """The turns of every case, one entry per round: the seconds of each call of the turn."""

    turns: dict[str, list[Sequence[float]]]

    @property
    def peers(self) -> list[str]:
        return [name for name in self.turns if name != OURS]

    def seconds(self, name: str) -> list[float]:
        """Per round, the mean of the turn's calls."""
        return [statistics.fmean(turn) for turn in self.turns[name]]

    def time(self, name: str = OURS) -> Spread:
        return Spread.of(self.seconds(name))

    def ratio(self, peer: str) -> Spread:
        """How many times as long as ours the peer takes, from the pairs of one round: above 1, ours is faster."""
        return Spread.of([p / o for p, o in zip(self.seconds(peer), self.seconds(OURS), strict=True)])

    def first_ratio(self, peer: str) -> float:
        """The same for the first call of each turn alone, which finds in the caches what another case has left."""
        pairs = zip(self.turns[peer], self.turns[OURS], strict=True)
        return statistics.median(p[0] / o[0] for p, o in pairs)

    def best_ratio(self, peer: str) -> float:
        """The ratio of the fastest turns, which other processes on the same cores disturb least."""
        return min(self.seconds(peer)) / min(self.seconds(OURS))

    def as_dict(self) -> dict:
        """Median and quartiles of the seconds and of the ratios, and the ratios of first calls and fastest turns."""
        return {
            "rounds": len(self.turns[OURS]),
            "calls": {name: len(turns[0]) for name, turns in self.turns.items()},
            "seconds": {name: _rounded(self.time(name)) for name in self.turns},
            "ratio": {name: _rounded(self.ratio(name)) for name in self.peers},
            "ratio_of_first_calls": {name: float(f"{self.first_ratio(name):.4g}") for name in self.peers},
            "ratio_of_fastest": {name: float(f"{self.best_ratio(name):.4g}") for name in self.peers},
        }


def _rounded(spread: Spread) -> list[float]:
    return [float(f"{value:.4g}") for value in (spread.median, spread.low, spread.high)]


def wall_clock(function: Function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def cuda_timer(*, cold: bool) -> Timer:
    """Seconds on the device between two events; ``cold`` reads several times the L2 before.

    Reading leaves no modified lines there, which the case would have to write back.
    """
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    scratch = torch.ones(cache, dtype=torch.float32, device="cuda") if cold else None  # 4 times its bytes
    launching: WeakKeyDictionary[Function, float] = WeakKeyDictionary()

    def seconds(function: Function) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        host = launching.get(function, 1e-3)
        torch.cuda._sleep(int(CYCLES_PER_SECOND * min(LONGEST_SLEEP, 1e-4 + 1.3 * host)))
        if scratch is not None:
            torch.amax(scratch)
        start.record()
        launch = time.perf_counter()
        function()
        launching[function] = min(host, time.perf_counter() - launch)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return seconds


def synchronised_clock(function: Function) -> float:
    """Seconds until the GPU has done all of it, the launches included, as the caller of a whole network sees them."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def process_bytes(name: str) -> int:
    """Memory of this process, as Linux counts it: ``VmRSS``, what it has now, or ``VmHWM``, the most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def extra_bytes(function: Function) -> int:
    """How far the memory of this process rises above what it is before the call, at its peak (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = process_bytes("VmRSS")
    function()
    return process_bytes("VmHWM") - before


def peak_bytes(function: Function) -> int:
    """The most GPU memory that its tensors take at a time, beyond those that are there before."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    return torch.cuda.max_memory_allocated() - before


def median_seconds(function: Function, timer: Timer, repetitions: int) -> float:
    """After one call to warm up."""
    function()
    return statistics.median(timer(function) for _ in range(repetitions))


class Rounds:
    """Lets the cases take turns: each round ours, then the peers, each round from another one on.

    So nobody always comes after the same one, which may leave little in the caches.

    Args:
        cases: functions by name; the one called ``"ours"`` is compared with all the others.
        timer: runs a function and returns its seconds.
        span: seconds that a turn should last, of as many calls as that takes; 0 for single calls.
        clock: of the seconds that all of it takes.
    """

    MOST_CALLS = 100
    MOST_ROUNDS = 200

    def __init__(
        self,
        cases: dict[str, Function],
        timer: Timer = wall_clock,
        span: float = 0.0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._cases, self._timer, self._span, self._clock = cases, timer, span, clock
        self._calls = dict.fromkeys(cases, 1)
        self._turns: dict[str, list[Sequence[float]]] = {name: [] for name in cases}

    def run(self, seconds: float, *, warm: bool = False) -> Comparison:
        """The rounds that fit into so many seconds, but one at least: it never takes longer by more than one round.

        Args:
            seconds: for warming up and for the rounds, not for the first call of each case, which may compile.
            warm: every case has been called before, so that a first call is like the others.
        """
        if not warm:
            self._round()
            self._forget()
        began = self._clock()
        one_round = self._round()
        once = {name: turns[0][0] for name, turns in self._turns.items()}
        calls = {
            name: min(self.MOST_CALLS, max(1, round(self._span / max(t, 1e-9)))) for name, t in once.items()
        }
        if 4 * one_round <= seconds and (not warm or max(calls.values()) > 1):
            self._calls = calls
            one_round = sum(calls[name] * once[name] for name in calls)
            self._forget()
        while not self._finished or (
            self._finished < self.MOST_ROUNDS and self._clock() - began + one_round <= seconds
        ):
            self._round()
        return Comparison(self._turns)

    @property
    def _finished(self) -> int:
        return len(self._turns[OURS])

    def _forget(self) -> None:
        for turns in self._turns.values():
            turns.clear()

    def _round(self) -> float:
        """One turn of every case; returns the seconds of all of it."""
        began = self._clock()
        peers = [name for name in self._cases if name != OURS]
        first = self._finished % len(peers)
        for name in (OURS, *peers[first:], *peers[:first]):
            self._turns[name].append(tuple(self._timer(self._cases[name]) for _ in range(self._calls[name])))
        return self._clock() - began


def compare(cases: dict[str, Function], seconds: float, timer: Timer = wall_clock) -> Comparison:
    """Interleaves single calls of the cases for about so many seconds; see :meth:`Rounds.run`."""
    return Rounds(cases, timer).run(seconds)


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
    return 2 * source.nbytes / median_seconds(lambda: target.copy_(source), timer, 15)


def machine_facts() -> dict[str, object]:
    """What a figure depends on: processor, threads, versions, commit, date. No names of hosts, users or folders."""
    from msd_kernels.runtime import processor  # compare.py times other versions of the package

    facts: dict[str, object] = {
        "cpu": cpu_model(),
        "kind": processor.kind().name,
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

"""Gives pytest-benchmark, which wants to time a function itself, the times of rounds that are over."""

from __future__ import annotations

import time
from collections.abc import Sequence


class Clock:
    """The usual clock, but for the rounds that are recorded."""

    def __init__(self) -> None:
        self.now: float | None = None

    def advance(self, seconds: float) -> None:
        self.now += seconds


CLOCK = Clock()


def clock() -> float:
    """For the option ``--benchmark-timer``."""
    return time.perf_counter() if CLOCK.now is None else CLOCK.now


def record(benchmark, seconds: Sequence[float]) -> None:
    """Has the fixture ``benchmark`` find these times, one per round."""
    left = iter(seconds)
    CLOCK.now = 0.0
    try:
        benchmark.pedantic(lambda: CLOCK.advance(next(left)), rounds=len(seconds))
    finally:
        CLOCK.now = None

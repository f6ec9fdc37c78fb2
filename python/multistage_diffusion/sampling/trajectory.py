"""A sampler under way: it says which evaluation of the network it needs next, and is given that.

A sampler is written as a generator (``walk`` of its settings) that yields what it needs and is sent D(x; sigma).
Whoever runs it decides what shares a call of the network: a batch at one noise level, as in ``sample``, or whatever
waits, as in ``SamplerService``.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import NamedTuple, Protocol

from torch import Tensor

Draw = Callable[[], Tensor]


class Evaluation(NamedTuple):
    """What a sampler asks for: D(x; sigma).

    Attributes:
        x: noisy samples ``[B, C, H, W]``.
        sigma: their noise level.
        step: which step of the sampler it is for, from 0.
    """

    x: Tensor
    sigma: float
    step: int


# Yields what it needs, is sent D(x; sigma), and returns the samples.
Walk = Generator[Evaluation, Tensor, Tensor]


class Settings(Protocol):
    """What every sampler's settings have."""

    num_steps: int
    start: float

    def walk(self, x: Tensor, draw: Draw) -> Walk: ...


class Trajectory:
    """One batch on its way from noise to samples.

    Args:
        settings: of the sampler.
        draw: gives unit noise ``[B, C, H, W]``, that of the start first.

    Attributes:
        wanted: the evaluation that it waits for, None at the end.
        finished: steps that are behind it.
        images: the samples, at the end.
    """

    def __init__(self, settings: Settings, draw: Draw) -> None:
        self.num_steps = settings.num_steps
        self.wanted: Evaluation | None = None
        self.images: Tensor | None = None
        self._walk = settings.walk(settings.start * draw(), draw)
        self._send(None)

    @property
    def finished(self) -> int:
        return self.num_steps if self.wanted is None else self.wanted.step

    def advance(self, denoised: Tensor) -> None:
        """Goes on to the next evaluation, or the end, with D(x; sigma) of the one that was wanted."""
        self._send(denoised.to(self.wanted.x.dtype))

    def _send(self, denoised: Tensor | None) -> None:
        try:
            self.wanted = self._walk.send(denoised)
        except StopIteration as end:
            self.wanted, self.images = None, end.value

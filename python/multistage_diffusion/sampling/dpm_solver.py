"""DDIM, DPM-Solver and DPM-Solver++: samplers for few steps, with their settings.

The papers write x_t = alpha_t y + sigma_t n. Here x is in data scale, x = y + sigma n: their x_t / alpha_t, with
sigma = sigma_t / alpha_t, lambda = −ln sigma and h = ln(sigma / sigma'). A step leads from sigma to sigma' < sigma.
With alpha = 1 the papers' factors are differences and ratios of noise levels::

    sigma' (e^h − 1) = sigma − sigma'     the factor of the noise prediction eps(x; sigma) = (x − D(x; sigma)) / sigma
    1 − e^−h = 1 − sigma' / sigma         the factor of the data prediction D(x; sigma)

The samplers start at x = sigma_max n and, as published, end at the lowest noise level that they are run to, at
x = y + sigma_min n: the noise that is left (sigma_min is 0.01 for VP, 0.04 for LDM) stays in the sample.
``denoise_to_zero`` adds a step to sigma = 0, which is one more evaluation and gives D(x; sigma_min). Data scale shows
at the two ends only: the published samplers start at sqrt(1 + sigma_max²) n, which is larger by less than 1e-4 of it,
and they return alpha_min x, which is smaller by 5e-5 of it for VP and 8e-4 for LDM.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from multistage_diffusion.common.checks import integer
from multistage_diffusion.noise.levels import between
from multistage_diffusion.noise.schedules import Schedule
from multistage_diffusion.sampling.trajectory import Draw, Evaluation, Walk

FEW_STEPS = 15  # a multistep solver of fewer steps ends with one of order 1


@dataclass(frozen=True)
class _StepConfig:
    """Settings of a sampler whose steps lead from one noise level to the next."""

    levels: tuple[float, ...]

    def __post_init__(self):
        object.__setattr__(self, "levels", tuple(map(float, self.levels)))
        falling = all(low < high < math.inf for high, low in itertools.pairwise(self.levels))
        if len(self.levels) < 2 or not falling or self.levels[-1] < 0:
            raise ValueError(
                f"{type(self).__name__}: levels must be at least two noise levels that fall from a finite one to 0 "
                f"or above, got {self.levels}"
            )

    @property
    def num_steps(self) -> int:
        return len(self.levels) - 1

    @property
    def start(self) -> float:
        """The noise level that the sampler starts from."""
        return self.levels[0]

    def evaluated_levels(self) -> list[float]:
        """The noise level of every network evaluation, in their order."""
        return list(self.levels[:-1])


@dataclass(frozen=True)
class DDIMConfig(_StepConfig):
    """DDIM (arXiv 2010.02502, eq. 12 and 16).

    ::

        x' = D + sqrt(sigma'² − s²) (x − D) / sigma + s n        s = eta (sigma' / sigma) sqrt(sigma² − sigma'²)

    With eta = 0 that is Euler's step in sigma, x + (sigma' − sigma) eps, and DPM-Solver-1; with eta = 1 it is DDPM's
    ancestral sampling.

    Attributes:
        levels: sigma at the ends of the steps, ``[num_steps + 1]``, falling; the last may be 0, where x' = D.
        eta: 0 for a deterministic sampler, up to 1.
    """

    eta: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.eta <= 1:
            raise ValueError(f"DDIMConfig: eta={self.eta} must lie within 0 and 1")

    @classmethod
    def for_schedule(
        cls,
        schedule: Schedule,
        steps: int,
        *,
        eta: float = 0.0,
        spacing: str | None = None,
        denoise_to_zero: bool = False,
    ) -> DDIMConfig:
        """``steps`` steps, spaced as ``Schedule.spaced`` says; ``denoise_to_zero`` adds one where they end elsewhere.

        By default they are evenly spaced in the schedule's variable, but for EDM, whose variable is sigma itself: there
        in sigma^(1/7), as in its own sampler (``levels.edm_sigmas``).
        """
        return cls(_spaced(cls, schedule, steps, spacing, denoise_to_zero), eta)

    def walk(self, x: torch.Tensor, draw: Draw) -> Walk:
        """From ``x`` at the first noise level to the samples; ``draw()`` is unit noise of their shape."""
        for step, (sigma, sigma_next) in enumerate(itertools.pairwise(self.levels)):
            s = self.eta * sigma_next / sigma * math.sqrt(sigma**2 - sigma_next**2)
            denoised = yield Evaluation(x, sigma, step)
            x = denoised + math.sqrt(sigma_next**2 - s**2) / sigma * (x - denoised)
            if s > 0:
                x = x + s * draw()
        return x


@dataclass(frozen=True)
class _SolverConfig(_StepConfig):
    """Settings of a solver whose steps have orders of their own."""

    orders: tuple[int, ...]
    highest_order: ClassVar[int]

    def __post_init__(self):
        super().__post_init__()
        name, allowed = type(self).__name__, range(1, self.highest_order + 1)
        object.__setattr__(self, "orders", tuple(self.orders))
        if len(self.orders) != self.num_steps or not set(self.orders) <= set(allowed):
            raise ValueError(
                f"{name}: orders must be {self.num_steps} numbers, one per step, of {', '.join(map(str, allowed))}, "
                f"got {self.orders}"
            )
        if self.levels[-1] == 0 and self.orders[-1] != 1:
            raise ValueError(f"{name}: a step to sigma = 0 must be of order 1, got {self.orders[-1]}")


@dataclass(frozen=True)
class DPMSinglestepConfig(_SolverConfig):
    """DPM-Solver with noise prediction, every step on its own (arXiv 2206.00927, algorithms 1 and 2, and eq. 3.7).

    A step of order k evaluates the network k times, at levels that divide h evenly: at sigma, and inside of the step at
    sigma_1 and sigma_2 (the paper's r1 = 1/2 for order 2, r1 = 1/3 and r2 = 2/3 for order 3)::

        order 1   x' = x + (sigma' − sigma) eps_0                         eps_0 = eps(x; sigma)
        order 2   u  = x + (sigma_1 − sigma) eps_0                        eps_1 = eps(u; sigma_1)
                  x' = x + (sigma' − sigma) eps_1
        order 3   w(s) = (sigma − s) / ln(sigma / s) − s
                  u  = x + (sigma_1 − sigma) eps_0                        eps_1 = eps(u; sigma_1)
                  v  = x + (sigma_2 − sigma) eps_0 − 2 w(sigma_2) (eps_1 − eps_0)      eps_2 = eps(v; sigma_2)
                  x' = x + (sigma' − sigma) eps_0 − 3/2 w(sigma') (eps_2 − eps_0)

    Attributes:
        levels: sigma at the ends of the steps, ``[num_steps + 1]``, falling; the last may be 0.
        orders: 1, 2 or 3 for each step.
    """

    highest_order: ClassVar[int] = 3

    @classmethod
    def for_schedule(
        cls, schedule: Schedule, steps: int, *, denoise_to_zero: bool = False
    ) -> DPMSinglestepConfig:
        """``steps`` network evaluations: steps of order 3, evenly spaced in log-SNR, the last of lower order.

        What 3 does not divide is left to the last step; where it does divide, the last two are of order 2 and 1, as in
        the paper. ``denoise_to_zero`` adds an evaluation.
        """
        steps = integer(cls.__name__, "steps", steps, 1)
        whole, rest = divmod(steps, 3)
        orders = (3,) * whole + (rest,) if rest else (3,) * (whole - 1) + (2, 1)
        levels = schedule.spaced(len(orders), "log-snr")
        if denoise_to_zero:
            levels, orders = (*levels, 0.0), (*orders, 1)
        return cls(levels, orders)

    def evaluated_levels(self) -> list[float]:
        """The noise level of every network evaluation, in their order."""
        steps = zip(itertools.pairwise(self.levels), self.orders, strict=True)
        return [level for ends, order in steps for level in _levels_of_step(*ends, order)]

    def walk(self, x: torch.Tensor, draw: Draw) -> Walk:
        """From ``x`` at the first noise level to the samples; nothing is drawn."""
        ends = itertools.pairwise(self.levels)
        for step, ((sigma, sigma_next), order) in enumerate(zip(ends, self.orders, strict=True)):
            x = yield from _singlestep(x, sigma, sigma_next, order, step)
        return x


@dataclass(frozen=True)
class DPMMultistepConfig(_SolverConfig):
    """DPM-Solver++(2M): data predictions of this step and of the one before (arXiv 2211.01095, algorithm 2).

    ::

        x' = (sigma' / sigma) x + (1 − sigma' / sigma) E
        order 1   E = D                                                   D = D(x; sigma)
        order 2   E = D + (D − D_before) / (2 r)                          r = h_before / h

    Attributes:
        levels: sigma at the ends of the steps, ``[num_steps + 1]``, falling; the last may be 0, where x' = D.
        orders: 1 or 2 for each step; 1 for the first.
    """

    highest_order: ClassVar[int] = 2

    def __post_init__(self):
        super().__post_init__()
        if self.orders[0] != 1:
            raise ValueError(f"DPMMultistepConfig: the first step must be of order 1, got {self.orders[0]}")

    @classmethod
    def for_schedule(
        cls, schedule: Schedule, steps: int, *, spacing: str | None = None, denoise_to_zero: bool = False
    ) -> DPMMultistepConfig:
        """``steps`` steps, spaced as those of ``DDIMConfig.for_schedule``; ``denoise_to_zero`` adds one as there.

        The first is of order 1, and so are a last one to sigma = 0 and, as its authors found to be stable, the last
        of fewer than 15; the others are of order 2.
        """
        levels = _spaced(cls, schedule, steps, spacing, denoise_to_zero)
        before_zero = len(levels) - 1 - (levels[-1] == 0)
        orders = (1, *(2,) * (before_zero - 1))[:before_zero]
        if steps < FEW_STEPS:
            orders = (*orders[:-1], 1)[:before_zero]
        return cls(levels, (*orders, *(1,) * (len(levels) - 1 - before_zero)))

    def walk(self, x: torch.Tensor, draw: Draw) -> Walk:
        """From ``x`` at the first noise level to the samples; nothing is drawn."""
        before = sigma_before = None
        ends = itertools.pairwise(self.levels)
        for step, ((sigma, sigma_next), order) in enumerate(zip(ends, self.orders, strict=True)):
            denoised = yield Evaluation(x, sigma, step)
            estimate = denoised
            if order == 2:
                r = math.log(sigma_before / sigma) / math.log(sigma / sigma_next)
                estimate = denoised + (denoised - before) / (2 * r)
            ratio = sigma_next / sigma
            x = ratio * x + (1 - ratio) * estimate
            before, sigma_before = denoised, sigma
        return x


def _singlestep(x: torch.Tensor, sigma: float, sigma_next: float, order: int, step: int) -> Walk:
    """One step of ``DPMSinglestepConfig``."""

    def eps(u: torch.Tensor, level: float) -> Walk:
        denoised = yield Evaluation(u, level, step)
        return (u - denoised) / level

    def w(level: float) -> float:
        return (sigma - level) / math.log(sigma / level) - level

    inner = _levels_of_step(sigma, sigma_next, order)[1:]
    eps_0 = yield from eps(x, sigma)
    if order == 1:
        return x + (sigma_next - sigma) * eps_0
    eps_1 = yield from eps(x + (inner[0] - sigma) * eps_0, inner[0])
    if order == 2:
        return x + (sigma_next - sigma) * eps_1
    v = x + (inner[1] - sigma) * eps_0 - 2 * w(inner[1]) * (eps_1 - eps_0)
    eps_2 = yield from eps(v, inner[1])
    return x + (sigma_next - sigma) * eps_0 - 1.5 * w(sigma_next) * (eps_2 - eps_0)


def _levels_of_step(sigma: float, sigma_next: float, order: int) -> list[float]:
    """Where a singlestep solver evaluates."""
    return [sigma, *(between(sigma, sigma_next, j / order) for j in range(1, order))]


def _spaced(
    kind: type[_StepConfig], schedule: Schedule, steps: int, spacing: str | None, denoise_to_zero: bool
) -> tuple[float, ...]:
    """The noise levels of ``steps`` steps, and 0 where it is asked for."""
    levels = schedule.spaced(integer(kind.__name__, "steps", steps, 1), spacing)
    return (*levels, 0.0) if denoise_to_zero and levels[-1] > 0 else levels

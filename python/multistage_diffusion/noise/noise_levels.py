"""The noise levels a batch is trained at.

They are drawn on the host, so that the number of samples of each stage is known there. Three ways: each sample on its
own (``MixedNoise``), evenly spaced (``SystematicNoise``), stages in given shares (``StratifiedNoise``).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from multistage_diffusion.common.checks import are_shares
from multistage_diffusion.noise.distributions import LogLogistic, LogNormal, Uniform
from multistage_diffusion.noise.stages import Stages


@dataclass(frozen=True)
class NoiseLevels:
    """The noise levels of one batch, on the host.

    Attributes:
        sigma: float64 ``[B]``.
        stage: int64 ``[B]``.
        weight: float64 ``[B]``, multiplies the loss of each sample; 1 unless importance weights are on.
        counts: number of samples of each stage.
    """

    sigma: torch.Tensor
    stage: torch.Tensor
    weight: torch.Tensor
    counts: tuple[int, ...]


class _Noise:
    """Stages in sigma, and the distribution of sigma; default: EDM's."""

    def __init__(self, stages: Stages, distribution: LogNormal | LogLogistic | Uniform | None = None):
        stages.require_variable("sigma", type(self).__name__)
        self.stages = stages
        self.distribution = distribution or LogNormal()

    def shares(self) -> tuple[float, ...]:
        """The probability of each stage."""
        return self.stages.probabilities(self.distribution)


class MixedNoise(_Noise):
    """Noise levels as EDM draws them: every sample on its own from the distribution.

    Args:
        stages: the stages, in sigma.
        distribution: of sigma; default: ln sigma ~ N(P_mean, P_std²) with EDM's numbers.
    """

    def draw(self, batch_size: int, generator: torch.Generator) -> NoiseLevels:
        sigma = self.distribution.sample(batch_size, generator)
        stage = self.stages.assign(sigma)
        return NoiseLevels(sigma, stage, torch.ones_like(sigma), stage_counts(stage, len(self.stages)))


class _EvenlySpaced(_Noise):
    """Samples at the places (i + u)/B of [0, 1), i = 0 ... B − 1, with one u ~ U[0, 1) for the whole batch.

    [0, 1) is cut into segments, of which each belongs to a stage. A subclass sets their upper ends c_j, ascending to 1,
    and the stage of each.
    """

    _ends: torch.Tensor
    _stage_of: torch.Tensor

    def mixes(self, batch_size: int) -> dict[tuple[int, ...], float]:
        """All ``counts`` that a batch of this size can have, and the probability of each.

        Below c_j lie ceil(B c_j − u) samples. As u grows from 0 to 1, that drops by 1 where u reaches the fraction of
        B c_j, and nowhere else. So there are at most as many mixes as segments.

        A micro-batch, every M-th sample of a batch, is drawn as a batch of B/M samples: its mixes are ``mixes(B/M)``.

        Raises:
            ValueError: a batch size below 1.
        """
        ends = self._scaled_ends(batch_size)
        drops = torch.cat([torch.zeros(1), ends.frac(), torch.ones(1)]).unique()
        probabilities: dict[tuple[int, ...], float] = {}
        for first, last in itertools.pairwise(drops):
            stage = self._stage_of[_segments(ends, first, batch_size)]
            counts = stage_counts(stage, len(self.stages))
            probabilities[counts] = probabilities.get(counts, 0.0) + float(last - first)
        return probabilities

    def _scaled_ends(self, batch_size: int) -> torch.Tensor:
        """B c_j, rounded to multiples of 2^−40, so that what should be a whole number is one."""
        if batch_size < 1:
            raise ValueError(f"{type(self).__name__}: batch_size={batch_size} must be at least 1")
        return (batch_size * self._ends * 2.0**40).round() * 2.0**-40


def _segments(ends: torch.Tensor, u: torch.Tensor, batch_size: int) -> torch.Tensor:
    """The segment of each i + u, i < B, in [0, B), ascending. Exact: i + u itself would be rounded."""
    below = ends.floor() + (u < ends.frac())
    return torch.searchsorted(below, torch.arange(batch_size, dtype=torch.float64), right=True)


class SystematicNoise(_EvenlySpaced):
    """Evenly spaced quantiles with one random offset: sigma_i = F⁻¹((i + u)/B), i = 0 ... B − 1, u ~ U[0, 1).

    F is the distribution function of sigma. This is the low-discrepancy sampler of variational diffusion models (arXiv
    2107.00630), there for uniform times. A sample in a random place of the batch has exactly the
    distribution that ``MixedNoise`` draws from, and the expected loss is the same. But

    - a mean over the batch of what varies smoothly with sigma varies much less from batch to batch, and
    - stage k gets B p_k samples rounded up or down (a stage of m intervals: within m of B p_k), and a batch size sees
      no more mixes of counts than the stages have intervals in all, few enough to capture a CUDA graph for each:
      ``mixes`` lists them.

    The samples are in ascending order of sigma (so also of stages, where each is one interval). A strided part of the
    batch, as gradient accumulation takes it, is then evenly spaced itself. The images of a batch must come in random
    order, as in ``Trainer``; else an image's place would decide which noise levels it sees.

    Args:
        stages: the stages, in sigma.
        distribution: of sigma; default: ln sigma ~ N(P_mean, P_std²) with EDM's numbers.
    """

    def __init__(self, stages: Stages, distribution: LogNormal | LogLogistic | Uniform | None = None):
        super().__init__(stages, distribution)
        intervals = sorted((low, high, k) for k, stage in enumerate(stages.intervals) for low, high in stage)
        low, high, stage_of = zip(*intervals, strict=True)
        self._low, self._high, self._stage_of = _float64(low), _float64(high), torch.tensor(stage_of)
        self._ends = _float64([self.distribution.mass(low[0], end) for end in high])
        self._ends[-1] = 1.0  # whatever the rounding

    def draw(self, batch_size: int, generator: torch.Generator) -> NoiseLevels:
        u = torch.rand(1, dtype=torch.float64, generator=generator)
        ends = self._scaled_ends(batch_size)
        starts = torch.cat([torch.zeros(1), ends[:-1]])
        segment = _segments(ends, u, batch_size)
        quantile = (torch.arange(batch_size) + u - starts[segment]) / (ends - starts)[segment]
        sigma = self.distribution.inverse_cdf(quantile, self._low[segment], self._high[segment])
        stage = self._stage_of[segment]
        return NoiseLevels(sigma, stage, torch.ones_like(sigma), stage_counts(stage, len(self.stages)))


class StratifiedNoise(_EvenlySpaced):
    """Stages in given proportions, sigma inside of a stage from the truncated log-normal distribution.

    Under EDM's distribution 96 % of all samples fall into the first stage and the last one starves; this
    feeds each decoder its share. Stages are drawn systematically: of B samples, stage k gets B q_k of them,
    rounded up or down at random without bias (exactly B q_k where that is a whole number); ``mixes`` lists the
    counts that can occur.

    Args:
        stages: the stages.
        probabilities: q_k, the share of each stage; default: the same for all.
        distribution: of sigma; its mass of stage k is p_k.
        importance_weights: weigh each loss with p_k / q_k. The expected loss is then that of
            ``MixedNoise``, with a smaller variance in rare stages. Without, rare stages count for more in
            the shared encoder.

    Raises:
        ValueError: probabilities that are negative, of the wrong number, or do not sum to 1; a stage with
            q_k > 0 that the distribution never reaches; importance weights with a stage that is never drawn.
    """

    def __init__(
        self,
        stages: Stages,
        probabilities: Sequence[float] | None = None,
        distribution: LogNormal | LogLogistic | Uniform | None = None,
        importance_weights: bool = False,
    ):
        super().__init__(stages, distribution)
        n = len(stages)
        q = [1 / n] * n if probabilities is None else [float(v) for v in probabilities]
        if len(q) != n:
            raise ValueError(f"StratifiedNoise: {len(q)} probabilities {q} for {n} stage(s)")
        if not are_shares(q):
            raise ValueError(f"StratifiedNoise: probabilities must be at least 0 and sum to 1, got {q}")
        p = stages.probabilities(self.distribution)
        for k in range(n):
            if q[k] > 0 and p[k] == 0:
                raise ValueError(
                    f"StratifiedNoise: stage {k} {stages.describe(k)} has probability 0 "
                    f"under {self.distribution}"
                )
            if importance_weights and q[k] == 0 and p[k] > 0:
                raise ValueError(
                    "StratifiedNoise: importance weights need every stage to be drawn, "
                    f"but stage {k} has share 0"
                )
        self.probabilities = tuple(q)
        self._ends, self._stage_of = _float64(q).cumsum(0).clamp_max(1), torch.arange(n)
        self._ends[max(k for k in range(n) if q[k] > 0) :] = 1.0  # whatever the rounding
        self._weight = torch.ones(n, dtype=torch.float64)
        if importance_weights:
            self._weight = _float64([a / b if b else 0.0 for a, b in zip(p, q, strict=True)])
        self._tabulate_intervals()

    def shares(self) -> tuple[float, ...]:
        return self.probabilities

    def _tabulate_intervals(self) -> None:
        """Per stage: the ends of its intervals and their cumulative mass, padded to the longest union."""
        width = max(len(stage) for stage in self.stages.intervals)
        shape = (len(self.stages), width)
        self._low = torch.zeros(shape, dtype=torch.float64)
        self._high = torch.full(shape, math.inf, dtype=torch.float64)
        self._cumulative_mass = torch.ones(shape, dtype=torch.float64)
        for k, stage in enumerate(self.stages.intervals):
            masses = _float64([self.distribution.mass(low, high) for low, high in stage])
            used = len(stage)
            self._low[k, :used] = _float64([low for low, _ in stage])
            self._high[k, :used] = _float64([high for _, high in stage])
            self._cumulative_mass[k, :used] = masses.cumsum(0) / masses.sum().clamp_min(1e-300)
            self._cumulative_mass[k, used - 1 :] = 1.0

    def draw(self, batch_size: int, generator: torch.Generator) -> NoiseLevels:
        u = torch.rand(batch_size + 1, 2, dtype=torch.float64, generator=generator)
        stage = _segments(self._scaled_ends(batch_size), u[-1, 0], batch_size)
        mass = self._cumulative_mass[stage]
        piece = (u[:-1, :1] >= mass).sum(dim=1).clamp_max(mass.shape[1] - 1)
        sigma = self.distribution.inverse_cdf(u[:-1, 1], self._low[stage, piece], self._high[stage, piece])
        return NoiseLevels(sigma, stage, self._weight[stage], stage_counts(stage, len(self.stages)))


class RestagedNoise:
    """Noise levels as another draws them, for a network of other stages: a unified one, which is then trained on what
    a multi-stage one sees.

    Args:
        noise: draws them.
        stages: those of the network, in sigma.
    """

    def __init__(self, noise: MixedNoise | SystematicNoise | StratifiedNoise, stages: Stages):
        stages.require_variable("sigma", type(self).__name__)
        self.noise, self.stages, self.distribution = noise, stages, noise.distribution

    def shares(self) -> tuple[float, ...]:
        """The probability of each of the network's stages."""
        drawn, mass = self.noise.stages, self.distribution.mass
        density = [
            q / p if q else 0.0
            for q, p in zip(self.noise.shares(), drawn.probabilities(self.distribution), strict=True)
        ]
        both = [
            (own, weight * mass(max(low, first), min(high, last)))
            for own, stage in enumerate(self.stages.intervals)
            for low, high in stage
            for weight, other in zip(density, drawn.intervals, strict=True)
            for first, last in other
            if max(low, first) < min(high, last)
        ]
        return tuple(math.fsum(share for own, share in both if own == k) for k in range(len(self.stages)))

    def draw(self, batch_size: int, generator: torch.Generator) -> NoiseLevels:
        levels = self.noise.draw(batch_size, generator)
        stage = self.stages.assign(levels.sigma)
        return NoiseLevels(levels.sigma, stage, levels.weight, stage_counts(stage, len(self.stages)))


def _float64(values: Sequence[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def stage_counts(stage: torch.Tensor, num_stages: int) -> tuple[int, ...]:
    """Samples of each stage among ids on the host."""
    return tuple(torch.bincount(stage, minlength=num_stages).tolist())

"""The noise levels a batch is trained at.

They are drawn on the host, so that the number of samples of each stage is known there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .schedules import LogNormal
from .stages import Stages


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


class MixedNoise:
    """Noise levels as EDM draws them: ln sigma ~ N(P_mean, P_std²) for every sample on its own."""

    def __init__(self, stages: Stages, distribution: LogNormal | None = None):
        stages.require_variable("sigma", "MixedNoise")
        self.stages = stages
        self.distribution = distribution or LogNormal()

    def draw(self, batch_size: int, generator: torch.Generator) -> NoiseLevels:
        sigma = self.distribution.sample(batch_size, generator)
        stage = self.stages.assign(sigma)
        return NoiseLevels(sigma, stage, torch.ones_like(sigma), _counts(stage, len(self.stages)))


class StratifiedNoise:
    """Stages in given proportions, sigma inside of a stage from the truncated log-normal distribution.

    Under EDM's distribution 96 % of all samples fall into the first stage and the last one starves; this
    feeds each decoder its share. Stages are drawn systematically: of B samples, stage k gets B q_k of them,
    rounded up or down at random without bias (exactly B q_k where that is a whole number).

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
        distribution: LogNormal | None = None,
        importance_weights: bool = False,
    ):
        stages.require_variable("sigma", "StratifiedNoise")
        self.stages = stages
        self.distribution = distribution or LogNormal()
        n = len(stages)
        q = [1 / n] * n if probabilities is None else [float(v) for v in probabilities]
        if len(q) != n:
            raise ValueError(f"StratifiedNoise: {len(q)} probabilities {q} for {n} stage(s)")
        if any(not v >= 0 for v in q) or not math.isclose(math.fsum(q), 1, abs_tol=1e-6):
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
        self._cumulative_q = _float64(q).cumsum(0)
        self._cumulative_q[max(k for k in range(n) if q[k] > 0) :] = 1.0  # whatever the rounding
        self._weight = torch.ones(n, dtype=torch.float64)
        if importance_weights:
            self._weight = _float64([a / b if b else 0.0 for a, b in zip(p, q, strict=True)])
        self._tabulate_intervals()

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
        offset = u[-1, 0]
        position = (torch.arange(batch_size, dtype=torch.float64) + offset) / batch_size
        stage = torch.searchsorted(self._cumulative_q, position, right=True).clamp_max(len(self.stages) - 1)
        mass = self._cumulative_mass[stage]
        piece = (u[:-1, :1] >= mass).sum(dim=1).clamp_max(mass.shape[1] - 1)
        sigma = self.distribution.inverse_cdf(u[:-1, 1], self._low[stage, piece], self._high[stage, piece])
        return NoiseLevels(sigma, stage, self._weight[stage], _counts(stage, len(self.stages)))


def _float64(values: Sequence[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _counts(stage: torch.Tensor, num_stages: int) -> tuple[int, ...]:
    return tuple(torch.bincount(stage, minlength=num_stages).tolist())

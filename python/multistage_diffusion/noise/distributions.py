"""How noise levels are distributed in training.

A distribution has ``mass(low, high)``, ``sample(count, generator)``, ``inverse_cdf(u, low, high)`` and ``to_json()``.
All of them run on the host in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch

_SMALLEST_UNIFORM = 2.0**-54
_LARGEST_UNIFORM = 1.0 - 2.0**-53


def host64(values) -> torch.Tensor:
    """Floats, arrays or tensors as a float64 tensor on the CPU."""
    return torch.as_tensor(values, dtype=torch.float64, device="cpu")


def _above(low: torch.Tensor) -> torch.Tensor:
    """The least number above."""
    return torch.nextafter(low, torch.full_like(low, math.inf))


@dataclass(frozen=True)
class LogNormal:
    """ln sigma ~ N(P_mean, P_std²), the noise levels EDM trains on (arXiv 2206.00364, table 1)."""

    P_mean: float = -1.2
    P_std: float = 1.2

    def __post_init__(self):
        if not math.isfinite(self.P_mean):
            raise ValueError(f"LogNormal: P_mean={self.P_mean} is not a finite number")
        if not (math.isfinite(self.P_std) and self.P_std > 0):
            raise ValueError(f"LogNormal: P_std={self.P_std} must be a positive, finite number")

    def standard_score(self, sigma: float) -> float:
        """(ln sigma − P_mean) / P_std; −inf at sigma = 0, inf at sigma = inf."""
        if sigma <= 0:
            return -math.inf
        return (math.log(sigma) - self.P_mean) / self.P_std

    def mass(self, low: float, high: float) -> float:
        """P(low < sigma <= high), accurate in both tails."""
        a, b = self.standard_score(low), self.standard_score(high)
        if a > 0:  # the upper tail: differences of small complements, not of numbers close to 1
            a, b = -b, -a
        return 0.5 * (math.erfc(-b / math.sqrt(2)) - math.erfc(-a / math.sqrt(2)))

    def sample(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """``count`` noise levels, float64 on the CPU."""
        z = torch.randn(count, dtype=torch.float64, generator=generator)
        return (self.P_mean + self.P_std * z).exp()

    def inverse_cdf(self, u, low, high) -> torch.Tensor:
        """Quantiles of sigma given low < sigma <= high.

        Args:
            u: quantiles in [0, 1].
            low, high: ends of the interval of each u (broadcast against it).

        Returns:
            float64 tensor; every value satisfies low < sigma <= high and is positive and finite.
        """
        u = host64(u).clamp(_SMALLEST_UNIFORM, _LARGEST_UNIFORM)
        low, high = host64(low), host64(high)
        a = (low.log() - self.P_mean) / self.P_std  # ln 0 = −inf and ln inf = inf are the right limits
        b = (high.log() - self.P_mean) / self.P_std
        mirrored = a > 0  # work in the lower tail, where the normal CDF keeps its relative accuracy
        left = torch.where(mirrored, -b, a)
        right = torch.where(mirrored, -a, b)
        v = torch.where(mirrored, 1 - u, u)
        p_left, p_right = _normal_cdf(left), _normal_cdf(right)
        z = torch.special.ndtri(p_left + v * (p_right - p_left))
        z = torch.where(mirrored, -z, z)
        sigma = (self.P_mean + self.P_std * z).exp()
        return torch.minimum(torch.maximum(sigma, _above(low)), high)

    def to_json(self) -> dict:
        return {"P_mean": self.P_mean, "P_std": self.P_std}


@dataclass(frozen=True)
class LogLogistic:
    """sigma = scale t/(1 − t) with t ~ U(0, 1): the noise levels of flow matching at even times (arXiv 2210.02747).

    ``scale`` is the shift of the times, t' = scale t/(1 + (scale − 1) t), with sigma = t'/(1 − t') (arXiv 2403.03206).
    """

    scale: float = 1.0

    def __post_init__(self):
        if not 0 < self.scale < math.inf:
            raise ValueError(f"LogLogistic: scale={self.scale} must be positive and finite")

    def mass(self, low: float, high: float) -> float:
        """P(low < sigma <= high), accurate in both tails."""
        low = max(low, 0.0)
        if high <= low:
            return 0.0
        above = self.scale / (self.scale + low)
        return above if high == math.inf else above * ((high - low) / (self.scale + high))

    def sample(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """``count`` noise levels, float64 on the CPU."""
        u = torch.rand(count, dtype=torch.float64, generator=generator)
        return self.inverse_cdf(u, 0.0, math.inf)

    def inverse_cdf(self, u, low, high) -> torch.Tensor:
        """Quantiles of sigma given low < sigma <= high, as ``LogNormal.inverse_cdf``."""
        u = host64(u).clamp(_SMALLEST_UNIFORM, _LARGEST_UNIFORM)
        low, high = host64(low), host64(high)
        below, above = (1 / (1 + self.scale / end) for end in (low, high))  # P(sigma <= end)
        beyond, rest = (1 / (1 + end / self.scale) for end in (low, high))  # P(sigma > end)
        p, q = below + u * (above - below), beyond + u * (rest - beyond)
        sigma = self.scale * torch.where(p < 0.5, p / (1 - p), (1 - q) / q)
        return torch.minimum(torch.maximum(sigma, _above(low)), high)

    def to_json(self) -> dict:
        return {"scale": self.scale}


class _Evenly(Protocol):
    """What ``Uniform`` needs of a schedule."""

    name: str

    def uniform_cdf(self, sigma: torch.Tensor, t_min: float) -> torch.Tensor: ...

    def uniform_quantile(
        self, u: torch.Tensor, low: torch.Tensor, high: torch.Tensor, t_min: float
    ) -> torch.Tensor: ...


@dataclass(frozen=True)
class Uniform:
    """A schedule's variable, drawn evenly: the noise levels that score SDE and latent diffusion train on.

    Args:
        schedule: times of a continuous schedule, or all steps of a discrete one.
        t_min: lowest time of a continuous schedule; 1e-5 in score SDE (arXiv 2011.13456).
    """

    schedule: _Evenly
    t_min: float = 1e-5

    def __post_init__(self):
        if not 0 <= self.t_min < 1:
            raise ValueError(f"Uniform: t_min={self.t_min} must be at least 0 and below 1")
        self.schedule.uniform_cdf(host64(1.0), self.t_min)  # raises for one that is not drawn evenly

    def mass(self, low: float, high: float) -> float:
        """P(low < sigma <= high)."""
        first, last = (self.schedule.uniform_cdf(host64(end), self.t_min) for end in (low, high))
        return float(last - first)

    def sample(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """``count`` noise levels, float64 on the CPU."""
        u = torch.rand(count, dtype=torch.float64, generator=generator)
        return self.inverse_cdf(u, 0.0, math.inf)

    def inverse_cdf(self, u, low, high) -> torch.Tensor:
        """Quantiles of sigma given low < sigma <= high, as ``LogNormal.inverse_cdf``."""
        u = host64(u).clamp(_SMALLEST_UNIFORM, _LARGEST_UNIFORM)
        return self.schedule.uniform_quantile(u, host64(low), host64(high), self.t_min)

    def to_json(self) -> dict:
        return {"uniform": self.schedule.name, "t_min": self.t_min}


def _normal_cdf(z: torch.Tensor) -> torch.Tensor:
    """As ``torch.special.ndtr``, whose relative error grows to 1e-12 at z = −4; this one keeps 1e-15."""
    return 0.5 * torch.erfc(-z / math.sqrt(2))

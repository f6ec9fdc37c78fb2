"""Noise levels: how they are distributed in training, how a sampler steps through them, and conversions.

sigma is the standard deviation of the noise in units of the data (data in [-1, 1]), as in EDM (arXiv
2206.00364). Everything here runs on the host in float64; functions take floats, arrays or tensors and
return float64 CPU tensors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch

from multistage_diffusion.common.checks import integer

_SMALLEST_UNIFORM = 2.0**-54
_LARGEST_UNIFORM = 1.0 - 2.0**-53


def _host64(values) -> torch.Tensor:
    return torch.as_tensor(values, dtype=torch.float64, device="cpu")


# ---------------------------------------------------------------------- distribution of training noise levels


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
        u = _host64(u).clamp(_SMALLEST_UNIFORM, _LARGEST_UNIFORM)
        low, high = _host64(low), _host64(high)
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
        above_low = torch.nextafter(low, torch.full_like(low, math.inf))
        return torch.minimum(torch.maximum(sigma, above_low), high)

    def to_json(self) -> dict:
        return {"P_mean": self.P_mean, "P_std": self.P_std}


@dataclass(frozen=True)
class Uniform:
    """A schedule's variable, drawn evenly: the noise levels that score SDE and latent diffusion train on.

    Args:
        schedule: times of a continuous schedule, or all steps of a discrete one.
        t_min: lowest time of a continuous schedule; 1e-5 in score SDE (arXiv 2011.13456).
    """

    schedule: Schedule
    t_min: float = 1e-5

    def __post_init__(self):
        if self.schedule.variable not in ("t", "step"):
            raise ValueError(f"Uniform: needs a schedule in t or step, got one in {self.schedule.variable}")
        if not 0 <= self.t_min < 1:
            raise ValueError(f"Uniform: t_min={self.t_min} must be at least 0 and below 1")

    def mass(self, low: float, high: float) -> float:
        """P(low < sigma <= high)."""
        first, last = self._quantiles(low, high)
        return float(last - first)

    def sample(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """``count`` noise levels, float64 on the CPU."""
        u = torch.rand(count, dtype=torch.float64, generator=generator)
        return self.inverse_cdf(u, 0.0, math.inf)

    def inverse_cdf(self, u, low, high) -> torch.Tensor:
        """Quantiles of sigma given low < sigma <= high, as ``LogNormal.inverse_cdf``."""
        u = _host64(u).clamp(_SMALLEST_UNIFORM, _LARGEST_UNIFORM)
        first, last = self._quantiles(low, high)
        quantile = first + u * (last - first)
        if self.schedule.variable == "step":
            steps = len(self.schedule.sigmas)
            # What rounding may do to a quantile at the end of an interval must not reach the next step.
            step = torch.minimum((quantile * steps).floor(), (last * steps).round() - 1)
            return self.schedule.sigmas[torch.maximum(step, (first * steps).round()).long()]
        sigma = self.schedule.sigma(self.t_min + quantile * (1 - self.t_min))
        low, high = _host64(low), _host64(high)
        return torch.minimum(torch.maximum(sigma, torch.nextafter(low, torch.full_like(low, math.inf))), high)

    def _quantiles(self, low, high) -> tuple[torch.Tensor, torch.Tensor]:
        """P(sigma <= low) and P(sigma <= high)."""
        return self._cdf(_host64(low)), self._cdf(_host64(high))

    def _cdf(self, sigma: torch.Tensor) -> torch.Tensor:
        if self.schedule.variable == "step":
            sigmas = self.schedule.sigmas
            return torch.searchsorted(sigmas, sigma.contiguous(), right=True).double() / len(sigmas)
        ends = self.schedule.sigma([self.t_min, 1.0])
        t = self.schedule.value(sigma.clamp(ends[0], ends[1]))
        return ((t - self.t_min) / (1 - self.t_min)).clamp(0, 1)

    def to_json(self) -> dict:
        return {"uniform": self.schedule.name, "t_min": self.t_min}


def _normal_cdf(z: torch.Tensor) -> torch.Tensor:
    """As ``torch.special.ndtr``, whose relative error grows to 1e-12 at z = −4; this one keeps 1e-15."""
    return 0.5 * torch.erfc(-z / math.sqrt(2))


# ---------------------------------------------------------------------------- discretisation


def edm_sigmas(
    num_steps: int = 18, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> torch.Tensor:
    """The noise levels of EDM's samplers (arXiv 2206.00364, eq. 5).

    sigma_i = (sigma_max^(1/rho) + i/(N−1) (sigma_min^(1/rho) − sigma_max^(1/rho)))^rho for i < N, and
    sigma_N = 0.

    Returns:
        float64 CPU tensor ``[num_steps + 1]``, decreasing from sigma_max through sigma_min to 0.

    Raises:
        TypeError: steps that are no integer.
        ValueError: no step, ends that are no noise levels or fall the wrong way, or a rho with which float64 does not
            tell the levels between apart.
    """
    num_steps = integer("edm_sigmas", "num_steps", num_steps, 1)
    if not 0 < sigma_min <= sigma_max < math.inf:
        raise ValueError(
            f"edm_sigmas: sigma_min={sigma_min} and sigma_max={sigma_max} must satisfy 0 < min <= max < inf"
        )
    if not 0 < rho < math.inf:
        raise ValueError(f"edm_sigmas: rho={rho} must be positive and finite")
    try:
        start, end = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    except OverflowError:
        start, end = math.inf, 0.0
    i = torch.arange(num_steps, dtype=torch.float64)
    sigmas = ((start + i / max(num_steps - 1, 1) * (end - start)) ** rho).clamp(sigma_min, sigma_max)
    sigmas[0] = sigma_max
    if num_steps > 1:
        sigmas[-1] = sigma_min
    falling = sigma_min == sigma_max or bool((sigmas.diff() < 0).all())
    if not (falling and bool(sigmas.isfinite().all())):
        raise ValueError(
            f"edm_sigmas: with rho={rho} the {num_steps} noise levels from sigma_max={sigma_max} to "
            f"sigma_min={sigma_min} do not fall in float64; 7 is usual"
        )
    return torch.cat([sigmas, torch.zeros(1, dtype=torch.float64)])


# ---------------------------------------------------------------------------- VP


def vp_sigma(t, beta_d: float = 19.9, beta_min: float = 0.1) -> torch.Tensor:
    """Noise level of the VP SDE: sigma(t)² = exp(beta_d t²/2 + beta_min t) − 1, t in [0, 1]."""
    t = _host64(t)
    if bool((t.isnan() | (t < 0)).any()):
        raise ValueError(f"vp_sigma: times must be at least 0; got {float(t.min())}")
    return torch.expm1(beta_d * t * t / 2 + beta_min * t).sqrt()


def vp_t(sigma, beta_d: float = 19.9, beta_min: float = 0.1) -> torch.Tensor:
    """Time of the VP SDE at which the noise level is sigma; the inverse of ``vp_sigma``."""
    sigma = _host64(sigma)
    if bool((sigma.isnan() | (sigma < 0)).any()):
        raise ValueError(f"vp_t: noise levels must be at least 0; got {float(sigma.min())}")
    L = torch.log1p(sigma * sigma)
    return 2 * L / (beta_min + (beta_min * beta_min + 2 * beta_d * L).sqrt())


# ---------------------------------------------------------------------------- conversions


def c_noise_from_sigma(sigma) -> torch.Tensor:
    """c_noise = ln(sigma) / 4, what an EDM network is told about the noise level."""
    return _host64(sigma).log() / 4


def sigma_from_c_noise(c_noise) -> torch.Tensor:
    """sigma = exp(4 c_noise), the inverse of ``c_noise_from_sigma``."""
    return (4 * _host64(c_noise)).exp()


def log_snr(sigma) -> torch.Tensor:
    """ln of the signal-to-noise ratio of powers, alpha²/(alpha sigma)² = 1/sigma²: −2 ln sigma."""
    return -2 * _host64(sigma).log()


def sigma_from_log_snr(value) -> torch.Tensor:
    """sigma = exp(−log_snr / 2), the inverse of ``log_snr``."""
    return (-_host64(value) / 2).exp()


# ---------------------------------------------------------------------------- schedules by name


class Schedule:
    """How a family of models names its noise levels: a variable that grows with sigma.

    Attributes:
        name: what the command line calls it.
        variable: the name of the variable, as in ``Stages``.
        domain: what stages in this variable cover. Of steps they cover 0 to their number, one beyond the last.
    """

    name: str
    variable: str
    domain: tuple[float, float]

    def sigma(self, value) -> torch.Tensor:
        """The noise level of a value of the variable."""
        raise NotImplementedError

    def value(self, sigma) -> torch.Tensor:
        """The inverse of ``sigma``."""
        raise NotImplementedError

    def cut(self, sigma) -> torch.Tensor:
        """The cut at ``sigma`` in this variable: what lies at or below the one lies at or below the other."""
        return self.value(sigma)

    def holds(self, low: float, high: float) -> bool:
        """Whether any value lies in (low, high]; the lowest of all belongs to the interval that begins there."""
        if self.variable != "step":
            return low < high
        lowest, end = self.domain
        return min(math.floor(high), end - 1) > (math.floor(low) if low > lowest else -1)

    def grid(self, points: int = 21) -> torch.Tensor:
        """Ascending values that represent all noise levels, for the clustering."""
        raise NotImplementedError


@dataclass(frozen=True)
class VP(Schedule):
    """The variance-preserving SDE, sigma(t)² = exp(beta_d t²/2 + beta_min t) − 1 (arXiv 2011.13456).

    Its networks are told (M − 1) t, as if there were M steps; epsilon_t is the lowest time of their training.
    """

    beta_d: float = 19.9
    beta_min: float = 0.1
    M: int = 1000
    epsilon_t: float = 1e-5
    name = "vp"
    variable = "t"
    domain = (0.0, 1.0)

    def __post_init__(self):
        object.__setattr__(self, "M", _checked_steps("VP", "M", self.M))
        if not 0 <= self.epsilon_t < 1:
            raise ValueError(f"VP: epsilon_t={self.epsilon_t} must be at least 0 and below 1")
        if not (0 <= self.beta_d < math.inf and 0 < self.beta_min < math.inf):
            raise ValueError(
                f"VP: beta_d={self.beta_d} must be at least 0 and beta_min={self.beta_min} above 0, both finite"
            )
        _check_finite(self, self.sigma(1.0))

    def sigma(self, value) -> torch.Tensor:
        return vp_sigma(value, self.beta_d, self.beta_min)

    def value(self, sigma) -> torch.Tensor:
        return vp_t(sigma, self.beta_d, self.beta_min)

    def grid(self, points: int = 21) -> torch.Tensor:
        """t = 0.001 + k/(points − 1), and 1: for 21 points the grid of arXiv 2312.09181.

        More than 1000 points, of which that would put several at 1, are evenly spaced from 0.001 to 1.
        """
        points = integer("grid", "points", points, 2)
        share = torch.arange(points, dtype=torch.float64) / (points - 1)
        return 0.001 + 0.999 * share if points > 1000 else (0.001 + share).clamp(max=1)


@dataclass(frozen=True)
class VE(Schedule):
    """The variance-exploding SDE, sigma(t) = sigma_min (sigma_max/sigma_min)^t (arXiv 2011.13456)."""

    sigma_min: float = 0.01
    sigma_max: float = 50.0
    name = "ve"
    variable = "t"
    domain = (0.0, 1.0)

    def __post_init__(self):
        _check_ends("VE", self.sigma_min, self.sigma_max)

    def sigma(self, value) -> torch.Tensor:
        t = _host64(value)
        return self.sigma_min ** (1 - t) * self.sigma_max**t

    def value(self, sigma) -> torch.Tensor:
        return (_host64(sigma) / self.sigma_min).log() / math.log(self.sigma_max / self.sigma_min)

    def grid(self, points: int = 21) -> torch.Tensor:
        points = integer("grid", "points", points, 2)
        return torch.linspace(0, 1, points, dtype=torch.float64)


@dataclass(frozen=True)
class EDM(Schedule):
    """EDM names noise levels by sigma itself (arXiv 2206.00364); its samplers use 0.002 to 80."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    name = "edm"
    variable = "sigma"
    domain = (0.0, math.inf)

    def __post_init__(self):
        _check_ends("EDM", self.sigma_min, self.sigma_max)

    def sigma(self, value) -> torch.Tensor:
        return _host64(value)

    def value(self, sigma) -> torch.Tensor:
        return _host64(sigma)

    def grid(self, points: int = 21) -> torch.Tensor:
        """Evenly spaced in ln sigma."""
        points = integer("grid", "points", points, 2)
        share = torch.linspace(0, 1, points, dtype=torch.float64)
        return self.sigma_min ** (1 - share) * self.sigma_max**share


class DiscreteSchedule(Schedule):
    """A schedule of whole steps, each of which has a noise level.

    Between the steps ln sigma is interpolated, so that ``value`` is the inverse of ``sigma``; ``cut`` is a whole step.

    Attributes:
        num_steps: how many there are.
        sigmas: sigma of steps 0 to num_steps − 1, float64, ascending.
    """

    variable = "step"
    num_steps: int
    sigmas: torch.Tensor

    @property
    def domain(self) -> tuple[float, float]:
        return 0.0, float(self.num_steps)

    def sigma(self, value) -> torch.Tensor:
        step = _host64(value)
        if not bool(((step >= 0) & (step <= self.num_steps - 1)).all()):
            raise ValueError(
                f"{type(self).__name__}.sigma: steps must lie within 0 and {self.num_steps - 1}, got {value}"
            )
        low = step.floor().long()
        high = (low + 1).clamp(max=self.num_steps - 1)
        fraction = step - low
        between = self.sigmas[low] * (self.sigmas[high] / self.sigmas[low]) ** fraction
        return torch.where(fraction == 0, self.sigmas[low], between)

    def value(self, sigma) -> torch.Tensor:
        """The real-valued step; noise levels beyond the first and last one get that step."""
        sigma = _host64(sigma).clamp(self.sigmas[0], self.sigmas[-1])
        high = torch.searchsorted(self.sigmas, sigma.contiguous()).clamp(1, self.num_steps - 1)
        low = high - 1
        step = low + (sigma / self.sigmas[low]).log() / (self.sigmas[high] / self.sigmas[low]).log()
        return torch.where(sigma == self.sigmas[high], high.double(), step)

    def cut(self, sigma) -> torch.Tensor:
        """The last step whose noise level is at most ``sigma``; step 0 always is below a cut."""
        count = torch.searchsorted(self.sigmas, _host64(sigma).contiguous(), right=True)
        return (count - 1).clamp(min=0).double()

    def grid(self, points: int = 21) -> torch.Tensor:
        """Whole steps; at most as many as there are."""
        points = integer("grid", "points", points, 2)
        if points > self.num_steps:
            raise ValueError(
                f"grid: points={points} must be at most the {self.num_steps} steps of {self.name}"
            )
        return torch.linspace(0, self.num_steps - 1, points, dtype=torch.float64).round()


@dataclass(frozen=True)
class LDM(DiscreteSchedule):
    """The discrete steps of latent diffusion (arXiv 2112.10752): sqrt(beta) rises evenly from step 0 on.

    With alpha_bar_k = prod_{j<=k} (1 − beta_j), sigma_k² = (1 − alpha_bar_k)/alpha_bar_k. Where ``betas`` are given,
    one per step, they count in place of the other fields.
    """

    linear_start: float = 0.0015
    linear_end: float = 0.0195
    num_steps: int = 1000
    betas: tuple[float, ...] | None = None
    name = "ldm"

    def __post_init__(self):
        if self.betas is not None:
            object.__setattr__(self, "betas", tuple(map(float, self.betas)))
            object.__setattr__(self, "num_steps", len(self.betas))
            if not all(0 < beta < 1 for beta in self.betas):
                raise ValueError("LDM: every one of betas must lie between 0 and 1")
        if not 0 < self.linear_start <= self.linear_end < 1:
            raise ValueError(
                f"LDM: linear_start={self.linear_start} and linear_end={self.linear_end} must satisfy "
                "0 < start <= end < 1"
            )
        object.__setattr__(self, "num_steps", _checked_steps("LDM", "num_steps", self.num_steps))

    @cached_property
    def sigmas(self) -> torch.Tensor:
        """sigma of steps 0 to num_steps − 1, float64."""
        if self.betas is not None:
            beta = torch.tensor(self.betas, dtype=torch.float64)
        else:
            ends = math.sqrt(self.linear_start), math.sqrt(self.linear_end)
            beta = torch.linspace(*ends, self.num_steps, dtype=torch.float64).square()
        return _check_finite(self, torch.expm1(-torch.log1p(-beta).cumsum(0)).sqrt())


@dataclass(frozen=True)
class IDDPM(DiscreteSchedule):
    """The steps of improved DDPM (arXiv 2102.09672) as EDM counts them (arXiv 2206.00364, table 1).

    With alpha_bar_j = sin²(pi j / (2 M (C_2 + 1))), u_M = 0 and
    u_{j−1}² + 1 = (u_j² + 1)/max(alpha_bar_{j−1}/alpha_bar_j, C_1); sigma of step k is u_{M−1−k}.
    """

    C_1: float = 0.001
    C_2: float = 0.008
    M: int = 1000
    name = "iddpm"

    def __post_init__(self):
        object.__setattr__(self, "M", _checked_steps("IDDPM", "M", self.M))
        if not (0 < self.C_1 < 1 and 0 <= self.C_2 < math.inf):
            raise ValueError(
                f"IDDPM: 0 < C_1 < 1 and 0 <= C_2 < inf are needed, got {self.C_1} and {self.C_2}"
            )

    @property
    def num_steps(self) -> int:
        return self.M

    @cached_property
    def sigmas(self) -> torch.Tensor:
        """sigma of steps 0 to M − 1, float64."""
        j = torch.arange(self.M, -1, -1, dtype=torch.float64)
        alpha_bar = (math.pi / 2 * j / (self.M * (self.C_2 + 1))).sin().square()
        ratio = (alpha_bar[1:] / alpha_bar[:-1]).clamp(min=self.C_1)
        return _check_finite(self, torch.expm1(-ratio.log().cumsum(0)).sqrt())

    def nearest(self, sigma) -> torch.Tensor:
        """The step whose noise level is nearest to sigma, the higher one of two; −1 where u_M = 0 is."""
        levels = torch.cat([torch.zeros(1, dtype=torch.float64), self.sigmas])
        middles = (levels[1:] + levels[:-1]) / 2
        return torch.searchsorted(middles, _host64(sigma).contiguous(), right=True).double() - 1


SCHEDULES: dict[str, type[Schedule]] = {kind.name: kind for kind in (VP, VE, EDM, LDM)}


def _check_finite(schedule: Schedule, sigmas: torch.Tensor) -> torch.Tensor:
    """The noise levels; raises ValueError where float64 cannot hold them."""
    if not bool(sigmas.isfinite().all()):
        raise ValueError(f"{schedule} has noise levels that float64 cannot hold; take smaller betas")
    return sigmas


def _check_ends(schedule: str, sigma_min: float, sigma_max: float) -> None:
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(
            f"{schedule}: sigma_min={sigma_min} and sigma_max={sigma_max} must satisfy 0 < min < max < inf"
        )


def _checked_steps(user: str, name: str, value: int, most: int = 1_000_000) -> int:
    """A number of steps: each takes memory."""
    if (steps := integer(user, name, value, 2)) > most:
        raise ValueError(f"{user}: {name}={steps} must be at most {most}")
    return steps

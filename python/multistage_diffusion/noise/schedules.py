"""Noise schedules: what each family of models calls a noise level, and what follows from that.

sigma is the standard deviation of the noise in units of the data (data in [-1, 1]), as in EDM (arXiv
2206.00364). Everything here runs on the host in float64; functions take floats, arrays or tensors and
return float64 CPU tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch

from multistage_diffusion.common.checks import integer, one_of
from multistage_diffusion.noise.distributions import LogLogistic, LogNormal, Uniform, host64
from multistage_diffusion.noise.levels import between, edm_sigmas, vp_sigma, vp_t

SPACINGS = ("own", "karras", "log-snr")


class Schedule:
    """How a family of models names its noise levels, and what follows from that: a variable that grows with sigma.

    Attributes:
        name: what the command line calls it.
        variable: the name of the variable, as in ``Stages``.
        domain: what stages in this variable cover. Of steps they cover 0 to their number, one beyond the last.
        ends: the first and the last value that a sampler of the family uses.
        spacing: how its steps are spaced between them where nothing else is asked for, one of ``SPACINGS``.
        sampler: the sampler of the published results (arXiv 2312.09181).
        predictions: what a network may predict, the usual one first.
        settings: the settings of a training run that are the schedule's or its distribution's.
        P_mean, P_std: ln sigma ~ N(P_mean, P_std²) in training, where the family draws it so and nothing else is asked
            for.
        sums_loss: the loss of a sample is the sum over its channels and pixels, not their mean.
    """

    name: ClassVar[str]
    variable: ClassVar[str]
    domain: tuple[float, float]
    ends: tuple[float, float]
    spacing: ClassVar[str] = "own"
    sampler: ClassVar[str]
    predictions: ClassVar[tuple[str, ...]] = ("epsilon", "x0", "v")
    settings: ClassVar[tuple[str, ...]] = ()
    P_mean: ClassVar[float] = -1.2
    P_std: ClassVar[float] = 1.2
    sums_loss: ClassVar[bool] = False

    # ------------------------------------------------------------------ noise levels

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
        return low < high

    def levels(self) -> tuple[float, float]:
        """The lowest and the highest noise level that there is."""
        return float(self.sigma(self.domain[0])), float(self.sigma(self.domain[1]))

    def grid(self, points: int = 21) -> torch.Tensor:
        """Ascending values that represent all noise levels, for the clustering."""
        raise NotImplementedError

    def spaced(self, steps: int, spacing: str | None = None) -> tuple[float, ...]:
        """``[steps + 1]`` falling noise levels, from the first to the last of ``ends``.

        Args:
            steps: at least 1.
            spacing: "own": evenly in the variable; "karras": in sigma^(1/7), see ``edm_sigmas``; "log-snr": in
                ln sigma. Default: the schedule's.

        Raises:
            ValueError: an unknown spacing.
        """
        spacing = self.spacing if spacing is None else spacing
        one_of("spaced", "spacing", spacing, SPACINGS)
        if spacing == "own":
            return self.evenly(steps)
        sigma_max, sigma_min = self._spacing_ends()
        if spacing == "karras":
            return tuple(edm_sigmas(steps + 1, sigma_min, sigma_max)[:-1].tolist())
        inner = (between(sigma_max, sigma_min, i / steps) for i in range(1, steps))
        return (sigma_max, *inner, sigma_min)

    def evenly(self, steps: int) -> tuple[float, ...]:
        """``[steps + 1]`` noise levels, evenly spaced in the variable between ``ends``."""
        return tuple(self.sigma(torch.linspace(*self.ends, steps + 1, dtype=torch.float64)).tolist())

    def _spacing_ends(self) -> tuple[float, float]:
        """The highest and the lowest noise level of the other spacings; both are positive."""
        sigma_max, sigma_min = self.sigma(self.ends).tolist()
        return sigma_max, sigma_min

    def label(self) -> str:
        """The variable, as a plot names it."""
        return f"{self.variable} ({self.name})"

    # ------------------------------------------------------------------ what its networks see and predict

    def c_noise(self, sigma: torch.Tensor) -> torch.Tensor:
        """What a network is told of a noise level (arXiv 2206.00364, table 1)."""
        raise NotImplementedError

    def scale(self, sigma: torch.Tensor) -> torch.Tensor:
        """s: a network sees s x, where x = y + sigma n. Keeps the variance, unless the schedule says otherwise."""
        return (1 + sigma * sigma).rsqrt()

    def skip_and_out(self, prediction: str, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """c_skip and c_out of D(x; sigma) = c_skip x + c_out F, for one of ``predictions``."""
        s = self.scale(sigma)
        return {
            "epsilon": (torch.ones_like(sigma), -sigma),
            "x0": (torch.zeros_like(sigma), torch.ones_like(sigma)),
            "v": (s * s, -s * sigma),
        }[prediction]

    # ------------------------------------------------------------------ training

    def training_distribution(self, settings: Mapping[str, object]) -> LogNormal | LogLogistic | Uniform:
        """The noise levels that the family trains on: its variable, drawn evenly.

        Args:
            settings: of the run; those of ``self.settings`` count.
        """
        return Uniform(self)

    def uniform_cdf(self, sigma: torch.Tensor, t_min: float) -> torch.Tensor:
        """P(level <= sigma) where the variable is drawn evenly, times from ``t_min`` on."""
        raise ValueError(f"Uniform: needs a schedule in t or step, got one in {self.variable}")

    def uniform_quantile(
        self, u: torch.Tensor, low: torch.Tensor, high: torch.Tensor, t_min: float
    ) -> torch.Tensor:
        """Quantiles of the levels with low < sigma <= high, where the variable is drawn evenly."""
        raise NotImplementedError


class TimeSchedule(Schedule):
    """A schedule of times from 0 to 1."""

    variable = "t"
    domain = (0.0, 1.0)
    ends = (1.0, 1e-3)
    sampler = "dpm-singlestep"

    def uniform_cdf(self, sigma: torch.Tensor, t_min: float) -> torch.Tensor:
        ends = self.sigma([t_min, 1.0])
        t = self.value(sigma.clamp(ends[0], ends[1]))
        return ((t - t_min) / (1 - t_min)).clamp(0, 1)

    def uniform_quantile(
        self, u: torch.Tensor, low: torch.Tensor, high: torch.Tensor, t_min: float
    ) -> torch.Tensor:
        first, last = self.uniform_cdf(low, t_min), self.uniform_cdf(high, t_min)
        sigma = self.sigma(t_min + (first + u * (last - first)) * (1 - t_min))
        above_low = torch.nextafter(low, torch.full_like(low, math.inf))
        return torch.minimum(torch.maximum(sigma, above_low), high)


@dataclass(frozen=True)
class VP(TimeSchedule):
    """The variance-preserving SDE, sigma(t)² = exp(beta_d t²/2 + beta_min t) − 1 (arXiv 2011.13456).

    Its networks are told (M − 1) t, as if there were M steps; epsilon_t is the lowest time of their training.
    """

    beta_d: float = 19.9
    beta_min: float = 0.1
    M: int = 1000
    epsilon_t: float = 1e-5
    name = "vp"

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

    def c_noise(self, sigma: torch.Tensor) -> torch.Tensor:
        """(M − 1) t."""
        return (self.M - 1) * self.value(sigma)

    def grid(self, points: int = 21) -> torch.Tensor:
        """t = 0.001 + k/(points − 1), and 1: for 21 points the grid of arXiv 2312.09181.

        More than 1000 points, of which that would put several at 1, are evenly spaced from 0.001 to 1.
        """
        points = integer("grid", "points", points, 2)
        share = torch.arange(points, dtype=torch.float64) / (points - 1)
        return 0.001 + 0.999 * share if points > 1000 else (0.001 + share).clamp(max=1)


@dataclass(frozen=True)
class VE(TimeSchedule):
    """The variance-exploding SDE, sigma(t) = sigma_min (sigma_max/sigma_min)^t (arXiv 2011.13456).

    Its networks see x as it is, are told ln(sigma / 2), and predict −n where others predict n.
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0
    name = "ve"
    predictions = ("epsilon", "x0")

    def __post_init__(self):
        _check_ends("VE", self.sigma_min, self.sigma_max)

    def sigma(self, value) -> torch.Tensor:
        t = host64(value)
        return self.sigma_min ** (1 - t) * self.sigma_max**t

    def value(self, sigma) -> torch.Tensor:
        return (host64(sigma) / self.sigma_min).log() / math.log(self.sigma_max / self.sigma_min)

    def c_noise(self, sigma: torch.Tensor) -> torch.Tensor:
        return (sigma / 2).log()

    def scale(self, sigma: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(sigma)

    def skip_and_out(self, prediction: str, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        skip, out = super().skip_and_out(prediction, sigma)
        return skip, -out if prediction == "epsilon" else out

    def grid(self, points: int = 21) -> torch.Tensor:
        points = integer("grid", "points", points, 2)
        return torch.linspace(0, 1, points, dtype=torch.float64)


@dataclass(frozen=True)
class FlowMatching(TimeSchedule):
    """Straight paths from data to noise, x_t = (1 − t) y + t n, so sigma(t) = t/(1 − t) (arXiv 2209.03003, 2210.02747).

    Networks see x_t, are told 1000 t, and predict the velocity n − y ("v").

    Attributes:
        shift: times are drawn and stepped through as shift t/(1 + (shift − 1) t), more of them where there is more
            noise (arXiv 2403.03206); that multiplies sigma with ``shift``.
    """

    shift: float = 1.0
    name = "flow"
    ends = (0.999, 0.0)
    sampler = "ddim"
    predictions = ("v", "epsilon", "x0")
    settings = ("shift", "time_sampling", "P_mean", "P_std")
    P_mean = 0.0
    P_std = 1.0

    def __post_init__(self):
        if not 0 < self.shift < math.inf:
            raise ValueError(f"FlowMatching: shift={self.shift} must be positive and finite")

    def sigma(self, value) -> torch.Tensor:
        t = host64(value)
        return t / (1 - t)

    def value(self, sigma) -> torch.Tensor:
        return 1 / (1 + 1 / host64(sigma))

    def shifted(self, t) -> torch.Tensor:
        """The times that evenly spaced ones become."""
        t = host64(t)
        return self.shift * t / (1 + (self.shift - 1) * t)

    def c_noise(self, sigma: torch.Tensor) -> torch.Tensor:
        return 1000 * self.value(sigma)

    def scale(self, sigma: torch.Tensor) -> torch.Tensor:
        """1 − t."""
        return 1 / (1 + sigma)

    def skip_and_out(self, prediction: str, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of "v": D = x_t − t F."""
        if prediction == "v":
            s = self.scale(sigma)
            return s, -s * sigma
        return super().skip_and_out(prediction, sigma)

    def evenly(self, steps: int) -> tuple[float, ...]:
        times = self.shifted(torch.linspace(*self.ends, steps + 1, dtype=torch.float64))
        return tuple(self.sigma(times).tolist())

    def _spacing_ends(self) -> tuple[float, float]:
        """Of the shifted times 0.999 and 0.001."""
        sigma_max, sigma_min = self.sigma(self.shifted([self.ends[0], 1 - self.ends[0]])).tolist()
        return sigma_max, sigma_min

    def training_distribution(self, settings: Mapping[str, object]) -> LogNormal | LogLogistic:
        """Of shifted times whose logits are N(P_mean, P_std²) ("logit-normal"), or that are even before ("uniform")."""
        if settings["time_sampling"] == "uniform":
            return LogLogistic(self.shift)
        return LogNormal(math.log(self.shift) + settings["P_mean"], settings["P_std"])

    def grid(self, points: int = 21) -> torch.Tensor:
        """Evenly spaced times from 0.001 to 0.999, shifted."""
        points = integer("grid", "points", points, 2)
        return self.shifted(torch.linspace(0.001, 0.999, points, dtype=torch.float64))


@dataclass(frozen=True)
class EDM(Schedule):
    """EDM names noise levels by sigma itself (arXiv 2206.00364); its samplers use 0.002 to 80."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    name = "edm"
    variable = "sigma"
    domain = (0.0, math.inf)
    spacing = "karras"
    sampler = "heun"
    predictions = ("epsilon",)  # its preconditioning says what F is
    settings = ("P_mean", "P_std", "sigma_data")
    sums_loss = True

    @property
    def ends(self) -> tuple[float, float]:
        return self.sigma_max, self.sigma_min

    def __post_init__(self):
        _check_ends("EDM", self.sigma_min, self.sigma_max)

    def sigma(self, value) -> torch.Tensor:
        return host64(value)

    def value(self, sigma) -> torch.Tensor:
        return host64(sigma)

    def label(self) -> str:
        return "Noise level sigma"

    def c_noise(self, sigma: torch.Tensor) -> torch.Tensor:
        return sigma.log() / 4

    def training_distribution(self, settings: Mapping[str, object]) -> LogNormal:
        return LogNormal(settings["P_mean"], settings["P_std"])

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
    sampler = "dpm-multistep"
    num_steps: int
    sigmas: torch.Tensor

    @property
    def domain(self) -> tuple[float, float]:
        return 0.0, float(self.num_steps)

    @property
    def ends(self) -> tuple[float, float]:
        return self.num_steps - 1.0, 0.0

    def sigma(self, value) -> torch.Tensor:
        step = host64(value)
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
        sigma = host64(sigma).clamp(self.sigmas[0], self.sigmas[-1])
        high = torch.searchsorted(self.sigmas, sigma.contiguous()).clamp(1, self.num_steps - 1)
        low = high - 1
        step = low + (sigma / self.sigmas[low]).log() / (self.sigmas[high] / self.sigmas[low]).log()
        return torch.where(sigma == self.sigmas[high], high.double(), step)

    def cut(self, sigma) -> torch.Tensor:
        """The last step whose noise level is at most ``sigma``; step 0 always is below a cut."""
        count = torch.searchsorted(self.sigmas, host64(sigma).contiguous(), right=True)
        return (count - 1).clamp(min=0).double()

    def holds(self, low: float, high: float) -> bool:
        lowest, end = self.domain
        return min(math.floor(high), end - 1) > (math.floor(low) if low > lowest else -1)

    def levels(self) -> tuple[float, float]:
        return float(self.sigmas[0]), float(self.sigmas[-1])

    def c_noise(self, sigma: torch.Tensor) -> torch.Tensor:
        """The nearest step."""
        return self.value(sigma).round()

    def uniform_cdf(self, sigma: torch.Tensor, t_min: float) -> torch.Tensor:
        return torch.searchsorted(self.sigmas, sigma.contiguous(), right=True).double() / len(self.sigmas)

    def uniform_quantile(
        self, u: torch.Tensor, low: torch.Tensor, high: torch.Tensor, t_min: float
    ) -> torch.Tensor:
        first, last = self.uniform_cdf(low, t_min), self.uniform_cdf(high, t_min)
        steps = len(self.sigmas)
        quantile = first + u * (last - first)
        # What rounding may do to a quantile at the end of an interval must not reach the next step.
        step = torch.minimum((quantile * steps).floor(), (last * steps).round() - 1)
        return self.sigmas[torch.maximum(step, (first * steps).round()).long()]

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

    def c_noise(self, sigma: torch.Tensor) -> torch.Tensor:
        """The step whose noise level is nearest to sigma, the higher one of two; −1 where u_M = 0 is."""
        levels = torch.cat([torch.zeros(1, dtype=torch.float64), self.sigmas])
        middles = (levels[1:] + levels[:-1]) / 2
        return torch.searchsorted(middles, host64(sigma).contiguous(), right=True).double() - 1


SCHEDULES: dict[str, type[Schedule]] = {kind.name: kind for kind in (VP, VE, EDM, LDM, FlowMatching)}


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

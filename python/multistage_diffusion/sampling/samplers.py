"""Samplers: from noise to images, with a schedule that lives on the host.

The noise level of every step is a Python float, so the stage of every network evaluation is known without
asking the device. A sampler is its settings: ``SamplerConfig`` for EDM's, ``DPMSinglestepConfig``,
``DPMMultistepConfig`` and ``DDIMConfig`` of ``dpm_solver``; ``sampler_config`` makes one by name.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from operator import index
from typing import get_args

import torch

import msd_kernels
from multistage_diffusion.common.checks import integer
from multistage_diffusion.networks.stage_network import Takes
from multistage_diffusion.noise.levels import edm_sigmas
from multistage_diffusion.noise.preconditioning import Preconditioner
from multistage_diffusion.noise.schedules import EDM, Schedule
from multistage_diffusion.sampling.dpm_solver import (
    DDIMConfig,
    DPMMultistepConfig,
    DPMSinglestepConfig,
)
from multistage_diffusion.sampling.table import find_sampler
from multistage_diffusion.sampling.trajectory import Draw, Evaluation, Trajectory, Walk

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class SamplerConfig:
    """Settings of EDM's sampler with Heun's second-order step (arXiv 2206.00364, algorithm 2; deterministic,
    algorithm 1, while S_churn is 0).

    Attributes:
        num_steps: N; 2 N − 1 network evaluations.
        sigma_min, sigma_max, rho: the noise levels, see ``schedules.edm_sigmas``.
        S_churn: how much noise is added and removed again over the whole run.
        S_min, S_max: noise levels between which that happens.
        S_noise: standard deviation of the added noise.
    """

    num_steps: int = 18
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    S_churn: float = 0.0
    S_min: float = 0.0
    S_max: float = math.inf
    S_noise: float = 1.0

    def __post_init__(self):
        object.__setattr__(self, "num_steps", integer("SamplerConfig", "num_steps", self.num_steps, 1))
        self.sigmas()  # raises what is wrong with the noise levels
        if not self.S_churn >= 0:
            raise ValueError(f"SamplerConfig: S_churn={self.S_churn} must be at least 0")
        if not 0 <= self.S_min <= self.S_max:
            raise ValueError(
                f"SamplerConfig: 0 <= S_min <= S_max is needed, got S_min={self.S_min}, S_max={self.S_max}"
            )
        if not 0 <= self.S_noise < math.inf:
            raise ValueError(f"SamplerConfig: S_noise={self.S_noise} must be at least 0 and finite")

    def sigmas(self) -> torch.Tensor:
        """float64 ``[num_steps + 1]``, ending in 0."""
        return edm_sigmas(self.num_steps, self.sigma_min, self.sigma_max, self.rho)

    def gamma(self, sigma: float) -> float:
        """The relative increase of the noise level before a step that starts at sigma."""
        if self.S_min <= sigma <= self.S_max:
            return min(self.S_churn / self.num_steps, math.sqrt(2) - 1)
        return 0.0

    def to_json(self) -> dict:
        return {k: "inf" if v == math.inf else v for k, v in asdict(self).items()}

    @classmethod
    def for_schedule(cls, schedule: Schedule, steps: int, **settings) -> SamplerConfig:
        """``steps`` steps on the noise levels of a schedule.

        Args:
            **settings: the other attributes; sigma_min and sigma_max default to 0.002 and 80, or to the schedule's own
                ends where these lie inside.

        Raises:
            ValueError: an evaluation at a noise level that the schedule does not have.
        """
        low, high = schedule.levels()
        ends = {"sigma_min": max(cls.sigma_min, low), "sigma_max": min(cls.sigma_max, high)}
        config = cls(steps, **{**ends, **settings})
        levels = config.evaluated_levels()
        if not low <= min(levels) <= max(levels) <= high:
            raise ValueError(
                f"SamplerConfig: these settings evaluate at sigma={min(levels):.6g} to {max(levels):.6g}, but the "
                f"{schedule.name} schedule has {low:.6g} to {high:.6g}; change sigma_min, sigma_max or S_max"
            )
        return config

    @property
    def start(self) -> float:
        """The noise level that the sampler starts from."""
        return float(self.sigma_max)

    def evaluated_levels(self) -> list[float]:
        """The noise level of every network evaluation, in their order."""
        sigmas = self.sigmas().tolist()
        pairs = [(sigma * (1 + self.gamma(sigma)), after) for sigma, after in itertools.pairwise(sigmas)]
        return [level for pair in pairs for level in pair if level > 0]

    def walk(self, x: torch.Tensor, draw: Draw) -> Walk:
        """From ``x`` at the first noise level to the samples; ``draw()`` is unit noise of their shape."""
        for step, (sigma, sigma_next) in enumerate(itertools.pairwise(self.sigmas().tolist())):
            gamma = self.gamma(sigma)
            sigma_hat = sigma * (1 + gamma)
            if gamma > 0:
                x = x + math.sqrt(sigma_hat**2 - sigma**2) * self.S_noise * draw()
            x = yield from _heun_step(x, sigma_hat, sigma_next, step)
        return x


def _heun_step(x: torch.Tensor, sigma: float, sigma_next: float, step: int) -> Walk:
    """One step of dx/dsigma = (x − D(x; sigma)) / sigma; Euler's where it ends at sigma = 0."""
    denoised = yield Evaluation(x, sigma, step)
    slope = (x - denoised) / sigma
    x_next = x + (sigma_next - sigma) * slope
    if sigma_next == 0:
        return x_next
    denoised = yield Evaluation(x_next, sigma_next, step)
    slope_next = (x_next - denoised) / sigma_next
    return x + (sigma_next - sigma) * (slope + slope_next) / 2


AnyConfig = SamplerConfig | DPMSinglestepConfig | DPMMultistepConfig | DDIMConfig


def sampler_config(
    name: str, schedule: Schedule | None = None, steps: int | None = None, **settings
) -> AnyConfig:
    """The settings of a sampler by name.

    Args:
        name: one of ``table.SAMPLERS``: ``"heun"``, EDM's, two evaluations per step but the last (arXiv 2206.00364);
            ``"dpm-singlestep"``, of order 3 (arXiv 2206.00927); ``"dpm-multistep"`` (arXiv 2211.01095); or ``"ddim"``.
        schedule: of the noise levels; default: EDM's. See ``schedule_of``.
        steps: steps, and network evaluations for ``"dpm-singlestep"``; default: 18 for ``"heun"``, else 20.
        **settings: ``SamplerConfig``'s attributes for ``"heun"``; ``denoise_to_zero`` for the others, ``spacing`` (see
            ``Schedule.spaced``) for ``"dpm-multistep"`` and ``"ddim"``, ``eta`` for ``"ddim"``.

    Raises:
        ValueError: an unknown sampler, too few steps, or settings out of their range.
    """
    return find_sampler(name).config(schedule or EDM(), steps, **settings)


def schedule_of(denoiser: Preconditioner) -> Schedule:
    """The schedule of a denoiser's noise levels: its own, or EDM's where it has none."""
    return getattr(denoiser, "schedule", None) or EDM()


def default_sampler(denoiser: Preconditioner) -> str:
    """The name of the sampler of the published results for a denoiser's schedule (arXiv 2312.09181)."""
    return schedule_of(denoiser).sampler


@dataclass
class Samples:
    """What a sampler returns.

    Attributes:
        images: ``[B, C, H, W]`` in the sampler's dtype, on the denoiser's device; data range, not clipped.
        evaluations: network evaluations of each sample.
        evaluations_per_stage: the same, stage by stage.
    """

    images: torch.Tensor
    evaluations: int
    evaluations_per_stage: tuple[int, ...] = field(default=())


def require_seeds(seeds: Sequence[int], user: str) -> list[int]:
    """The seeds as integers; what stands for integers, as NumPy's and tensors of them do, is turned into those.

    Raises, in the name of ``user``:
        TypeError: a seed that is no integer.
        ValueError: one that PyTorch's generators do not take.
    """
    return [_seed(seed, user) for seed in seeds]


def _seed(seed: int, user: str) -> int:
    try:
        found = index(seed)
    except TypeError:
        raise TypeError(f"{user}: seeds must be integers, got {seed!r}") from None
    if not -(2**63) <= found < 2**64:
        raise ValueError(f"{user}: seed {found} does not fit into 64 bits; allowed: -2^63 to 2^64 - 1")
    return found


class SeededNoise:
    """Unit normal noise, where sample i depends on seeds[i] only.

    Every sample has its own generator, on the CPU, so that a seed gives the same noise in any batch and on
    any device.

    Args:
        seeds: one integer per sample, of 64 bits: -2^63 to 2^64 - 1. PyTorch's generator for the CPU tells them
            apart by their lowest 32 bits.
        shape: (C, H, W).

    Raises:
        TypeError: a seed that is no integer.
        ValueError: no seed, or one that does not fit into 64 bits.
    """

    def __init__(self, seeds: Sequence[int], shape: Sequence[int], device="cpu", dtype=torch.float64):
        self.generators = [
            torch.Generator().manual_seed(seed) for seed in require_seeds(seeds, "SeededNoise")
        ]
        if not self.generators:
            raise ValueError("SeededNoise: at least one seed is needed")
        self.shape, self.device, self.dtype = tuple(shape), device, dtype

    def draw(self) -> torch.Tensor:
        """``[B, C, H, W]``; the next numbers of every sample's stream."""
        noise = [torch.randn(self.shape, generator=g, dtype=torch.float64) for g in self.generators]
        return torch.stack(noise).to(self.device, self.dtype)


@torch.no_grad()
def sample(
    denoiser: Preconditioner,
    noise: SeededNoise,
    config: AnyConfig | None = None,
    *,
    progress: Progress | None = None,
    **conditioning,
) -> Samples:
    """One batch of samples.

    Args:
        denoiser: D(x; sigma), in eval mode.
        noise: where the start and the noise of stochastic steps come from; its dtype is that of x.
        config: which sampler, and its settings; default: EDM's, 18 deterministic steps, on noise levels that the
            denoiser's schedule has.
        progress: called after each step with the number of finished steps and of all steps.
        **conditioning: passed to the network, one row per sample.

    Raises:
        TypeError: the config of no sampler.
    """
    if config is None:
        config = sampler_config("heun", schedule_of(denoiser))
    if not isinstance(config, AnyConfig):
        allowed = ", ".join(kind.__name__ for kind in get_args(AnyConfig))
        raise TypeError(f"sample: config must be one of {allowed}, got {type(config).__name__}")
    per_stage = [0] * len(denoiser.stages)
    trajectory = Trajectory(config, noise.draw)
    with msd_kernels.frozen_weights():
        while (wanted := trajectory.wanted) is not None:
            stage = denoiser.stages.assign(wanted.sigma)
            per_stage[stage] += 1
            trajectory.advance(denoiser(wanted.x, wanted.sigma, stage, **conditioning))
            if progress is not None and trajectory.finished > wanted.step:
                progress(trajectory.finished, config.num_steps)
    return Samples(trajectory.images, sum(per_stage), tuple(per_stage))


def heun(
    denoiser: Preconditioner,
    noise: SeededNoise,
    config: SamplerConfig | None = None,
    *,
    progress: Progress | None = None,
    **conditioning,
) -> Samples:
    """``sample`` with EDM's sampler (arXiv 2206.00364, algorithms 1 and 2)."""
    return sample(denoiser, noise, config, progress=progress, **conditioning)


def generate(
    denoiser: Preconditioner,
    seeds: Sequence[int],
    shape: Sequence[int],
    config: AnyConfig | None = None,
    batch_invariant: bool = False,
    *,
    batch_size: int = 64,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
    **conditioning,
) -> Samples:
    """Any number of samples, batch by batch.

    Args:
        denoiser: D(x; sigma), in eval mode.
        seeds: one integer per sample; sample i depends on seeds[i] only, to rounding.
        shape: (C, H, W).
        config: which sampler, and its settings; default: EDM's, 18 deterministic steps, on noise levels that the
            denoiser's schedule has.
        batch_invariant: on the CPU, sample i depends on seeds[i] only bit for bit: it is the same image whatever
            ``batch_size``, the other seeds and their order; slower. See :func:`msd_kernels.batch_invariant`.
        batch_size: samples per network evaluation.
        dtype: of x between the steps; float64 as in EDM, float32 is faster on devices with slow float64.
        device: default: where the denoiser's weights are.
        progress: called with the number of finished steps and of all steps, over all batches.
        **conditioning: tensors with one row per sample, such as ``class_labels``, on any device.

    Returns:
        ``Samples`` with the images on the CPU.

    Raises:
        NotImplementedError: ``batch_invariant`` on another device than the CPU, or for a compiled network.
    """
    batch_size = integer("generate", "batch_size", batch_size, 1)
    seeds = require_seeds(seeds, "generate")
    device = torch.device(device if device is not None else device_of(denoiser))
    if batch_invariant and device.type != "cpu":
        raise NotImplementedError(f"generate: batch_invariant holds on the CPU, got device={device}")
    starts = range(0, len(seeds), batch_size)
    parts = []
    for b, start in enumerate(starts):
        window = slice(start, start + batch_size)
        part = {name: value[window].to(device) for name, value in conditioning.items() if value is not None}

        def report(step, steps, finished=b):
            if progress is not None:
                progress(finished * steps + step, len(starts) * steps)

        noise = SeededNoise(seeds[window], shape, device, dtype)
        with msd_kernels.batch_invariant() if batch_invariant else nullcontext():
            result = sample(denoiser, noise, config, progress=report, **part)
        parts.append(result)
        result.images = result.images.cpu()
    if not parts:
        raise ValueError("generate: at least one seed is needed")
    images = torch.cat([part.images for part in parts])
    return Samples(images, parts[0].evaluations, parts[0].evaluations_per_stage)


def class_labels(network, seeds: Sequence[int], class_id: int | None = None) -> dict[str, torch.Tensor]:
    """The conditioning of a class-conditional network; empty for any other.

    Args:
        network: declares what it takes, see ``networks.Takes``.
        seeds: one per sample.
        class_id: class of all samples; default: seed modulo the number of classes, so that all classes take turns.

    Returns:
        ``{"class_labels": one-hot [B, label_dim]}`` on the CPU, or ``{}``.

    Raises:
        ValueError: the network has no such class.
    """
    label_dim = Takes.of(network).class_labels
    if class_id is not None and not 0 <= class_id < label_dim:
        known = f"classes 0 to {label_dim - 1}" if label_dim else "no classes"
        raise ValueError(f"class {class_id}: this model has {known}")
    if not label_dim:
        return {}
    seeds = require_seeds(seeds, "class_labels")
    labels = torch.tensor([seed % label_dim if class_id is None else class_id for seed in seeds])
    return {"class_labels": torch.nn.functional.one_hot(labels, label_dim).float()}


def device_of(denoiser: Preconditioner) -> torch.device:
    """Where a denoiser's weights are."""
    for parameter in denoiser.parameters():
        return parameter.device
    return torch.device("cpu")

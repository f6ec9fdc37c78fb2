"""The published configurations by name, each as a multi-stage, a unified and a separate model (arXiv 2312.09181).

Importing this module is quick: it holds plain data, and torch is imported where a function needs it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn

    from .preconditioning import Preconditioner
    from .schedules import Schedule
    from .stages import Stages

__all__ = ["PRESETS", "SAMPLERS", "VARIANTS", "Preset", "evaluation_levels", "find"]

VARIANTS = ("multistage", "unified", "separate")
SAMPLERS = ("heun", "dpm-singlestep", "dpm-multistep", "ddim")


@dataclass(frozen=True)
class Preset:
    """One published configuration.

    Attributes:
        name: what the command line calls it.
        title: what it is.
        network: the multi-stage network, as ``networks.build`` takes it.
        unified_width: base width of the unified baseline.
        schedule: name of the noise schedule, a key of ``schedules.SCHEDULES``.
        boundaries: where the stages are cut, in the schedule's variable; see ``Stages.from_boundaries``.
        shares: probability of each stage in training; None: of the log-normal distribution of EDM.
        sampler, sampler_steps: the sampler of the published results: one of :data:`SAMPLERS`, and its steps (network
            evaluations for ``"dpm-singlestep"``).
        published_attention: whether the paper's cost of this network counts the products of its attention.
    """

    name: str
    title: str
    network: Mapping[str, object]
    unified_width: int
    schedule: str
    boundaries: Sequence[float]
    shares: tuple[float, ...] | None
    sampler: str
    sampler_steps: int
    published_attention: bool = True

    def config(self, variant: str = "multistage", **changes: object) -> dict[str, object]:
        """The network's configuration for ``networks.build``.

        Args:
            variant: ``"multistage"``; ``"unified"``: one decoder, of the encoder's width; ``"separate"``: one network
                per stage, encoder and decoder as wide as the stage's decoder.
            changes: arguments of the network that replace the preset's, such as ``decoder_widths``.

        Raises:
            ValueError: an unknown variant.
        """
        if variant not in VARIANTS:
            raise ValueError(f"presets: variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
        config = {**self.network, **changes}
        if variant == "unified":
            config |= {"encoder_widths": [self.unified_width], "decoder_widths": [self.unified_width]}
        elif variant == "separate":
            config["encoder_widths"] = config["decoder_widths"]
        return config

    def stages(self) -> Stages:
        """The stages, in the variable of the schedule."""
        from .schedules import SCHEDULES
        from .stages import Stages

        return Stages.from_boundaries(self.boundaries, SCHEDULES[self.schedule].variable)

    def stage_shares(self) -> tuple[float, ...]:
        """The probability of each stage in training."""
        from .schedules import LogNormal

        return self.shares or self.stages().probabilities(LogNormal())

    def denoiser(self, network: nn.Module) -> Preconditioner:
        """D(x; sigma) around a network of this preset, preconditioned as published; a unified one has one stage."""
        from .preconditioning import EDMPreconditioner, SchedulePreconditioner
        from .schedules import SCHEDULES
        from .stages import Stages

        stages = self.stages()
        if network.num_stages == 1:
            stages = Stages.single(stages.variable)
        if self.schedule == "edm":
            return EDMPreconditioner(network, stages)
        return SchedulePreconditioner(network, stages, SCHEDULES[self.schedule]())

    def evaluations(self, sampler: str | None = None, steps: int | None = None) -> tuple[int, ...]:
        """Network evaluations of each stage for one sample; the sampler defaults to the preset's."""
        from .schedules import SCHEDULES

        levels = evaluation_levels(
            sampler or self.sampler, SCHEDULES[self.schedule](), steps or self.sampler_steps
        )
        stage = self.stages().assign(levels).tolist()
        return tuple(stage.count(k) for k in range(len(self.boundaries) - 1))


def evaluation_levels(sampler: str, schedule: Schedule, steps: int) -> torch.Tensor:
    """Where a sampler evaluates the network, as values of the schedule's variable, in the order of the evaluations.

    Args:
        sampler: ``"heun"``: EDM's, ``steps`` steps, two evaluations each but the last (arXiv 2206.00364, algorithm 1).
            ``"dpm-singlestep"``: DPM-Solver of order 3, evenly spaced in log-SNR, ``steps`` evaluations (arXiv
            2206.00927). ``"dpm-multistep"`` and ``"ddim"``: ``steps`` steps evenly spaced in time, one evaluation each.
        schedule: the noise schedule.
        steps: at least 1.

    Returns:
        float64 CPU tensor. Times of a continuous schedule end at 0.001, steps of a discrete one at 0.

    Raises:
        ValueError: an unknown sampler, or too few steps.
    """
    import torch

    if sampler not in SAMPLERS:
        raise ValueError(f"presets: sampler must be one of {', '.join(SAMPLERS)}, got {sampler!r}")
    if steps < 1:
        raise ValueError(f"presets: a sampler needs at least 1 step, got {steps}")
    if sampler == "heun":
        from .schedules import edm_sigmas

        sigmas = edm_sigmas(steps)
        corrections = torch.stack([sigmas[:-1], sigmas[1:]], dim=1).flatten()
        return schedule.value(corrections[corrections > 0])
    first, last = _ends(schedule)
    if sampler == "dpm-singlestep":
        ends = schedule.sigma(torch.tensor([first, last], dtype=torch.float64)).tolist()
        return schedule.value(_singlestep_sigmas(*ends, steps)).clamp(last, first)
    return torch.linspace(first, last, steps + 1, dtype=torch.float64)[:-1]


def _ends(schedule: Schedule) -> tuple[float, float]:
    """The first and the last value of the variable that a sampler of the family uses."""
    if schedule.variable == "sigma":
        return schedule.sigma_max, schedule.sigma_min
    return (1.0, 1e-3) if schedule.variable == "t" else (schedule.domain[1] - 1, 0.0)


def _singlestep_sigmas(sigma_max: float, sigma_min: float, evaluations: int) -> torch.Tensor:
    """Steps of order 3, and at the end of lower order, so that the evaluations are used up.

    A step of order k evaluates at its beginning and at k - 1 points evenly spaced in log sigma inside of it.
    """
    import torch

    whole, rest = divmod(evaluations, 3)
    orders = {0: [3] * (whole - 1) + [2, 1], 1: [3] * whole + [1], 2: [3] * whole + [2]}[rest]
    edges = torch.linspace(math.log(sigma_max), math.log(sigma_min), len(orders) + 1, dtype=torch.float64)
    inside = [
        edges[i] + (edges[i + 1] - edges[i]) * j / order
        for i, order in enumerate(orders)
        for j in range(order)
    ]
    return torch.stack(inside).exp().clamp(sigma_min, sigma_max)


THIRDS = (1 / 3, 1 / 3, 1 / 3)
EDM_STAGES = (0.0, 2.5103, 7.6577, math.inf)
SDE_STAGES = (0.0, 0.4420, 0.6308, 1.0)
LDM_STAGES = (0.0, 441.0, 630.0, 1000.0)  # steps 0 to 441, 442 to 630 and 631 to 999

_EDM = {
    "family": "edm",
    "encoder_widths": [128],
    "decoder_widths": [192, 128, 16],
    "num_blocks": 4,
    "attn_resolutions": [16],
    "augment_dim": 9,
}

PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            name="edm-cifar10",
            title="EDM (DDPM++), CIFAR-10",
            network={**_EDM, "image_size": 32, "channel_mult": [2, 2, 2], "dropout": 0.13},
            unified_width=128,
            schedule="edm",
            boundaries=EDM_STAGES,
            shares=None,
            sampler="heun",
            sampler_steps=18,
        ),
        Preset(
            name="edm-celeba",
            title="EDM (DDPM++), CelebA 64",
            network={**_EDM, "image_size": 64, "channel_mult": [1, 2, 2, 2], "dropout": 0.05},
            unified_width=128,
            schedule="edm",
            boundaries=EDM_STAGES,
            shares=None,
            sampler="heun",
            sampler_steps=40,
        ),
        Preset(
            name="ncsnpp-cifar10",
            title="score SDE (NCSN++, VP), CIFAR-10",
            network={
                "family": "ncsnpp",
                "image_size": 32,
                "encoder_widths": [128],
                "decoder_widths": [192, 128, 16],
                "channel_mult": [1, 2, 2, 2],
                "num_blocks": 8,
                "attn_resolutions": [16],
                "dropout": 0.1,
            },
            unified_width=128,
            schedule="vp",
            boundaries=SDE_STAGES,
            shares=THIRDS,
            sampler="dpm-singlestep",
            sampler_steps=20,
        ),
        Preset(
            name="uvit-cifar10",
            title="U-ViT, CIFAR-10",
            network={
                "family": "uvit",
                "image_size": 32,
                "encoder_widths": [512],
                "decoder_widths": [768, 512, 128],
                "depth": 13,
                "num_heads": 8,
                "patch_size": 2,
            },
            unified_width=512,
            schedule="vp",
            boundaries=SDE_STAGES,
            shares=THIRDS,
            sampler="dpm-singlestep",
            sampler_steps=20,
            published_attention=False,
        ),
        Preset(
            name="ldm-celebahq256",
            title="latent diffusion, CelebA-HQ 256 (VQ-f4 latents 64x64x3)",
            network={
                "family": "ldm",
                "image_size": 64,
                "encoder_widths": [224],
                "decoder_widths": [256, 192, 128],
                "channel_mult": [1, 2, 3, 4],
                "num_blocks": 2,
                "attn_resolutions": [8, 16, 32],
                "head_channels": 32,
            },
            unified_width=224,
            schedule="ldm",
            boundaries=LDM_STAGES,
            shares=THIRDS,
            sampler="dpm-multistep",
            sampler_steps=20,
        ),
        Preset(
            name="ldm-imagenet256",
            title="latent diffusion, ImageNet 256 class-conditional (f8 latents 32x32x4)",
            network={
                "family": "ldm",
                "image_size": 32,
                "in_channels": 4,
                "out_channels": 4,
                "encoder_widths": [256],
                "decoder_widths": [288, 224, 160],
                "channel_mult": [1, 2, 4],
                "num_blocks": 2,
                "attn_resolutions": [8, 16, 32],
                "head_channels": 32,
                "context_dim": 512,
                "label_dim": 1000,
            },
            unified_width=256,
            schedule="ldm",
            boundaries=LDM_STAGES,
            shares=THIRDS,
            sampler="dpm-multistep",
            sampler_steps=20,
        ),
    )
}


def find(name: str) -> Preset:
    """The preset of this name.

    Raises:
        ValueError: there is none; lists those that there are.
    """
    if name not in PRESETS:
        raise ValueError(f"presets: unknown preset {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name]

"""The published configurations by name, each as a multi-stage, a unified and a separate model (arXiv 2312.09181),
and the demo's.

Importing this module is quick: it holds plain data, and torch is imported where a function needs it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from multistage_diffusion.common.checks import one_of
from multistage_diffusion.sampling.table import SAMPLERS, find_sampler

if TYPE_CHECKING:
    from torch import nn

    from multistage_diffusion.noise.preconditioning import Preconditioner
    from multistage_diffusion.noise.stages import Stages

__all__ = ["DIGITS", "PRESETS", "SAMPLERS", "TRAINABLE", "VARIANTS", "Preset", "find"]

VARIANTS = ("multistage", "unified", "separate")


@dataclass(frozen=True)
class Preset:
    """One published configuration.

    Attributes:
        name: what the command line calls it.
        title: what it is.
        network: the multi-stage network, as ``networks.build`` takes it.
        schedule: name of the noise schedule, a key of ``schedules.SCHEDULES``.
        boundaries: where the stages are cut, in the schedule's variable; see ``Stages.from_boundaries``.
        shares: probability of each stage in training; None: of the log-normal distribution of EDM.
        sampler, sampler_steps: the sampler of the published results: one of :data:`SAMPLERS`, and its steps (network
            evaluations for ``"dpm-singlestep"``).
        training: settings of :class:`multistage_diffusion.training.config.TrainingConfig` other than those above.
        published_attention: whether the paper's cost of this network counts the products of its attention.
        reference: arguments of the network that the reference's own checkpoints have instead.
    """

    name: str
    title: str
    network: Mapping[str, object]
    schedule: str
    boundaries: Sequence[float]
    shares: tuple[float, ...] | None
    sampler: str
    sampler_steps: int
    training: Mapping[str, object]
    published_attention: bool = True
    reference: Mapping[str, object] = field(default_factory=dict)

    def config(self, variant: str = "multistage", **changes: object) -> dict[str, object]:
        """The network's configuration for ``networks.build``.

        Args:
            variant: ``"multistage"``; ``"unified"``: one decoder, of the encoder's width; ``"separate"``: one network
                per stage, encoder and decoder as wide as the stage's decoder.
            changes: arguments of the network that replace the preset's, such as ``decoder_widths``.

        Raises:
            ValueError: an unknown variant, or widths that it does not have.
        """
        one_of("presets", "variant", variant, VARIANTS)
        config = {**self.network, **changes}
        fixed = {"unified": {"encoder_widths", "decoder_widths"}, "separate": {"encoder_widths"}}
        if given := sorted(fixed.get(variant, set()) & changes.keys()):
            raise ValueError(
                f"presets: the {variant} network's widths follow from the preset, got {', '.join(given)}"
            )
        if variant == "unified":
            config["decoder_widths"] = config["encoder_widths"]
        elif variant == "separate":
            config["encoder_widths"] = config["decoder_widths"]
        return config

    def stages(self) -> Stages:
        """The stages, in the variable of the schedule."""
        from multistage_diffusion.noise.schedules import SCHEDULES
        from multistage_diffusion.noise.stages import Stages

        return Stages.from_boundaries(self.boundaries, SCHEDULES[self.schedule].variable)

    def stage_shares(self) -> tuple[float, ...]:
        """The probability of each stage in training."""
        from multistage_diffusion.noise.schedules import LogNormal

        return self.shares or self.stages().probabilities(LogNormal())

    def training_settings(self, variant: str = "multistage") -> dict[str, object]:
        """What ``TrainingConfig`` takes besides the network and the data.

        A separate model has the stages of the multi-stage one, a unified one a single stage of all noise levels. All
        are trained on the same ones: those of the multi-stage model.
        """
        from multistage_diffusion.noise.stages import Stages

        settings = {"schedule": self.schedule, **self.training}
        unified, own = variant == "unified", self.stages()
        settings["stages"] = Stages.single(own.variable) if unified else own
        if self.shares is not None:
            settings |= {"stage_sampling": "stratified", "stage_probabilities": self.shares}
            settings |= {"drawn_stages": own} if unified else {}
        return settings

    def denoiser(self, network: nn.Module) -> Preconditioner:
        """D(x; sigma) around a network of this preset, preconditioned as published; a unified one has one stage."""
        from multistage_diffusion.noise.preconditioning import precondition
        from multistage_diffusion.noise.stages import Stages

        stages = self.stages()
        if network.num_stages == 1:
            stages = Stages.single(stages.variable)
        return precondition(network, stages, self.schedule)

    def evaluations(self, sampler: str | None = None, steps: int | None = None) -> tuple[int, ...]:
        """Network evaluations of each stage for one sample; the sampler defaults to the preset's."""
        import torch

        from multistage_diffusion.noise.noise_levels import stage_counts
        from multistage_diffusion.noise.preconditioning import stages_in_sigma
        from multistage_diffusion.noise.schedules import SCHEDULES

        schedule = SCHEDULES[self.schedule]()
        own = find_sampler(self.sampler if sampler is None else sampler)
        config = own.config(schedule, self.sampler_steps if steps is None else steps)
        levels = torch.tensor(config.evaluated_levels(), dtype=torch.float64)
        return stage_counts(stages_in_sigma(self.stages(), schedule).assign(levels), len(self.boundaries) - 1)


def _halflife(decay: float, batch_size: int) -> float:
    """Half-life in images of an average that keeps ``decay`` of itself in every step."""
    return batch_size * math.log(0.5) / math.log(decay)


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
_EDM_TRAINING = {"warmup_images": 10_000_000, "ema_halflife_images": 500_000, "checkpoint_every": 5000}
_AVERAGE = {"ema_halflife_images": _halflife(0.9999, 128), "ema_rampup_ratio": None, "checkpoint_every": 5000}
# Latent diffusion scales its learning rate with the batch; AdamW with PyTorch's weight decay, no warm-up.
_LDM_TRAINING = {
    "batch_size": 48,
    "weight_decay": 0.01,
    "ema_halflife_images": _halflife(0.9999, 48),
    "ema_rampup_ratio": None,
    "checkpoint_every": 5000,
}

PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            name="edm-cifar10",
            title="EDM (DDPM++), CIFAR-10",
            network={**_EDM, "image_size": 32, "channel_mult": [2, 2, 2], "dropout": 0.13},
            schedule="edm",
            boundaries=EDM_STAGES,
            shares=None,
            sampler="heun",
            sampler_steps=18,
            # arXiv 2206.00364, appendix F: 200 million images.
            training={**_EDM_TRAINING, "steps": 390_625, "batch_size": 512, "lr": 1e-3, "augment": 0.12},
        ),
        Preset(
            name="edm-celeba",
            title="EDM (DDPM++), CelebA 64",
            network={**_EDM, "image_size": 64, "channel_mult": [1, 2, 2, 2], "dropout": 0.05},
            schedule="edm",
            boundaries=EDM_STAGES,
            shares=None,
            sampler="heun",
            sampler_steps=40,
            # As FFHQ at 64 pixels in arXiv 2206.00364, appendix F: 200 million images.
            training={**_EDM_TRAINING, "steps": 781_250, "batch_size": 256, "lr": 2e-4, "augment": 0.15},
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
            schedule="vp",
            boundaries=SDE_STAGES,
            shares=THIRDS,
            sampler="dpm-singlestep",
            sampler_steps=20,
            # arXiv 2011.13456, appendix H, as long as arXiv 2312.09181 trains it.
            training={
                **_AVERAGE,
                "steps": 450_000,
                "batch_size": 128,
                "lr": 2e-4,
                "warmup_images": 5000 * 128,
                "gradient_clip": 1.0,
                "augment": 0.0,
            },
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
            schedule="vp",
            boundaries=SDE_STAGES,
            shares=THIRDS,
            sampler="dpm-singlestep",
            sampler_steps=20,
            # As its own paper, arXiv 2209.12152.
            training={
                **_AVERAGE,
                "steps": 500_000,
                "batch_size": 128,
                "lr": 2e-4,
                "betas": (0.99, 0.999),
                "weight_decay": 0.03,
                "warmup_images": 2500 * 128,
                "augment": 0.0,
            },
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
            schedule="ldm",
            boundaries=LDM_STAGES,
            shares=THIRDS,
            sampler="dpm-multistep",
            sampler_steps=20,
            # arXiv 2112.10752.
            training={**_LDM_TRAINING, "steps": 410_000, "lr": 9.6e-5},
            reference={"reduced_attention": True},
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
            schedule="ldm",
            boundaries=LDM_STAGES,
            shares=THIRDS,
            sampler="dpm-multistep",
            sampler_steps=20,
            # arXiv 2112.10752; the number of steps is ours.
            training={**_LDM_TRAINING, "steps": 400_000, "lr": 4.8e-5},
            reference={"reduced_attention": True},
        ),
    )
}

# The demo's model of scikit-learn's handwritten digits; for no published configuration.
DIGITS = Preset(
    name="digits",
    title="EDM, scikit-learn's handwritten digits at 16 pixels",
    network={
        "family": "edm",
        "image_size": 16,
        "in_channels": 1,
        "out_channels": 1,
        "encoder_widths": [32],
        "decoder_widths": [48, 32, 16],
        "channel_mult": [1, 1],
        "num_blocks": 1,
        "attn_resolutions": [],
        "dropout": 0.0,
    },
    schedule="edm",
    boundaries=(0.0, 0.5, 2.0, math.inf),
    shares=(0.25, 0.5, 0.25),
    sampler="heun",
    sampler_steps=18,
    training={
        "P_mean": -0.4,
        "sigma_data": 0.7,
        "steps": 800,
        "batch_size": 64,
        "lr": 2e-3,
        "warmup_images": 5000,
        "lr_decay": "cosine",
        "ema_halflife_images": 5000,
        "checkpoint_every": 200,
        "log_every": 25,
    },
)

DEFAULT_PRESET = "edm-cifar10"  # of all data but the digits
TRAINABLE: dict[str, Preset] = {DIGITS.name: DIGITS, **PRESETS}


def find(name: str) -> Preset:
    """The preset of this name.

    Raises:
        ValueError: there is none; lists those that there are.
    """
    if name not in PRESETS:
        raise ValueError(f"presets: unknown preset {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name]

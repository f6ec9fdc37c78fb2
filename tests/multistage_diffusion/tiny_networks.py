"""Tiny networks of every family and configuration, and what they are called with."""

from __future__ import annotations

import pytest
import torch

from msd_kernels.dispatch import backends
from multistage_diffusion.flops import conditioning
from multistage_diffusion.networks import build
from multistage_diffusion.networks.stage_network import StageNetwork

STAGES = [2, 0, 1, 0, 2, 0]
BATCH = len(STAGES)

UNET = {"encoder_widths": (8,), "decoder_widths": (12, 8, 4), "channel_mult": (1, 2), "num_blocks": 1}
TINY = {
    "edm": UNET | {"attn_resolutions": (4,), "dropout": 0.0},
    "ncsnpp": UNET | {"attn_resolutions": (4,), "dropout": 0.0},
    "ldm": UNET | {"encoder_widths": (32,), "decoder_widths": (64, 32, 32), "attn_resolutions": (4,)},
    "uvit": {"encoder_widths": (16,), "decoder_widths": (24, 16, 8), "depth": 4, "num_heads": 2},
}
NCSNPP_OF_EDM = {
    "embedding_type": "fourier",
    "encoder_type": "residual",
    "resample_filter": (1, 3, 3, 1),
    "channel_mult_noise": 2,
}
# What the constructors are tried with beyond the reference's fixtures: family and changes.
CONFIGURATIONS = {
    "edm": ("edm", {}),
    "edm separate": ("edm", {"encoder_widths": (12, 8, 4)}),
    "edm unified": ("edm", {"decoder_widths": (8,)}),
    "edm labels": ("edm", {"label_dim": 3, "augment_dim": 2}),
    "edm one level": ("edm", {"channel_mult": (2,), "attn_resolutions": (8,)}),
    "edm three levels": ("edm", {"channel_mult": (1, 2, 3), "num_blocks": 2, "attn_resolutions": (8, 2)}),
    "edm NCSN++": ("edm", NCSNPP_OF_EDM),
    "edm NCSN++ separate": ("edm", NCSNPP_OF_EDM | {"encoder_widths": (12, 8, 4)}),
    "edm skips": ("edm", {"encoder_type": "skip", "decoder_type": "skip", "resample_filter": (1, 3, 3, 1)}),
    "edm block without a projection in one stage": (
        "edm",
        {"decoder_widths": (16, 8, 4), "channel_mult": (1, 2)},
    ),
    "ncsnpp": ("ncsnpp", {}),
    "ncsnpp separate": ("ncsnpp", {"encoder_widths": (12, 8, 4)}),
    "ncsnpp unified": ("ncsnpp", {"decoder_widths": (8,), "centered": False, "skip_rescale": False}),
    "ncsnpp three levels": (
        "ncsnpp",
        {"channel_mult": (1, 2, 1), "num_blocks": 2, "attn_resolutions": (8, 4)},
    ),
    "ldm": ("ldm", {}),
    "ldm separate": ("ldm", {"encoder_widths": (64, 32, 32)}),
    "ldm unified": ("ldm", {"decoder_widths": (32,), "num_heads": 4}),
    "ldm as the reference": (
        "ldm",
        {"reduced_attention": True, "attn_resolutions": (4, 8), "context_dim": 6},
    ),
    "ldm context": ("ldm", {"context_dim": 6, "transformer_depth": 2}),
    "ldm class as context": ("ldm", {"context_dim": 6, "label_dim": 3}),
    "ldm class in the embedding": ("ldm", {"label_dim": 3, "adaptive_scale": True}),
    "ldm context separate": ("ldm", {"context_dim": 6, "encoder_widths": (64, 32, 32)}),
    "uvit": ("uvit", {}),
    "uvit separate": ("uvit", {"encoder_widths": (24, 16, 8)}),
    "uvit unified": ("uvit", {"decoder_widths": (16,), "qkv_bias": True, "final_conv": False}),
    "uvit classes": ("uvit", {"label_dim": 3, "patch_size": 4, "depth": 5}),
}
each_configuration = pytest.mark.parametrize(
    ("family", "changes"), CONFIGURATIONS.values(), ids=CONFIGURATIONS.keys()
)


def tiny(family: str = "edm", **changes) -> StageNetwork:
    """A tiny network in float64 whose every path is open: no weight is near zero."""
    torch.manual_seed(0)
    network = build({"family": family, "image_size": 8} | TINY[family] | changes).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return network


def inputs(batch: int = BATCH) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(batch, 3, 8, 8, generator=generator, dtype=torch.float64)
    return x, torch.randn(batch, generator=generator, dtype=torch.float64)


def labels_for(network: StageNetwork, batch: int = BATCH) -> dict[str, torch.Tensor]:
    """Random labels and context of the shapes that the network takes."""
    generator = torch.Generator().manual_seed(3)
    zeros = conditioning(network, batch)
    return {k: torch.randn(v.shape, generator=generator, dtype=torch.float64) for k, v in zeros.items()}


@pytest.fixture(autouse=True)
def float64_is_served_by_the_library():
    """The compiled CPU kernels take no float64."""
    with backends.use("library"):
        yield

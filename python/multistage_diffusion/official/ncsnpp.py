"""Score SDE's NCSN++: ``en_modules.{i}.*`` and ``de_modules.{stage}.{i}.*``, counted in build order."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from itertools import count

import numpy as np
import torch
from torch import Tensor, nn

from multistage_diffusion.networks.blocks import ResidualBlock
from multistage_diffusion.networks.layers import StageAttention
from multistage_diffusion.networks.ncsnpp import NCSNpp
from multistage_diffusion.official.entries import Arguments, Entry, Family, part, weights

ARGUMENTS = {
    "image_size": "image_size",
    "num_channels": "in_channels",
    "ch_mult": "channel_mult",
    "num_res_blocks": "num_blocks",
    "attn_resolutions": "attn_resolutions",
    "dropout": "dropout",
    "fir_kernel": "resample_filter",
    "skip_rescale": "skip_rescale",
    "centered": "centered",
}
FIXED = {
    "resblock": "biggan",
    "progressive": "none",
    "progressive_input": "residual",
    "progressive_combine": "sum",
    "embedding_type": "positional",
    "scale_by_sigma": False,
    "fir": True,
    "conditional": True,
    "resamp_with_conv": True,
    "nonlinearity": "swish",
    "normalization": "GroupNorm",
}
SIGMA_MAX, SIGMA_MIN, NOISE_SCALES = 50, 0.01, 1000


def build(config: Mapping[str, object]) -> NCSNpp:
    """``nf`` stands for the original, unified network, which has up to 32 groups."""
    arguments = Arguments("ncsnpp", config)
    if "nf" in arguments:
        width = arguments.take("nf")
        own = {"encoder_widths": [width], "decoder_widths": [width]}
        own["max_groups"] = arguments.take("group", 32)
    else:
        own = {
            "encoder_widths": [arguments.take("en_nf", 128)],
            "decoder_widths": arguments.take("de_nfs", [192, 128, 16]),
            "max_groups": arguments.take("group", 16),
        }
    own |= arguments.renamed(ARGUMENTS)
    arguments.fixed(FIXED)
    arguments.ignored(
        "sigma_min", "sigma_max", "num_scales", "beta_min", "beta_max", "init_scale", "ema_rate"
    )
    arguments.finish(own)
    return NCSNpp(**NCSNpp.in_effect(own))


def entries(network: NCSNpp) -> Iterator[Entry]:
    index = count()
    yield from weights(f"en_modules.{next(index)}", network.embed.layer0)
    yield from weights(f"en_modules.{next(index)}", network.embed.layer1)
    yield from weights(f"en_modules.{next(index)}", network.conv)
    for level in network.enc.values():
        if level.down is not None:
            yield from _block("en_modules", index, level.down)
            yield from weights(f"en_modules.{next(index)}.Conv2d_0", level.input.conv)
        for block in level.blocks:
            yield from _block("en_modules", index, block)
    for block in network.middle:
        yield from _block("en_modules", index, block)
    index = count()
    decoder = "de_modules.{stage}"
    for level in network.dec.values():
        for block in (*level.entry, *level.blocks):
            yield from _block(decoder, index, block)
        if level.head is not None:
            yield from weights(f"{decoder}.{next(index)}", level.head.norm)
            yield from weights(f"{decoder}.{next(index)}", level.head.conv)


def constants(network: NCSNpp) -> Iterator[tuple[str, Tensor]]:
    """The noise levels of the VE SDE, which the reference saves and this network does not use."""
    yield "sigmas", torch.from_numpy(np.exp(np.linspace(np.log(SIGMA_MAX), np.log(SIGMA_MIN), NOISE_SCALES)))


def unified_name(network: nn.Module) -> Callable[[str], str]:
    """The original counts the modules of encoder and decoder together."""
    encoder = [entry.name.split(".")[1] for entry in entries(network) if entry.name.startswith("en_modules.")]
    first = int(encoder[-1]) + 1

    def rename(name: str) -> str:
        match = re.match(r"all_modules\.(\d+)\.(.*)", name)
        if match is None:
            return name
        index = int(match[1])
        return (
            f"en_modules.{index}.{match[2]}" if index < first else f"de_modules.0.{index - first}.{match[2]}"
        )

    return rename


def _block(prefix: str, index: Iterator[int], block: ResidualBlock) -> Iterator[Entry]:
    name = f"{prefix}.{next(index)}"
    parts = {
        "GroupNorm_0": block.norm0,
        "Conv_0": block.conv0,
        "Dense_0": block.affine,
        "GroupNorm_1": block.norm1,
        "Conv_1": block.conv1,
        "Conv_2": block.skip,
    }
    for theirs, own in parts.items():
        yield from weights(f"{name}.{theirs}", own)
    if block.attention is not None:
        yield from _attention(f"{prefix}.{next(index)}", block.attention)


def _attention(name: str, attention: StageAttention) -> Iterator[Entry]:
    """q, k, v and the projection are linear maps that the reference stores as ``[in, out]``."""
    yield from weights(f"{name}.GroupNorm_0", attention.norm)
    for i in range(3):
        third = part(i, 3)
        yield Entry(
            f"{name}.NIN_{i}.W", attention.qkv, "weight", lambda t, third=third: _transposed(third(t))
        )
        yield Entry(f"{name}.NIN_{i}.b", attention.qkv, "bias", third)
    yield Entry(f"{name}.NIN_3.W", attention.proj, "weight", _transposed)
    yield Entry(f"{name}.NIN_3.b", attention.proj, "bias")


def _transposed(weight: Tensor) -> Tensor:
    return weight[:, :, 0, 0].t()


FAMILY = Family(build, entries, unified_name, constants, constants_matter=False)

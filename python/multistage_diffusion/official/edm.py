"""EDM's U-Net: ``map_*``, ``enc.{res}x{res}_{part}.*``, ``decs.{stage}.{res}x{res}_{part}.*``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from multistage_diffusion.networks.blocks import ResidualBlock, ResidualInput, SkipInput
from multistage_diffusion.networks.edm import EDMUNet
from multistage_diffusion.networks.embeddings import FourierEmbedding
from multistage_diffusion.official.entries import (
    Arguments,
    Entry,
    Family,
    interleaved,
    separable_filter,
    weights,
)

ARGUMENTS = {
    "img_resolution": "image_size",
    "in_channels": "in_channels",
    "out_channels": "out_channels",
    "channel_mult": "channel_mult",
    "num_blocks": "num_blocks",
    "attn_resolutions": "attn_resolutions",
    "dropout": "dropout",
    "channel_mult_emb": "channel_mult_emb",
    "label_dim": "label_dim",
    "augment_dim": "augment_dim",
    "label_dropout": "label_dropout",
    "embedding_type": "embedding_type",
    "channel_mult_noise": "channel_mult_noise",
    "encoder_type": "encoder_type",
    "decoder_type": "decoder_type",
    "resample_filter": "resample_filter",
}
# Of the reference constructor, where they are not ours.
DEFAULTS = {"channel_mult": [1, 2, 2, 2], "dropout": 0.10}


def build(config: Mapping[str, object]) -> EDMUNet:
    """``model_channels`` stands for the original, unified network, which has up to 32 groups."""
    arguments = Arguments("edm", config)
    if "model_channels" in arguments:
        width = arguments.take("model_channels")
        own = {"encoder_widths": [width], "decoder_widths": [width], "max_groups": 32}
    else:
        own = {
            "encoder_widths": [arguments.take("en_model_channels", 128)],
            "decoder_widths": arguments.take("de_model_channels", [192, 128, 16]),
        }
    own |= DEFAULTS | arguments.renamed(ARGUMENTS)
    arguments.finish(own, "img_resolution")
    return EDMUNet(**EDMUNet.in_effect(own))


def entries(network: EDMUNet) -> Iterator[Entry]:
    if isinstance(network.map_noise, FourierEmbedding):
        yield Entry("map_noise.freqs", network.map_noise, "freqs")
    yield from weights("map_label", network.map_label)
    yield from weights("map_augment", network.map_augment)
    yield from weights("map_layer0", network.map_layers.layer0)
    yield from weights("map_layer1", network.map_layers.layer1)
    for name, part in _parts(network):
        if isinstance(part, ResidualBlock):
            yield from _block(name, part)
        elif isinstance(part, SkipInput):
            yield from weights(f"{name}_skip", part.conv)
        elif isinstance(part, ResidualInput):
            yield from weights(f"{name}_residual", part.conv)
        else:
            yield from weights(name, part)


def constants(network: EDMUNet) -> Iterator[tuple[str, Tensor]]:
    """The reference saves the resampling filter of every layer that resamples."""
    value = separable_filter(network.config["resample_filter"])
    for name, part in _parts(network):
        if isinstance(part, ResidualBlock) and part.conv0.resample is not None:
            owners = [f"{name}.conv0", f"{name}.skip"]
        elif isinstance(part, SkipInput):
            owners = [f"{name}_down"]
        elif isinstance(part, ResidualInput):
            owners = [f"{name}_residual"]
        else:
            continue
        for owner in owners:
            yield from _per_stage(network, f"{owner}.resample_filter", value)
    if network.config["decoder_type"] == "skip":
        for resolution in list(network.dec)[1:]:
            yield from _per_stage(network, f"decs.{{stage}}.{resolution}_aux_up.resample_filter", value)


def _parts(network: EDMUNet) -> Iterator[tuple[str, nn.Module]]:
    """(name, layer, block or input) in the reference's order."""
    for level, (resolution, encoder) in enumerate(network.enc.items()):
        name = f"enc.{resolution}"
        yield (f"{name}_conv", network.conv) if level == 0 else (f"{name}_down", encoder.down)
        if encoder.input is not None:
            yield f"{name}_aux", encoder.input
        for index, block in enumerate(encoder.blocks):
            yield f"{name}_block{index}", block
    for resolution, decoder in network.dec.items():
        name = f"decs.{{stage}}.{resolution}"
        entry = ("up",) if len(decoder.entry) == 1 else ("in0", "in1")
        for kind, block in zip(entry, decoder.entry, strict=True):
            yield f"{name}_{kind}", block
        for index, block in enumerate(decoder.blocks):
            yield f"{name}_block{index}", block
        if decoder.head is not None:
            yield f"{name}_aux_norm", decoder.head.norm
            yield f"{name}_aux_conv", decoder.head.conv


def _block(name: str, block: ResidualBlock) -> Iterator[Entry]:
    for part in ("norm0", "conv0", "affine", "norm1", "conv1", "skip"):
        yield from weights(f"{name}.{part}", getattr(block, part))
    if block.attention is not None:
        yield from weights(f"{name}.norm2", block.attention.norm)
        yield from interleaved(f"{name}.qkv", block.attention.qkv, 3)
        yield from weights(f"{name}.proj", block.attention.proj)


def _per_stage(network: EDMUNet, name: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
    for stage in range(network.num_stages if "{stage}" in name else 1):
        yield name.format(stage=stage), value.clone()


FAMILY = Family(
    build, entries, [(r"^dec\.", "decs.0.")], constants, {"augment_dim": ("map_augment.weight", 1)}
)

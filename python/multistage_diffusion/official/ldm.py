"""Latent diffusion: ``time_embed``, ``input_blocks``, ``middle_block``, ``de_modules.{stage}``, ``outs.{stage}``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from torch import Tensor, nn

from multistage_diffusion.networks.blocks import ResidualBlock
from multistage_diffusion.networks.layers import OnStages, StageAttention, StageCrossAttention
from multistage_diffusion.networks.ldm import LDMUNet
from multistage_diffusion.networks.transformer import SpatialTransformer
from multistage_diffusion.official.entries import Arguments, Entry, Family, part, weights

ARGUMENTS = {
    "image_size": "image_size",
    "in_channels": "in_channels",
    "out_channels": "out_channels",
    "channel_mult": "channel_mult",
    "num_res_blocks": "num_blocks",
    "dropout": "dropout",
    "transformer_depth": "transformer_depth",
    "use_scale_shift_norm": "adaptive_scale",
}
FIXED = {
    "conv_resample": True,
    "dims": 2,
    "resblock_updown": False,
    "use_new_attention_order": False,
    "legacy": True,
    "n_embed": None,
    "num_heads_upsample": -1,
}


def build(config: Mapping[str, object]) -> LDMUNet:
    """Without ``de_nfs`` it is the original, unified network. ``n_classes`` is the class embedder's argument."""
    arguments = Arguments("ldm", config)
    width = arguments.take("model_channels", 224)
    own = {"encoder_widths": [width], "decoder_widths": arguments.take("de_nfs", [width])}
    own |= {"reduced_attention": True, "channel_mult": [1, 2, 4, 8]} | arguments.renamed(ARGUMENTS)
    factors = arguments.take("attention_resolutions", ())
    own |= _heads(arguments) | _conditioning(arguments)
    arguments.fixed(FIXED)
    arguments.ignored("use_checkpoint", "use_fp16")
    arguments.finish(own)
    levels = [1 << level for level in range(len(own["channel_mult"]))]
    own["attn_resolutions"] = [own["image_size"] // factor for factor in factors if factor in levels]
    return LDMUNet(**own)


def _heads(arguments: Arguments) -> dict[str, object]:
    head_channels, num_heads = arguments.take("num_head_channels", -1), arguments.take("num_heads", -1)
    if head_channels == -1 and num_heads == -1:
        raise ValueError("official: ldm needs num_heads or num_head_channels")
    return {"num_heads": num_heads} if head_channels == -1 else {"head_channels": head_channels}


def _conditioning(arguments: Arguments) -> dict[str, object]:
    added, embedded = arguments.take("num_classes"), arguments.take("n_classes")
    context = arguments.take("context_dim")
    if bool(arguments.take("use_spatial_transformer", False)) != (context is not None):
        raise ValueError("official: ldm needs context_dim if and only if use_spatial_transformer is set")
    if (added and context) or (embedded and not context):
        raise ValueError(
            "official: ldm takes num_classes without, and n_classes only with use_spatial_transformer"
        )
    return {"context_dim": context or 0, "label_dim": added or embedded or 0}


def entries(network: LDMUNet) -> Iterator[Entry]:
    yield from weights("time_embed.0", network.embed.layer0)
    yield from weights("time_embed.2", network.embed.layer1)
    if network.embed_label is not None:
        name = "cond_stage_model.embedding" if network.context_dim else "label_emb"
        yield Entry(f"{name}.weight", network.embed_label, "weight", lambda weight: weight.t())
    yield from weights("input_blocks.0.0", network.conv)
    index = 1
    for level in network.enc.values():
        if level.down is not None:
            yield from weights(f"input_blocks.{index}.0.op", level.down.conv)
            index += 1
        for block in level.blocks:
            yield from _block(f"input_blocks.{index}", block)
            index += 1
    first, last = network.middle
    yield from _residual("middle_block.0", first)
    yield from _attention("middle_block.1", first.attention)
    yield from _residual("middle_block.2", last)
    yield from _decoder(network)


def _decoder(network: LDMUNet) -> Iterator[Entry]:
    """The upsampling is this level's first layer here, and the last one of the level before in the reference."""
    index, previous = 0, None
    for level in network.dec.values():
        for up in level.entry:
            for parameter in ("weight", "bias"):
                yield Entry(_upsampling_name(index - 1, previous, parameter), up.conv, parameter)
        for block in level.blocks:
            yield from _block(f"de_modules.{{stage}}.{index}", block)
            index, previous = index + 1, block
        if level.head is not None:
            yield from weights("outs.{stage}.0", level.head.norm)
            yield from weights("outs.{stage}.2", level.head.conv)


def _upsampling_name(index: int, block: ResidualBlock, parameter: str) -> Callable[[int], str]:
    """It comes after the block's attention in those decoders that have one."""
    attention = block.attention

    def name(stage: int) -> str:
        attends = stage in attention.stages if isinstance(attention, OnStages) else attention is not None
        return f"de_modules.{stage}.{index}.{2 if attends else 1}.conv.{parameter}"

    return name


def _block(name: str, block: ResidualBlock) -> Iterator[Entry]:
    """A residual block and its attention, one after the other in a sequence."""
    yield from _residual(f"{name}.0", block)
    yield from _attention(f"{name}.1", block.attention)


def _residual(name: str, block: ResidualBlock) -> Iterator[Entry]:
    yield from weights(f"{name}.in_layers.0", block.norm0)
    yield from weights(f"{name}.in_layers.2", block.conv0)
    yield from weights(f"{name}.emb_layers.1", block.affine)
    yield from weights(f"{name}.out_layers.0", block.norm1)
    yield from weights(f"{name}.out_layers.3", block.conv1)
    yield from weights(f"{name}.skip_connection", block.skip)


def _attention(name: str, attention: nn.Module | None) -> Iterator[Entry]:
    if isinstance(attention, OnStages):
        attention = attention.module
    if isinstance(attention, SpatialTransformer):
        yield from _transformer(name, attention)
    elif isinstance(attention, StageAttention):
        yield from weights(f"{name}.norm", attention.norm)
        yield from weights(f"{name}.qkv", attention.qkv, _one_dimensional)
        yield from weights(f"{name}.proj_out", attention.proj, _one_dimensional)


def _transformer(name: str, transformer: SpatialTransformer) -> Iterator[Entry]:
    yield from weights(f"{name}.norm", transformer.norm)
    yield from weights(f"{name}.proj_in", transformer.proj_in)
    for index, block in enumerate(transformer.blocks):
        inner = f"{name}.transformer_blocks.{index}"
        yield from _self_attention(f"{inner}.attn1", block.attention)
        yield from weights(f"{inner}.ff.net.0.proj", block.mlp.layer0)
        yield from weights(f"{inner}.ff.net.2", block.mlp.layer1)
        yield from _cross_attention(f"{inner}.attn2", block.cross)
        yield from weights(f"{inner}.norm1", block.attention.norm)
        yield from weights(f"{inner}.norm2", block.cross.norm)
        yield from weights(f"{inner}.norm3", block.mlp.norm)
    yield from weights(f"{name}.proj_out", transformer.proj_out)


def _self_attention(name: str, attention: StageAttention) -> Iterator[Entry]:
    for i, letter in enumerate("qkv"):
        yield Entry(f"{name}.to_{letter}.weight", attention.qkv, "weight", part(i, 3))
    yield from weights(f"{name}.to_out.0", attention.proj)


def _cross_attention(name: str, attention: StageCrossAttention) -> Iterator[Entry]:
    yield from weights(f"{name}.to_q", attention.q)
    for i, letter in enumerate("kv"):
        yield Entry(f"{name}.to_{letter}.weight", attention.kv, "weight", part(i, 2))
    yield from weights(f"{name}.to_out.0", attention.proj)


def _one_dimensional(weight: Tensor) -> Tensor:
    """The reference's attention sees the pixels as a sequence."""
    return weight[:, :, 0]


CLASSES = ("cond_stage_model.embedding.weight", 0)
UNIFIED = [(r"^out\.", "outs.0."), (r"^output_blocks\.", "de_modules.0.")]
FAMILY = Family(build, entries, UNIFIED, sizes={"label_dim": CLASSES}, outside={"n_classes": CLASSES})

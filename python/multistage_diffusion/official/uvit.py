"""U-ViT: ``patch_embed``, ``pos_embed``, ``in_blocks``, ``mid_block`` and, per stage, ``de_modules.{stage}.{i}``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from multistage_diffusion.networks.transformer import TransformerBlock
from multistage_diffusion.networks.uvit import UViT
from multistage_diffusion.official.entries import Arguments, Entry, Family, weights

ARGUMENTS = {
    "image_size": "image_size",
    "img_size": "image_size",
    "in_chans": "in_channels",
    "depth": "depth",
    "num_heads": "num_heads",
    "patch_size": "patch_size",
    "mlp_ratio": "mlp_ratio",
    "qkv_bias": "qkv_bias",
    "conv": "final_conv",
}
FIXED = {"mlp_time_embed": False, "qk_scale": None, "skip": True}


def build(config: Mapping[str, object]) -> UViT:
    """Without ``de_nfs`` it is the original, unified network."""
    arguments = Arguments("uvit", config)
    width = arguments.take("embed_dim", 512)
    own = {"encoder_widths": [width], "decoder_widths": arguments.take("de_nfs", [width])}
    own |= {"label_dim": max(arguments.take("num_classes", -1), 0)} | arguments.renamed(ARGUMENTS)
    arguments.fixed(FIXED)
    arguments.ignored("use_checkpoint")
    arguments.finish(own)
    return UViT(**own)


def entries(network: UViT) -> Iterator[Entry]:
    yield Entry("pos_embed", network.positions, "weight", lambda table: table[None])
    yield from weights("patch_embed.proj", network.embed_patches)
    if network.embed_label is not None:
        yield Entry("label_emb.weight", network.embed_label, "weight", lambda weight: weight.t())
    for index, block in enumerate(network.in_blocks):
        yield from _block(f"in_blocks.{index}", block)
    yield from _block("mid_block", network.middle)
    for index, block in enumerate(network.out_blocks):
        name = f"de_modules.{{stage}}.{index}"
        yield from weights(f"{name}.skip_linear", block.linear, lambda weight: weight[:, :, 0, 0])
        yield from _block(name, block.block)
    yield from weights("norm.{stage}", network.norm)
    yield from weights("decoder_pred.{stage}", network.predict)
    if network.final_conv is not None:
        for stage in range(network.num_stages):  # one object, which the reference saves once per stage
            yield from weights(f"final_layer.{stage}", network.final_conv)


UNIFIED = [
    (r"^out_blocks\.", "de_modules.0."),
    (r"^(norm|decoder_pred|final_layer)\.(weight|bias)$", r"\1.0.\2"),
]


def _block(name: str, block: TransformerBlock) -> Iterator[Entry]:
    yield from weights(f"{name}.norm1", block.attention.norm)
    yield from weights(f"{name}.attn.qkv", block.attention.qkv)
    yield from weights(f"{name}.attn.proj", block.attention.proj)
    yield from weights(f"{name}.norm2", block.mlp.norm)
    yield from weights(f"{name}.mlp.fc1", block.mlp.layer0)
    yield from weights(f"{name}.mlp.fc2", block.mlp.layer1)


FAMILY = Family(build, entries, UNIFIED)

"""The U-Net of latent diffusion (Rombach et al., arXiv 2112.10752; blocks of Dhariwal & Nichol, arXiv 2105.05233)
with one decoder per stage (arXiv 2312.09181)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from msd_kernels import StageBatch
from multistage_diffusion.networks.blocks import BlockStyle, Resample
from multistage_diffusion.networks.embeddings import EmbeddingMLP, PositionalEmbedding, label_batch
from multistage_diffusion.networks.layers import (
    StageAttention,
    StageConv2d,
    StageGroupNorm,
    StageLinear,
    StageStridedConv2d,
    Widths,
    fan_in_uniform,
    on_stages,
    xavier_uniform,
)
from multistage_diffusion.networks.transformer import SpatialTransformer
from multistage_diffusion.networks.unet import UNet

__all__ = ["LDMUNet"]

GROUPS, EPS, TRANSFORMER_EPS = 32, 1e-5, 1e-6
EMB_MULT = 4
ZERO = xavier_uniform(1e-5)


def norm(channels: Widths, eps: float = EPS) -> StageGroupNorm:
    """GroupNorm of this family: 32 groups."""
    return StageGroupNorm(channels, (GROUPS,) * len(channels), eps=eps)


class LDMUNet(UNet):
    """U-Net of latent diffusion with shared encoder and middle and one decoder per stage; a batch may mix all stages.

    ``decoder_widths`` with one entry is the unified network; as many ``encoder_widths`` as ``decoder_widths`` are
    separate networks. The defaults are the network for CelebA-HQ 256. With ``context_dim`` every attention is a
    spatial transformer that looks at the context, too.

    ``noise`` is the integer steps 0 to 999.

    Args:
        image_size: height and width of the latents, divisible by 2 to the number of levels less one.
        in_channels, out_channels: channels of the latents.
        encoder_widths: base width of the encoder: one for a shared encoder, or one per stage. Multiples of 32.
        decoder_widths: base width of each stage's decoder. Multiples of 32.
        channel_mult: per level, finest first, the multiple of the base width.
        num_blocks: residual blocks per level.
        attn_resolutions: resolutions (of the latents) with attention after every block, all among those of the levels:
            ``image_size``, its half and so on. Default: those of 8, 16 and 32 that there are.
            The middle has one attention more.
        head_channels: channels per attention head: there are as many heads as fit into a width, and they share it.
        num_heads: heads of every attention, instead of ``head_channels``.
        dropout: dropout probability inside the residual blocks.
        context_dim: channels of the context's tokens; 0: no context.
        transformer_depth: transformer blocks in each spatial transformer.
        label_dim: number of classes; 0: none. With ``context_dim`` the class is the context's one token, else it is
            added to the embedding of the noise.
        adaptive_scale: the embedding scales and shifts the second normalisation of a block.
        reduced_attention: leave attention out of the later decoders exactly as the reference implementation does, whose
            constructor goes on counting the resolution from one decoder to the next. For its checkpoints only.

    Raises:
        ValueError: sizes that do not fit together; the message says what is allowed.
    """

    family = "ldm"
    attending = (8, 16, 32)
    needed = ("class_labels", "context")

    def __init__(
        self,
        image_size: int,
        *,
        in_channels: int = 3,
        out_channels: int = 3,
        encoder_widths: Sequence[int] = (224,),
        decoder_widths: Sequence[int] = (256, 192, 128),
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        num_blocks: int = 2,
        attn_resolutions: Sequence[int] | None = None,
        head_channels: int = 32,
        num_heads: int | None = None,
        dropout: float = 0.0,
        context_dim: int = 0,
        transformer_depth: int = 1,
        label_dim: int = 0,
        adaptive_scale: bool = False,
        reduced_attention: bool = False,
    ) -> None:
        super().__init__(locals())
        emb = tuple(EMB_MULT * w for w in self.encoder_widths)
        stages = len(self.encoder_widths)
        self.embed_noise = PositionalEmbedding(self.encoder_widths, endpoint=False, cosine_first=True)
        self.embed = EmbeddingMLP(self.encoder_widths, emb, initialise=fan_in_uniform)
        labels = ((context_dim,) * stages if context_dim else emb) if label_dim else None
        self.embed_label = (
            StageLinear((label_dim,) * stages, labels, bias=False, initialise=fan_in_uniform)
            if labels
            else None
        )
        style = partial(
            BlockStyle,
            norm=norm,
            attention=self._attention,
            dropout=dropout,
            adaptive_scale=adaptive_scale,
            initialise=fan_in_uniform,
            initialise_last=ZERO,
        )
        self.add_levels(emb, style)

    def downsample(self, channels: Widths, style: BlockStyle) -> Resample:
        return Resample(StageStridedConv2d(channels, channels, 3, padding=1, initialise=style.initialise))

    def upsample(self, channels: Widths, style: BlockStyle) -> Resample:
        return Resample(StageConv2d(channels, channels, 3, resample="up", initialise=style.initialise))

    def decoder_attention(self, level: int, channels: Widths) -> list[nn.Module | None]:
        """After every block."""
        attending, count = self._attending_stages()[level], self.config["num_blocks"] + 1
        return [on_stages(self._attention, attending, channels) for _ in range(count)]

    def tokens(
        self, counts: Widths, dtype: torch.dtype, conditioning: dict[str, Tensor | None]
    ) -> StageBatch | None:
        context = conditioning["context"]
        if context is not None:
            return StageBatch.from_dense(context.to(dtype).transpose(1, 2)[..., None], counts)
        if not self.context_dim:
            return None
        return label_batch(conditioning["class_labels"], self.embed_label, counts, dtype)

    def embedding(
        self, noise: Tensor, counts: Widths, dtype: torch.dtype, conditioning: dict[str, Tensor | None]
    ) -> StageBatch:
        labels = None
        if not self.context_dim:
            labels = label_batch(conditioning["class_labels"], self.embed_label, counts, dtype)
        return self.embed(self.embed_noise(noise, counts).to(dtype), labels)

    def _attention(self, channels: Widths) -> StageAttention | SpatialTransformer:
        heads = tuple(self._heads(c) for c in channels)
        if self.context_dim:
            return SpatialTransformer(
                norm(channels, TRANSFORMER_EPS),
                (self.context_dim,) * len(channels),
                heads,
                depth=self.config["transformer_depth"],
                initialise=fan_in_uniform,
                initialise_last=ZERO,
            )
        return StageAttention(
            norm(channels),
            StageConv2d(channels, [3 * c for c in channels], 1, initialise=fan_in_uniform),
            StageConv2d(channels, channels, 1, initialise=ZERO),
            heads,
            layout="per_head",
        )

    def _heads(self, channels: int) -> int:
        heads = self.config["num_heads"]
        if heads is None:
            heads = channels // self.config["head_channels"]
        if heads < 1 or channels % heads:
            raise ValueError(
                f"LDMUNet: {channels} channels are no multiple of head_channels={self.config['head_channels']} "
                f"or num_heads={self.config['num_heads']}"
            )
        return heads

    def _attending_stages(self) -> list[Widths]:
        """Per level, the stages whose decoders have attention."""
        config = self.config
        levels = range(len(config["channel_mult"]))
        if not config["reduced_attention"]:
            everyone = tuple(range(self.num_stages))
            return [
                everyone if self.image_size >> level in config["attn_resolutions"] else () for level in levels
            ]
        attending: list[list[int]] = [[] for _ in levels]
        downsampling = 2 ** (len(levels) - 1)
        for stage in range(self.num_stages):
            for level in reversed(levels):
                if downsampling and self.image_size // downsampling in config["attn_resolutions"]:
                    attending[level].append(stage)
                if level:
                    downsampling //= 2  # never reset: this is the reference's structure
        return [tuple(stages) for stages in attending]

"""The NCSN++ U-Net of score SDE (Song et al., arXiv 2011.13456) with one decoder per stage (arXiv 2312.09181).

BigGAN residual blocks, FIR resampling, residual progressive input; the middle belongs to the encoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from msd_kernels import StageBatch
from multistage_diffusion.networks.blocks import SKIP_SCALE, BlockStyle, ResidualInput
from multistage_diffusion.networks.embeddings import EmbeddingMLP, PositionalEmbedding
from multistage_diffusion.networks.layers import (
    StageAttention,
    StageConv2d,
    StageGroupNorm,
    Widths,
    xavier_uniform,
)
from multistage_diffusion.networks.unet import UNet

__all__ = ["NCSNpp"]

ATTENTION, ZERO = xavier_uniform(0.1**0.5), xavier_uniform(1e-5)
MIN_CHANNELS_PER_GROUP, EPS = 4, 1e-6
EMB_MULT = 4


def norm(channels: Widths, max_groups: int = 16) -> StageGroupNorm:
    """GroupNorm of this family: a group for every 4 channels, at most ``max_groups``."""
    groups = [max(min(c // MIN_CHANNELS_PER_GROUP, max_groups), 1) for c in channels]
    return StageGroupNorm(channels, groups, eps=EPS)


def attention(channels: Widths, max_groups: int = 16, scale: float = SKIP_SCALE) -> StageAttention:
    """Self-attention of this family: one head; q, k and v one after the other."""
    return StageAttention(
        norm(channels, max_groups),
        StageConv2d(channels, [3 * c for c in channels], 1, initialise=ATTENTION),
        StageConv2d(channels, channels, 1, initialise=ZERO),
        num_heads=(1,) * len(channels),
        layout="blocked",
        scale=scale,
    )


class NCSNpp(UNet):
    """NCSN++ with a shared encoder and one decoder per stage; a batch may mix samples of all stages.

    ``decoder_widths`` with one entry is the unified network; as many ``encoder_widths`` as ``decoder_widths`` are
    separate networks. The defaults are the deep network for CIFAR-10.

    ``noise`` is 999 t with the SDE's time t in [0, 1].

    Args:
        image_size: height and width of the images, divisible by 2 to the number of levels less one.
        in_channels: channels of the images.
        encoder_widths: base width of the encoder: one for a shared encoder, or one per stage.
        decoder_widths: base width of each stage's decoder.
        channel_mult: per level, finest first, the multiple of the base width.
        num_blocks: residual blocks per level.
        attn_resolutions: resolutions with attention, after every encoder block and once in the decoder; all among those
            of the levels: ``image_size``, its half and so on. Default: 16, where that is one.
            The middle has one attention more.
        dropout: dropout probability inside the residual blocks.
        resample_filter: taps of the resampling filter, an even number.
        skip_rescale: the sum of residual and skip is scaled by √½.
        centered: images are in [−1, 1]; if not, they are in [0, 1] and are centred first.
        max_groups: most groups of a GroupNorm: 16 in the multi-stage models, 32 in the original.

    Raises:
        ValueError: sizes that do not fit together; the message says what is allowed.
    """

    family = "ncsnpp"
    attending = (16,)

    def __init__(
        self,
        image_size: int,
        *,
        in_channels: int = 3,
        encoder_widths: Sequence[int] = (128,),
        decoder_widths: Sequence[int] = (192, 128, 16),
        channel_mult: Sequence[int] = (1, 2, 2, 2),
        num_blocks: int = 8,
        attn_resolutions: Sequence[int] | None = None,
        dropout: float = 0.1,
        resample_filter: Sequence[float] = (1, 3, 3, 1),
        skip_rescale: bool = True,
        centered: bool = True,
        max_groups: int = 16,
    ) -> None:
        super().__init__(locals())
        emb = tuple(EMB_MULT * w for w in self.encoder_widths)
        scale = SKIP_SCALE if skip_rescale else 1.0
        self.embed_noise = PositionalEmbedding(self.encoder_widths)
        self.embed = EmbeddingMLP(self.encoder_widths, emb)
        style = partial(
            BlockStyle,
            norm=partial(norm, max_groups=max_groups),
            attention=partial(attention, max_groups=max_groups, scale=scale),
            dropout=dropout,
            scale=scale,
            filter=tuple(resample_filter),
        )
        self.add_levels(emb, style)

    def image_input(self, pyramid: Widths, channels: Widths, style: BlockStyle) -> tuple[nn.Module, Widths]:
        return ResidualInput(pyramid, channels, style.filter, scale=style.scale), channels

    def centered(self, x: Tensor) -> Tensor:
        return x if self.config["centered"] else 2 * x - 1

    def embedding(
        self, noise: Tensor, counts: Widths, dtype: torch.dtype, conditioning: dict[str, Tensor | None]
    ) -> StageBatch:
        return self.embed(self.embed_noise(noise, counts).to(dtype))

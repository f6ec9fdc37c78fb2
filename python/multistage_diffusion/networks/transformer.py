"""Transformer blocks: those of U-ViT, and the spatial transformer of latent diffusion (arXiv 2112.10752)."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import nn

from msd_kernels import StageBatch
from multistage_diffusion.networks.layers import (
    Initialiser,
    StageAttention,
    StageConv2d,
    StageCrossAttention,
    StageGroupNorm,
    StageLayerNorm,
    StageLinear,
    Widths,
)


def times(channels: Widths, factor: float) -> Widths:
    """Each stage's channels, multiplied."""
    return tuple(int(c * factor) for c in channels)


def self_attention(
    channels: Widths,
    num_heads: Sequence[int],
    *,
    qkv_bias: bool = False,
    initialise: Initialiser | None = None,
) -> StageAttention:
    """``x + attention(layer_norm(x))`` over tokens; q, k and v one after the other, each ordered [heads, d]."""
    return StageAttention(
        StageLayerNorm(channels),
        StageLinear(channels, times(channels, 3), bias=qkv_bias, initialise=initialise),
        StageLinear(channels, channels, initialise=initialise),
        num_heads,
        layout="blocked",
    )


def cross_attention(
    channels: Widths, context: Widths, num_heads: Sequence[int], *, initialise: Initialiser | None = None
) -> StageCrossAttention:
    """``x + attention(layer_norm(x), context)`` from tokens to the tokens of a context."""
    return StageCrossAttention(
        StageLayerNorm(channels),
        StageLinear(channels, channels, bias=False, initialise=initialise),
        StageLinear(context, times(channels, 2), bias=False, initialise=initialise),
        StageLinear(channels, channels, initialise=initialise),
        num_heads,
    )


class FeedForward(nn.Module):
    """``x + layer1(gelu(layer0(layer_norm(x))))``; gated: ``layer0`` gives values and gates, values · gelu(gates)."""

    def __init__(
        self,
        channels: Widths,
        ratio: float = 4.0,
        *,
        gated: bool = False,
        initialise: Initialiser | None = None,
    ) -> None:
        super().__init__()
        self.gated = gated
        hidden = times(channels, ratio)
        self.norm = StageLayerNorm(channels)
        self.layer0 = StageLinear(channels, times(hidden, 2) if gated else hidden, initialise=initialise)
        self.layer1 = StageLinear(hidden, channels, initialise=initialise)

    def forward(self, x: StageBatch) -> StageBatch:
        h = self.layer0(self.norm(x))
        return self.layer1(_gate(h) if self.gated else h.map(F.gelu), residual=x)


def _gate(x: StageBatch) -> StageBatch:
    halves = [segment.chunk(2, dim=1) for segment in x.segments()]
    return StageBatch.from_segments([values * F.gelu(gates) for values, gates in halves])


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention where there is a context, feed-forward; each adds to its input."""

    def __init__(
        self, attention: StageAttention, cross: StageCrossAttention | None, mlp: FeedForward
    ) -> None:
        super().__init__()
        self.attention, self.cross, self.mlp = attention, cross, mlp

    def forward(self, x: StageBatch, context: StageBatch | None = None) -> StageBatch:
        x = self.attention(x)
        if self.cross is not None:
            x = self.cross(x, context)
        return self.mlp(x)


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a feature map: ``x + proj_out(blocks(proj_in(norm(x)), context))``."""

    def __init__(
        self,
        norm: StageGroupNorm,
        context: Widths,
        num_heads: Sequence[int],
        *,
        depth: int = 1,
        initialise: Initialiser | None = None,
        initialise_last: Initialiser | None = None,
    ) -> None:
        super().__init__()
        channels = norm.channels
        self.norm = norm
        self.proj_in = StageConv2d(channels, channels, 1, initialise=initialise)
        self.blocks = nn.ModuleList(
            TransformerBlock(
                self_attention(channels, num_heads, initialise=initialise),
                cross_attention(channels, context, num_heads, initialise=initialise),
                FeedForward(channels, gated=True, initialise=initialise),
            )
            for _ in range(depth)
        )
        self.proj_out = StageConv2d(channels, channels, 1, initialise=initialise_last)

    def forward(self, x: StageBatch, context: StageBatch) -> StageBatch:
        """``context``: a StageBatch with the context's tokens as its pixels."""
        h = self.proj_in(self.norm(x))
        for block in self.blocks:
            h = block(h, context)
        return self.proj_out(h, residual=x)

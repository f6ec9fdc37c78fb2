"""Embeddings of the noise input and of the labels, which every family of networks shares."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msd_kernels import StageBatch
from multistage_diffusion.networks.layers import Initialiser, StageLinear, StageModule, Widths

MAX_POSITIONS = 10_000


def positional_embedding(
    noise: Tensor, channels: int, *, endpoint: bool = True, cosine_first: bool = False
) -> Tensor:
    """``[B] -> [B, channels]``: sines and cosines of the noise at frequencies that fall from 1 to 1 / 10,000.

    Args:
        endpoint: 1 / 10,000 is included (EDM, score SDE); else the frequencies stop one short of it (latent
            diffusion, U-ViT).
        cosine_first: cosines, then sines (latent diffusion, U-ViT); else the other way round.
    """
    half = channels // 2
    dtype = torch.float64 if noise.dtype == torch.float64 else torch.float32
    steps = max(half - 1, 1) if endpoint else half
    frequencies = (
        torch.arange(half, dtype=dtype, device=noise.device) * (-math.log(MAX_POSITIONS) / steps)
    ).exp()
    angles = noise.to(dtype)[:, None] * frequencies
    parts = (angles.cos(), angles.sin()) if cosine_first else (angles.sin(), angles.cos())
    return F.pad(torch.cat(parts, dim=1), (0, channels % 2))


class PositionalEmbedding(nn.Module):
    """:func:`positional_embedding` for a mixed batch; ``channels`` is per stage."""

    def __init__(self, channels: Widths, *, endpoint: bool = True, cosine_first: bool = False) -> None:
        super().__init__()
        self.channels, self.endpoint, self.cosine_first = channels, endpoint, cosine_first

    def forward(self, noise: Tensor, counts: Sequence[int]) -> StageBatch:
        parts = zip(noise.split(list(counts)), self.channels, strict=True)
        return _vectors(
            [
                positional_embedding(n, c, endpoint=self.endpoint, cosine_first=self.cosine_first)
                for n, c in parts
            ]
        )


class FourierEmbedding(StageModule):
    """Sines, then cosines, of the noise at random, fixed frequencies from N(0, ``scale``²) (arXiv 2011.13456).

    The frequencies are buffers, one per stage.
    """

    def __init__(self, channels: Widths, scale: float = 16.0) -> None:
        super().__init__(len(channels))
        self.channels = channels
        sizes = [c // 2 for c in channels]
        frequencies = torch.randn(sum(sizes)) * scale
        self.hold("freqs", [part.clone() for part in frequencies.split(sizes)], trained=False)

    def forward(self, noise: Tensor, counts: Sequence[int]) -> StageBatch:
        dtype = torch.float64 if noise.dtype == torch.float64 else torch.float32
        parts = zip(noise.split(list(counts)), self.freqs(), strict=True)
        angles = [n.to(dtype)[:, None] * (2 * math.pi * f.to(dtype)) for n, f in parts]
        return _vectors([torch.cat([a.sin(), a.cos()], dim=1) for a in angles])


class EmbeddingMLP(nn.Module):
    """``silu(layer1(silu(layer0(x))) + extra)``: what every residual block is told about noise and labels."""

    def __init__(
        self, in_channels: Widths, channels: Widths, *, initialise: Initialiser | None = None
    ) -> None:
        super().__init__()
        self.layer0 = StageLinear(in_channels, channels, initialise=initialise)
        self.layer1 = StageLinear(channels, channels, initialise=initialise)

    def forward(self, x: StageBatch, extra: StageBatch | None = None) -> StageBatch:
        x = self.layer1(self.layer0(x).map(F.silu))
        return (x if extra is None else add(x, extra)).map(F.silu)


def label_batch(
    labels: Tensor | None, layer: StageLinear | None, counts: Sequence[int], dtype: torch.dtype
) -> StageBatch | None:
    """``layer(labels)``, one vector per sample; None where no labels were given."""
    return None if labels is None else layer(StageBatch.from_dense(labels.to(dtype), counts))


def drop_labels(labels: Tensor | None, probability: float) -> Tensor | None:
    """Sets each sample's labels to zero with this probability, for guidance without a classifier."""
    if labels is None or probability == 0:
        return labels
    keep = torch.rand(labels.shape[0], 1, device=labels.device) >= probability
    return labels * keep.to(labels.dtype)


def add(first: StageBatch, second: StageBatch | None) -> StageBatch:
    """The sum of two batches of one layout; ``first`` where ``second`` is None."""
    return first if second is None else first.with_values(first.values + second.values)


def _vectors(parts: Sequence[Tensor]) -> StageBatch:
    return StageBatch.from_segments([part[:, :, None, None] for part in parts])

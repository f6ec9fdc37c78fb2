"""A U-Net built like that of guided diffusion (Dhariwal and Nichol, arXiv 2105.05233), written anew.

Its classes have the names and the attributes by which :func:`msd_kernels.nn.replace_group_norm` knows the original's:
:func:`as_guided_diffusion` lets them be found where that library's would be.
"""

from __future__ import annotations

import math
import sys
import types
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GroupNorm32(nn.GroupNorm):
    """Computed in float32."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.group_norm(x.float(), self.num_groups, self.weight.float(), self.bias.float(), self.eps)
        return y.to(x.dtype)


def norm(channels: int) -> GroupNorm32:
    return GroupNorm32(32, channels)


class ResBlock(nn.Module):
    """A residual block whose second norm is scaled and shifted by the embedding; ``resample`` is a factor."""

    def __init__(self, channels: int, out_channels: int, embedding: int, resample: float = 1.0) -> None:
        super().__init__()
        self.resample = resample
        self.in_layers = nn.Sequential(
            norm(channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, 2 * out_channels))
        self.out_layers = nn.Sequential(
            norm(out_channels),
            nn.SiLU(),
            nn.Dropout(0.0),
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
        )
        same = channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1)

    def _resampled(self, x: Tensor) -> Tensor:
        if self.resample == 1.0:
            return x
        return F.avg_pool2d(x, 2) if self.resample < 1 else F.interpolate(x, scale_factor=2, mode="nearest")

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        begin, convolve = self.in_layers[:-1], self.in_layers[-1]
        h = convolve(self._resampled(begin(x)))
        scale, shift = self.emb_layers(embedding)[..., None, None].chunk(2, dim=1)
        normalise, rest = self.out_layers[0], self.out_layers[1:]
        h = rest(normalise(h) * (1 + scale) + shift)
        return self.skip_connection(self._resampled(x)) + h


class AttentionBlock(nn.Module):
    def __init__(self, channels: int, head: int = 64) -> None:
        super().__init__()
        self.heads = channels // head
        self.norm, self.qkv = norm(channels), nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, *size = x.shape
        tokens = x.flatten(2)
        parts = self.qkv(self.norm(tokens)).view(batch, self.heads, 3, -1, tokens.shape[-1]).unbind(2)
        h = F.scaled_dot_product_attention(*(part.transpose(-1, -2) for part in parts))
        h = self.proj_out(h.transpose(-1, -2).reshape(tokens.shape))
        return (tokens + h).view(batch, channels, *size)


class GuidedUNet(nn.Module):
    """Of ImageNet 64's settings but for the number of blocks: 192 channels, scale and shift, resampling in blocks."""

    def __init__(
        self, width: int = 192, mult: Sequence[int] = (1, 2, 3, 4), blocks: int = 1, attention_from: int = 1
    ) -> None:
        super().__init__()
        self.width, embedding = width, 4 * width
        self.time_embed = nn.Sequential(
            nn.Linear(width, embedding), nn.SiLU(), nn.Linear(embedding, embedding)
        )
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        skips, channels = [width], width
        for level, factor in enumerate(mult):
            for _ in range(blocks):
                self.down.append(self._stack(channels, factor * width, embedding, level >= attention_from))
                channels = factor * width
                skips.append(channels)
            if level < len(mult) - 1:
                self.down.append(nn.ModuleList([ResBlock(channels, channels, embedding, 0.5)]))
                skips.append(channels)
        self.middle = nn.ModuleList(
            [
                ResBlock(channels, channels, embedding),
                AttentionBlock(channels),
                ResBlock(channels, channels, embedding),
            ]
        )
        for level, factor in reversed(list(enumerate(mult))):
            for index in range(blocks + 1):
                stack = self._stack(
                    channels + skips.pop(), factor * width, embedding, level >= attention_from
                )
                channels = factor * width
                if level and index == blocks:
                    stack.append(ResBlock(channels, channels, embedding, 2.0))
                self.up.append(stack)
        self.out = nn.Sequential(norm(channels), nn.SiLU(), nn.Conv2d(channels, 3, 3, padding=1))

    @staticmethod
    def _stack(channels: int, outs: int, embedding: int, attention: bool) -> nn.ModuleList:
        block = ResBlock(channels, outs, embedding)
        return nn.ModuleList([block, AttentionBlock(outs)] if attention else [block])

    def forward(self, x: Tensor, step: Tensor) -> Tensor:
        half = self.width // 2
        rates = torch.exp(torch.arange(half, dtype=torch.float32) * (-math.log(10000.0) / half))
        angles = step[:, None].float() * rates
        embedding = self.time_embed(torch.cat([angles.cos(), angles.sin()], dim=1).to(x.dtype))
        h = self.first(x)
        skips = [h]
        for stack in self.down:
            h = _run(stack, h, embedding)
            skips.append(h)
        h = _run(self.middle, h, embedding)
        for stack in self.up:
            h = _run(stack, torch.cat([h, skips.pop()], dim=1), embedding)
        return self.out(h)


def _run(stack: nn.ModuleList, h: Tensor, embedding: Tensor) -> Tensor:
    for module in stack:
        h = module(h, embedding) if isinstance(module, ResBlock) else module(h)
    return h


def as_guided_diffusion() -> None:
    """Lets the classes be found as that library's, unless it is imported."""
    for name, found in (("nn", GroupNorm32), ("unet", ResBlock)):
        module = sys.modules.setdefault(f"guided_diffusion.{name}", types.ModuleType(name))
        if not hasattr(module, found.__name__):
            setattr(module, found.__name__, found)

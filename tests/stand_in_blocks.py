"""Blocks with the names and attributes of other people's libraries, written for the tests: what is known of them.

:func:`libraries` puts them where the libraries would have them.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHANNELS, GROUPS, EMBEDDING = 8, 2, 4


def convolution() -> nn.Conv2d:
    return nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)


class ResnetBlock2D(nn.Module):
    """Of diffusers: one SiLU for both norms and the embedding, which is added or scales and shifts."""

    def __init__(self, scale_shift: bool = False) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(GROUPS, CHANNELS), nn.GroupNorm(GROUPS, CHANNELS)
        self.conv1, self.conv2 = convolution(), convolution()
        self.nonlinearity = nn.SiLU()
        self.scale_shift = scale_shift
        self.time_emb_proj = nn.Linear(EMBEDDING, (1 + scale_shift) * CHANNELS)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv1(self.nonlinearity(self.norm1(x)))
        e = self.time_emb_proj(self.nonlinearity(embedding))[:, :, None, None]
        if self.scale_shift:
            scale, shift = e.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + e)
        return x + self.conv2(self.nonlinearity(h))


class Decoder(nn.Module):
    """The end of diffusers' networks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_norm_out, self.conv_act = nn.GroupNorm(GROUPS, CHANNELS), nn.SiLU()
        self.conv_out = convolution()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return self.conv_out(self.conv_act(self.conv_norm_out(x)))


class GroupNorm32(nn.GroupNorm):
    """Of guided diffusion."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).type(x.dtype)


class ResBlock(nn.Module):
    """Of guided diffusion: the second norm is called alone, and what follows it as a slice."""

    def __init__(self, scale_shift: bool = True) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(GroupNorm32(GROUPS, CHANNELS), nn.SiLU(), convolution())
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(EMBEDDING, 2 * CHANNELS))
        self.out_layers = nn.Sequential(
            GroupNorm32(GROUPS, CHANNELS), nn.SiLU(), nn.Dropout(0.0), convolution()
        )
        self.scale_shift = scale_shift

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        rest, last = self.in_layers[:-1], self.in_layers[-1]
        h = last(rest(x))
        scale, shift = self.emb_layers(embedding)[..., None, None].chunk(2, dim=1)
        if not self.scale_shift:
            return x + self.out_layers(h + shift)
        norm, rest = self.out_layers[0], self.out_layers[1:]
        return x + rest(norm(h) * (1 + scale) + shift)


class GroupNorm(nn.Module):
    """Of EDM, which is no ``torch.nn.GroupNorm``."""

    def __init__(self) -> None:
        super().__init__()
        self.num_groups, self.eps = GROUPS, 1e-5
        self.weight, self.bias = nn.Parameter(torch.ones(CHANNELS)), nn.Parameter(torch.zeros(CHANNELS))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.group_norm(x, self.num_groups, weight=weight, bias=bias, eps=self.eps)


class Conv2d(nn.Module):
    """Of EDM, which is no ``torch.nn.Conv2d`` and may resample."""

    def __init__(self, up: bool = False, channels: int = 32) -> None:
        super().__init__()
        self.in_channels = self.out_channels = channels
        self.up, self.down = up, False
        self.weight = nn.Parameter(torch.zeros(channels, channels, 3, 3))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2) if self.up else x
        y = F.conv2d(x, self.weight.to(x.dtype), padding=1)
        return y.add_(self.bias.to(x.dtype).reshape(1, -1, 1, 1))


class UNetBlock(nn.Module):
    """Of EDM: SiLU is a function, the embedding comes by ``addcmul``."""

    def __init__(self, adaptive_scale: bool = True) -> None:
        super().__init__()
        self.norm0, self.norm1 = GroupNorm(), GroupNorm()
        self.conv0, self.conv1 = convolution(), convolution()
        self.affine = nn.Linear(EMBEDDING, 2 * CHANNELS)
        self.adaptive_scale = adaptive_scale

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv0(F.silu(self.norm0(x)))
        scale, shift = self.affine(embedding)[:, :, None, None].chunk(2, dim=1)
        if self.adaptive_scale:
            h = F.silu(torch.addcmul(shift, self.norm1(h), scale + 1))
        else:
            h = F.silu(self.norm1(h.add_(shift)))
        return x + self.conv1(h)


class ResnetBlock(nn.Module):
    """Of latent diffusion's autoencoder: SiLU is written out."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(GROUPS, CHANNELS), convolution()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.norm1(x)
        return x + self.conv1(h * torch.sigmoid(h))


class ConditionedModule(nn.Module):
    """Of k-diffusion."""


class AdaGN(ConditionedModule):
    """Of k-diffusion; a GELU follows it."""

    def __init__(self) -> None:
        super().__init__()
        self.num_groups, self.eps, self.cond_key = GROUPS, 1e-5, "cond"
        self.mapper = nn.Linear(EMBEDDING, 2 * CHANNELS)

    def forward(self, x: Tensor, cond: dict[str, Tensor]) -> Tensor:
        scale, shift = self.mapper(cond[self.cond_key]).chunk(2, dim=-1)
        y = F.group_norm(x, self.num_groups, eps=self.eps)
        return torch.addcmul(shift[..., None, None], y, scale[..., None, None] + 1)


class Conditioned(nn.Module):
    """Where k-diffusion's blocks call their modules."""

    def __init__(self) -> None:
        super().__init__()
        self.main = nn.ModuleList([AdaGN(), nn.GELU(), convolution()])

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        for module in self.main:
            x = module(x, {"cond": embedding}) if isinstance(module, ConditionedModule) else module(x)
        return x


HOMES = {
    "diffusers.models.resnet": [ResnetBlock2D],
    "diffusers.models.autoencoders.vae": [Decoder],
    "guided_diffusion.nn": [GroupNorm32],
    "guided_diffusion.unet": [ResBlock],
    "_imported_module_of_a_pickle": [GroupNorm, UNetBlock, Conv2d],
    "ldm.modules.diffusionmodules.model": [ResnetBlock],
    "k_diffusion.layers": [AdaGN],
}


@contextmanager
def libraries() -> Iterator[None]:
    """As if the libraries were imported, and others not."""
    before = {name: sys.modules.get(name) for name in HOMES}
    for name, found in HOMES.items():
        sys.modules[name] = types.ModuleType(name)
        for kind in found:
            setattr(sys.modules[name], kind.__name__, kind)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module

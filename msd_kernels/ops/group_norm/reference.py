"""GroupNorm, scale and shift, SiLU: the formulas, one after the other, on packed stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from msd_kernels.dispatch.dtypes import wide
from msd_kernels.layouts import Affine, GroupNormLayout
from msd_kernels.ops.group_norm.masks import dropped
from msd_kernels.ops.group_norm.sources import joined, parted


@dataclass(frozen=True)
class _Stage:
    """One stage's inputs as ``[n, c, pixels]``, ``[1, c, 1]`` and ``[n, c, 1]``, in the wide dtype."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    scale: Tensor
    shift: Tensor
    groups: int

    def group_mean(self, t: Tensor) -> Tensor:
        """The mean over each group's channels and pixels, at every channel: ``[n, c, 1]``."""
        n, c, pixels = t.shape
        mean = t.reshape(n, self.groups, c // self.groups * pixels).mean(dim=2)
        return mean.repeat_interleave(c // self.groups, dim=1)[:, :, None]


def group_norm(
    x: Tensor,
    skip: Tensor | None,
    affine: Affine,
    layout: GroupNormLayout,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output of :func:`msd_kernels.group_norm`, and each group's mean and rstd, all flat.

    Differentiable in plain autograd.
    """
    x, layout = joined(x, skip, layout)
    ys, means, rstds = [], [], []
    for stage in _stages(x, affine, layout):
        x_hat, mean, rstd = _normalise(stage, layout.eps)
        z = (x_hat * stage.weight + stage.bias) * (1 + stage.scale) + stage.shift
        y = z * torch.sigmoid(z) if layout.silu else z
        ys.append(_flatten(y, layout.channels_last).to(x.dtype))
        first_of_group = slice(None, None, y.shape[1] // stage.groups)
        means.append(mean[:, first_of_group].reshape(-1))
        rstds.append(rstd[:, first_of_group].reshape(-1))
    return dropped(torch.cat(ys), layout, seed), torch.cat(means), torch.cat(rstds)


def group_norm_backward(
    dy: Tensor,
    x: Tensor,
    skip: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    affine: Affine,
    layout: GroupNormLayout,
    wanted: Sequence[bool],
    seed: Tensor | None = None,
) -> list[Tensor | None]:
    """Gradients for ``(x, skip, weight, bias, scale, shift)``, None where not wanted."""
    dy = dropped(dy, layout, seed)
    source, whole = joined(x, skip, layout)
    stages, cotangents = _stages(source, affine, whole), _stages(dy, Affine(), whole)
    gradients = [_stage_gradients(d.x, stage, whole) for d, stage in zip(cotangents, stages, strict=True)]
    dx, *others = zip(*gradients, strict=True)
    dsource = torch.cat([_flatten(d, whole.channels_last) for d in dx])
    found = [
        *parted(dsource, layout, wanted),
        *(torch.cat([d.reshape(-1) for d in parts]) for parts in others),
    ]
    return [
        d.to(t.dtype) if t is not None and flag else None
        for d, t, flag in zip(found, (x, skip, *affine), wanted, strict=True)
    ]


def _stage_gradients(dy: Tensor, stage: _Stage, layout: GroupNormLayout) -> tuple[Tensor, ...]:
    x_hat, _, rstd = _normalise(stage, layout.eps)
    affine = x_hat * stage.weight + stage.bias
    z = affine * (1 + stage.scale) + stage.shift
    sigmoid = torch.sigmoid(z)
    dz = dy * sigmoid * (1 + z * (1 - sigmoid)) if layout.silu else dy
    d_affine = dz * (1 + stage.scale)
    dx_hat = d_affine * stage.weight
    dx = rstd * (dx_hat - stage.group_mean(dx_hat) - x_hat * stage.group_mean(dx_hat * x_hat))
    dweight = (d_affine * x_hat).sum(dim=(0, 2))
    dbias = d_affine.sum(dim=(0, 2))
    return dx, dweight, dbias, (dz * affine).sum(dim=2), dz.sum(dim=2)


def _normalise(stage: _Stage, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    mean = stage.group_mean(stage.x)
    centred = stage.x - mean
    variance = stage.group_mean(centred.square())
    # Where squares overflowed, the variance is infinite; its rstd of 0 would hide that.
    rstd = torch.rsqrt(variance + eps).masked_fill(variance == torch.inf, torch.nan)
    return centred * rstd, mean, rstd


def _stages(x: Tensor, affine: Affine, layout: GroupNormLayout) -> list[_Stage]:
    planes, channels = layout.planes(x), layout.channels
    weights = [
        _split(flat, channels, x, default) for flat, default in ((affine.weight, 1.0), (affine.bias, 0.0))
    ]
    modulation = [_split(flat, layout.sample_sizes, x, 0.0) for flat in (affine.scale, affine.shift)]
    return [
        _Stage(
            planes[s].to(wide(x.dtype)),
            *(parts[s].view(1, channels[s], 1) for parts in weights),
            *(parts[s].view(layout.counts[s], channels[s], 1) for parts in modulation),
            layout.groups[s],
        )
        for s in range(len(channels))
    ]


def _split(flat: Tensor | None, sizes: Sequence[int], x: Tensor, default: float) -> Sequence[Tensor]:
    if flat is None:
        return [x.new_full((size,), default, dtype=wide(x.dtype)) for size in sizes]
    return flat.to(wide(x.dtype)).split(list(sizes))


def _flatten(planes: Tensor, channels_last: bool) -> Tensor:
    return (planes.transpose(1, 2) if channels_last else planes).reshape(-1)

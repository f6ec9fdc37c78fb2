"""GroupNorm per stage through ``torch.nn.functional``, its backward through ``aten``'s own kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from msd_kernels.batch_invariance import elementwise
from msd_kernels.dispatch.dtypes import wide
from msd_kernels.dispatch.segments import gather, split
from msd_kernels.layouts import Affine, GroupNormLayout
from msd_kernels.ops.group_norm.masks import dropped
from msd_kernels.ops.group_norm.sources import joined, parted


def group_norm(
    x: Tensor,
    skip: Tensor | None,
    affine: Affine,
    layout: GroupNormLayout,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output of :func:`msd_kernels.group_norm`, and each group's mean and rstd, all flat."""
    x, layout = joined(x, skip, layout)
    arguments = _per_stage(x, affine, layout)
    stats: dict[int, tuple[Tensor, Tensor]] = {}

    def stage_output(s: int) -> Tensor:
        planes, w, b, a, d = arguments[s]
        y, mean, rstd = _normalise(planes, w, b, layout.groups[s], layout.eps)
        stats[s] = (mean.reshape(-1), rstd.reshape(-1))
        return _flatten(_modulate(y, a, d, layout.silu), layout.channels_last)

    y = gather(x, layout.out_sizes, stage_output)
    mean, rstd = (gather(x, layout.stat_sizes, lambda s, i=i: stats[s][i]) for i in (0, 1))
    return dropped(y, layout, seed), mean.to(wide(x.dtype)), rstd.to(wide(x.dtype))


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
    """Gradients for ``(x, skip, weight, bias, scale, shift)``. The statistics come from a new forward, in the dtype
    that the library's own backward expects on this device."""
    dy = dropped(dy, layout, seed)
    x, whole = joined(x, skip, layout)
    arguments = _per_stage(x, affine, whole)
    cotangents = [planes for planes, *_ in _per_stage(dy, Affine(), whole)]
    flags = (wanted[0] or wanted[1], *wanted[2:])
    found = {
        s: _stage_gradients(cotangents[s], arguments[s], layout.groups[s], whole, flags)
        for s, n in enumerate(layout.counts)
        if n
    }
    dx, *others = (
        _join_gradient(argument, position, found, whole) if argument is not None and flags[position] else None
        for position, argument in enumerate((x, *affine))
    )
    return [*parted(dx, layout, wanted), *others]


def _stage_gradients(dy, arguments, groups, layout, wanted):
    x, weight, bias, scale, shift = arguments
    n, c, height, width = x.shape
    normalised, mean, rstd = _normalise(x, weight, bias, groups, layout.eps)
    dz = (
        dy
        if not layout.silu
        else torch.ops.aten.silu_backward(dy, _modulate(normalised, scale, shift, silu=False))
    )
    dscale = (dz * normalised).sum(dim=(2, 3)) if wanted[3] else None
    dshift = dz.sum(dim=(2, 3)) if wanted[4] else None
    dnormalised = dz if scale is None else dz * (1 + scale.to(dz.dtype))
    gamma = _as_kernel_takes(x, weight, bias)[0]
    # All three are asked for: the CPU kernel of PyTorch 2.13 reads the input's gradient even where it is masked out.
    dx, dweight, dbias = torch.ops.aten.native_group_norm_backward(
        dnormalised, x, mean, rstd, gamma, n, c, height * width, groups, [True, True, True]
    )
    return dx, dweight, dbias, dscale, dshift


def _join_gradient(argument, position, found, layout):
    """Joins one input's gradients over the stages, in that input's dtype; an empty stage's weights get zeros."""

    def part(stage: int) -> Tensor:
        gradient = found[stage][position].to(argument.dtype)
        return _flatten(gradient, layout.channels_last) if position == 0 else gradient.reshape(-1)

    if position in (1, 2):
        stages = zip(layout.counts, layout.channels, strict=True)
        return torch.cat([part(s) if n else argument.new_zeros(c) for s, (n, c) in enumerate(stages)])
    return gather(argument, layout.counts, part)


def _per_stage(x, affine, layout):
    """Each stage's planes in NCHW, which CUDA's kernel copies to anyway: PyTorch's channels_last kernel for the CPU
    computes the variance as E[x²] - E[x]² and is wrong by 0.7 standard deviations at a mean of 1,000 of them."""
    views = [planes.contiguous()[:, :, None] for planes in layout.planes(x)]
    modulation = [
        [
            None if t is None else t.view(n, c, 1, 1)
            for t, n, c in zip(split(flat, layout.sample_sizes), layout.counts, layout.channels, strict=True)
        ]
        for flat in (affine.scale, affine.shift)
    ]
    weights = (split(flat, layout.channels) for flat in (affine.weight, affine.bias))
    return list(zip(views, *weights, *modulation, strict=True))


def _normalise(planes, weight, bias, groups, eps):
    n, c, height, width = planes.shape
    weight, bias = _as_kernel_takes(planes, weight, bias)
    y, mean, rstd = torch.native_group_norm(planes, weight, bias, n, c, height * width, groups, eps)
    if planes.is_cpu and rstd.all():
        return y, mean, rstd
    # An rstd of 0 hides that squares overflowed. Looking for one would make the host wait for a GPU.
    overflow = torch.zeros_like(rstd).masked_fill_(rstd == 0, torch.nan)
    y.add_(overflow.to(y.dtype).repeat_interleave(c // groups, dim=1)[:, :, None, None])
    return y, mean, rstd.add_(overflow)


def _as_kernel_takes(planes, weight, bias):
    """On the CPU the wide dtype, which the kernel keeps its statistics in, too; elsewhere the dtype of ``planes``."""
    if not planes.is_cpu:
        return tuple(None if t is None else t.to(planes.dtype) for t in (weight, bias))
    dtype, channels = wide(planes.dtype), planes.shape[1]
    weight = planes.new_ones(channels, dtype=dtype) if weight is None else weight.to(dtype)
    bias = planes.new_zeros(channels, dtype=dtype) if bias is None else bias.to(dtype)
    return weight, bias


def _modulate(y, scale, shift, silu):
    if scale is not None:
        y = y * (1 + scale.to(y.dtype))
    if shift is not None:
        y = y + shift.to(y.dtype)
    return elementwise(F.silu, y) if silu else y


def _flatten(y: Tensor, channels_last: bool) -> Tensor:
    return (y.permute(0, 2, 3, 1) if channels_last else y).reshape(-1)

"""FIR resampling by 2: the sum over the taps along one axis, then along the other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from msd_kernels.reference.dtypes import wide


def resample2d(
    x: Tensor,
    taps: Sequence[float],
    upward: bool,
    stride: int,
    counts: Sequence[int],
    channels: Sequence[int],
    height: int,
    width: int,
    out_height: int,
    out_width: int,
    channels_last: bool,
) -> Tensor:
    """As the dispatcher op ``msd_kernels::resample2d``; differentiable in plain autograd."""
    axes = ((1, out_height), (2, out_width)) if channels_last else ((2, out_height), (3, out_width))
    ys = []
    for plane in stage_planes(x, counts, channels, height, width, channels_last):
        y = plane.to(wide(x.dtype))
        for dim, out_size in axes:
            y = _filter_axis(y, dim, taps, upward, stride, out_size)
        ys.append(y.reshape(-1).to(x.dtype))
    return torch.cat(ys)


def _filter_axis(
    x: Tensor, dim: int, taps: Sequence[float], upward: bool, stride: int, out_size: int
) -> Tensor:
    """The sum of shifted copies of ``x``, one per tap; upward with ``stride - 1`` zeros behind each element first."""
    x = x.movedim(dim, -1)
    padding, step = (len(taps) - 1) // 2, stride
    if upward:
        x = F.pad(x[..., None], (0, stride - 1)).flatten(-2)
        taps, padding, step = taps[::-1], len(taps) - 1 - padding, 1
    reach = step * (out_size - 1) + 1
    x = F.pad(x, (padding, reach + len(taps) - 1 - padding - x.shape[-1]))
    y = sum(tap * x[..., t : t + reach : step] for t, tap in enumerate(taps))
    return y.movedim(-1, dim)


def stage_planes(
    x: Tensor, counts: Sequence[int], channels: Sequence[int], height: int, width: int, channels_last: bool
) -> list[Tensor]:
    """Views of each stage's segment as ``[n, H, W, C]``, or ``[n, C, H, W]`` where x is not channels_last."""
    segments = x.split([n * c * height * width for n, c in zip(counts, channels, strict=True)])
    return [
        part.view(n, height, width, c) if channels_last else part.view(n, c, height, width)
        for part, n, c in zip(segments, counts, channels, strict=True)
    ]

"""FIR resampling by 2: the matrix of the filter along one axis, applied to both."""

from __future__ import annotations

from collections.abc import Sequence

import torch
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
    rows = _filter_matrix(x, taps, upward, stride, height, out_height)
    columns = _filter_matrix(x, taps, upward, stride, width, out_width)
    equation = "ij,njlc,kl->nikc" if channels_last else "ij,ncjl,kl->ncik"
    ys = []
    for plane in stage_planes(x, counts, channels, height, width, channels_last):
        y = torch.einsum(equation, rows, plane.to(wide(x.dtype)), columns)
        ys.append(y.reshape(-1).to(x.dtype))
    return torch.cat(ys)


def _filter_matrix(
    x: Tensor, taps: Sequence[float], upward: bool, stride: int, size: int, out_size: int
) -> Tensor:
    """``[out_size, size]``. Downward, row i holds tap t in column ``stride * i + t - padding``."""
    coarse, fine = (size, out_size) if upward else (out_size, size)
    row, column = (torch.arange(n, device=x.device) for n in (coarse, fine))
    position = column - stride * row[:, None] + (len(taps) - 1) // 2  # of a matrix element among the taps
    matrix = x.new_zeros(coarse, fine, dtype=wide(x.dtype))
    for t, tap in enumerate(taps):
        matrix += (position == t).to(matrix.dtype) * tap
    return matrix.t() if upward else matrix


def stage_planes(
    x: Tensor, counts: Sequence[int], channels: Sequence[int], height: int, width: int, channels_last: bool
) -> list[Tensor]:
    """Views of each stage's segment as ``[n, H, W, C]``, or ``[n, C, H, W]`` where x is not channels_last."""
    segments = x.split([n * c * height * width for n, c in zip(counts, channels, strict=True)])
    return [
        part.view(n, height, width, c) if channels_last else part.view(n, c, height, width)
        for part, n, c in zip(segments, counts, channels, strict=True)
    ]

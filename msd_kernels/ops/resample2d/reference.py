"""FIR resampling by 2: the sum over the taps along one axis, then along the other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from msd_kernels.dispatch.dtypes import wide
from msd_kernels.layouts import Resample2dLayout


def resample2d(x: Tensor, layout: Resample2dLayout) -> Tensor:
    """The flat output of :func:`msd_kernels.resample2d`; differentiable in plain autograd."""
    first = 1 if layout.channels_last else 2
    ys = []
    for plane in layout.planes(x):
        y = plane.to(wide(x.dtype))
        for dim, out_size in ((first, layout.out_height), (first + 1, layout.out_width)):
            y = _filter_axis(y, dim, layout.taps, layout.upward, layout.stride, out_size)
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

"""The compiled FIR resampling kernels (csrc/cpu/resample2d.cpp)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from msd_kernels import allocate
from msd_kernels.native.group_norm import cannot_cpu

__all__ = ["cannot_cpu", "resample2d"]


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
    """As the dispatcher op ``msd_kernels::resample2d``."""
    y = allocate.grouped_output(x, [n * out_height * out_width for n in counts], channels)
    layout = (counts, channels, height, width, out_height, out_width, channels_last)
    torch.ops.msd_kernels_native.resample2d(x, taps, upward, stride, *layout, y)
    return y

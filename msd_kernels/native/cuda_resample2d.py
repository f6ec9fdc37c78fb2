"""The CUDA kernel of FIR resampling (csrc/cuda/resample2d.cu)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from msd_kernels import allocate
from msd_kernels.native import cuda

KERNELS = torch.ops.msd_kernels_cuda


def cannot(*, dtype: torch.dtype, **_) -> str | None:
    """Why this kernel cannot serve a call, or None."""
    return cuda.cannot_run(dtype)


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
    """As the dispatcher op ``msd_kernels::resample2d``; one launch, or two where only some stages fill vectors."""
    y = allocate.grouped_output(x, [n * out_height * out_width for n in counts], channels)
    layout = (counts, channels, height, width, out_height, out_width, channels_last)
    cuda.run(KERNELS.resample2d.default, x, x, taps, upward, stride, *layout, y)
    return y

"""The CUDA kernel of FIR resampling (csrc/cuda/resample2d.cu)."""

from __future__ import annotations

import torch
from torch import Tensor

from msd_kernels.layouts import Resample2dLayout
from msd_kernels.runtime import cuda

KERNELS = torch.ops.msd_kernels_cuda


def cannot(*, dtype: torch.dtype, **_) -> str | None:
    """Why this kernel cannot serve a call, or None."""
    return cuda.cannot_run(dtype)


def resample2d(x: Tensor, layout: Resample2dLayout) -> Tensor:
    """The flat output of :func:`msd_kernels.resample2d`, by one launch, or two where only some stages fill vectors."""
    y = x.new_empty(layout.out_elements)
    cuda.run(KERNELS.resample2d.default, x, x, *layout, y)
    return y

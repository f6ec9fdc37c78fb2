"""The compiled FIR resampling kernels (csrc/cpu/resample2d.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from msd_kernels.layouts import Resample2dLayout
from msd_kernels.ops.group_norm.cpu import cannot

__all__ = ["cannot", "resample2d"]


def resample2d(x: Tensor, layout: Resample2dLayout) -> Tensor:
    """The flat output of :func:`msd_kernels.resample2d`."""
    y = x.new_empty(layout.out_elements)
    torch.ops.msd_kernels_native.resample2d(x, *layout, y)
    return y

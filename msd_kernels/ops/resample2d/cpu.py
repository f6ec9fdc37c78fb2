"""The compiled FIR resampling kernels (csrc/cpu/resample2d.cpp)."""

from __future__ import annotations

from torch import Tensor

from msd_kernels.dispatch import allocate
from msd_kernels.layouts import Resample2dLayout
from msd_kernels.ops.group_norm.cpu import cannot
from msd_kernels.runtime.extension import addresses, compiled_layout, load

__all__ = ["cannot", "resample2d"]


def resample2d(x: Tensor, layout: Resample2dLayout) -> Tensor:
    """The flat output of :func:`msd_kernels.resample2d`."""
    y = allocate.resample2d_output(x, layout)
    kernels = load("cpu").module
    kernels.resample2d(compiled_layout(kernels.Resample2dLayout, layout, x), addresses(x), addresses(y))
    return y

"""The compiled FIR resampling kernels (csrc/cpu/resample2d.cpp)."""

from __future__ import annotations

from torch import Tensor

from msd_kernels.dispatch import allocate
from msd_kernels.dispatch.backends import Call
from msd_kernels.layouts import Resample2dLayout
from msd_kernels.runtime.extension import addresses, cannot_run_on_cpu, compiled_layout, load


def cannot(call: Call) -> str | None:
    """Why these kernels cannot serve a call, or None."""
    return cannot_run_on_cpu(call.dtype)


def resample2d(x: Tensor, layout: Resample2dLayout) -> Tensor:
    """The flat output of :func:`msd_kernels.resample2d`."""
    y = allocate.resample2d_output(x, layout)
    kernels = load("cpu").module
    kernels.resample2d(compiled_layout(kernels.Resample2dLayout, layout, x), addresses(x), addresses(y))
    return y

"""The CUDA kernel of FIR resampling (csrc/cuda/resample2d.cu)."""

from __future__ import annotations

from torch import Tensor

from msd_kernels.dispatch import allocate
from msd_kernels.dispatch.backends import Call
from msd_kernels.layouts import Resample2dLayout
from msd_kernels.runtime import cuda
from msd_kernels.runtime.extension import addresses, compiled_layout


def cannot(call: Call) -> str | None:
    """Why this kernel cannot serve a call, or None."""
    return cuda.cannot_run(call.dtype)


def resample2d(x: Tensor, layout: Resample2dLayout) -> Tensor:
    """The flat output of :func:`msd_kernels.resample2d`, by one launch, or two where only some stages fill vectors."""
    y = allocate.resample2d_output(x, layout)
    kernels = cuda.kernels()
    call = (compiled_layout(kernels.Resample2dLayout, layout, x), addresses(x), addresses(y))
    cuda.run(lambda device, stream: kernels.resample2d(*call, device, stream), x)
    return y

"""The grouped linear layer in Triton: the 1×1 convolution of maps of one pixel, in the same launches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from msd_kernels.dispatch.backends import Call
from msd_kernels.layouts import LinearLayout
from msd_kernels.ops.grouped_conv2d import triton as conv
from msd_kernels.ops.grouped_conv2d.triton import run_backward, run_forward
from msd_kernels.runtime import tuned

__all__ = ["cannot", "grouped_linear", "grouped_linear_backward", "slower"]


def cannot(call: Call) -> str | None:
    """Why the kernels cannot serve a call, or None."""
    return conv.cannot(call._replace(layout=call.layout.conv2d))


def slower(call: Call) -> str | None:
    """Why the library's loop over the stages is preferred to one launch, or None."""
    return conv.slower(call._replace(layout=call.layout.conv2d))


def grouped_linear(
    x: Tensor, weight: Sequence[Tensor], bias: Sequence[Tensor], layout: LinearLayout
) -> Tensor:
    """The flat output of :func:`msd_kernels.grouped_linear`."""
    return run_forward(x, None, None, None, weight, bias, layout.conv2d, 1.0, _arithmetic(x))


def grouped_linear_backward(
    dy: Tensor, x: Tensor, weight: Sequence[Tensor], layout: LinearLayout, wanted: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients for ``(x, *weight, *bias)``, None where not wanted."""
    want_x, *want_parameters = wanted
    flags = (want_x, False, False, *want_parameters)
    dx, _, _, *parameters = run_backward(dy, x, None, weight, layout.conv2d, flags, _arithmetic(x))
    matrices = [
        g if g is None else g.view(shape) for g, shape in zip(parameters, layout.weight_shapes, strict=False)
    ]
    return [dx, *matrices, *parameters[len(weight) :]]


def _arithmetic(x: Tensor) -> str:
    """Float32 follows PyTorch's own setting for matrix products."""
    allow_tf32 = x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return tuned.arithmetic(x.dtype, allow_tf32)

"""The compiled GroupNorm kernels (csrc/cpu/group_norm.cpp)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from msd_kernels.dispatch import allocate
from msd_kernels.dispatch.backends import Call
from msd_kernels.layouts import Affine, GroupNormLayout
from msd_kernels.runtime.extension import addresses, compiled_layout, load

# x and its likes may come and go in their own shapes, and dy in NCHW order although x is NHWC: the kernels look at
# the order in memory alone.
TAKES_OWN_SHAPES = True
CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def cannot(call: Call) -> str | None:
    """Why the CPU kernel cannot serve a call, or None."""
    if call.dtype not in CPU_DTYPES:
        return f"takes float32, bfloat16 and float16, got {call.dtype}"
    return load("cpu").reason or None


def group_norm(x: Tensor, affine: Affine, layout: GroupNormLayout) -> tuple[Tensor, Tensor, Tensor]:
    """The output of :func:`msd_kernels.group_norm` in the shape of ``x``, and each group's mean and rstd, flat."""
    outputs = allocate.group_norm_outputs(x, layout)
    kernels = load("cpu").module
    compiled = compiled_layout(kernels.GroupNormLayout, layout, x, *affine)
    kernels.group_norm_forward(compiled, addresses(x, *affine), addresses(*outputs))
    return outputs


def group_norm_backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    affine: Affine,
    layout: GroupNormLayout,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients for ``(x, weight, bias, scale, shift)``, None where not wanted."""
    gradients = allocate.gradients_like((x, *affine), wanted)
    kernels = load("cpu").module
    compiled = compiled_layout(kernels.GroupNormLayout, layout, x, *affine)
    dy_planar = layout.channels_last and dy.dim() > 1 and dy.is_contiguous()
    inputs = addresses(dy, mean, rstd, x, *affine)
    kernels.group_norm_backward(compiled, inputs, addresses(*gradients), dy_planar)
    return gradients

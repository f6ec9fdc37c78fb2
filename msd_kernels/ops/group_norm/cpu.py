"""The compiled GroupNorm kernels (csrc/cpu/group_norm.cpp)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from msd_kernels.layouts import Affine, GroupNormLayout
from msd_kernels.runtime.extension import load

# x and its likes may come and go in their own shapes, and dy in NCHW order although x is NHWC: the kernels look at
# the order in memory alone.
TAKES_OWN_SHAPES = True
CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def cannot(*, dtype: torch.dtype, **_) -> str | None:
    """Why the CPU kernel cannot serve a call with activations of ``dtype``, or None."""
    if dtype not in CPU_DTYPES:
        return f"takes float32, bfloat16 and float16, got {dtype}"
    return load("cpu").reason or None


@cache
def _operator(name: str):
    """A registered function of the library, which must be loaded."""
    return getattr(torch.ops.msd_kernels_native, name).default


def group_norm(x: Tensor, affine: Affine, layout: GroupNormLayout) -> tuple[Tensor, Tensor, Tensor]:
    """The output of :func:`msd_kernels.group_norm` in the shape of ``x``, and each group's mean and rstd, flat."""
    return _operator("group_norm_forward")(x, *affine, *layout)


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
    counts, channels, groups, spatial, channels_last, _, silu = layout
    planar = channels_last and dy.dim() > 1 and dy.is_contiguous()
    bits = sum(flag << i for i, flag in enumerate(wanted))
    gradients = _operator("group_norm_backward")(
        dy, planar, x, mean, rstd, *affine, counts, channels, groups, spatial, channels_last, silu, bits
    )
    return [gradient if flag else None for gradient, flag in zip(gradients, wanted, strict=True)]

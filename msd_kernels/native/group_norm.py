"""The compiled GroupNorm kernels (csrc/cpu/group_norm.cpp)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from msd_kernels.native import load

# x and its likes may come and go in their own shapes, and dy in NCHW order although x is NHWC: the kernels look at
# the order in memory alone.
TAKES_OWN_SHAPES = True
CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def cannot_cpu(*, dtype: torch.dtype, **_) -> str | None:
    """Why the CPU kernel cannot serve a call with activations of ``dtype``, or None."""
    if dtype not in CPU_DTYPES:
        return f"takes float32, bfloat16 and float16, got {dtype}"
    return load("cpu").reason or None


@cache
def _operator(name: str):
    """A registered function of the library, which must be loaded."""
    return getattr(torch.ops.msd_kernels_native, name).default


def group_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    counts: Sequence[int],
    channels: Sequence[int],
    groups: Sequence[int],
    spatial: int,
    channels_last: bool,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As the dispatcher op ``msd_kernels::group_norm``."""
    return _operator("group_norm_forward")(
        x, weight, bias, scale, shift, counts, channels, groups, spatial, channels_last, eps, silu
    )


def group_norm_backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    counts: Sequence[int],
    channels: Sequence[int],
    groups: Sequence[int],
    spatial: int,
    channels_last: bool,
    eps: float,
    silu: bool,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients for ``(x, weight, bias, scale, shift)``, None where not wanted."""
    planar = channels_last and dy.dim() > 1 and dy.is_contiguous()
    layout = (counts, channels, groups, spatial, channels_last, silu)
    bits = sum(flag << i for i, flag in enumerate(wanted))
    gradients = _operator("group_norm_backward")(
        dy, planar, x, mean, rstd, weight, bias, scale, shift, *layout, bits
    )
    return [gradient if flag else None for gradient, flag in zip(gradients, wanted, strict=True)]

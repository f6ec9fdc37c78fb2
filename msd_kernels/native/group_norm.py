"""The compiled GroupNorm kernels (csrc/cpu/group_norm.cpp)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from msd_kernels import allocate
from msd_kernels.native import load

CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def cannot_cpu(*, dtype: torch.dtype, **_) -> str | None:
    """Why the CPU kernel cannot serve a call with activations of ``dtype``, or None."""
    if dtype not in CPU_DTYPES:
        return f"takes float32, bfloat16 and float16, got {dtype}"
    return load("cpu").reason or None


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
    outputs = allocate.group_norm_outputs(x, counts, groups)
    torch.ops.msd_kernels_native.group_norm_forward(
        x, weight, bias, scale, shift, counts, channels, groups, spatial, channels_last, eps, silu, *outputs
    )
    return outputs


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
    gradients = allocate.gradients_like((x, weight, bias, scale, shift), wanted)
    layout = (counts, channels, groups, spatial, channels_last, silu)
    torch.ops.msd_kernels_native.group_norm_backward(
        dy, x, mean, rstd, weight, bias, scale, shift, *layout, *gradients
    )
    return gradients

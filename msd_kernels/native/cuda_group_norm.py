"""The CUDA kernels of GroupNorm (csrc/cuda/group_norm.cu and group_norm_backward.cu)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from msd_kernels import allocate
from msd_kernels.native import cuda

# x and its likes may come and go in their own shapes: the kernels look at the order in memory alone.
TAKES_OWN_SHAPES = True
# A block holds several arrays of a group's channels in shared memory (csrc/cuda/group_norm_plan.h).
MAX_GROUP_CHANNELS = 2048

KERNELS = torch.ops.msd_kernels_cuda
# For benchmarks: [groups of a unit, parts of a unit or 0 for two passes] in the place of the estimates' choice.
CUT: list[int] | None = None


def cannot(*, dtype: torch.dtype, channels: Sequence[int], groups: Sequence[int], **_) -> str | None:
    """Why these kernels cannot serve a call, or None."""
    widest = max(c // g for c, g in zip(channels, groups, strict=True))
    if widest > MAX_GROUP_CHANNELS:
        return f"takes up to {MAX_GROUP_CHANNELS} channels per group, got {widest}"
    return cuda.cannot_run(dtype)


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
    """As the dispatcher op ``msd_kernels::group_norm``; in one launch if a slab fits the shared memory of a cluster."""
    outputs = allocate.group_norm_outputs(x, counts, groups)
    layout = (counts, channels, groups, spatial, channels_last, eps, silu)
    cuda.run(KERNELS.group_norm_forward.default, x, x, weight, bias, scale, shift, *layout, *outputs, CUT)
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
    if channels_last and dy.dim() == 4:
        dy = dy.contiguous(memory_format=torch.channels_last)
    gradients = allocate.gradients_like((x, weight, bias, scale, shift), wanted)
    layout = (counts, channels, groups, spatial, channels_last, silu)
    inputs = (dy, x, mean, rstd, weight, bias, scale, shift)
    cuda.run(KERNELS.group_norm_backward.default, x, *inputs, *layout, *gradients, CUT)
    return gradients

"""The CUDA kernels of GroupNorm (csrc/cuda/group_norm.cu and group_norm_backward.cu)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from msd_kernels.dispatch import allocate
from msd_kernels.layouts import Affine, GroupNormLayout
from msd_kernels.runtime import cuda

# x and its likes may come and go in their own shapes: the kernels look at the order in memory alone.
TAKES_OWN_SHAPES = True
# A block holds several arrays of a group's channels in shared memory (csrc/cuda/group_norm_plan.h).
MAX_GROUP_CHANNELS = 2048

KERNELS = torch.ops.msd_kernels_cuda
# For benchmarks: [groups of a unit, parts of a unit or 0 for two passes] in the place of the estimates' choice.
CUT: list[int] | None = None


def cannot(*, dtype: torch.dtype, layout: GroupNormLayout, **_) -> str | None:
    """Why these kernels cannot serve a call, or None."""
    if layout.widest_group > MAX_GROUP_CHANNELS:
        return f"takes up to {MAX_GROUP_CHANNELS} channels per group, got {layout.widest_group}"
    return cuda.cannot_run(dtype)


def group_norm(x: Tensor, affine: Affine, layout: GroupNormLayout) -> tuple[Tensor, Tensor, Tensor]:
    """The output of :func:`msd_kernels.group_norm`, and each group's mean and rstd.

    In one launch if a slab fits the shared memory of a cluster.
    """
    outputs = allocate.group_norm_outputs(x, layout)
    cuda.run(KERNELS.group_norm_forward.default, x, x, *affine, *layout, *outputs, CUT)
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
    counts, channels, groups, spatial, channels_last, _, silu = layout
    if channels_last and dy.dim() == 4:
        dy = dy.contiguous(memory_format=torch.channels_last)
    gradients = allocate.gradients_like((x, *affine), wanted)
    sizes = (counts, channels, groups, spatial, channels_last, silu)
    cuda.run(KERNELS.group_norm_backward.default, x, dy, x, mean, rstd, *affine, *sizes, *gradients, CUT)
    return gradients

"""The compiled GroupNorm kernels (csrc/cpu/group_norm.cpp)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from msd_kernels.dispatch import allocate
from msd_kernels.dispatch.backends import Call
from msd_kernels.layouts import Affine, GroupNormLayout
from msd_kernels.ops.group_norm.sources import joined, parted
from msd_kernels.runtime.extension import addresses, cannot_run_on_cpu, compiled_layout, load

# x and its likes may come and go in their own shapes, and dy in NCHW order although x is NHWC: the kernels look at
# the order in memory alone.
TAKES_OWN_SHAPES = True
# Channels of a row are a multiple of this, and so many at least.
ROW, LEAST_ROW = 32, 128


def cannot(call: Call) -> str | None:
    """Why the CPU kernel cannot serve a call, or None."""
    return "has no dropout" if call.layout.dropout else cannot_run_on_cpu(call.dtype)


def group_norm(
    x: Tensor,
    skip: Tensor | None,
    affine: Affine,
    layout: GroupNormLayout,
    _seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output of :func:`msd_kernels.group_norm` in the shape of ``x``, and each group's mean and rstd, flat."""
    if not _read_in_place(layout):
        (x, layout), skip = joined(x, skip, layout), None
    outputs = allocate.group_norm_outputs(x, layout)
    kernels = load("cpu").module
    compiled = compiled_layout(kernels.GroupNormLayout, layout, x, *affine)
    kernels.group_norm_forward(compiled, addresses(x, skip, *affine), addresses(*outputs))
    return outputs


def group_norm_backward(
    dy: Tensor,
    x: Tensor,
    skip: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    affine: Affine,
    layout: GroupNormLayout,
    wanted: Sequence[bool],
    _seed: Tensor | None = None,
) -> list[Tensor | None]:
    """Gradients for ``(x, skip, weight, bias, scale, shift)``, None where not wanted."""
    if not _read_in_place(layout):
        source, whole = joined(x, skip, layout)
        flags = [wanted[0] or wanted[1], False, *wanted[2:]]
        dsource, _, *others = group_norm_backward(dy, source, None, mean, rstd, affine, whole, flags)
        return [*parted(dsource, layout, wanted), *others]
    gradients = allocate.gradients_like((x, skip, *affine), wanted)
    kernels = load("cpu").module
    compiled = compiled_layout(kernels.GroupNormLayout, layout, x, *affine)
    dy_planar = layout.channels_last and dy.dim() > 1 and dy.is_contiguous()
    inputs = addresses(dy, mean, rstd, x, skip, *affine)
    kernels.group_norm_backward(compiled, inputs, addresses(*gradients), dy_planar)
    return gradients


def _read_in_place(layout: GroupNormLayout) -> bool:
    """Whether the kernels read two sources where they are: rows of narrow maps hold several pixels (csrc/cpu/
    group_norm_plan.cpp), which lie together in one source alone."""
    widths = zip(layout.channels, layout.in_channels, strict=True)
    return not layout.has_skip or all(
        own == both or (own % ROW == both % ROW == 0 and both >= LEAST_ROW) for own, both in widths
    )

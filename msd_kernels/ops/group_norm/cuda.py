"""The CUDA kernels of GroupNorm (csrc/cuda/group_norm.cu and group_norm_backward.cu)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from msd_kernels.dispatch import allocate
from msd_kernels.dispatch.backends import Call
from msd_kernels.layouts import Affine, GroupNormLayout
from msd_kernels.runtime import cuda
from msd_kernels.runtime.extension import addresses, compiled_layout

# x and its likes may come and go in their own shapes: the kernels look at the order in memory alone.
TAKES_OWN_SHAPES = True
# A block holds several arrays of a group's channels in shared memory (csrc/cuda/group_norm_plan.h).
MAX_GROUP_CHANNELS = 2048

# For benchmarks: groups of a unit, and its parts or 0 for two passes, in the place of the estimates' choice.
ESTIMATED = (0, 0)
CUT = ESTIMATED


def cannot(call: Call) -> str | None:
    """Why these kernels cannot serve a call, or None."""
    if call.layout.has_skip:
        return "takes one source, got two"
    if call.layout.dropout:
        return "has no dropout"
    widest = call.layout.widest_group
    if widest > MAX_GROUP_CHANNELS:
        return f"takes up to {MAX_GROUP_CHANNELS} channels per group, got {widest}"
    return cuda.cannot_run(call.dtype)


def group_norm(
    x: Tensor,
    skip: Tensor | None,
    affine: Affine,
    layout: GroupNormLayout,
    _seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output of :func:`msd_kernels.group_norm`, and each group's mean and rstd.

    In one launch if a slab fits the shared memory of a cluster.
    """
    outputs = allocate.group_norm_outputs(x, layout)
    _run("group_norm_forward", layout, (x, skip, *affine), outputs)
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
    if layout.channels_last and dy.dim() == 4:
        dy = dy.contiguous(memory_format=torch.channels_last)
    gradients = allocate.gradients_like((x, skip, *affine), wanted)
    _run("group_norm_backward", layout, (dy, mean, rstd, x, skip, *affine), gradients)
    return gradients


def _run(
    name: str, layout: GroupNormLayout, inputs: Sequence[Tensor | None], outputs: Sequence[Tensor | None]
) -> None:
    """Launches a kernel, with a workspace that the stream keeps until it is done.

    The last six inputs are ``x``, ``skip`` and what is affine.
    """
    kernels, x = cuda.kernels(), inputs[-6]
    compiled = compiled_layout(kernels.GroupNormLayout, layout, x, *inputs[-4:])
    backward = name == "group_norm_backward"
    parameters = backward and any(gradient is not None for gradient in outputs[2:4])

    def launch(device: int, stream: int) -> None:
        floats = kernels.group_norm_workspace(compiled, backward, parameters, CUT, device)
        workspace = x.new_empty(floats, dtype=torch.float32) if floats else None
        tensors = (addresses(*inputs), addresses(*outputs), *addresses(workspace))
        getattr(kernels, name)(compiled, *tensors, CUT, device, stream)

    cuda.run(launch, x)

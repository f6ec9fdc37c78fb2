"""A linear layer with one weight per stage: one library matrix product per non-empty stage."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from msd_kernels.dispatch import stage_weights
from msd_kernels.dispatch.segments import gather
from msd_kernels.layouts import LinearLayout
from msd_kernels.runtime.cpu_types import float32, wants_float32


def grouped_linear(
    x: Tensor, weight: Sequence[Tensor], bias: Sequence[Tensor], layout: LinearLayout
) -> Tensor:
    """The flat output of :func:`msd_kernels.grouped_linear`."""
    dtype = x.dtype
    weight, bias = (stage_weights.converted(tensors, dtype, layout.rows) for tensors in (weight, bias))
    if wants_float32(x):
        (x,), weight, bias = float32(x), float32(*weight), float32(*bias)
    inputs = layout.inputs(x)

    def stage_output(s: int) -> Tensor:
        return F.linear(inputs[s], weight[s], bias[s]).view(-1)

    return gather(x, layout.out_sizes, stage_output).to(dtype)


def grouped_linear_backward(
    dy: Tensor, x: Tensor, weight: Sequence[Tensor], layout: LinearLayout, wanted: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients for ``(x, *weight, *bias)``, None where not wanted."""
    dtype, stages = x.dtype, len(weight)
    masters = [w.dtype for w in weight]
    weight = stage_weights.converted(weight, dtype, layout.rows)
    if wants_float32(x):
        (dy, x), weight = float32(dy, x), float32(*weight)
    inputs, cotangents = layout.inputs(x), layout.outputs(dy)
    want_x, want_weight, want_bias = wanted[0], wanted[1 : 1 + stages], wanted[1 + stages :]

    return [
        gather(x, layout.rows, lambda s: (cotangents[s] @ weight[s]).view(-1)).to(dtype) if want_x else None,
        *[(cotangents[s].t() @ inputs[s]).to(masters[s]) if want_weight[s] else None for s in range(stages)],
        *[cotangents[s].sum(dim=0).to(masters[s]) if want_bias[s] else None for s in range(stages)],
    ]

"""A linear layer with one weight per stage: one library matrix product per non-empty stage."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from msd_kernels.dispatch.segments import gather, split
from msd_kernels.layouts import LinearLayout
from msd_kernels.runtime.cpu_types import float32, wants_float32


def grouped_linear(x: Tensor, weight: Tensor, bias: Tensor | None, layout: LinearLayout) -> Tensor:
    """The flat output of :func:`msd_kernels.grouped_linear`."""
    dtype = x.dtype
    if wants_float32(x):
        x, weight, bias = float32(x, weight, bias)
    inputs, weights = layout.views(x, weight)
    biases = split(bias, layout.out_features)

    def stage_output(s: int) -> Tensor:
        return F.linear(inputs[s], weights[s], biases[s]).view(-1)

    return gather(x, layout.out_sizes, stage_output).to(dtype)


def grouped_linear_backward(
    dy: Tensor, x: Tensor, weight: Tensor, layout: LinearLayout, wanted: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients for ``(x, weight, bias)``, None where not wanted; an empty stage's weights get zeros."""
    dtype = x.dtype
    if wants_float32(x):
        dy, x, weight = float32(dy, x, weight)
    (inputs, weights), cotangents = layout.views(x, weight), layout.outputs(dy)
    want_x, want_weight, want_bias = wanted
    found = [
        gather(x, layout.rows, lambda s: (cotangents[s] @ weights[s]).view(-1)) if want_x else None,
        torch.cat([(d.t() @ i).view(-1) for d, i in zip(cotangents, inputs, strict=True)])
        if want_weight
        else None,
        torch.cat([d.sum(dim=0) for d in cotangents]) if want_bias else None,
    ]
    return [None if gradient is None else gradient.to(dtype) for gradient in found]

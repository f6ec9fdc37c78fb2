"""A linear layer with one weight per stage: the matrix products, stage by stage."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from msd_kernels.dispatch.dtypes import wide
from msd_kernels.layouts import LinearLayout


def grouped_linear(x: Tensor, weight: Tensor, bias: Tensor | None, layout: LinearLayout) -> Tensor:
    """The flat output of :func:`msd_kernels.grouped_linear`; differentiable in plain autograd."""
    inputs, weights = _wide_views(x, weight, layout)
    biases = x.new_zeros(sum(layout.out_features)) if bias is None else bias
    outputs = [
        i @ w.t() + b.to(i.dtype)
        for i, w, b in zip(inputs, weights, biases.split(list(layout.out_features)), strict=True)
    ]
    return torch.cat([y.reshape(-1) for y in outputs]).to(x.dtype)


def grouped_linear_backward(
    dy: Tensor, x: Tensor, weight: Tensor, layout: LinearLayout, wanted: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients for ``(x, weight, bias)``, None where not wanted."""
    inputs, weights = _wide_views(x, weight, layout)
    cotangents = [d.to(wide(x.dtype)) for d in layout.outputs(dy)]
    pairs = list(zip(cotangents, inputs, weights, strict=True))
    gradients = (
        [d @ w for d, _, w in pairs],
        [d.t() @ i for d, i, _ in pairs],
        [d.sum(dim=0) for d, _, _ in pairs],
    )
    return [
        torch.cat([g.reshape(-1) for g in parts]).to(dtype) if flag else None
        for parts, dtype, flag in zip(gradients, (x.dtype, weight.dtype, weight.dtype), wanted, strict=True)
    ]


def _wide_views(x: Tensor, weight: Tensor, layout: LinearLayout) -> list[list[Tensor]]:
    return [[part.to(wide(x.dtype)) for part in parts] for parts in layout.views(x, weight)]

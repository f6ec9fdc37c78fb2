"""A linear layer with one weight per stage: the matrix products, stage by stage."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from msd_kernels.dispatch.dtypes import wide
from msd_kernels.layouts import LinearLayout


def grouped_linear(
    x: Tensor, weight: Sequence[Tensor], bias: Sequence[Tensor], layout: LinearLayout
) -> Tensor:
    """The flat output of :func:`msd_kernels.grouped_linear`; differentiable in plain autograd."""
    inputs, weights = _wide(x, weight, layout)
    outputs = [i @ w.t() for i, w in zip(inputs, weights, strict=True)]
    if bias:
        outputs = [y + b.to(x.dtype).to(y.dtype) for y, b in zip(outputs, bias, strict=True)]
    return torch.cat([y.reshape(-1) for y in outputs]).to(x.dtype)


def grouped_linear_backward(
    dy: Tensor, x: Tensor, weight: Sequence[Tensor], layout: LinearLayout, wanted: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients for ``(x, *weight, *bias)``, None where not wanted."""
    inputs, weights = _wide(x, weight, layout)
    cotangents = [d.to(wide(x.dtype)) for d in layout.outputs(dy)]
    pairs = list(zip(cotangents, inputs, weights, strict=True))
    dx = torch.cat([(d @ w).reshape(-1) for d, _, w in pairs]).to(x.dtype)
    parameters = [d.t() @ i for d, i, _ in pairs] + [d.sum(dim=0) for d, _, _ in pairs]
    found = [dx, *[g.to(w.dtype) for g, w in zip(parameters, (*weight, *weight), strict=True)]]
    return [gradient if flag else None for gradient, flag in zip(found, wanted, strict=True)]


def _wide(x: Tensor, weight: Sequence[Tensor], layout: LinearLayout) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs and weights in the wide dtype; the weights first rounded to that of ``x``."""
    dtype = wide(x.dtype)
    return [part.to(dtype) for part in layout.inputs(x)], [w.to(x.dtype).to(dtype) for w in weight]

"""A linear layer with one weight per stage: the matrix products, stage by stage."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from msd_kernels.reference.dtypes import wide


def grouped_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Sequence[int],
    in_features: Sequence[int],
    out_features: Sequence[int],
) -> Tensor:
    """Differentiable in plain autograd; arguments as the dispatcher op ``msd_kernels::grouped_linear``."""
    inputs, weights = _views(x, weight, rows, in_features, out_features)
    biases = x.new_zeros(sum(out_features)) if bias is None else bias
    outputs = [
        i @ w.t() + b.to(i.dtype)
        for i, w, b in zip(inputs, weights, biases.split(list(out_features)), strict=True)
    ]
    return torch.cat([y.reshape(-1) for y in outputs]).to(x.dtype)


def grouped_linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    rows: Sequence[int],
    in_features: Sequence[int],
    out_features: Sequence[int],
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients for ``(x, weight, bias)``, None where not wanted."""
    inputs, weights = _views(x, weight, rows, in_features, out_features)
    sizes = [n * o for n, o in zip(rows, out_features, strict=True)]
    cotangents = [
        d.view(n, o).to(wide(x.dtype)) for d, n, o in zip(dy.split(sizes), rows, out_features, strict=True)
    ]
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


def _views(x, weight, rows, in_features, out_features):
    dtype = wide(x.dtype)
    inputs = x.split([n * i for n, i in zip(rows, in_features, strict=True)])
    weights = weight.split([i * o for i, o in zip(in_features, out_features, strict=True)])
    return (
        [part.view(n, i).to(dtype) for part, n, i in zip(inputs, rows, in_features, strict=True)],
        [part.view(o, i).to(dtype) for part, o, i in zip(weights, out_features, in_features, strict=True)],
    )

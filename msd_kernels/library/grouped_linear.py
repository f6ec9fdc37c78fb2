"""A linear layer with one weight per stage: one library matrix product per non-empty stage."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from msd_kernels.library.cpu_types import float32, wants_float32
from msd_kernels.library.segments import gather, split


def grouped_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Sequence[int],
    in_features: Sequence[int],
    out_features: Sequence[int],
) -> Tensor:
    """As the dispatcher op ``msd_kernels::grouped_linear``."""
    dtype = x.dtype
    if wants_float32(x):
        x, weight, bias = float32(x, weight, bias)
    inputs, weights = _views(x, weight, rows, in_features, out_features)
    biases = split(bias, out_features)
    sizes = [n * o for n, o in zip(rows, out_features, strict=True)]
    return gather(x, sizes, lambda s: F.linear(inputs[s], weights[s], biases[s]).view(-1)).to(dtype)


def grouped_linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    rows: Sequence[int],
    in_features: Sequence[int],
    out_features: Sequence[int],
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients for ``(x, weight, bias)``, None where not wanted; an empty stage's weights get zeros."""
    dtype = x.dtype
    if wants_float32(x):
        dy, x, weight = float32(dy, x, weight)
    inputs, weights = _views(x, weight, rows, in_features, out_features)
    sizes = [n * o for n, o in zip(rows, out_features, strict=True)]
    cotangents = [d.view(n, o) for d, n, o in zip(dy.split(sizes), rows, out_features, strict=True)]
    want_x, want_weight, want_bias = wanted
    found = [
        gather(x, rows, lambda s: (cotangents[s] @ weights[s]).view(-1)) if want_x else None,
        torch.cat([(d.t() @ i).view(-1) for d, i in zip(cotangents, inputs, strict=True)])
        if want_weight
        else None,
        torch.cat([d.sum(dim=0) for d in cotangents]) if want_bias else None,
    ]
    return [None if gradient is None else gradient.to(dtype) for gradient in found]


def _views(x, weight, rows, in_features, out_features):
    inputs = x.split([n * i for n, i in zip(rows, in_features, strict=True)])
    weights = weight.split([i * o for i, o in zip(in_features, out_features, strict=True)])
    return (
        [part.view(n, i) for part, n, i in zip(inputs, rows, in_features, strict=True)],
        [part.view(o, i) for part, o, i in zip(weights, out_features, in_features, strict=True)],
    )

"""Scaled dot-product attention: the formulas, stage by stage."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from msd_kernels.dispatch.dtypes import wide
from msd_kernels.layouts import AttentionLayout, flatten_heads


def attention(
    q: Tensor, k: Tensor | None, v: Tensor | None, layout: AttentionLayout
) -> tuple[Tensor, Tensor]:
    """The output of :func:`msd_kernels.attention` and the log-sum-exp of each row of scores, flat.

    Differentiable in plain autograd.
    """
    ys, log_sums = [], []
    for stage, inputs in enumerate(layout.inputs(q, k, v)):
        queries, keys, values = (part.to(wide(q.dtype)) for part in inputs)
        scores = queries @ keys.mT * layout.scale_of(stage)
        y = torch.softmax(scores, dim=-1) @ values
        ys.append(flatten_heads(y, layout.out_order).to(q.dtype))
        log_sums.append(torch.logsumexp(scores, dim=-1).reshape(-1))
    return torch.cat(ys), torch.cat(log_sums)


def attention_backward(
    dy: Tensor,
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    y: Tensor,
    log_sum: Tensor,
    layout: AttentionLayout,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients for ``(q, k, v)``, None where not wanted; for a packed ``q`` one gradient in its layout."""
    stages = zip(layout.outputs(dy), layout.inputs(q, k, v), strict=True)
    gradients = [_stage_gradients(d, *parts, layout.scale_of(s)) for s, (d, parts) in enumerate(stages)]
    if layout.packed:
        gradients = [[torch.stack(parts)] for parts in gradients]
    joined = [
        torch.cat([flatten_heads(d, layout.order) for d in parts]) for parts in zip(*gradients, strict=True)
    ]
    joined += [None] * (3 - len(joined))
    return [d.to(q.dtype) if flag else None for d, flag in zip(joined, wanted, strict=True)]


def _stage_gradients(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dy, q, k, v = (part.to(wide(q.dtype)) for part in (dy, q, k, v))
    p = torch.softmax(q @ k.mT * scale, dim=-1)
    dp = dy @ v.mT
    ds = p * (dp - (p * dp).sum(dim=-1, keepdim=True))
    return ds @ k * scale, ds.mT @ q * scale, p.mT @ dy

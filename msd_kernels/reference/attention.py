"""Scaled dot-product attention: the formulas, stage by stage, and how the flat buffers are read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from msd_kernels.reference.dtypes import wide


def attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    counts: Sequence[int],
    heads: Sequence[int],
    head_dims: Sequence[int],
    tokens: int,
    context: int,
    order: str,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    """As the dispatcher op ``msd_kernels::attention``; differentiable in plain autograd."""
    ys, log_sums = [], []
    for inputs in stage_heads(q, k, v, counts, heads, head_dims, tokens, context, order):
        queries, keys, values = (part.to(wide(q.dtype)) for part in inputs)
        scores = queries @ keys.mT * scale_of(queries, scale)
        y = torch.softmax(scores, dim=-1) @ values
        ys.append(flatten_heads(y, one_part(order)).to(q.dtype))
        log_sums.append(torch.logsumexp(scores, dim=-1).reshape(-1))
    return torch.cat(ys), torch.cat(log_sums)


def attention_backward(
    dy: Tensor,
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    y: Tensor,
    log_sum: Tensor,
    counts: Sequence[int],
    heads: Sequence[int],
    head_dims: Sequence[int],
    tokens: int,
    context: int,
    order: str,
    scale: float | None,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients for ``(q, k, v)``, None where not wanted; for a packed ``q`` one gradient in its layout."""
    stages = stage_heads(q, k, v, counts, heads, head_dims, tokens, context, order)
    cotangents = stage_outputs(dy, counts, heads, head_dims, tokens, order)
    gradients = [
        _stage_gradients(cotangent, *inputs, scale_of(inputs[0], scale))
        for cotangent, inputs in zip(cotangents, stages, strict=True)
    ]
    if "p" in order:
        joined = [torch.cat([flatten_heads(torch.stack(parts), order) for parts in gradients])]
    else:
        joined = [
            torch.cat([flatten_heads(d, order) for d in parts]) for parts in zip(*gradients, strict=True)
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


def scale_of(q: Tensor, scale: float | None) -> float:
    """The factor on the scores of one stage's queries: ``scale``, or 1 / sqrt(head dimension)."""
    return q.shape[-1] ** -0.5 if scale is None else scale


# A memory order names the axes of a flat buffer, the slowest first: n samples, t tokens, h heads, d head
# dimension, and in a packed buffer p, the three parts q, k and v.


def one_part(order: str) -> str:
    """The memory order of the output, which lies as one part of a packed buffer does."""
    return order.replace("p", "")


def view_heads(flat: Tensor, n: int, tokens: int, heads: int, head_dim: int, order: str) -> Tensor:
    """A view of a stage's segment as ``[n, h, t, d]``, or ``[p, n, h, t, d]`` where it is packed."""
    sizes = {"n": n, "t": tokens, "h": heads, "d": head_dim, "p": 3}
    axes = "pnhtd" if "p" in order else "nhtd"
    return flat.view([sizes[axis] for axis in order]).permute([order.index(axis) for axis in axes])


def flatten_heads(x: Tensor, order: str) -> Tensor:
    """The inverse of :func:`view_heads`: a view where ``x`` already lies in that order without gaps, else a copy."""
    axes = "pnhtd" if "p" in order else "nhtd"
    return x.permute([axes.index(axis) for axis in order]).reshape(-1).contiguous()


def stage_heads(
    q: Tensor | None,
    k: Tensor | None,
    v: Tensor | None,
    counts: Sequence[int],
    heads: Sequence[int],
    head_dims: Sequence[int],
    tokens: int,
    context: int,
    order: str,
) -> list[tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """Views of each stage's queries, keys and values as ``[n, h, t, d]``.

    In a packed order ``q`` holds all three. Serves gradients, too; one that is None is None in every stage.
    """
    if "p" in order:
        return [view.unbind(0) for view in _stage_views(q, counts, heads, head_dims, tokens, order)]
    lengths = ((q, tokens), (k, context), (v, context))
    return list(
        zip(*(_stage_views(t, counts, heads, head_dims, length, order) for t, length in lengths), strict=True)
    )


def stage_outputs(
    y: Tensor, counts: Sequence[int], heads: Sequence[int], head_dims: Sequence[int], tokens: int, order: str
) -> list[Tensor]:
    """Views of each stage's output, or of its cotangent, as ``[n, h, t, d]``."""
    return _stage_views(y, counts, heads, head_dims, tokens, one_part(order))


def _stage_views(flat, counts, heads, head_dims, tokens, order) -> list[Tensor | None]:
    if flat is None:
        return [None] * len(counts)
    parts = 3 if "p" in order else 1
    stages = list(zip(counts, heads, head_dims, strict=True))
    segments = flat.split([parts * n * tokens * h * d for n, h, d in stages])
    return [
        view_heads(part, n, tokens, h, d, order) for part, (n, h, d) in zip(segments, stages, strict=True)
    ]

"""The exact result of attention, with the error that it may have, and what its tests draw and unpack."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from helpers import ROUNDING, assert_elements_close

# How many times the error that `formula` says a result may be off. The worst found is 2.5.
ROUNDINGS = 3


def formula(q: Tensor, k: Tensor, v: Tensor, dy: Tensor, scale: float, dtype: torch.dtype):
    """Output and gradients in float64, and for each the error that one rounding of every step adds up to.

    Probabilities and score gradients are rounded to ``dtype``, and below its range to 0; scores and sums are
    float32 (float64), and the roundings of a sum's additions grow as the root of their number.
    """
    q, k, v, dy = (t.detach().double() for t in (q, k, v, dy))
    scores = scale * q @ k.mT
    p = scores.softmax(dim=-1)
    dp = dy @ v.mT
    ds = p * (dp - (p * dp).sum(dim=-1, keepdim=True))
    exact = (p @ v, scale * ds @ k, scale * ds.mT @ q, p.mT @ dy)

    wide_dtype = dtype if dtype == torch.float64 else torch.float32
    wide, smallest = ROUNDING[wide_dtype], torch.finfo(wide_dtype).smallest_normal
    smallest = max(smallest, torch.finfo(dtype).smallest_normal * ROUNDING[dtype])
    unit = ROUNDING[dtype] + wide * scores.shape[-1] ** 0.5
    score_error = wide * scale * (q.abs() @ k.abs().mT)
    p_error = p * (unit + score_error + (p * score_error).sum(dim=-1, keepdim=True)) + smallest
    terms = dy.abs() @ v.abs().mT
    terms = terms + (p * terms).sum(dim=-1, keepdim=True)
    ds_error = (p_error + unit * p) * terms + smallest
    errors = (
        p_error @ v.abs(),
        scale * ds_error @ k.abs(),
        scale * ds_error.mT @ q.abs(),
        p_error.mT @ dy.abs(),
    )
    return exact, errors


def run(function: Callable[..., Tensor], inputs: Sequence[Tensor], dy: Tensor) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in inputs]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def check_close(found: Sequence[Tensor], q: Tensor, k: Tensor, v: Tensor, dy: Tensor, scale=None) -> None:
    """``found``, an output and gradients, per element against the formula."""
    exact, errors = formula(q, k, v, dy, scale or q.shape[-1] ** -0.5, q.dtype)
    unit = ROUNDING[q.dtype]
    smallest = torch.finfo(q.dtype).smallest_normal * unit
    for actual, expected, error in zip(found, exact, errors, strict=True):
        assert actual.dtype == q.dtype
        bound = ROUNDINGS * error + smallest
        assert_elements_close(actual, expected.cpu(), rtol=unit, atol=bound.cpu())


def dense(generator, shape, dtype=torch.float32) -> tuple[Tensor, ...]:
    """q, k, v and a cotangent ``[B, heads, tokens, d]``."""
    batch, heads, tokens, context, head_dim = shape
    return tuple(
        torch.randn(batch, heads, length, head_dim, generator=generator).to(dtype)
        for length in (tokens, context, context, tokens)
    )


def unpack(x: Tensor, heads: int, layout: str) -> list[Tensor]:
    """The three parts of ``[B, 3C, H, W]`` as ``[B, heads, tokens, d]``, as the published networks take them."""
    batch, channels, height, width = x.shape
    head_dim = channels // (3 * heads)
    if layout == "interleaved":
        parts = x.reshape(batch, heads, head_dim, 3, height * width).unbind(3)
    elif layout == "per_head":
        parts = x.reshape(batch, heads, 3 * head_dim, height * width).split(head_dim, dim=2)
    else:
        parts = [part.reshape(batch, heads, head_dim, height * width) for part in x.chunk(3, dim=1)]
    return [part.mT for part in parts]


def pixels_as_tokens(x: Tensor, heads: int) -> Tensor:
    return x.permute(0, 2, 3, 1).flatten(1, 2).unflatten(2, (heads, -1)).transpose(1, 2)

"""Allocates what ops return. An op's fake implementation and its kernels call the same function."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from msd_kernels.reference.dtypes import wide


def without_absent(gradients: Sequence[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
    """What a dispatcher op returns for gradients: an empty tensor stands for each that nobody asked for."""
    return tuple(like.new_empty(0) if g is None else g for g in gradients)


def gradients_like(inputs: Sequence[Tensor | None], wanted: Sequence[bool]) -> list[Tensor | None]:
    """One uninitialised gradient per wanted input, None for the others."""
    return [
        torch.empty_like(t) if t is not None and flag else None
        for t, flag in zip(inputs, wanted, strict=True)
    ]


def group_norm_outputs(
    x: Tensor, counts: Sequence[int], groups: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """``y`` like ``x``, ``mean`` and ``rstd`` with one entry per sample and group."""
    num_stats = sum(n * g for n, g in zip(counts, groups, strict=True))
    mean = x.new_empty(num_stats, dtype=wide(x.dtype))
    return torch.empty_like(x), mean, torch.empty_like(mean)


def grouped_output(x: Tensor, rows: Sequence[int], channels: Sequence[int]) -> Tensor:
    """A flat buffer of ``rows[s] * channels[s]`` elements per stage."""
    return x.new_empty(sum(n * c for n, c in zip(rows, channels, strict=True)))


def optimal_denoiser_outputs(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The mean ``[B, D]`` and two log sums ``[B]``, all float64."""
    log_sum = x.new_empty(x.shape[0], dtype=torch.float64)
    return x.new_empty(x.shape, dtype=torch.float64), log_sum, torch.empty_like(log_sum)


def attention_outputs(
    q: Tensor, counts: Sequence[int], heads: Sequence[int], head_dims: Sequence[int], tokens: int
) -> tuple[Tensor, Tensor]:
    """``y`` with the elements of one part of ``q``, and one log-sum-exp per sample, head and token."""
    rows = [n * tokens * h for n, h in zip(counts, heads, strict=True)]
    return grouped_output(q, rows, head_dims), q.new_empty(sum(rows), dtype=wide(q.dtype))

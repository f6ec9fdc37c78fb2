"""Allocates what ops return. An op's fake implementation and its kernels call the same function."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from msd_kernels.dispatch.autodiff import present
from msd_kernels.dispatch.dtypes import wide
from msd_kernels.layouts import AttentionLayout, GroupNormLayout, Resample2dLayout


def gradients_like(inputs: Sequence[Tensor | None], wanted: Sequence[bool]) -> list[Tensor | None]:
    """One uninitialised gradient per wanted input, None for the others."""
    return [
        torch.empty_like(t) if t is not None and flag else None
        for t, flag in zip(inputs, wanted, strict=True)
    ]


def wanted_gradients(
    singles: Sequence[Tensor | None], weight: Sequence[Tensor], wanted: Sequence[bool]
) -> list[Tensor]:
    """Those that are wanted of single tensors, one weight per stage, and one bias per row of each weight."""
    bias = [w.new_empty(w.shape[0]) for w in weight]
    return present(gradients_like((*singles, *weight, *bias), wanted))


def group_norm_outputs(x: Tensor, layout: GroupNormLayout) -> tuple[Tensor, Tensor, Tensor]:
    """``y`` like ``x``, or flat for two sources, ``mean`` and ``rstd`` with one entry per sample and group."""
    y = x.new_empty(sum(layout.out_sizes)) if layout.has_skip else torch.empty_like(x)
    mean = x.new_empty(sum(layout.stat_sizes), dtype=wide(x.dtype))
    return y, mean, torch.empty_like(mean)


def resample2d_output(x: Tensor, layout: Resample2dLayout) -> Tensor:
    """Flat."""
    return x.new_empty(layout.out_elements)


def optimal_denoiser_outputs(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The mean ``[B, D]`` and two log sums ``[B]``, all float64."""
    log_sum = x.new_empty(x.shape[0], dtype=torch.float64)
    return x.new_empty(x.shape, dtype=torch.float64), log_sum, torch.empty_like(log_sum)


def attention_outputs(q: Tensor, layout: AttentionLayout) -> tuple[Tensor, Tensor]:
    """``y`` with the elements of one part of ``q``, and one log-sum-exp per sample, head and token."""
    log_sum = q.new_empty(sum(layout.log_sum_sizes), dtype=wide(q.dtype))
    return q.new_empty(sum(layout.out_sizes)), log_sum

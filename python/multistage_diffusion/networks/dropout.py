"""Dropout that does not hold up training: on the CPU an op with few random numbers, elsewhere a part of the norm."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["belongs_to_norm", "dropout"]

# PyTorch draws the numbers of a CPU mask one by one in one thread, an eighth of an EDM training step. A 64-bit number
# decides about four elements here, 16 bits each.
_LANES = 4
_LEVELS = 1 << 16


def belongs_to_norm(x: Tensor) -> bool:
    """Whether :func:`msd_kernels.group_norm` drops what it writes itself, by a seed: wherever no CPU serves it."""
    return not x.is_cpu


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """``torch.nn.functional.dropout``: in training every element is 0 with probability ``p``, else x / (1 - p).

    On the CPU ``p`` is rounded to a multiple of 2^-16, and the mask differs from PyTorch's for the same seed.

    Args:
        x: any shape and floating dtype.
        p: probability, from 0 to 1.
        training: whether to drop anything at all.

    Source: Srivastava et al., "Dropout" (JMLR 15, 2014).

    Raises:
        ValueError: a probability outside [0, 1].
    """
    dropped = round(p * _LEVELS)
    if x.is_cpu and training and 0 < dropped < _LEVELS:
        return x * _multiplier(x.detach(), dropped)
    return F.dropout(x, p, training)


def _multiplier(x: Tensor, dropped: int) -> Tensor:
    """0 with probability dropped / 2^16, else what keeps the mean; in the dtype, shape and memory order of ``x``."""
    words = torch.empty(-(-x.numel() // _LANES), dtype=torch.int64).random_(-(1 << 63), None)
    kept = words.view(torch.int16)[: x.numel()] >= dropped - _LEVELS // 2
    factors = kept.to(x.dtype).mul_(_LEVELS / (_LEVELS - dropped))
    return factors.view(x.shape) if x.is_contiguous() else torch.empty_like(x).copy_(factors.view(x.shape))

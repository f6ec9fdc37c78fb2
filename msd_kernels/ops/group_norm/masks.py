"""Which elements a dropout keeps: a hash of each one's place and of a seed, so that no mask lies in memory.

The kernels compute the same numbers (``_kept`` in ``kernels.py``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from msd_kernels.layouts import GroupNormLayout

# A probability is rounded to a multiple of 1 / LEVELS.
LEVELS = 1 << 24
LOW = 0xFFFFFFFF
# C. Wellons, "Prospecting for hash functions" (2018): the permutation of 32 bits with the least bias that he found of
# two products.
SHIFTS, FACTORS = (16, 15, 16), (0x7FEB352D, 0x846CA68B)
HIGH_FACTOR = 0x9E3779B1  # spreads what is above 32 bits of a place


def dropped_levels(dropout: float) -> int:
    """Of LEVELS, those by which an element is dropped."""
    return round(dropout * LEVELS)


def kept_factor(dropout: float) -> float:
    """What keeps the mean: 1 / (1 - dropout)."""
    dropped = dropped_levels(dropout)
    return LEVELS / (LEVELS - dropped) if dropped < LEVELS else 0.0


def dropped(flat: Tensor, layout: GroupNormLayout, seed: Tensor | None) -> Tensor:
    """A result, or its cotangent, behind the dropout of its call."""
    if seed is None:
        return flat
    return flat * multipliers(seed, flat.numel(), layout.dropout, flat.dtype)


def multipliers(seed: Tensor, elements: int, dropout: float, dtype: torch.dtype) -> Tensor:
    """For each place of a flat buffer 0 with the probability of dropout, else what keeps the mean."""
    place = torch.arange(elements, dtype=torch.int64, device=seed.device)
    seed = seed.reshape(())
    number = ((place & LOW) + (place >> 32) * HIGH_FACTOR + seed) & LOW
    number = _mixed(_mixed(number) ^ ((seed >> 32) & LOW))
    kept = (number >> 8) >= dropped_levels(dropout)
    return kept.to(dtype) * kept_factor(dropout)


def _mixed(number: Tensor) -> Tensor:
    for shift, factor in zip(SHIFTS, FACTORS, strict=False):
        number = number ^ (number >> shift)
        number = (number * factor) & LOW
    return number ^ (number >> SHIFTS[-1])

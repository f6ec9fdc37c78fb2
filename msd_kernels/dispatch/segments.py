"""Reading and writing the segments of a flat buffer without avoidable copies."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def split(flat: Tensor | None, sizes: Sequence[int]) -> Sequence[Tensor | None]:
    """One view per stage, or None per stage where the tensor is absent."""
    return [None] * len(sizes) if flat is None else flat.split(list(sizes))


def flat_nhwc(x: Tensor) -> Tensor:
    """``[n, C, H, W]`` as a flat NHWC buffer: a view where it is channels_last, a copy elsewhere."""
    return x.permute(0, 2, 3, 1).reshape(-1)


def gather(like: Tensor, sizes: Sequence[int], compute: Callable[[int], Tensor]) -> Tensor:
    """Joins ``compute(stage)``, flat tensors of ``sizes``, calling it for non-empty stages only.

    With one non-empty stage the result is that stage's tensor itself, not a copy of it.
    """
    stages = [stage for stage, size in enumerate(sizes) if size]
    parts = [compute(stage) for stage in stages]
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts) if parts else like.new_empty(0)

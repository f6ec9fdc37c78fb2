"""The entrance and the exit of a network: from the caller's order to stage order and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class StageOrder:
    """Where the samples of a mixed batch go.

    Attributes:
        counts: samples per stage.
        order: sample indices sorted by stage, stably; None where the batch is sorted already.
    """

    counts: tuple[int, ...]
    order: tuple[int, ...] | None

    @staticmethod
    def of(stage: Sequence[int] | Tensor, num_stages: int, batch_size: int) -> StageOrder:
        """Sorts a batch on the host.

        Args:
            stage: one id per sample, 0 <= id < num_stages: a sequence or an integer tensor. A tensor on a GPU costs a
                synchronisation; keep stages on the host.

        Raises:
            ValueError: ids that are out of range or not one per sample.
            TypeError: ids that are no integers.
        """
        if isinstance(stage, Tensor):
            if stage.is_floating_point():
                raise TypeError(f"stage: ids must be integers, got a {stage.dtype} tensor")
            stage = stage.reshape(-1).tolist() if stage.dim() <= 1 else _refuse_shape(stage)
        ids = tuple(stage)
        if len(ids) != batch_size:
            raise ValueError(f"stage: one id per sample is needed, got {len(ids)} ids for {batch_size} samples")
        wrong = [i for i in ids if not 0 <= i < num_stages]
        if wrong:
            raise ValueError(f"stage: ids must lie in 0..{num_stages - 1}, got {wrong[0]}")
        order = tuple(sorted(range(batch_size), key=ids.__getitem__))
        counts = tuple(ids.count(s) for s in range(num_stages))
        return StageOrder(counts, None if order == tuple(range(batch_size)) else order)

    def sort(self, x: Tensor | None) -> Tensor | None:
        """Samples along dimension 0, from the caller's order to stage order."""
        if x is None or self.order is None:
            return x
        return x.index_select(0, _index(self.order, x.device))

    def restore(self, x: Tensor) -> Tensor:
        """Samples along dimension 0, from stage order back to the caller's."""
        if self.order is None:
            return x
        inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
        return x.index_select(0, _index(inverse, x.device))


def _index(order: Sequence[int], device: torch.device) -> Tensor:
    """An index tensor that reaches a GPU without a synchronisation."""
    index = torch.tensor(order, dtype=torch.int64)
    return index.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else index


def _refuse_shape(stage: Tensor):
    raise ValueError(f"stage: ids must be a vector, got shape {tuple(stage.shape)}")

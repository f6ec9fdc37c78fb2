"""From the caller's order of a mixed batch to stage order and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import index

import torch
from torch import Tensor

from msd_kernels import containers
from msd_kernels.stage_batch import fixed_shape
from multistage_diffusion.common.transfer import host_to_device

__all__ = ["StageOrder"]


@dataclass(frozen=True, eq=False)
class StageOrder:
    """Where the samples of a mixed batch go.

    A network takes one in place of the stages. Made outside of a compiled network, and ``explicit``, it makes the order
    of the samples an input like any other: only new counts compile anew. Made outside of a captured CUDA graph, it
    stays where the graph reads it, and copying other orders into it with :meth:`copy_` replays the graph on them.
    PyTorch's tools take it for a container: a pytree whose leaves are ``order`` and ``inverse``, and a dataclass.

    Attributes:
        counts: samples per stage.
        order: sample indices sorted by stage, stably: int64 ``[B]``; None where the batch is sorted already.
        inverse: the position of each sample in that order: int64 ``[B]``; None as ``order``.
    """

    counts: tuple[int, ...]
    order: Tensor | None
    inverse: Tensor | None

    @staticmethod
    def of(
        stage: Sequence[int] | Tensor | StageOrder,
        num_stages: int,
        batch_size: int,
        device: torch.device | str = "cpu",
        *,
        explicit: bool = False,
    ) -> StageOrder:
        """Sorts a batch on the host.

        Args:
            stage: one id per sample, 0 <= id < num_stages: a sequence or an integer tensor. A tensor on a GPU costs a
                synchronisation; keep stages on the host. An order that was made before is checked and moved to the
                device.
            device: where the batch is.
            explicit: give a sorted batch an order, too, for a graph that is to serve every order of its counts.

        Raises:
            ValueError: ids that are out of range or not one per sample; an order of another batch; what has no values,
                as it is on the meta device.
            TypeError: ids that are no integers, or what holds no ids.
        """
        device = torch.device(device)
        if isinstance(stage, StageOrder):
            stage = stage._checked(num_stages, batch_size).to(device)
            if stage.order is not None or not explicit:
                return stage
            stage = [k for k, count in enumerate(stage.counts) for _ in range(count)]
        ids = _listed(stage) if isinstance(stage, Tensor) else _integers(stage)
        if len(ids) != batch_size:
            raise ValueError(
                f"stage: one id per sample is needed, got {len(ids)} ids for {batch_size} samples"
            )
        wrong = [i for i in ids if not 0 <= i < num_stages]
        if wrong:
            raise ValueError(f"stage: ids must lie in 0..{num_stages - 1}, got {wrong[0]}")
        samples = [[] for _ in range(num_stages)]
        for sample, i in enumerate(ids):
            samples[i].append(sample)
        counts = tuple(map(len, samples))
        order = list(chain.from_iterable(samples))
        if order == list(range(batch_size)) and not explicit:
            return StageOrder(counts, None, None)
        inverse = sorted(range(batch_size), key=order.__getitem__)
        both = host_to_device(torch.tensor([order, inverse], dtype=torch.int64), device)
        return StageOrder(counts, both[0], both[1])

    def to(self, device: torch.device | str, non_blocking: bool = True) -> StageOrder:
        """The same on ``device``; itself where it is there already.

        Args:
            non_blocking: whether the host may go on before a copy to a GPU is done, as it does from pinned memory.

        Raises:
            ValueError: an order on the meta device, which has no values to copy.
        """
        device = torch.device(device)
        if self.order is None or self.order.device == device:
            return self
        if self.order.is_meta:
            raise ValueError(f"stage: an order on the meta device has no values to copy to {device}")
        if self.order.is_cpu and non_blocking:
            return self._map(lambda t: host_to_device(t, device))
        return self._map(lambda t: t.to(device))

    def pin_memory(self) -> StageOrder:
        """The same in pinned memory, as a ``DataLoader`` with ``pin_memory=True`` asks for."""
        return self._map(lambda t: t.pin_memory())

    def detach(self) -> StageOrder:
        """The same; integers have no gradients."""
        return self._map(Tensor.detach)

    def clone(self) -> StageOrder:
        """The same in memory of its own."""
        return self._map(Tensor.clone)

    def copy_(self, other: StageOrder) -> StageOrder:
        """Overwrites this order with another of the same counts, in place.

        Raises:
            ValueError: other counts, or an order that is not explicit.
        """
        if self.counts != other.counts or self.order is None or other.order is None:
            raise ValueError(
                f"StageOrder.copy_: needs two explicit orders of the same counts, got {self} and {other}; "
                "StageOrder.of(..., explicit=True) makes one"
            )
        self.order.copy_(other.order, non_blocking=True)
        self.inverse.copy_(other.inverse, non_blocking=True)
        return self

    def sort(self, x: Tensor | None) -> Tensor | None:
        """Samples along dimension 0, from the caller's order to stage order."""
        if x is None or self.order is None:
            return x
        x, _ = fixed_shape(x)  # a traced selection would drop the samples of a larger batch
        return x.index_select(0, self.to(x.device).order)

    def restore(self, x: Tensor) -> Tensor:
        """Samples along dimension 0, from stage order back to the caller's."""
        return x if self.order is None else x.index_select(0, self.to(x.device).inverse)

    def __repr__(self) -> str:
        kind = "sorted" if self.order is None else f"explicit, on {self.order.device}"
        return f"StageOrder(counts={self.counts}, {kind})"

    def _map(self, function: Callable[[Tensor], Tensor]) -> StageOrder:
        """Both of its tensors through a function; itself where it has none."""
        if self.order is None:
            return self
        return StageOrder(self.counts, function(self.order), function(self.inverse))

    def _checked(self, num_stages: int, batch_size: int) -> StageOrder:
        if len(self.counts) != num_stages or sum(self.counts) != batch_size:
            raise ValueError(
                f"stage: got the order of {sum(self.counts)} samples in {len(self.counts)} stages, "
                f"needed is one of {batch_size} samples in {num_stages} stages"
            )
        return self


containers.register(StageOrder, ("order", "inverse"), differentiable=False)


def _listed(stage: Tensor) -> list[int]:
    if stage.is_floating_point() or stage.is_complex():
        raise TypeError(f"stage: ids must be integers, got a {stage.dtype} tensor")
    if stage.dim() > 1:
        raise ValueError(f"stage: ids must be a vector, got shape {tuple(stage.shape)}")
    if stage.is_meta:
        raise ValueError("stage: ids must have values, got a tensor on the meta device")
    if torch.jit.is_tracing():
        raise ValueError(
            "stage: torch.jit.trace would keep the ids of a tensor as constants; give a list or a StageOrder, "
            "whose ids are meant to be constant, or use torch.export"
        )
    return stage.reshape(-1).tolist()


def _integers(stage: Sequence[int]) -> tuple[int, ...]:
    """The ids; what stands for integers, as NumPy's do, is turned into those."""
    try:
        ids = tuple(stage)
    except TypeError:
        raise TypeError(f"stage: must hold one id per sample, got {stage!r}") from None
    return tuple(i if type(i) is int else _integer(i, sample) for sample, i in enumerate(ids))


def _integer(value, sample: int) -> int:
    try:
        return index(value)
    except TypeError:
        raise TypeError(f"stage: ids must be integers, got {value!r} for sample {sample}") from None

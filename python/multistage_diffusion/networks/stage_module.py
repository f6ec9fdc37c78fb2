"""What the stage-grouped layers have in common: one ordinary parameter per stage, named by the stage."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from multistage_diffusion.networks.network_limits import count_tensors

__all__ = ["PerStage", "StageModule", "is_sharded"]


def is_sharded(module: nn.Module) -> bool:
    """Whether ``torch.distributed.fsdp.fully_shard`` was applied to the module itself; it gives it another class."""
    return type(module).__name__.startswith("FSDP")


class PerStage(nn.Module):
    """One tensor per stage under one name: ``layer.weight[0]`` is the parameter ``layer.weight.0``.

    Each is an ordinary parameter, or buffer, of its own shape, whose name is its key in the ``state_dict``. Layers call
    the holder for its list, so that what hooks into modules (offloading, say) acts on it.

    Args:
        tensors: one per stage.
        trained: they are parameters, not buffers.

    Raises:
        RuntimeError: called after ``fully_shard(holder)``, which cannot work: shard the layer that owns it.
    """

    def __init__(self, tensors: Sequence[Tensor], *, trained: bool = True) -> None:
        super().__init__()
        self.trained = trained
        self.stage_ids: tuple[int, ...] = ()
        self._names: tuple[str, ...] = ()
        self._hold(list(tensors), range(len(tensors)))

    def _hold(self, tensors: Sequence[Tensor], stage_ids: Sequence[int]) -> None:
        self.stage_ids = tuple(stage_ids)
        self._names = tuple(map(str, self.stage_ids))
        for name, tensor in zip(self._names, tensors, strict=True):
            if self.trained:
                own = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor)
                self.register_parameter(name, own)
            else:
                self.register_buffer(name, tensor)

    def renumber(self, stage_ids: Sequence[int]) -> None:
        """Names the tensors by other stages, in the same order."""
        tensors = self.tensors()
        for name in self._names:
            delattr(self, name)
        self._hold(tensors, stage_ids)

    def forward(self) -> list[Tensor]:
        """The tensors."""
        if is_sharded(self):
            raise RuntimeError(
                "PerStage: fully_shard was applied to the holder of a layer's weights; apply it to the layer, or to "
                "what contains it"
            )
        return self.tensors()

    def tensors(self) -> list[Tensor]:
        """The tensors, without a call that hooks would see."""
        own = self._parameters if self.trained else self._buffers
        try:
            return [own[name] for name in self._names]
        except KeyError:  # parametrized, or a replica of DataParallel
            return [getattr(self, name) for name in self._names]

    def __getitem__(self, index: int) -> Tensor:
        return self.tensors()[index]

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.tensors())

    def __len__(self) -> int:
        return len(self._names)

    @property
    def device(self) -> torch.device:
        return self.tensors()[0].device

    @property
    def dtype(self) -> torch.dtype:
        return self.tensors()[0].dtype

    def extra_repr(self) -> str:
        return ", ".join(str(list(tensor.shape)) for tensor in self.tensors())


class StageModule(nn.Module):
    """A module with weights of its own for each stage, in :class:`PerStage` holders.

    Attributes:
        num_stages: stages that the module holds weights of.
        stage_ids: their numbers in the network, which name the parameters; see :class:`OnStages`.
    """

    def __init__(self, num_stages: int) -> None:
        super().__init__()
        self.num_stages = num_stages
        self.stage_ids = tuple(range(num_stages))

    def hold(self, name: str, tensors: Iterable[Tensor], *, trained: bool = True) -> None:
        """Registers one parameter, or buffer, per stage; takes no more of them than a network may have."""
        held = []
        for tensor in tensors:
            count_tensors(1)
            held.append(tensor)
        setattr(self, name, PerStage(held, trained=trained))

    def renumber(self, stage_ids: Sequence[int]) -> None:
        """Makes this a module of other stages of its network, in the same order."""
        self.stage_ids = tuple(stage_ids)
        for holder in self.holders().values():
            holder.renumber(stage_ids)

    def holders(self) -> dict[str, PerStage]:
        """Everything that the module holds per stage, by name."""
        return {name: child for name, child in self.named_children() if isinstance(child, PerStage)}

    def stage_parameters(self) -> Iterator[tuple[int, nn.Parameter]]:
        """(number of the stage, one of its parameters) for all of them."""
        for holder in self.holders().values():
            if holder.trained:
                yield from zip(holder.stage_ids, holder.tensors(), strict=True)

    def weights(self, name: str, dtype: torch.dtype) -> list[Tensor] | None:
        """A parameter as the ops take it for features of ``dtype``; None for one that the layer lacks."""
        holder = getattr(self, name)
        if holder is None:
            return None
        weights = holder()
        if weights[0].dtype in (dtype, torch.float32):  # the ops round float32 themselves
            return weights
        return [weight.to(dtype) for weight in weights]

"""Dense DTensors, whose samples may be sharded: an op runs on every rank's own, and its result is sharded as they are.

PyTorch's ``register_sharding`` would give each rank the layout of the whole batch with a shard of it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from msd_kernels.stage_batch import StageBatch

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = ["is_distributed", "on_shards"]

ORDINARY = frozenset((Tensor, StageBatch))


def is_distributed(x: Any) -> bool:
    """Whether it is a DTensor, of which there are none before somebody has imported them."""
    if type(x) in ORDINARY:
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def on_shards(
    op: Callable[..., Tensor],
    samples: Mapping[str, DTensor | None],
    parameters: Mapping[str, DTensor | None],
    **settings: Any,
) -> DTensor:
    """``op(**samples, **parameters, **settings)`` of dense DTensors.

    Where the first of the samples is sharded along dimension 0, or replicated, the result is, too; along every other
    dimension it is gathered first. The rest of the samples follow it, and parameters are replicated.

    Raises:
        TypeError: another argument is no DTensor.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate

    x = next(iter(samples.values()))
    placements = [p if p.is_shard(0) else Replicate() for p in x.placements]
    whole = [Replicate()] * len(placements)
    sums = [Partial() if p.is_shard(0) else p for p in placements]
    local = {}
    for tensors, wanted, of_gradient in ((samples, placements, placements), (parameters, whole, sums)):
        for name, tensor in tensors.items():
            if tensor is None:
                continue
            if not isinstance(tensor, DTensor):
                raise TypeError(
                    f"{op.__name__}: {name} must be a DTensor as {next(iter(samples))} is, got {type(tensor).__name__}"
                )
            tensor = tensor.redistribute(x.device_mesh, wanted)
            local[name] = tensor.to_local(grad_placements=of_gradient)
    y = op(**local, **settings)
    shape, stride = (x.shape[0], *y.shape[1:]), y.stride()
    if not y.shape[0] and x.shape[0]:  # no samples have no memory format
        given = {name: tensor for name, tensor in {**samples, **parameters}.items() if tensor is not None}
        stride = op(**{name: _on_meta(tensor) for name, tensor in given.items()}, **settings).stride()
    return DTensor.from_local(y, x.device_mesh, placements, run_check=False, shape=shape, stride=stride)


def _on_meta(tensor: DTensor) -> Tensor:
    """The whole tensor, without values."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")

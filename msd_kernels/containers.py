"""Dataclasses of tensors and settings, as PyTorch's tools take them: containers whose leaves are their tensors.

``torch.export``, ``torch.func``, FSDP2's hooks, ``torch.utils.checkpoint`` and module trackers look for tensors in
registered pytrees; FSDP2's mixed precision and DDP look for them in dataclasses. What is registered here is both.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointFunction

from msd_kernels import _private

__all__ = ["register"]

# Between a reentrant checkpoint and the flattening of its arguments there is code of these modules alone.
BETWEEN = ("torch.utils._pytree", "torch.utils.checkpoint")


def register(
    cls: type,
    tensors: Sequence[str],
    *,
    differentiable: bool,
    complete: Callable[[Any], bool] = lambda container: False,
) -> None:
    """Makes a frozen dataclass a pytree, and one that ``torch.load(weights_only=True)`` reads.

    Tools put any object in the place of a tensor, as the functions that they map over trees return. It is taken unseen,
    and such a container has an attribute ``checked`` that is False.

    Args:
        tensors: the fields that are leaves. The others are the structure of the tree: numbers, or tuples of numbers.
        differentiable: whether gradients flow through its tensors, so that a reentrant checkpoint would lose them.
        complete: whether what was put together so is as the constructor would take it, which then completes it.
    """
    settings = [field.name for field in fields(cls) if field.name not in tensors]
    torch.serialization.add_safe_globals([cls])
    if _private.register_pytree_node is None or _private.GetAttrKey is None:
        return

    def flatten(container: Any) -> tuple[list[Any], tuple]:
        leaves = [getattr(container, name) for name in tensors]
        if differentiable and not (torch.compiler.is_compiling() or torch.is_grad_enabled()):
            _refuse_reentrant_checkpoint(leaves)
        return leaves, tuple(getattr(container, name) for name in settings)

    def flatten_with_keys(container: Any) -> tuple[list[tuple[Any, Any]], tuple]:
        leaves, structure = flatten(container)
        return list(zip(map(_private.GetAttrKey, tensors), leaves, strict=True)), structure

    def unflatten(leaves: Any, structure: tuple) -> Any:
        container = object.__new__(cls)
        for name, value in zip((*tensors, *settings), (*leaves, *structure), strict=True):
            object.__setattr__(container, name, value)
        if not torch.compiler.is_compiling() and complete(container):
            return replace(container)
        object.__setattr__(container, "checked", False)
        return container

    _private.register_pytree_node(
        cls,
        flatten,
        unflatten,
        serialized_type_name=f"{cls.__module__.split('.')[0]}.{cls.__qualname__}",
        to_dumpable_context=list,
        from_dumpable_context=lambda dumped: tuple(tuple(s) if isinstance(s, list) else s for s in dumped),
        flatten_with_keys_fn=flatten_with_keys,
    )


def _refuse_reentrant_checkpoint(leaves: Sequence[Any]) -> None:
    """Raises where ``torch.utils.checkpoint`` with ``use_reentrant=True`` asks for gradients of a container.

    It looks for gradients in arguments and outputs that are tensors: those that a container holds lose theirs without a
    word, and so do all parameters behind them. It runs without gradients, and flattens its arguments to find their
    devices; it then stands above what flattens, with nothing but PyTorch's own code between.
    """
    frame = sys._getframe(2)
    while frame is not None and frame.f_globals.get("__name__") in BETWEEN:
        if frame.f_code is CheckpointFunction.forward.__code__:
            if any(isinstance(t, Tensor) and t.requires_grad for t in (*leaves, *frame.f_locals["args"])):
                raise TypeError(
                    "StageBatch: torch.utils.checkpoint with use_reentrant=True loses its gradients, and those of all "
                    "parameters behind it; use_reentrant=False keeps them"
                )
            return
        frame = frame.f_back

"""What the registered ops require of their arguments, whoever calls them through ``torch.ops.msd_kernels``.

The public functions make arguments that fit. A direct call may give sizes that its tensors do not have, by which
kernels would read and write outside of them. Python's integers do not overflow, so that one comparison with a tensor's
elements finds sums and products that would.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

LARGEST = 2**63 - 1


def are_symbolic(args: Sequence[Any]) -> bool:
    """Whether a size is a symbol, of which nothing is known before the call runs."""
    for arg in args:
        sizes = arg.shape if isinstance(arg, Tensor) else arg if isinstance(arg, (list, tuple)) else (arg,)
        for size in sizes:
            if isinstance(size, torch.SymInt) or (isinstance(size, Tensor) and are_symbolic([size])):
                return True
    return False


def seen_of(arg: Any) -> Any:
    """What a check sees of an argument."""
    if isinstance(arg, Tensor):
        return arg.shape, arg.stride(), arg.dtype, arg.device, arg.layout
    if isinstance(arg, list):
        return tuple(map(seen_of, arg))
    return arg


def require_stages(op: str, least: dict[str, int], **lists: Sequence[int]) -> None:
    """One entry per stage in each list, at least 1, or what ``least`` says for the list."""
    lengths = {name: len(values) for name, values in lists.items()}
    if len(set(lengths.values())) != 1 or not all(lengths.values()):
        raise ValueError(f"{op}: {', '.join(lists)} must have one entry per stage, got {lengths}")
    for name, values in lists.items():
        smallest = least.get(name, 1)
        if min(values) < smallest:
            raise ValueError(f"{op}: {name} must be >= {smallest}, got {list(values)}")


def require_positive(op: str, **numbers: int) -> None:
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"{op}: {name} must be >= 1, got {value}")


def require_wanted(op: str, wanted: Sequence[bool], gradients: int) -> None:
    if len(wanted) != gradients:
        raise ValueError(f"{op}: wanted must have one entry per gradient ({gradients}), got {list(wanted)}")


def total(op: str, *factors: Sequence[int] | int) -> int:
    """The elements of all stages: sums of products of one factor per stage, or of one for all.

    Not even an empty stage may have sizes whose product does not fit 64 bits.
    """
    num_stages = max(len(f) for f in factors if not isinstance(f, int))
    stages = list(zip(*([f] * num_stages if isinstance(f, int) else f for f in factors), strict=True))
    if sum(math.prod(max(size, 1) for size in sizes) for sizes in stages) > LARGEST:
        raise ValueError(f"{op}: sizes of stages must fit 64 bits, got the products of {stages}")
    return sum(map(math.prod, stages))


def require_shape(op: str, name: str, tensor: Tensor, *sizes: int | None) -> None:
    """``tensor`` must be of these sizes; None stands for any that is positive."""
    fits = tensor.dim() == len(sizes) and all(
        n == size or (size is None and n > 0) for n, size in zip(tensor.shape, sizes, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in sizes)
        raise ValueError(f"{op}: {name} must be [{wanted}], got {list(tensor.shape)}")


def require_elements(op: str, name: str, tensor: Tensor, elements: int) -> None:
    if tensor.numel() != elements:
        raise ValueError(
            f"{op}: {name} must have {elements} elements for these sizes, got shape {list(tensor.shape)}"
        )


def require_dense(op: str, name: str, tensor: Tensor) -> None:
    if not tensor.is_contiguous():
        raise ValueError(f"{op}: {name} must be contiguous, got strides {tensor.stride()}")


def require_flat(op: str, x: Tensor, elements: dict[str, tuple[Tensor | None, int]]) -> None:
    """Each a dense flat buffer of so many elements, of the dtype and on the device of ``x``; None where absent."""
    for name, (tensor, size) in elements.items():
        if tensor is None:
            continue
        require_like(op, name, tensor, x, x.dtype)
        require_shape(op, name, tensor, size)
        require_dense(op, name, tensor)


def require_per_stage(
    op: str, name: str, tensors: Sequence[Tensor], x: Tensor, shapes: Sequence[tuple[int, ...]]
) -> None:
    """One tensor per stage of these shapes, of the dtype of ``x`` or float32, on its device."""
    if len(tensors) != len(shapes):
        raise ValueError(f"{op}: {name} must hold one tensor per stage ({len(shapes)}), got {len(tensors)}")
    for stage, (tensor, shape) in enumerate(zip(tensors, shapes, strict=True)):
        require_like(op, f"{name} of stage {stage}", tensor, x, x.dtype, torch.float32)
        require_shape(op, f"{name} of stage {stage}", tensor, *shape)


def require_like(op: str, name: str, tensor: Tensor, x: Tensor, *dtypes: torch.dtype) -> None:
    """``tensor`` must lie where ``x`` does and have one of ``dtypes``."""
    if tensor.layout is not torch.strided or tensor.device != x.device:
        raise ValueError(
            f"{op}: {name} must be a dense tensor on {x.device}, got {tensor.layout} on {tensor.device}"
        )
    if tensor.dtype not in dtypes:
        allowed = " or ".join(str(dtype) for dtype in dict.fromkeys(dtypes))
        raise TypeError(f"{op}: {name} must be {allowed}, got {tensor.dtype}")

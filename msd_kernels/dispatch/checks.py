"""Checks that every op needs. Each raises before any kernel runs, with the op's name first."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from numbers import Real
from operator import index

import torch
from torch import Tensor

from msd_kernels.stage_batch import StageBatch, as_integer, fixed_shape

NUMBERS = (float, int, torch.SymFloat, torch.SymInt)
FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def require_floating(op: str, name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in FLOATING:
        raise TypeError(f"{op}: {name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")
    if tensor.layout is not torch.strided or tensor.is_nested:
        kind = "nested" if tensor.is_nested else tensor.layout
        raise TypeError(f"{op}: {name} must be a dense tensor, got a {kind} one")


def require_like(
    op: str, name: str, tensor: Tensor, x: Tensor, *, also: tuple[torch.dtype, ...] = ()
) -> None:
    """``tensor`` must be on the device of ``x`` and have its dtype, or one of ``also``."""
    require_floating(op, name, tensor)
    if tensor.device != x.device:
        raise ValueError(f"{op}: {name} is on {tensor.device}, but x is on {x.device}")
    if tensor.dtype != x.dtype and tensor.dtype not in also:
        allowed = " or ".join(str(dtype) for dtype in dict.fromkeys((x.dtype, *also)))
        raise TypeError(f"{op}: {name} must be {allowed} for x of {x.dtype}, got {tensor.dtype}")


def real(op: str, name: str, value: float) -> float:
    """A number, also NaN or infinite. No tensor: its gradient would be lost, and a GPU waited for."""
    if type(value) is float:
        return value
    if type(value) not in NUMBERS and (isinstance(value, bool) or not isinstance(value, Real)):
        raise TypeError(f"{op}: {name} must be a number, got {value!r}")
    try:
        return float(value)
    except OverflowError:
        return math.inf


def number(op: str, name: str, value: float) -> float:
    """A finite number."""
    found = real(op, name, value)
    if not -math.inf < found < math.inf:  # which a compiler can trace, unlike math.isfinite
        raise ValueError(f"{op}: {name} must be finite, got {found}")
    return found


def integer(op: str, name: str, value: int) -> int:
    """What stands for an integer, as NumPy's do, is turned into one."""
    if type(value) is int:
        return value
    try:
        return as_integer(value)
    except TypeError:
        raise TypeError(f"{op}: {name} must be an integer, got {value!r}") from None


def integers(op: str, name: str, value: int | Sequence[int]) -> int | tuple[int, ...]:
    """One integer or several."""
    if type(value) is int or isinstance(value, torch.SymInt):
        return value
    try:
        return tuple(map(as_integer, value)) if isinstance(value, Sequence) else index(value)
    except TypeError:
        raise TypeError(f"{op}: {name} must be one integer or one per stage, got {value!r}") from None


def stage_counts(op: str, counts: Sequence[int]) -> tuple[int, ...]:
    """The samples of each stage, as integers."""
    try:
        return tuple(map(as_integer, counts))
    except TypeError:
        raise TypeError(f"{op}: counts must be integers, one per stage, got {counts!r}") from None


def per_stage(op: str, name: str, value: int | Sequence[int], num_stages: int) -> tuple[int, ...]:
    """Spreads one integer over the stages, or checks that there is one per stage."""
    if isinstance(value, Sequence):
        if len(value) != num_stages:
            raise ValueError(
                f"{op}: {name} must be one integer or one per stage ({num_stages}), got {tuple(value)}"
            )
        return tuple(value)
    return (value,) * num_stages


def stage_weights(
    op: str, name: str, weights: Sequence[Tensor]
) -> tuple[list[Tensor], tuple[tuple[int, ...], ...]]:
    """One tensor per stage, and their shapes."""
    if isinstance(weights, Tensor | str | bytes | Iterator) or not isinstance(weights, Iterable):
        got = "a single tensor" if isinstance(weights, Tensor) else type(weights).__name__
        raise TypeError(f"{op}: {name} must be a sequence of one tensor per stage, got {got}")
    weights = list(weights)
    for stage, tensor in enumerate(weights):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} of stage {stage} must be a tensor, got {type(tensor).__name__}")
    fixed = [fixed_shape(weight) for weight in weights]
    return [weight for weight, _ in fixed], tuple(shape for _, shape in fixed)


def optional_stage_weights(
    op: str, name: str, weights: Sequence[Tensor] | None
) -> tuple[list[Tensor], tuple[tuple[int, ...], ...] | None]:
    """As :func:`stage_weights`; no tensors, and None for their shapes, where there are none."""
    return ([], None) if weights is None else stage_weights(op, name, weights)


def require_shapes(
    op: str, name: str, shapes: Sequence[tuple[int, ...]], expected: Sequence[tuple[int | None, ...]]
) -> None:
    """The shapes of one weight per stage must be those expected, where None stands for any size from 1."""
    if len(shapes) != len(expected):
        raise ValueError(f"{op}: {name} must hold one tensor per stage ({len(expected)}), got {len(shapes)}")
    for stage, (shape, sizes) in enumerate(zip(shapes, expected, strict=True)):
        fits = len(shape) == len(sizes) and all(
            s >= 1 if e is None else s == e for s, e in zip(shape, sizes, strict=True)
        )
        if not fits:
            wanted = ", ".join("any" if size is None else str(size) for size in sizes)
            raise ValueError(f"{op}: {name} of stage {stage} must be [{wanted}], got {list(shape)}")


def require_dtypes(op: str, name: str, weights: Sequence[Tensor], x: Tensor) -> None:
    """Each must be of the dtype of ``x`` or float32, all of one, on the device of ``x``."""
    for stage, tensor in enumerate(weights):
        require_like(op, f"{name} of stage {stage}", tensor, x, also=(torch.float32,))
        if tensor.dtype != weights[0].dtype:
            raise TypeError(
                f"{op}: {name} of stage {stage} is {tensor.dtype}, stage 0 is {weights[0].dtype}; all stages need one"
            )


def require_layer(
    op: str,
    x: Tensor,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
    weight_shapes: Sequence[tuple[int, ...]],
    bias_shapes: Sequence[tuple[int, ...]] | None,
    expected: Sequence[tuple[int | None, ...]],
) -> None:
    """The weights of a layer, whose shapes are ``expected``, and its biases of as many elements as those have rows."""
    require_shapes(op, "weight", weight_shapes, expected)
    if bias_shapes is not None:
        require_shapes(op, "bias", bias_shapes, [shape[:1] for shape in weight_shapes])
    for name, tensors in (("weight", weight), ("bias", bias)):
        require_dtypes(op, name, tensors, x)


def require_stage_batch(op: str, name: str, batch: StageBatch) -> None:
    if not isinstance(batch, StageBatch):
        raise TypeError(f"{op}: {name} must be a StageBatch, got {type(batch).__name__}")


def skip_batch(op: str, x: StageBatch, skip: StageBatch | Tensor | None) -> StageBatch | None:
    """A second source of the counts and size of ``x``, which may be a dense tensor in stage order."""
    if skip is None:
        return None
    if isinstance(skip, Tensor):
        skip, shape = fixed_shape(skip)
        if len(shape) != 4 or shape[0] != x.num_samples:
            raise ValueError(f"{op}: a dense skip must be [{x.num_samples}, D, H, W], got {tuple(shape)}")
        skip = StageBatch.from_dense(skip, x.counts)
    if not isinstance(skip, StageBatch):
        raise TypeError(f"{op}: skip must be a StageBatch or a dense tensor, got {type(skip).__name__}")
    require_layout(op, "skip", skip, x.counts, skip.channels, x.height, x.width)
    return skip


def require_size(op: str, name: str, batch: StageBatch) -> None:
    """``batch`` must hold what its layout says: a tool that maps functions over tensors may have put in another."""
    if not batch.checked and not batch.fits():
        raise ValueError(
            f"{op}: {name} must hold [{sum(batch.sizes)}] values for counts={batch.counts}, "
            f"channels={batch.channels} at {batch.height}x{batch.width}, got {list(batch.values.shape)}"
        )


def require_layout(
    op: str,
    name: str,
    batch: StageBatch,
    counts: Sequence[int],
    channels: Sequence[int],
    height: int,
    width: int,
) -> None:
    """``batch`` must be a StageBatch of exactly this layout."""
    require_stage_batch(op, name, batch)
    got = batch.layout
    expected = (tuple(counts), tuple(channels), height, width)
    if got != expected:
        raise ValueError(
            f"{op}: {name} must have counts={expected[0]}, channels={expected[1]} at {height}x{width}, "
            f"got counts={got[0]}, channels={got[1]} at {got[2]}x{got[3]}"
        )
    require_size(op, name, batch)

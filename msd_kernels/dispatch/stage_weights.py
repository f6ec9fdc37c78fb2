"""The weights of all stages, one tensor each: what kernels of one launch read of them, and their gradients.

A layer's weights are ordinary tensors, in PyTorch's own shapes. A launch over all stages reads ONE buffer that holds
stage after stage, a convolution's weight ``[O, I, kh, kw]`` as ``[O, kh, kw, I]``, so that every slice of a reduction
is one contiguous load. That buffer is made from them per call, on a GPU by one launch, and never shown.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from math import prod

import torch
from torch import Tensor, distributed

from msd_kernels.frozen import kept
from msd_kernels.runtime import weight_buffers
from msd_kernels.runtime.launch import cannot_run

Shape = Sequence[int]


def joined(weights: Sequence[Tensor], dtype: torch.dtype | None = None) -> Tensor | None:
    """The buffer that a launch reads, in ``dtype``; None for no weights. One weight may be its own buffer."""
    if not weights:
        return None
    first = weights[0]
    dtype = dtype or first.dtype
    if len(weights) == 1 and first.dim() < 4 and first.dtype == dtype:
        return first if first.dim() == 1 and first.is_contiguous() else first.reshape(-1).contiguous()
    return kept(weights, dtype, lambda: _joined(weights, dtype))


def _joined(weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    if _by_kernel(weights[0]):
        return weight_buffers.pack(weights, dtype)
    flat = [w.permute(0, 2, 3, 1).reshape(-1) if w.dim() == 4 else w.reshape(-1) for w in weights]
    buffer = flat[0] if len(flat) == 1 else torch.cat(flat)
    return buffer.to(dtype).contiguous()


def wanted_parts(
    buffer: Tensor | None, shapes: Sequence[Shape], wanted: Sequence[bool]
) -> list[Tensor | None]:
    """The wanted stages' parts of such a buffer: tensors of their own, in PyTorch's shape, without gaps."""
    if buffer is None:
        return [None] * len(shapes)
    if len(shapes) == 1 and _as_shape(buffer, shapes[0]).is_contiguous():
        return [_as_shape(buffer, shapes[0]) if wanted[0] else None]
    if _by_kernel(buffer):
        return weight_buffers.unpack(buffer, shapes, wanted)
    parts = buffer.split_with_sizes([prod(shape) for shape in shapes])
    return [
        _as_shape(part, shape).clone(memory_format=torch.contiguous_format) if flag else None
        for part, shape, flag in zip(parts, shapes, wanted, strict=True)
    ]


def _by_kernel(tensor: Tensor) -> bool:
    return tensor.is_cuda and cannot_run("cuda", tensor.dtype) is None


def _as_shape(part: Tensor, shape: Shape) -> Tensor:
    """A view of one stage's part of the buffer, in PyTorch's shape."""
    if len(shape) < 4:
        return part if len(shape) == 1 else part.view(shape)
    out_channels, in_channels, height, width = shape
    return part.view(out_channels, height, width, in_channels).permute(0, 3, 1, 2)


def converted(
    weights: Sequence[Tensor],
    dtype: torch.dtype,
    counts: Sequence[int],
    *,
    channels_last: bool | None = False,
) -> list[Tensor | None]:
    """The weights as a library takes them, in ``dtype`` and without gaps.

    None for each stage without samples, and for each where there are no weights. ``channels_last`` None leaves each
    weight in that order that has it.

    Libraries bring a convolution's weight into an order of their own in every call: several times as fast where its
    channels lie innermost, as those of the features do, than from PyTorch's own order.
    """
    if not weights:
        return [None] * len(counts)
    return [
        _converted(weight, dtype, channels_last) if count else None
        for weight, count in zip(weights, counts, strict=True)
    ]


def has_channels_innermost(weight: Tensor) -> bool:
    """Whether a weight lies in channels_last order and in no other."""
    return (
        not weight.is_contiguous()
        and weight.dim() == 4
        and weight.is_contiguous(memory_format=torch.channels_last)
    )


def _converted(weight: Tensor, dtype: torch.dtype, channels_last: bool | None) -> Tensor:
    last = has_channels_innermost(weight) if channels_last is None else channels_last and weight.dim() == 4
    order = torch.channels_last if last else torch.contiguous_format
    if weight.dtype == dtype and weight.is_contiguous(memory_format=order):
        return weight
    return kept([weight], (dtype, order), lambda: weight.to(dtype).contiguous(memory_format=order))


def differentiate(
    backward: Callable[[Sequence[bool]], Sequence[Tensor]],
    needed: Sequence[bool],
    counts: Sequence[int],
    weight: Sequence[Tensor],
    bias_shapes: Sequence[Shape] | None,
    like: Tensor,
) -> list[Tensor | None]:
    """The gradients of an op's tensors: single ones, then one weight, and one bias where there are any, per stage.

    A stage without samples leaves its own without a gradient (None), by which an optimizer leaves its decoder alone.
    Where several processes train together they get zeros: the stage's samples may be in another process, and all must
    have a gradient to sum up.

    Args:
        backward: computes the wanted ones, told by flags for the single tensors, every weight and every bias.
        needed: which of the tensors need one, a tuple.
        counts: of the samples that each stage has.
        weight: may be empty, too.
        bias_shapes: None where there is no bias.
        like: a tensor on their device.
    """
    present = tuple(map(bool, counts))
    wanted, places = _wanted(needed, present, bool(weight), bias_shapes is not None)
    found = iter(backward(wanted) if any(wanted) else ())
    gradients = [next(found) if wanted[place] else None for place in places]
    if several_processes():
        shapes = [*(w.shape for w in weight), *(bias_shapes or ())]
        for position, shape in enumerate(shapes, len(needed) - len(shapes)):
            if needed[position] and gradients[position] is None:
                gradients[position] = like.new_zeros(list(shape))
    return gradients


@lru_cache(maxsize=4096)
def _wanted(
    needed: tuple[bool, ...], present: tuple[bool, ...], weighted: bool, biased: bool
) -> tuple[tuple[bool, ...], list[int]]:
    """Flags for the single tensors, every weight and every bias, and the places of an op's own tensors among them."""
    stages = len(present)
    singles = len(needed) - (weighted + biased) * stages
    places = [*range(singles), *(range(singles, singles + stages) if weighted else ())]
    places += range(singles + stages, singles + 2 * stages) if biased else ()
    wanted = [False] * (singles + 2 * stages)
    for place, flag in zip(places, needed, strict=True):
        wanted[place] = flag and (place < singles or present[(place - singles) % stages])
    return tuple(wanted), places


def several_processes() -> bool:
    """Whether this process trains together with others, as far as PyTorch knows."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1

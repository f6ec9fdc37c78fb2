"""The weights of all stages in one buffer, and their gradients out of one, by one launch each.

A launch of all stages reads ONE buffer that holds stage after stage, a convolution's weight ``[O, C, kh, kw]`` as
``[O, kh, kw, C]``. Each weight is a tensor of its own, whose address the kernel takes by value.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib import import_module
from itertools import accumulate
from math import prod
from types import ModuleType

import torch
from torch import Tensor

from msd_kernels.runtime.extension import address
from msd_kernels.runtime.launch import launch

BLOCK = 1024
STAGES_AT_ONCE = 8

Shape = Sequence[int]


def pack(weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The buffer of several weights of one dtype, in ``dtype``."""
    weights = [weight.contiguous() for weight in weights]
    buffer = weights[0].new_empty(sum(weight.numel() for weight in weights), dtype=dtype)
    _move(buffer, weights, [weight.shape for weight in weights], unpack=False)
    return buffer


def unpack(buffer: Tensor, shapes: Sequence[Shape], wanted: Sequence[bool]) -> list[Tensor | None]:
    """The wanted weights of a buffer, or gradients: tensors of their own, of these shapes and the buffer's dtype."""
    parts = [buffer.new_empty(shape) if flag else None for shape, flag in zip(shapes, wanted, strict=True)]
    if any(wanted):
        _move(buffer, parts, shapes, unpack=True)
    return parts


def _move(buffer: Tensor, weights: Sequence[Tensor | None], shapes: Sequence[Shape], unpack: bool) -> None:
    example = next(weight for weight in weights if weight is not None)
    starts = accumulate(map(prod, shapes), initial=0)
    rows = [row for row in zip(weights, shapes, starts, strict=False) if row[0] is not None]
    for begin in range(0, len(rows), STAGES_AT_ONCE):
        tiles, numbers = 0, []
        for weight, shape, start in rows[begin : begin + STAGES_AT_ONCE]:
            tiles += -(-weight.numel() // BLOCK)
            numbers += [address(weight), weight.numel(), shape[1] if len(shape) > 1 else 1, start]
        numbers += [0, 0, 1, 0] * (STAGES_AT_ONCE - len(numbers) // 4)
        launch(
            _kernels()._weights_kernel, tiles, buffer, buffer, example, by_value=numbers,
            TAPS=prod(shapes[0][2:]), UNPACK=unpack, BLOCK=BLOCK,
        )  # fmt: skip


@cache
def _kernels() -> ModuleType:
    return import_module("msd_kernels.runtime.weight_kernels")

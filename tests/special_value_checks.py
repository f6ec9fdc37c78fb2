"""What the tests of special values share: one number of a call is none, infinite, very large or very small.

What does not depend on it must be right. What does must be right, too, or no finite number; and where the value in
float64 is not finite, the result may not be, either.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from msd_kernels import attention, group_norm, resample2d
from msd_kernels.dispatch.backends import OpBackends, use
from msd_kernels.ops import attention as attention_op
from msd_kernels.ops import group_norm as group_norm_op
from msd_kernels.ops import resample2d as resample2d_op
from op_calls import CALLS, Call, cotangent_of

NONE_OR_INFINITE = (math.nan, math.inf, -math.inf)
# Of about 1e38, 1e25 and 1e15; all types hold the same. Of the last of each nothing overflows on the way.
LARGE = {torch.float32: (2.0**126, -(2.0**83), 2.0**50), torch.float16: (2.0**15, 2.0**10)}
LARGE[torch.bfloat16] = LARGE[torch.float32]
# Of each value, and of the largest one: far above all rounding, and far below what a lost number does.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}


def _large_norm(*shape: int, channels_last: bool) -> Call:
    """Whole vectors, several chunks of rows and several groups."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def function(x, weight, shift):
        x = x.contiguous(memory_format=memory_format)
        return group_norm(x, 2, weight, shift=shift, activation="silu")

    return Call([shape, shape[1:2], shape[:2]], function)


def _wide_resampling(up: int, down: int) -> Call:
    def function(x):
        return resample2d(x.contiguous(memory_format=torch.channels_last), [1, 3, 3, 1], up, down)

    return Call([(1, 40, 4, 6)], function)


# Every call of the ops on few elements, and calls that fill vectors and blocks.
CASES: dict[str, tuple[OpBackends, Call]] = {
    **{case: (backends, build(2)) for case, (backends, build) in CALLS.items()},
    "group_norm in NHWC": (group_norm_op.BACKENDS, _large_norm(1, 48, 9, 9, channels_last=True)),
    "group_norm in NCHW": (group_norm_op.BACKENDS, _large_norm(1, 4, 9, 9, channels_last=False)),
    "attention to 37 keys": (
        attention_op.BACKENDS,
        Call([(1, 1, 3, 4), (1, 1, 37, 4), (1, 1, 37, 4)], attention),
    ),
    "resample2d up": (resample2d_op.BACKENDS, _wide_resampling(2, 1)),
    "resample2d down": (resample2d_op.BACKENDS, _wide_resampling(1, 2)),
}


@dataclass(frozen=True)
class Expected:
    """One result or gradient in float64."""

    values: Tensor
    ordinary: float  # the largest value that it has without a special one
    touched: Tensor  # what depends on the special value
    either: Tensor  # what would, if the zeros around an image were numbers like others


def check(case: str, dtype: torch.dtype, special: Sequence[float] = ()) -> None:
    """A call and its gradients, with every special value in every input and in the cotangent, each at another place."""
    call = CASES[case][1]
    special = special or NONE_OR_INFINITE + LARGE[dtype]
    for position, tensor in enumerate(_ordinary_values(case)):
        for number, value in enumerate(special):
            place = number * tensor.numel() // len(special)
            found = _results(call, _values(case, position, place, value), dtype)
            for i, (actual, expected) in enumerate(
                zip(found, _expected(case, position, place, value), strict=True)
            ):
                said = f"{value} in input {position} at {place}: " + (f"gradient {i - 1}" if i else "result")
                _check_result(said, actual, expected, dtype, exact=value == LARGE[dtype][-1])


def _check_result(said: str, found: Tensor, expected: Expected, dtype: torch.dtype, *, exact: bool) -> None:
    finite = expected.values.abs() <= torch.finfo(dtype).max
    largest = expected.values[finite].abs().max() if finite.any() else 0.0
    scale = torch.where(expected.touched, largest, expected.ordinary) + expected.values.abs()
    right = (found - expected.values).abs() <= TOLERANCES[dtype] * scale + torch.finfo(dtype).smallest_normal
    lost = ~found.isfinite() & expected.touched
    may_be_lost = expected.touched & ~finite if exact else expected.touched
    wrong = ~(right & finite | lost & may_be_lost | expected.either)
    assert not wrong.any(), (
        f"{said}: {int(wrong.sum())} wrong, the first is {found[wrong][0]:.6e}, not {expected.values[wrong][0]:.6e}"
    )


@cache
def _expected(case: str, position: int, place: int, special: float) -> list[Expected]:
    call = CASES[case][1]
    with use("reference"):
        one, other, found = (
            _results(call, _values(case, position, place, value), torch.float64)
            for value in (0.25, 1.75, special)
        )
    expected = []
    for a, b, values in zip(one, other, found, strict=True):
        touched = a != b
        either = ~touched & ~values.isfinite() if "conv2d" in case else torch.zeros_like(touched)
        expected.append(Expected(torch.where(touched, values, a), a.abs().max().item(), touched, either))
    return expected


def _values(case: str, position: int, place: int, special: float) -> list[Tensor]:
    values = [t.clone() for t in _ordinary_values(case)]
    values[position].view(-1)[place] = special
    return values


@cache
def _ordinary_values(case: str) -> list[Tensor]:
    """The leaves of a call and its cotangent, in float64, representable in 16 bits."""
    call = CASES[case][1]
    leaves = call.leaves(torch.Generator().manual_seed(5), torch.float16)
    with use("reference"):
        y = call.function(*leaves)
    return [t.detach().bfloat16().double() for t in (*leaves, cotangent_of(y))]


def _results(call: Call, values: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The result and all gradients, in float64."""
    leaves = [t.to(dtype).requires_grad_() for t in values[:-1]]
    y = call.function(*leaves)
    gradients = torch.autograd.grad(y, leaves, values[-1].to(dtype))
    return [t.detach().double() for t in (y, *gradients)]

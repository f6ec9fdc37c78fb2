"""Registered ops called directly with sizes and tensors that lie: refused, at once, by the op's name."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from helpers import dispatcher_calls
from msd_kernels import optimal_denoiser
from msd_kernels.dispatch.backends import use
from op_calls import CALLS, Call, forward_and_backward

pytestmark = pytest.mark.filterwarnings("ignore::msd_kernels.FallbackWarning")

NUMBERS = (0, -1, 2**31, 2**62, 2**63 - 1)
SECONDS = 1.0
REFUSALS = (ValueError, TypeError, RuntimeError)


def denoiser(side: int) -> Call:
    data = torch.linspace(-2, 2, 5 * side).sin().reshape(5, side)
    return Call([(3, side)], lambda x: optimal_denoiser(x, 0.5, data))


EVERY_CALL = {case: build for case, (_, build) in CALLS.items()} | {"optimal_denoiser": denoiser}


def mutations(argument) -> Iterator:
    """Other values in the place of a valid argument."""
    if isinstance(argument, Tensor):
        flat = argument.detach().flatten()
        yield flat[:-1].clone()
        yield torch.cat([flat, flat])
        yield flat.new_empty(0)
        yield argument.detach().to(torch.float16)
        yield argument.detach().to(torch.int64)
        yield argument.detach()[None]
        yield torch.stack([flat, flat], dim=1)[:, 0]
        yield argument.detach().to("meta")
    elif isinstance(argument, (list, tuple)) and len(argument):
        values = list(argument)
        yield []
        yield values[:-1]
        yield [*values, values[-1]]
        if isinstance(values[0], Tensor):
            yield from ([other, *values[1:]] for other in mutations(values[0]))
        if not isinstance(values[0], int) or isinstance(values[0], bool):
            return
        for number in NUMBERS:
            yield [number, *values[1:]]
            yield [number] * len(values)
        yield [values[0] + 1, *values[1:]]
        yield [2**62] * 4
    elif isinstance(argument, int) and not isinstance(argument, bool):
        yield from NUMBERS
        yield argument + 1
    elif isinstance(argument, str):
        yield from ("", "hntd", "sideways")
    elif argument is None:
        yield torch.zeros(3)


def tensors_in(arguments: tuple) -> Iterator[Tensor]:
    """Single ones and those in lists."""
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, list):
            yield from tensors_in(tuple(argument))


def with_tensors(arguments: tuple, function: Callable[[Tensor], Tensor]) -> tuple:
    """The same arguments with ``function`` of each tensor in its place."""
    return tuple(
        function(a)
        if isinstance(a, Tensor)
        else list(with_tensors(tuple(a), function))
        if isinstance(a, list)
        else a
        for a in arguments
    )


def shown(argument) -> object:
    """Tensors by their shapes."""
    if isinstance(argument, Tensor):
        return tuple(argument.shape)
    return [shown(a) for a in argument] if isinstance(argument, list) else argument


def mutated(arguments: tuple) -> Iterator[tuple[str, tuple]]:
    for position, argument in enumerate(arguments):
        for other in mutations(argument):
            changed = (*arguments[:position], other, *arguments[position + 1 :])
            yield f"argument {position} as {shown(other)}", changed


def outcome(op: Callable, arguments: tuple):
    """The outputs, or the error that refuses the call; in a second."""
    begin = time.perf_counter()
    try:
        result = op(*arguments)
    except REFUSALS as error:
        result = error
    assert time.perf_counter() - begin < SECONDS
    return result


def tensors(result) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


@pytest.mark.parametrize("build", EVERY_CALL.values(), ids=EVERY_CALL)
def test_arguments_that_lie_are_refused_or_change_nothing(build, generator):
    call = build(4)
    calls = dispatcher_calls(lambda: forward_and_backward(call, call.leaves(generator)))
    assert len(calls) == 2
    for op, arguments in calls:
        arguments = with_tensors(arguments, Tensor.detach)
        name = op.name().removeprefix("msd_kernels::").removesuffix("_backward")
        op(*arguments)
        for what, changed in mutated(arguments):
            result = outcome(op, changed)
            if isinstance(result, Exception):
                assert name in str(result) or "meta" in str(result), f"{what}: {result}"
                continue
            with use("reference"):
                expected = op(*changed)
            for ours, theirs in zip(tensors(result), tensors(expected), strict=True):
                half = any(a.dtype == torch.float16 for a in tensors_in(changed))
                tolerance = 1e-2 if half else 1e-4
                torch.testing.assert_close(
                    ours, theirs, rtol=tolerance, atol=tolerance, msg=lambda m, w=what: f"{w}: {m}"
                )


@pytest.mark.parametrize("build", EVERY_CALL.values(), ids=EVERY_CALL)
def test_arguments_that_lie_are_refused_without_data(build, generator):
    """By the fake implementations, exactly where the kernels refuse."""
    call = build(4)
    calls = dispatcher_calls(lambda: forward_and_backward(call, call.leaves(generator)))
    mode = FakeTensorMode()
    for op, arguments in calls:
        arguments = with_tensors(arguments, Tensor.detach)
        for what, changed in mutated(arguments):
            if any(a.is_meta for a in tensors_in(changed)):
                continue
            real = outcome(op, changed)
            with mode:
                fake = outcome(op, with_tensors(changed, mode.from_tensor))
            assert isinstance(fake, Exception) == isinstance(real, Exception), f"{what}: {fake}, but {real}"


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    ("op", "arguments", "message"),
    [
        (
            "group_norm",
            (
                [None, None, None, None, [], []],
                [2**62] * 4,
                [1] * 4,
                [0] * 4,
                [1] * 4,
                4,
                True,
                1e-5,
                False,
                0.0,
            ),
            "group_norm: sizes of stages must fit 64 bits",
        ),
        (
            "group_norm",
            (
                [None, None, None, None, [], []],
                [0] * 4,
                [2**62] * 4,
                [0] * 4,
                [1] * 4,
                1,
                True,
                1e-5,
                False,
                0.0,
            ),
            "group_norm: sizes of stages must fit 64 bits",
        ),
        (
            "group_norm",
            ([None, None, None, None, [], []], [0, 0], [4, 2], [0, 0], [2, 1], 2**62, True, 1e-5, False, 0.0),
            "group_norm: sizes of stages must fit 64 bits",
        ),
        (
            "group_norm_backward",
            (
                [torch.zeros(16), None, *[torch.zeros(16)] * 2, None, None, None, [], []],
                *([2**62] * 4, [1] * 4, [0] * 4, [1] * 4, 1, True, 1e-5, False, 0.0),
                [True] * 13,
            ),
            "group_norm: sizes of stages must fit 64 bits",
        ),
        (
            "resample2d",
            ([[0.5, 0.5], False, 2], [2**62] * 4, [1] * 4, 4, 4, 2, 2, True),
            "resample2d: sizes of stages must fit 64 bits",
        ),
        (
            "resample2d",
            ([[0.5, 0.5], False, 2], [0, 0], [2, 1], 2**62, 6, 2**61, 3, True),
            "resample2d: sizes of stages must fit 64 bits",
        ),
        (
            "resample2d",
            ([[0.5, 0.5], False, 2], [0, 0], [2, 1], 4, 6, 2**50, 3, True),
            "resample2d: 2 taps with a stride of 2 do not lead down",
        ),
        (
            "resample2d",
            ([[0.1] * 9, False, 2], [1], [1], 4, 4, 2, 2, True),
            "resample2d: there must be 1 to 8 taps",
        ),
        (
            "grouped_linear",
            ([[torch.zeros(1, 1)] * 4, []], [2**62] * 4, [1] * 4, [1] * 4),
            "must fit 64 bits",
        ),
        ("grouped_linear", ([[torch.zeros(2, 1)] * 2, []], [-4, 12], [1, 1], [2, 2]), "rows must be >= 0"),
        ("grouped_linear", ([[], []], [], [], []), "must have one entry per stage"),
    ],
)
def test_arguments_that_would_overflow_are_refused(op, arguments, message, grad):
    first, *layout = arguments
    x = torch.zeros(16, requires_grad=grad)
    begin = time.perf_counter()
    with pytest.raises(ValueError, match=message):
        getattr(torch.ops.msd_kernels, op)(x, *first, *layout)
    assert time.perf_counter() - begin < SECONDS

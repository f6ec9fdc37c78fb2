"""Values, gradients and errors of grouped_linear; what every op owes is in test_contract.py."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers import ROUNDING, assert_elements_close, each_backend, poisoned_memory, stage_batch
from msd_kernels import StageBatch, grouped_linear
from msd_kernels.dispatch.backends import use
from msd_kernels.ops.grouped_linear import BACKENDS, library
from msd_kernels.runtime import processor

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)

# Float32 roundings of the sum of the absolute products. The order of a BLAS sum is its own: this is the worst found
# over this file, 4.2, doubled.
ROUNDINGS = 8


BIAS = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
SIZES = pytest.mark.parametrize(
    ("counts", "ins", "outs", "height", "width"),
    [
        ((5,), (7,), (3,), 1, 1),
        ((1,), (1,), (1,), 1, 1),
        ((2, 1), (512, 256), (384, 32), 1, 1),
        ((3, 0, 2), (12, 8, 4), (5, 4, 8), 3, 5),
        ((0, 0, 1), (12, 8, 4), (5, 4, 8), 2, 2),
        ((0, 0, 0), (12, 8, 4), (5, 4, 8), 2, 2),
        ((1, 0, 2, 1, 0, 1, 1), (3, 4, 5, 160, 2, 1, 17), (1, 2, 3, 4, 5, 6, 7), 2, 1),
    ],
)


def random_weights(
    generator, counts, ins, outs, dtype, *, bias=True
) -> tuple[list[Tensor], list[Tensor] | None]:
    def draw(*size):
        return torch.randn(size, generator=generator).to(dtype).requires_grad_()

    weight = [draw(o, i) for o, i in zip(outs, ins, strict=True)]
    return weight, [draw(o) for o in outs] if bias else None


def formula(x: StageBatch, weight: list[Tensor], bias: list[Tensor] | None) -> Tensor:
    """The products stage by stage, flat as the op packs them."""
    bias = bias or [w.new_zeros(w.shape[0]) for w in weight]
    rows = [segment.permute(0, 2, 3, 1).reshape(-1, segment.shape[1]) for segment in x.segments()]
    return torch.cat([(r @ w.T + b).reshape(-1) for r, w, b in zip(rows, weight, bias, strict=True)])


def derivatives(x: StageBatch, weight, bias, dy: Tensor, function) -> list[Tensor]:
    """The flat result and the gradients of x, weights and biases."""
    y = function(x, weight, bias)
    return [y, *torch.autograd.grad(y, [x.values, *weight, *(bias or [])], dy, materialize_grads=True)]


def converted(x: StageBatch, weight, bias, function: Callable[[Tensor], Tensor]):
    """``function`` of every tensor, as leaves."""

    def leaf(t: Tensor) -> Tensor:
        return function(t.detach()).requires_grad_()

    return x.with_values(leaf(x.values)), [leaf(w) for w in weight], bias and [leaf(b) for b in bias]


def check(x: StageBatch, weight, bias, generator, device: str = "cpu") -> None:
    """Result and all gradients, per element, against the formula in float64, in poisoned memory."""
    size = sum(n * x.height * x.width * w.shape[0] for n, w in zip(x.counts, weight, strict=True))
    dy = torch.randn(size, generator=generator).to(x.dtype)
    inputs = converted(x, weight, bias, lambda t: t.to(device))
    with poisoned_memory():
        found = derivatives(*inputs, dy.to(device), lambda *arguments: grouped_linear(*arguments).values)
    expected = derivatives(*converted(x, weight, bias, Tensor.double), dy.double(), formula)
    absolute = converted(x, weight, bias, lambda t: t.double().abs())
    terms = derivatives(*absolute, dy.double().abs(), formula)
    for actual, exact, term in zip(found, expected, terms, strict=True):
        assert actual.dtype == x.dtype
        atol = ROUNDINGS * ROUNDING[torch.float32] * term.detach()
        # The library rounds before and after it adds the bias.
        rtol = ROUNDING[x.dtype]
        assert_elements_close(actual, exact.detach(), rtol=2 * rtol if bias else rtol, atol=atol)


@each_backend(BACKENDS)
@DTYPES
@BIAS
@SIZES
def test_grouped_linear_equals_the_formula(counts, ins, outs, height, width, bias, dtype, backend, generator):
    x = stage_batch(generator, counts, ins, height, width, dtype=dtype, requires_grad=True)
    weight, bias = random_weights(generator, counts, ins, outs, dtype, bias=bias)
    check(x, weight, bias, generator)


@pytest.mark.gpu
@each_backend(BACKENDS, "cuda")
@DTYPES
@BIAS
@SIZES
def test_grouped_linear_on_cuda_equals_the_formula(
    counts, ins, outs, height, width, bias, dtype, backend, generator, exact_cuda
):
    x = stage_batch(generator, counts, ins, height, width, dtype=dtype)
    weight, bias = random_weights(generator, counts, ins, outs, dtype, bias=bias)
    check(x, weight, bias, generator, "cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_grouped_linear_on_a_processor_that_lacks_the_type(dtype, generator, monkeypatch):
    """The library multiplies in float32 then, and rounds once."""
    multiplied = set()

    def linear(x, weight, bias):
        multiplied.add(x.dtype)
        return F.linear(x, weight, bias)

    monkeypatch.setattr(library, "F", SimpleNamespace(linear=linear))
    monkeypatch.setattr(processor, "capabilities", lambda: frozenset({"sse2", "avx2", "avx512_f"}))
    x = stage_batch(generator, (2, 0, 1), (8, 6, 5), 3, 2, dtype=dtype, requires_grad=True)
    weight, bias = random_weights(generator, (2, 0, 1), (8, 6, 5), (4, 7, 3), dtype, bias=True)
    with use("library"):
        check(x, weight, bias, generator)
    assert multiplied == {torch.float32}


@each_backend(BACKENDS)
def test_grouped_linear_of_500_random_shapes(backend, generator):
    draw = random.Random(500)
    for _ in range(500):
        stages = draw.choice((1, 2, 3, 7))
        counts, ins, outs = (
            [draw.randint(low, high) for _ in range(stages)] for low, high in ((0, 4), (1, 40), (1, 40))
        )
        dtype = draw.choice((torch.float32, torch.bfloat16, torch.float16))
        x = stage_batch(
            generator, counts, ins, draw.randint(1, 3), draw.randint(1, 3), dtype=dtype, requires_grad=True
        )
        weight, bias = random_weights(generator, counts, ins, outs, dtype, bias=draw.random() < 0.5)
        check(x, weight, bias, generator)


@each_backend(BACKENDS)
@DTYPES
def test_grouped_linear_sums_in_float32(dtype, backend):
    """A sum of ones in bfloat16 would stop at 256, one in float16 at 2,048."""
    y = grouped_linear(torch.ones(2, 4096, dtype=dtype), [torch.ones(3, 4096, dtype=dtype)])
    assert torch.equal(y.values, torch.full((6,), 4096, dtype=dtype))


@each_backend(BACKENDS)
@DTYPES
def test_grouped_linear_of_stages_equals_separate_calls_bit_for_bit(dtype, backend, generator):
    counts, ins, outs = (3, 0, 2), (384, 256, 32), (96, 64, 8)
    x = stage_batch(generator, counts, ins, 2, 2, dtype=dtype, requires_grad=True)
    weight, bias = random_weights(generator, counts, ins, outs, dtype)
    y = grouped_linear(x, weight, bias)
    dy = y.with_values(torch.randn(y.values.shape, generator=generator).to(dtype))
    leaves = [x.values, *weight, *bias]
    dx, *others = torch.autograd.grad(y.values, leaves, dy.values, materialize_grads=True)
    found = [y.segments(), x.with_values(dx).segments(), others[:3], others[3:]]
    for stage, (segment, cotangent) in enumerate(zip(x.segments(), dy.segments(), strict=True)):
        alone = StageBatch.from_dense(segment.detach())
        leaves = [t.detach().clone().requires_grad_() for t in (alone.values, weight[stage], bias[stage])]
        result = grouped_linear(alone.with_values(leaves[0]), [leaves[1]], [leaves[2]])
        dy_alone = StageBatch.from_dense(cotangent).values
        gradients = torch.autograd.grad(result.values, leaves, dy_alone, materialize_grads=True)
        assert torch.equal(found[0][stage], result.dense())
        assert torch.equal(found[1][stage], alone.with_values(gradients[0]).dense())
        assert torch.equal(found[2][stage], gradients[1])
        assert torch.equal(found[3][stage], gradients[2])


@each_backend(BACKENDS)
def test_grouped_linear_of_a_dense_tensor(backend, generator):
    x = torch.randn(5, 6, generator=generator)
    weight = [torch.randn(o, 6, generator=generator) for o in (4, 3, 2)]
    strided = torch.cat([x, x], dim=1)[:, :6]
    y = grouped_linear(strided, weight, counts=(2, 0, 3))
    assert (y.counts, y.channels, y.height, y.width) == ((2, 0, 3), (4, 3, 2), 1, 1)
    expected = [
        (part @ w.T).double()
        for part, w in zip(x.double().split((2, 0, 3)), map(Tensor.double, weight), strict=True)
    ]
    for segment, exact in zip(y.segments(), expected, strict=True):
        assert_elements_close(segment.flatten(1), exact, rtol=0, atol=20 * ROUNDING[torch.float32])


def test_grouped_linear_takes_weights_in_any_memory_order(generator):
    x = stage_batch(generator, (1, 2), (4, 3), 2, 2)
    weight, bias = random_weights(generator, x.counts, (4, 3), (2, 5), torch.float32)
    turned = [w.t().contiguous().t() for w in weight]
    assert torch.equal(grouped_linear(x, turned, bias).values, grouped_linear(x, weight, bias).values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_grouped_linear_under_autocast_does_as_pytorch(dtype, generator, recwarn):
    x, weight = torch.randn(3, 4, generator=generator).to(dtype), torch.ones(2, 4, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, theirs = grouped_linear(x, [weight]), F.linear(x, weight)
    assert y.dtype == theirs.dtype
    assert torch.equal(y.values.view(3, 2), theirs)


def test_grouped_linear_under_autocast_returns_gradients_in_the_leaf_dtype(generator):
    x, weight = torch.randn(3, 4, generator=generator), torch.ones(2, 4, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = grouped_linear(x, [weight])
    y.values.sum().backward()
    assert weight.grad.dtype == torch.float32


BATCH = StageBatch(torch.zeros(3 * 4 * 2), (1, 2), (4, 4), 1, 2)
WEIGHTS = [torch.zeros(2, 4), torch.zeros(3, 4)]
X = torch.zeros(3, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: grouped_linear(X[0], WEIGHTS), ValueError, r"a dense x must be \[B, I\], got shape \(4,\)"),
        (lambda: grouped_linear(None, WEIGHTS), TypeError, "x must be a tensor, got NoneType"),
        (lambda: grouped_linear(X.int(), WEIGHTS), TypeError, "x must be float32, .* got torch.int32"),
        (
            lambda: grouped_linear(X, WEIGHTS),
            ValueError,
            "a dense x with the weights of 2 stages needs counts, got None",
        ),
        (
            lambda: grouped_linear(X, WEIGHTS, counts=(1, 1)),
            ValueError,
            r"counts must sum up to the batch size 3, got \(1, 1\)",
        ),
        (
            lambda: grouped_linear(BATCH, WEIGHTS, counts=(2, 1)),
            ValueError,
            r"counts=\(2, 1\) contradict those of the StageBatch, \(1, 2\)",
        ),
        (
            lambda: grouped_linear(BATCH, X),
            TypeError,
            "weight must be a sequence of one tensor per stage",
        ),
        (
            lambda: grouped_linear(BATCH, WEIGHTS[:1]),
            ValueError,
            r"weight must hold one tensor per stage \(2\), got 1",
        ),
        (
            lambda: grouped_linear(BATCH, [WEIGHTS[0], torch.zeros(3, 5)]),
            ValueError,
            r"weight of stage 1 must be \[any, 4\], got \[3, 5\]",
        ),
        (
            lambda: grouped_linear(BATCH, WEIGHTS, [torch.zeros(2), torch.zeros(2)]),
            ValueError,
            r"bias of stage 1 must be \[3\], got \[2\]",
        ),
        (
            lambda: grouped_linear(BATCH, [w.bfloat16() for w in WEIGHTS]),
            TypeError,
            "weight of stage 0 must be torch.float32 for x of torch.float32, got torch.bfloat16",
        ),
        (
            lambda: grouped_linear(BATCH, [w.to("meta") for w in WEIGHTS]),
            ValueError,
            "weight of stage 0 is on meta, but x is on cpu",
        ),
    ],
)
def test_grouped_linear_says_what_is_wrong(call, error, message):
    with pytest.raises(error, match=f"^grouped_linear: {message}"):
        call()

"""Dropout in GroupNorm's store: which elements it drops follows from a seed, and no mask lies in memory."""

from __future__ import annotations

import math

import pytest
import torch

from helpers import each_backend, stage_batch
from msd_kernels import StageBatch, explain, group_norm
from msd_kernels.dispatch.backends import BackendError, use
from msd_kernels.ops.group_norm import BACKENDS
from msd_kernels.ops.group_norm.masks import kept_factor, multipliers

ELEMENTS = 200_001
pytestmark = pytest.mark.filterwarnings("ignore::msd_kernels.FallbackWarning")
SERVING = pytest.mark.parametrize("backend", ["library", "reference"])


def seed_of(number: int) -> torch.Tensor:
    return torch.tensor([number])


@pytest.mark.parametrize("p", [0.05, 0.13, 0.5, 0.9])
@pytest.mark.parametrize("seed", [0, -1, 2**62 + 12345], ids=str)
def test_dropout_drops_that_share_of_independent_neighbours(p, seed):
    found = multipliers(seed_of(seed), ELEMENTS, p, torch.float32)
    zeros = found == 0
    error = math.sqrt(p * (1 - p) / ELEMENTS)
    assert abs(zeros.float().mean().item() - p) < 5 * error
    assert torch.equal(found[~zeros], torch.full_like(found[~zeros], kept_factor(p)))
    for distance in (1, 2, 3, 8, 64, 256, 4096):
        both = (zeros[:-distance] & zeros[distance:]).float().mean().item()
        assert abs(both - p * p) < 5 * math.sqrt(p * p * (1 - p * p) / ELEMENTS)


@pytest.mark.parametrize("other", [1, 2**32, -(2**63)])
def test_other_seeds_drop_other_elements(other):
    first, second = (multipliers(seed_of(s), ELEMENTS, 0.5, torch.float32) == 0 for s in (0, other))
    assert abs((first & second).float().mean().item() - 0.25) < 5 * math.sqrt(0.1875 / ELEMENTS)


@SERVING
@pytest.mark.parametrize("p", [0.3, 1.0])
def test_dropout_is_that_of_the_result_and_of_its_cotangent(p, backend, generator):
    counts, channels, groups = (2, 0, 1), (12, 8, 4), (3, 2, 1)
    x = stage_batch(generator, counts, channels, 3, 5, requires_grad=True)
    weight = [torch.randn(c, generator=generator).requires_grad_() for c in channels]
    seed, leaves = seed_of(7), [x.values, *weight]
    with use(backend):
        y = group_norm(x, groups, weight, activation="silu", dropout=p, seed=seed).values
        plain = group_norm(x, groups, weight, activation="silu").values
        factors = multipliers(seed, y.numel(), p, y.dtype)
        dy = torch.randn(y.shape, generator=generator)
        found = torch.autograd.grad(y, leaves, dy, materialize_grads=True)
        expected = torch.autograd.grad(plain, leaves, dy * factors, materialize_grads=True)
    assert torch.equal(y, plain * factors)
    assert (y == 0).any()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_derivatives_of_dropout_are_right_to_the_second_order(generator):
    x, skip = (
        torch.randn(2 * 6 * c, generator=generator, dtype=torch.float64).requires_grad_() for c in (4, 2)
    )
    weight = torch.randn(6, generator=generator, dtype=torch.float64).requires_grad_()

    def function(x, skip, weight):
        batches = (StageBatch(t, (2,), (c,), 2, 3) for t, c in ((x, 4), (skip, 2)))
        first, second = batches
        options = {"skip": second, "dropout": 0.4, "seed": seed_of(3)}
        return group_norm(first, 2, [weight], activation="silu", **options).values

    assert torch.autograd.gradcheck(function, (x, skip, weight))
    assert torch.autograd.gradgradcheck(function, (x, skip, weight))


def test_dropout_compiles_whole(generator):
    x = torch.randn(2, 8, 4, 4, generator=generator)
    compiled = torch.compile(
        lambda t, seed: group_norm(t, 2, dropout=0.5, seed=seed), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(x, seed_of(5)), group_norm(x, 2, dropout=0.5, seed=seed_of(5)))


@each_backend(BACKENDS)
def test_a_backend_serves_dropout_or_says_that_it_does_not(backend, generator):
    x = torch.randn(1, 8, 2, 2, generator=generator)
    options = {"dropout": 0.5, "seed": seed_of(1)}
    if backend == "cpu":
        with use("auto"):
            assert explain("group_norm", x, 2, **options).why_not["cpu"] == "has no dropout"
        with pytest.raises(BackendError, match="has no dropout"):
            group_norm(x, 2, **options)
    else:
        assert (group_norm(x, 2, **options) == 0).any()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dropout": 0.5}, TypeError, "seed must be a tensor where dropout is above 0, got NoneType"),
        ({"dropout": -0.1, "seed": seed_of(0)}, ValueError, "dropout probability has to be between 0 and 1"),
        ({"dropout": 1.1, "seed": seed_of(0)}, ValueError, "dropout probability has to be between 0 and 1"),
        ({"dropout": "0.5", "seed": seed_of(0)}, TypeError, "dropout must be a number, got '0.5'"),
        ({"dropout": 0.5, "seed": torch.zeros(1)}, TypeError, "seed must be torch.int64, got torch.float32"),
        ({"dropout": 0.5, "seed": torch.zeros(2).long()}, ValueError, r"seed must be \[1\], got \[2\]"),
    ],
)
def test_dropout_says_what_is_wrong(options, error, message):
    with pytest.raises(error, match=f"^group_norm: {message}"):
        group_norm(torch.zeros(1, 8, 2, 2), 2, **options)

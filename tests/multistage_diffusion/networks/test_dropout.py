"""Dropout with few random numbers: the distribution, the gradient, the seed."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from multistage_diffusion.networks.dropout import dropout

ELEMENTS = 200_001  # no multiple of the elements per random number


def standard_error(p: float, count: int) -> float:
    return math.sqrt(p * (1 - p) / count)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("p", [0.05, 0.13, 0.5, 0.9])
def test_dropout_drops_that_share_and_keeps_the_mean(p, dtype):
    torch.manual_seed(0)
    y = dropout(torch.ones(ELEMENTS, dtype=dtype), p, training=True)
    kept = y[y != 0]
    assert abs(kept.numel() / ELEMENTS - (1 - p)) < 5 * standard_error(p, ELEMENTS)
    assert torch.equal(kept, torch.full_like(kept, 1 / (1 - round(p * 65536) / 65536)))


def test_dropout_treats_neighbours_independently():
    torch.manual_seed(0)
    p = 0.3
    zeros = dropout(torch.ones(ELEMENTS), p, training=True) == 0
    for distance in (1, 2, 3, 4, 8, 64):
        both = (zeros[:-distance] & zeros[distance:]).float().mean().item()
        assert abs(both - p * p) < 5 * standard_error(p * p, ELEMENTS)


def test_dropout_gradient_has_the_mask_of_the_result():
    torch.manual_seed(0)
    x = torch.randn(3, 5, 7, requires_grad=True)
    y = dropout(x, 0.4, training=True)
    (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
    torch.testing.assert_close(gradient * x, y)
    assert 0 < (gradient == 0).sum() < x.numel()


def test_dropout_repeats_with_the_seed_and_not_without():
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(dropout(torch.ones(1000), 0.5, training=True))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_dropout_keeps_shape_and_memory_format():
    x = torch.randn(2, 8, 3, 5).contiguous(memory_format=torch.channels_last)
    y = dropout(x, 0.1, training=True)
    assert y.shape == x.shape
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("p", [0.0, 1.0, 2.0**-20])
def test_dropout_at_the_ends(p):
    x = torch.randn(100)
    assert torch.equal(dropout(x, p, training=True) != 0, torch.full((100,), p < 1))
    assert dropout(torch.empty(0), 0.5, training=True).shape == (0,)


def test_dropout_does_nothing_outside_training():
    x = torch.randn(100)
    assert torch.equal(dropout(x, 0.5, training=False), x)


@pytest.mark.parametrize("p", [-0.1, 1.1])
def test_dropout_refuses_what_pytorch_refuses(p):
    with pytest.raises(ValueError, match="dropout probability has to be between 0 and 1"):
        F.dropout(torch.ones(3), p, True)
    with pytest.raises(ValueError, match="dropout probability has to be between 0 and 1"):
        dropout(torch.ones(3), p, True)

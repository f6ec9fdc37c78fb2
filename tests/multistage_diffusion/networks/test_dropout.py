"""Dropout with few random numbers: the distribution, the gradient, the seed."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from msd_kernels import StageBatch
from multistage_diffusion.networks import blocks
from multistage_diffusion.networks.blocks import BlockStyle, Projections, ResidualBlock
from multistage_diffusion.networks.dropout import dropout
from multistage_diffusion.networks.layers import StageGroupNorm

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


@pytest.fixture
def dropping_block(monkeypatch):
    """A block whose norm drops, as on a GPU, and what it takes."""
    monkeypatch.setattr(blocks, "belongs_to_norm", lambda x: True)
    torch.manual_seed(0)
    style = BlockStyle(
        (8, 8),
        lambda channels: StageGroupNorm(channels, (2, 2)),
        lambda _: None,
        dropout=0.4,
        initialise_last=None,
    )
    block = ResidualBlock((8, 4), (8, 4), style).train()
    x = StageBatch(torch.randn(2 * 16 * 8 + 16 * 4, requires_grad=True), (2, 1), (8, 4), 4, 4)
    return block, x, StageBatch(torch.randn(3 * 8), (2, 1), (8, 8), 1, 1)


@pytest.mark.filterwarnings("ignore::msd_kernels.FallbackWarning")
def test_a_norms_dropout_repeats_with_the_seed_and_not_without(dropping_block):
    block, x, emb = dropping_block
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(block(x, Projections(emb)).values)
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    assert not torch.equal(results[0], block.eval()(x, Projections(emb)).values)


@pytest.mark.filterwarnings("ignore::msd_kernels.FallbackWarning")
def test_a_block_that_runs_again_drops_the_same(dropping_block):
    """As a checkpointed one does in its backward."""
    block, x, emb = dropping_block
    found = []
    for again in (False, True):
        torch.manual_seed(3)
        projections = Projections(emb)
        y = checkpoint(block, x, projections, use_reentrant=False) if again else block(x, projections)
        found.append(torch.autograd.grad(y.values.square().sum(), x.values)[0])
    assert torch.equal(*found)


def test_each_block_has_a_seed_of_its_own(dropping_block):
    _, _, emb = dropping_block
    projections, modules = Projections(emb), [torch.nn.Identity() for _ in range(300)]
    seeds = [projections.seed_of(module).item() for module in modules]
    assert len(set(seeds)) == len(seeds)
    assert seeds == [projections.seed_of(module).item() for module in modules]


@pytest.mark.filterwarnings("ignore::msd_kernels.FallbackWarning")
def test_a_norm_refuses_the_probability_that_dropout_refuses(dropping_block):
    block, x, emb = dropping_block
    block.dropout = -0.1
    with pytest.raises(ValueError, match="dropout probability has to be between 0 and 1"):
        block(x, Projections(emb))

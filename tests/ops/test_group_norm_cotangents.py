"""The change of a gradient's memory format."""

from __future__ import annotations

import pytest
import torch

from helpers import unavailable
from msd_kernels import group_norm
from msd_kernels.native.channels_last import to_channels_last

pytestmark = pytest.mark.skipif(bool(unavailable("cpu")), reason="the CPU kernels were not built")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape", [(2, 64, 8, 8), (1, 17, 9, 9), (3, 5, 7), (2, 3, 33, 1), (1, 8, 2, 3, 5), (0, 4, 2, 2)], ids=str
)
@pytest.mark.parametrize("threads", [1, 2])
def test_to_channels_last_moves_every_element(shape, dtype, threads, generator):
    torch.set_num_threads(threads)
    gradient = torch.randn(shape, generator=generator).to(dtype)
    moved = to_channels_last(gradient)
    assert torch.equal(moved, gradient)
    assert moved.movedim(1, -1).is_contiguous()


@pytest.mark.parametrize(
    "gradient",
    [
        None,
        torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last),
        torch.ones(()).expand(2, 3, 4, 4),
        torch.ones(2, 3, 4, 4, dtype=torch.float64),
        torch.ones(2, 3, 4, 4, requires_grad=True),
    ],
    ids=["absent", "channels_last", "expanded", "float64", "differentiable"],
)
def test_to_channels_last_leaves_other_gradients_alone(gradient):
    assert to_channels_last(gradient) is None


def test_group_norm_gives_the_same_bits_for_a_cotangent_of_either_layout(generator):
    x = torch.randn(2, 32, 6, 6, generator=generator).to(memory_format=torch.channels_last).requires_grad_()
    dy = torch.randn(2, 32, 6, 6, generator=generator)
    y = group_norm(x, 4, activation="silu")
    (nchw,) = torch.autograd.grad(y, x, dy, retain_graph=True)
    (nhwc,) = torch.autograd.grad(y, x, dy.to(memory_format=torch.channels_last))
    assert torch.equal(nchw, nhwc)


def test_group_norm_output_takes_in_place_operations(generator):
    x = torch.randn(2, 8, 3, 3, generator=generator).to(memory_format=torch.channels_last).requires_grad_()
    y = group_norm(x, 2)
    torch.relu_(y).sum().backward()
    expected = torch.autograd.grad(torch.relu(group_norm(x, 2)).sum(), x)[0]
    assert torch.equal(x.grad, expected)

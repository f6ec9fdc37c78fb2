"""GroupNorm of channels_last tensors, whose cotangents and users need not be channels_last."""

from __future__ import annotations

import pytest
import torch

from helpers import each_backend
from msd_kernels import group_norm
from msd_kernels.ops.group_norm import BACKENDS


def nhwc(t: torch.Tensor) -> torch.Tensor:
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


@each_backend(BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        ((2, 64, 8, 8), 4),
        ((1, 34, 9, 9), 2),
        ((3, 6, 7), 3),
        ((2, 4, 33, 1), 2),
        ((1, 8, 2, 3, 5), 1),
        ((1, 256, 24, 24), 16),  # one sample that two threads share
        ((2, 20, 70, 71), 5),  # pixels in several pieces
        ((2, 640, 32, 32), 16),  # a sample cut into blocks of channels
    ],
    ids=str,
)
@pytest.mark.parametrize("threads", [1, 2])
def test_group_norm_gives_the_same_bits_for_cotangents_of_either_layout(
    shape, groups, dtype, activation, threads, backend, generator
):
    torch.set_num_threads(threads)
    x = nhwc(torch.randn(shape, generator=generator)).to(dtype).requires_grad_()
    dy = torch.randn(shape, generator=generator).to(dtype)
    y = group_norm(x, groups, activation=activation)
    (planar,) = torch.autograd.grad(y, x, dy, retain_graph=True)
    (interleaved,) = torch.autograd.grad(y, x, nhwc(dy))
    assert torch.equal(planar, interleaved)
    assert planar.stride() == x.stride()


def test_group_norm_output_takes_in_place_operations(generator):
    x = nhwc(torch.randn(2, 8, 3, 3, generator=generator)).requires_grad_()
    y = group_norm(x, 2)
    torch.relu_(y).sum().backward()
    expected = torch.autograd.grad(torch.relu(group_norm(x, 2)).sum(), x)[0]
    assert torch.equal(x.grad, expected)

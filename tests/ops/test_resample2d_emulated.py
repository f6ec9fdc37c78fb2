"""FIR resampling in CUDA, run on CPU tensors by the emulator; what only a GPU shows is in tests/gpu."""

from __future__ import annotations

import pytest
import torch
from test_resample2d import (
    ANY_FILTER,
    DIRECTION,
    DTYPES,
    FILTERS,
    LAYOUTS,
    SHAPES,
    check,
    check_reach,
    check_shapes,
    cotangent,
)

import cuda_emulator
from cuda_emulator import Device
from helpers import stage_batch
from msd_kernels import resample2d
from msd_kernels.dispatch.backends import use
from msd_kernels.ops.resample2d import BACKENDS

# Vectors in 16 bits and in 32, several blocks of threads, several strips, strips of several rows.
LARGE_SHAPES = ((2, 8, 9, 12), (1, 40, 37, 5), (1, 4, 6, 130))
DEVICES = [Device(multiprocessors=1), Device(multiprocessors=132)]
EACH_DEVICE = pytest.mark.parametrize("device", DEVICES, ids=["long strips", "short strips"])


@pytest.fixture(autouse=True)
def emulator(emulated_cuda):
    emulated_cuda.use(Device())
    with cuda_emulator.served_by(emulated_cuda, BACKENDS), use("cuda"):
        yield emulated_cuda


@ANY_FILTER
@DIRECTION
@LAYOUTS
@DTYPES
def test_resample2d_equals_the_depthwise_convolution(dtype, channels_last, up, down, filter, generator):
    check_shapes(generator, SHAPES, dtype, channels_last, filter, up, down)


@EACH_DEVICE
@DIRECTION
@LAYOUTS
@DTYPES
def test_resample2d_of_many_threads(dtype, channels_last, up, down, device, emulator, generator):
    for name in ("box", "linear", "eight"):
        emulator.use(device)
        check_shapes(generator, LARGE_SHAPES, dtype, channels_last, FILTERS[name], up, down)


@ANY_FILTER
@DIRECTION
@LAYOUTS
def test_resample2d_spreads_nan_as_far_as_the_filter_reaches(channels_last, up, down, filter, generator):
    for shape in ((1, 5, 7, 9), (1, 8, 6, 5)):
        check_reach(generator, shape, channels_last, filter, up, down)


def test_resample2d_of_random_sizes(emulator, generator):
    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    for _ in range(150):
        emulator.use(DEVICES[draw(0, 2)])
        shape = (draw(1, 4), 4 * draw(1, 9) + draw(0, 2), draw(4, 20), draw(4, 20))
        dtype = (torch.float32, torch.bfloat16, torch.float16)[draw(0, 3)]
        up, down = ((1, 2), (2, 1), (1, 1))[draw(0, 3)]
        filter = (torch.rand(draw(1, 9), generator=generator) + 0.1).tolist()
        check_shapes(generator, [shape], dtype, bool(draw(0, 2)), filter, up, down)


@DIRECTION
def test_resample2d_of_one_pixel(up, down, generator):
    x = torch.randn(1, 3, 1, 1, generator=generator)
    check(x, cotangent(generator, x, FILTERS["odd"], up, down), FILTERS["odd"], up, down)


@pytest.mark.parametrize(
    ("counts", "channels", "dtype", "launches"),
    [
        ((2, 0, 1), (384, 256, 32), torch.bfloat16, 1),
        ((1, 2, 1), (64, 3, 20), torch.float16, 2),
        ((1,) * 19, (4, *(8,) * 17, 6), torch.float32, 3),
        ((0, 0), (8, 4), torch.float32, 0),
    ],
    ids=["EDM", "unaligned stages", "19 stages", "no samples"],
)
@DIRECTION
def test_resample2d_of_a_stage_batch_equals_separate_calls_bit_for_bit(
    up, down, counts, channels, dtype, launches, emulator, generator
):
    x = stage_batch(generator, counts, channels, 6, 5, dtype=dtype, requires_grad=True)
    emulator.use(Device())
    y = resample2d(x, FILTERS["linear"], up, down)
    assert emulator.launches() == (launches, 0)
    dy = y.with_values(torch.randn(y.values.shape, generator=generator).to(dtype))
    dx = x.with_values(torch.autograd.grad(y.values, x.values, dy.values)[0])
    for segment, *whole, d in zip(x.segments(), y.segments(), dx.segments(), dy.segments(), strict=True):
        leaf = segment.detach().clone().requires_grad_()
        alone = resample2d(leaf, FILTERS["linear"], up, down)
        assert torch.equal(whole[0], alone)
        assert torch.equal(whole[1], torch.autograd.grad(alone, leaf, d)[0])

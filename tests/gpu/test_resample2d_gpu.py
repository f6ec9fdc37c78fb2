"""FIR resampling on a GPU. What every op owes there is in test_cuda.py."""

from __future__ import annotations

import pytest
import torch
from ops.test_resample2d import (
    ANY_FILTER,
    DIRECTION,
    DTYPES,
    FILTERS,
    LARGE_SHAPES,
    LAYOUTS,
    SHAPES,
    check_reach,
    check_shapes,
)

from helpers import each_backend
from msd_kernels import StageBatch, explain, resample2d
from msd_kernels.ops.resample2d import BACKENDS

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("exact_cuda")]

COMPILED = pytest.mark.parametrize("backend", ["cuda", "triton"], indirect=True)


@each_backend(BACKENDS, "cuda")
@ANY_FILTER
@DIRECTION
@LAYOUTS
@DTYPES
def test_results_equal_the_depthwise_convolution(dtype, channels_last, up, down, filter, backend, generator):
    check_shapes(generator, SHAPES, dtype, channels_last, filter, up, down, "cuda")


@each_backend(BACKENDS, "cuda")
@DIRECTION
@LAYOUTS
@DTYPES
def test_results_of_many_blocks(dtype, channels_last, up, down, backend, generator):
    shapes = (*LARGE_SHAPES, (3, 256, 32, 32), (2, 160, 17, 33))
    check_shapes(generator, shapes, dtype, channels_last, FILTERS["linear"], up, down, "cuda")


@COMPILED
@ANY_FILTER
@DIRECTION
@LAYOUTS
def test_nan_spreads_as_far_as_the_filter_reaches(channels_last, up, down, filter, backend, generator):
    for shape in SHAPES:
        check_reach(generator, shape, channels_last, filter, up, down, "cuda")


@COMPILED
@DIRECTION
@pytest.mark.parametrize("counts", [(3, 0, 2), (0, 1, 0), (0, 0, 0)], ids=str)
def test_a_stage_batch_equals_separate_calls_bit_for_bit(counts, up, down, backend, generator):
    channels = (384, 256, 3)
    size = sum(n * c for n, c in zip(counts, channels, strict=True)) * 16 * 8
    values = torch.randn(size, generator=generator).to("cuda", torch.bfloat16)
    x = StageBatch(values, counts, channels, 16, 8)
    y = resample2d(x, FILTERS["linear"], up, down)
    for segment, whole in zip(x.segments(), y.segments(), strict=True):
        assert torch.equal(whole, resample2d(segment, FILTERS["linear"], up, down))


@COMPILED
@LAYOUTS
def test_tensors_beyond_32_bit_offsets(channels_last, backend):
    shape = (2064, 256, 64, 64)
    free, _ = torch.cuda.mem_get_info()
    if free < 8 * 2**30:
        pytest.skip(f"needs 8 GiB of free device memory, {free / 2**30:.0f} are free")
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.empty(shape, dtype=torch.bfloat16, device="cuda", memory_format=memory_format).zero_()
    x[-1] = torch.randn(shape[1:], device="cuda")
    y = resample2d(x, FILTERS["linear"], down=2)
    assert y[:-1].count_nonzero().item() == 0
    assert torch.equal(
        y[-1:], resample2d(x[-1:].clone(memory_format=memory_format), FILTERS["linear"], down=2)
    )


def test_auto_takes_a_kernel_of_this_library():
    x = torch.zeros(1, 8, 4, 4, device="cuda")
    assert explain("resample2d", x, [1, 1], down=2).backend in ("cuda", "triton")

"""FIR resampling in Triton, run by Triton's interpreter on CPU tensors."""

from __future__ import annotations

import pytest
import torch
from interpreter import require_interpreter

require_interpreter()

from test_resample2d import (  # noqa: E402
    ANY_FILTER,
    DIRECTION,
    FILTERS,
    LAYOUTS,
    check,
    check_reach,
    check_shapes,
    cotangent,
)

from helpers import stage_batch  # noqa: E402
from msd_kernels import explain, resample2d  # noqa: E402
from msd_kernels.dispatch.backends import use  # noqa: E402
from msd_kernels.ops.resample2d import triton as implementation  # noqa: E402

# Several blocks of channels, of columns and of rows.
LARGE_SHAPES = ((1, 66, 3, 4), (1, 1, 3, 258))


@pytest.fixture(autouse=True)
def _triton():
    with use("triton"):
        yield


@LAYOUTS
@DIRECTION
@ANY_FILTER
def test_resample2d_equals_the_depthwise_convolution(filter, up, down, channels_last, generator):
    check_shapes(generator, [(1, 3, 4, 3)], torch.float32, channels_last, filter, up, down)


@LAYOUTS
@DIRECTION
def test_resample2d_of_float16(up, down, channels_last, generator):
    """Triton's interpreter truncates to bfloat16 instead of rounding."""
    check_shapes(generator, [(2, 3, 4, 5)], torch.float16, channels_last, FILTERS["linear"], up, down)


@LAYOUTS
@DIRECTION
def test_resample2d_of_several_blocks(up, down, channels_last, generator):
    check_shapes(generator, LARGE_SHAPES, torch.float32, channels_last, FILTERS["odd"], up, down)


@DIRECTION
def test_resample2d_of_one_pixel(up, down, generator):
    x = torch.randn(1, 3, 1, 1, generator=generator)
    check(x, cotangent(generator, x, FILTERS["odd"], up, down), FILTERS["odd"], up, down)


@DIRECTION
@pytest.mark.parametrize("name", ["odd", "linear"])
def test_resample2d_spreads_nan_as_far_as_the_filter_reaches(name, up, down, generator):
    for channels_last in (True, False):
        check_reach(generator, (1, 2, 6, 5), channels_last, FILTERS[name], up, down)


@pytest.mark.parametrize(
    ("counts", "channels"),
    [((2, 0, 1), (66, 40, 3)), ((0, 1, 1, 0, 1), (8, 12, 16, 20, 24)), ((0, 0), (8, 4))],
    ids=str,
)
@DIRECTION
def test_resample2d_of_a_stage_batch_equals_separate_calls_bit_for_bit(up, down, counts, channels, generator):
    x = stage_batch(generator, counts, channels, 3, 4, requires_grad=True)
    y = resample2d(x, FILTERS["odd"], up, down)
    dy = y.with_values(torch.randn(y.values.shape, generator=generator))
    dx = x.with_values(torch.autograd.grad(y.values, x.values, dy.values)[0])
    for segment, *whole, d in zip(x.segments(), y.segments(), dx.segments(), dy.segments(), strict=True):
        leaf = segment.detach().clone().requires_grad_()
        alone = resample2d(leaf, FILTERS["odd"], up, down)
        assert torch.equal(whole[0], alone)
        assert torch.equal(whole[1], torch.autograd.grad(alone, leaf, d)[0])


@pytest.mark.parametrize("stages", [1, 7])
def test_one_launch_forward_one_backward(stages, generator, monkeypatch):
    launched = []
    run = implementation.launch

    def record(kernel, *arguments, **options):
        launched.append(kernel.__name__)
        run(kernel, *arguments, **options)

    monkeypatch.setattr(implementation, "launch", record)
    x = stage_batch(generator, (1,) * stages, (8,) * stages, 2, 2, requires_grad=True)
    resample2d(x, FILTERS["box"], up=2).values.sum().backward()
    assert launched == ["_resample2d_kernel"] * 2


def test_auto_never_takes_the_interpreter(generator):
    with use("auto"):
        answer = explain("resample2d", torch.randn(1, 8, 2, 2, generator=generator), [1, 1], down=2)
    assert answer.backend != "triton"
    assert "interpreter" in answer.why_not["triton"] or "comes first" in answer.why_not["triton"]

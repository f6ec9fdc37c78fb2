"""Values, gradients, contract and errors of resample2d."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers import (
    ROUNDING,
    assert_elements_close,
    dispatcher_calls,
    each_backend,
    poisoned_memory,
    stage_batch,
)
from msd_kernels import StageBatch
from msd_kernels.dispatch.backends import use
from msd_kernels.ops.resample2d import BACKENDS, explain, resample2d
from msd_kernels.runtime.extension import load

FILTERS = {
    "box": [1, 1],
    "linear": [1, 3, 3, 1],
    "odd": [1, 2, 1],
    "lopsided": [0.3, -0.1, 1.7, 0.2],
    "eight": [-1, 2, 5, 9, 8, 4, 1, -2],
    "one": [3],
}
ANY_FILTER = pytest.mark.parametrize("filter", FILTERS.values(), ids=FILTERS)
DIRECTION = pytest.mark.parametrize(("up", "down"), [(1, 2), (2, 1), (1, 1)], ids=["down", "up", "plain"])
LAYOUTS = pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda t: str(t)[6:]
)
# The backends that take float64.
PLAIN = pytest.mark.parametrize("backend", ["library", "reference"], indirect=True)
# Odd sizes, one channel, pixels narrower and wider than the vectors of any processor.
SHAPES = ((2, 5, 8, 6), (1, 3, 7, 9), (2, 1, 5, 4), (1, 40, 5, 7))
# Rows and pixels beyond the blocks that the CPU kernels cut them into.
LARGE_SHAPES = ((1, 2, 5, 1100), (1, 24, 3, 150), (1, 700, 3, 40), (1, 1060, 4, 9))

# Roundings of float32 (float64) per output, relative to the sum of its terms' absolute values: up to 64 additions in
# any order and the rounded products of taps. The worst found over all filters, dtypes and backends is 7.3.
ROUNDINGS = 16


def formula(x: Tensor, filter: list[float], up: int, down: int) -> Tensor:
    """EDM's depthwise convolutions: stride 2, padding (L - 1) // 2, the filter times 4 for up."""
    line = torch.tensor(filter, dtype=x.dtype)
    line = line / line.sum()
    weight = torch.outer(line, line).expand(x.shape[1], 1, -1, -1)
    settings = {"padding": (len(filter) - 1) // 2, "groups": x.shape[1]}
    if up == 2:
        return F.conv_transpose2d(x, 4 * weight, stride=2, **settings)
    return F.conv2d(x, weight, stride=down, **settings)


def magnitude(x: Tensor, filter: list[float], up: int, down: int) -> Tensor:
    """The sum of the absolute values of each output's terms."""
    total = sum(filter)
    gain = (sum(abs(tap) for tap in filter) / total) ** 2
    return gain * formula(x.abs(), [abs(tap) for tap in filter], up, down)


def make(generator, shape, dtype, channels_last: bool, device: str = "cpu") -> Tensor:
    x = (torch.randn(shape, generator=generator) + 30).to(device, dtype)
    return x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def gradient(function, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.detach().requires_grad_()
    y = function(leaf)
    return y.detach(), torch.autograd.grad(y, leaf, dy)[0]


def check(x: Tensor, dy: Tensor, filter: list[float], up: int, down: int) -> None:
    """Result and gradient, per element, against the convolution in float64, in poisoned memory."""
    with poisoned_memory():
        found = gradient(lambda t: resample2d(t, filter, up, down), x, dy)
    wide, wide_dy = x.detach().cpu().double(), dy.cpu().double()
    exact = gradient(lambda t: formula(t, filter, up, down), wide, wide_dy)
    terms = gradient(lambda t: magnitude(t, filter, up, down), wide.abs(), wide_dy.abs())
    unit = ROUNDING[torch.float64 if x.dtype == torch.float64 else torch.float32]
    smallest = torch.finfo(x.dtype).smallest_normal * ROUNDING[x.dtype]
    for actual, expected, bound in zip(found, exact, terms, strict=True):
        assert actual.dtype == x.dtype
        assert_elements_close(
            actual, expected, rtol=ROUNDING[x.dtype], atol=ROUNDINGS * unit * bound + smallest
        )


def cotangent(generator, x: Tensor, filter, up, down) -> Tensor:
    y = resample2d(x, filter, up, down)
    return torch.empty_like(y).copy_(torch.randn(y.shape, generator=generator))


def check_shapes(generator, shapes, dtype, channels_last, filter, up, down, device: str = "cpu") -> None:
    for shape in shapes:
        x = make(generator, shape, dtype, channels_last, device)
        check(x, cotangent(generator, x, filter, up, down), filter, up, down)


def check_reach(generator, shape, channels_last, filter, up, down, device: str = "cpu") -> None:
    """One pixel is no number: so are those outputs that have a tap there, and no others."""
    x = make(generator, shape, torch.float32, channels_last, device)
    x[..., -2, -2] = torch.nan
    reached = formula(x.isnan().double(), [1.0] * len(filter), up, down) > 0
    assert torch.equal(resample2d(x, filter, up, down).isnan(), reached)


@each_backend(BACKENDS)
@ANY_FILTER
@DIRECTION
@LAYOUTS
@DTYPES
def test_resample2d_equals_the_depthwise_convolution(
    dtype, channels_last, up, down, filter, backend, generator
):
    check_shapes(generator, SHAPES, dtype, channels_last, filter, up, down)


@PLAIN
@ANY_FILTER
@DIRECTION
@LAYOUTS
def test_resample2d_of_float64_equals_the_depthwise_convolution(
    channels_last, up, down, filter, backend, generator
):
    check_shapes(generator, SHAPES, torch.float64, channels_last, filter, up, down)


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
@pytest.mark.parametrize("isa", ["avx512bf16", "avx512", "avx2", "portable"])
@DTYPES
def test_resample2d_on_every_instruction_set(dtype, isa, backend, generator, monkeypatch):
    monkeypatch.setenv("MSD_KERNELS_CPU_ISA", isa)
    if load("cpu").module.cpu_isa() != isa:
        pytest.skip(f"this processor has no {isa}")
    for filter, channels_last in itertools.product(FILTERS.values(), (False, True)):
        for up, down in ((1, 2), (2, 1), (1, 1)):
            check_shapes(generator, SHAPES[1:], dtype, channels_last, filter, up, down)


@each_backend(BACKENDS)
@LAYOUTS
@DIRECTION
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_resample2d_of_large_rows_and_pixels(dtype, up, down, channels_last, backend, generator):
    for name in ("linear", "eight"):
        check_shapes(generator, LARGE_SHAPES, dtype, channels_last, FILTERS[name], up, down)


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
@LAYOUTS
@DIRECTION
def test_resample2d_of_random_sizes(up, down, channels_last, backend, generator):
    for _ in range(60):
        taps, batch, channels, height, width = (
            int(torch.randint(low, high, (), generator=generator))
            for low, high in ((1, 9), (1, 4), (1, 70), (4, 20), (4, 70))
        )
        x = make(generator, (batch, channels, height, width), torch.float32, channels_last)
        filter = (torch.rand(taps, generator=generator) + 0.1).tolist()
        check(x, cotangent(generator, x, filter, up, down), filter, up, down)


def upfirdn2d(x: Tensor, kernel: Tensor, up: int, down: int, pad: tuple[int, int]) -> Tensor:
    """From its definition: insert zeros, pad, convolve with the flipped kernel, keep every ``down``-th pixel."""
    batch, channels, height, width = x.shape
    spread = x.new_zeros(batch, channels, height, up, width, up)
    spread[:, :, :, 0, :, 0] = x
    padded = F.pad(spread.view(batch, channels, height * up, width * up), (*pad, *pad))
    size = kernel.shape[0]
    windows = padded.unfold(2, size, 1).unfold(3, size, 1)
    return torch.einsum("bchwij,ij->bchw", windows, kernel.flip(0, 1))[:, :, ::down, ::down]


@pytest.mark.parametrize("filter", [[1, 3, 3, 1], [1, 1], [1, 2, 5, 5, 2, 1]], ids=str)
def test_resample2d_equals_upfirdn2d_with_its_usual_padding(filter, generator):
    x = torch.randn(2, 3, 8, 6, generator=generator, dtype=torch.float64)
    kernel = torch.outer(torch.tensor(filter), torch.tensor(filter)).double()
    kernel /= kernel.sum()
    excess = len(filter) - 2
    downsampled = upfirdn2d(x, kernel, 1, 2, ((excess + 1) // 2, excess // 2))
    upsampled = upfirdn2d(x, kernel * 4, 2, 1, ((excess + 1) // 2 + 1, excess // 2))
    tolerance = {"rtol": 0, "atol": 100 * ROUNDING[torch.float64]}
    assert_elements_close(resample2d(x, filter, down=2), downsampled, **tolerance)
    assert_elements_close(resample2d(x, filter, up=2), upsampled, **tolerance)


@each_backend(BACKENDS)
@LAYOUTS
def test_resample2d_of_the_box_is_mean_and_repetition_bit_for_bit(channels_last, backend, generator):
    x = make(generator, (2, 6, 4, 8), torch.bfloat16, channels_last)
    assert torch.equal(resample2d(x, [1, 1], up=2), x.repeat_interleave(2, 2).repeat_interleave(2, 3))
    mean = x.float().unflatten(3, (4, 2)).unflatten(2, (2, 2)).mean((3, 5)).bfloat16()
    assert torch.equal(resample2d(x, [1, 1], down=2), mean)


@each_backend(BACKENDS)
def test_resample2d_keeps_a_constant_image_in_half_precision(backend):
    """With a filter that bfloat16 cannot hold; rounded taps would scale the image."""
    x = torch.full((1, 3, 16, 16), 201.0, dtype=torch.bfloat16)
    for factors in ({"up": 2}, {"down": 2}):
        y = resample2d(x, [0.9, 2.1, 2.1, 0.9], **factors)
        assert (y[:, :, 1:-1, 1:-1] == 201).all()


@pytest.mark.parametrize("backend", ["cpu", "library"], indirect=True)
@ANY_FILTER
@DIRECTION
@LAYOUTS
def test_resample2d_spreads_nan_as_far_as_the_filter_reaches(
    channels_last, up, down, filter, backend, generator
):
    for shape in SHAPES:
        check_reach(generator, shape, channels_last, filter, up, down)


@pytest.mark.parametrize(
    ("size", "taps", "down_size", "up_size"),
    [(8, 2, 4, 16), (7, 2, 3, 14), (7, 4, 3, 14), (8, 3, 4, 15), (7, 3, 4, 13), (1, 3, 1, 1), (2, 8, 1, 4)],
)
def test_resample2d_of_odd_sizes_has_the_documented_size(size, taps, down_size, up_size):
    x = torch.ones(1, 1, size, size)
    assert resample2d(x, [1.0] * taps, down=2).shape == (1, 1, down_size, down_size)
    assert resample2d(x, [1.0] * taps, up=2).shape == (1, 1, up_size, up_size)


@each_backend(BACKENDS)
@LAYOUTS
@DIRECTION
def test_resample2d_of_non_contiguous_tensors_and_foreign_cotangents(
    up, down, channels_last, backend, generator
):
    filter = [1, 3, 3, 1]
    views = [
        torch.randn(4, 6, 8, 10, generator=generator)[::2, ::2],
        torch.randn(2, 3, 10, 8, generator=generator).transpose(2, 3),
        torch.randn(2, 9, 12, 3, generator=generator)[:, 1:, 1:11].permute(0, 3, 1, 2),
        torch.randn(1, 3, 1, 10, generator=generator).expand(2, 3, 8, 10),
    ]
    other = torch.contiguous_format if channels_last else torch.channels_last
    for x in (*views, make(generator, (2, 3, 8, 10), torch.float32, channels_last)):
        dy = cotangent(generator, x, filter, up, down)
        check(x, dy.contiguous(memory_format=other), filter, up, down)
        check(x, dy[:, :, :1, :1].expand_as(dy), filter, up, down)


@each_backend(BACKENDS)
@ANY_FILTER
@DIRECTION
@pytest.mark.parametrize("counts", [(3, 0, 2), (0, 1, 0), (0, 0, 0)], ids=str)
def test_resample2d_of_a_stage_batch_equals_separate_calls(counts, up, down, filter, backend, generator):
    """To float32 rounding, because a convolution may take another algorithm for another channel count."""
    x = stage_batch(generator, counts, (24, 8, 3), 6, 5, requires_grad=True)
    y = resample2d(x, filter, up, down)
    dy = y.with_values(torch.randn(y.values.shape, generator=generator))
    dx = x.with_values(torch.autograd.grad(y.values, x.values, dy.values)[0])
    for segment, *results, d in zip(x.segments(), y.segments(), dx.segments(), dy.segments(), strict=True):
        alone = gradient(lambda t: resample2d(t, filter, up, down), segment, d)
        for whole, separate in zip(results, alone, strict=True):
            torch.testing.assert_close(whole, separate, rtol=1e-6, atol=1e-5)


@each_backend(BACKENDS)
@DIRECTION
def test_resample2d_repeats_bit_for_bit(up, down, backend, generator):
    x = make(generator, (4, 32, 16, 16), torch.bfloat16, True)
    dy = cotangent(generator, x, [1, 3, 3, 1], up, down)
    first, second = (gradient(lambda t: resample2d(t, [1, 3, 3, 1], up, down), x, dy) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@LAYOUTS
def test_resample2d_keeps_dtype_and_memory_format_and_never_returns_its_input(channels_last, generator):
    x = make(generator, (2, 6, 4, 8), torch.float16, channels_last)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    for factors in ({"up": 2}, {"down": 2}, {}):
        y = resample2d(x, [1], **factors)
        assert y.dtype == x.dtype
        assert y.is_contiguous(memory_format=memory_format)
        assert y.data_ptr() != x.data_ptr()
    assert torch.equal(resample2d(x, [5.0]), x)


def test_resample2d_of_no_samples_is_empty():
    x = torch.empty(0, 4, 6, 6, requires_grad=True)
    y = resample2d(x, [1, 1], down=2)
    y.sum().backward()
    assert y.shape == (0, 4, 3, 3)
    assert x.grad.shape == x.shape


@PLAIN
@pytest.mark.parametrize("filter", [[1, 1], [1, 2, 4, 1], [1, 2, 1]], ids=str)
@DIRECTION
def test_resample2d_derivatives_agree_with_differences(up, down, filter, backend, generator):
    x = torch.randn(1, 2, 4, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: resample2d(t, filter, up, down), x)
    assert torch.autograd.gradgradcheck(lambda t: resample2d(t, filter, up, down), x)


@DIRECTION
def test_resample2d_passes_opcheck(up, down, generator):
    x = stage_batch(generator, (2, 0, 1), (4, 3, 5), 5, 6, requires_grad=True)
    calls = dispatcher_calls(
        lambda: torch.autograd.grad(resample2d(x, [1, 3, 3, 1], up, down).values.sum(), x.values)
    )
    assert [op.overloadpacket._qualified_op_name for op, _ in calls] == ["msd_kernels::resample2d"] * 2
    for op, arguments in calls:
        torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("dynamic", [False, True])
def test_resample2d_compiles_without_graph_breaks(dynamic, generator):
    def function(x, batch):
        down = resample2d(x, [1, 3, 3, 1], down=2)
        packed = resample2d(StageBatch(batch, (1, 2), (4, 2), 4, 4), [1, 1], up=2)
        return resample2d(down, [1, 1], up=2) + packed.values.sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for size in (4, 6, 10):
        x = make(generator, (2, 3, size, 4), torch.float32, True).requires_grad_()
        batch = torch.randn(128, generator=generator, requires_grad=True)
        results = []
        for run in (function, compiled):
            y = run(x, batch)
            results.append((y, *torch.autograd.grad(y.square().sum(), (x, batch))))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_resample2d_under_autocast_does_as_conv2d(generator):
    x = torch.randn(1, 2, 4, 4, generator=generator)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = resample2d(x, [1, 3, 3, 1], down=2)
        double = resample2d(x.double(), [1, 3, 3, 1], down=2)
    assert torch.equal(y, resample2d(x.bfloat16(), [1, 3, 3, 1], down=2))
    assert double.dtype == torch.float64


IMAGE = torch.ones(1, 2, 4, 4)


def test_resample2d_explains_its_choice():
    explanation = explain(IMAGE, [1, 1], down=2)
    assert explanation.backend == ("library" if load("cpu").reason else "cpu")
    assert explanation.why_not["triton"]
    double = explain(IMAGE.double(), [1, 1], down=2)
    assert double.backend == "library"
    assert double.why_not["cpu"] == "takes float32, bfloat16 and float16, got torch.float64"
    with use("reference"):
        assert explain(IMAGE, [1, 1], down=2).backend == "reference"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0], [1, 1], 2), TypeError, "x must be a tensor, got list"),
        (
            (IMAGE.int(), [1, 1], 2),
            TypeError,
            "x must be float32, bfloat16, float16 or float64, got torch.int32",
        ),
        ((IMAGE[0], [1, 1], 2), ValueError, "x must be [B, C, H, W], none 0 but B, got [2, 4, 4]"),
        ((IMAGE[:, :0], [1, 1], 2), ValueError, "x must be [B, C, H, W], none 0 but B, got [1, 0, 4, 4]"),
        ((IMAGE, torch.ones(2), 2), TypeError, "filter must be a sequence of numbers, got Tensor"),
        ((IMAGE, 1.0, 2), TypeError, "filter must be a sequence of numbers, got float"),
        ((IMAGE, [], 2), ValueError, "filter must have 1 to 8 taps, got 0"),
        ((IMAGE, [1] * 9, 2), ValueError, "filter must have 1 to 8 taps, got 9"),
        ((IMAGE, [1, -1], 2), ValueError, "filter must have finite taps whose sum is not 0, got [1, -1]"),
        ((IMAGE, [1, float("inf")], 2), ValueError, "filter must have finite taps whose sum is not 0"),
        ((IMAGE, [1, 1], 2, 2), ValueError, "up and down must be 1 or 2 and not both 2, got up=2 and down=2"),
        ((IMAGE, [1, 1], 3), ValueError, "up and down must be 1 or 2 and not both 2, got up=3 and down=1"),
        (
            (IMAGE[:, :, :1], [1, 1], 1, 2),
            ValueError,
            "2 taps with up=1 and down=2 leave no pixels of 1x4, but 0x2",
        ),
    ],
)
def test_resample2d_refuses(arguments, error, message):
    with pytest.raises(error, match=re.escape(f"resample2d: {message}")):
        resample2d(*arguments)

"""The grouped convolution and linear layer in Triton, run by Triton's interpreter on CPU tensors."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from interpreter import require_interpreter
from torch import Tensor

require_interpreter()

from helpers import (  # noqa: E402
    ROUNDING,
    assert_elements_close,
    conv_backward,
    conv_forward,
    poisoned_memory,
    stage_batch,
)
from msd_kernels import explain, grouped_conv2d, grouped_linear  # noqa: E402
from msd_kernels.dispatch.backends import use  # noqa: E402
from msd_kernels.layouts import Conv2dLayout  # noqa: E402
from msd_kernels.ops.grouped_conv2d import reference  # noqa: E402
from msd_kernels.ops.grouped_conv2d import triton as implementation  # noqa: E402
from msd_kernels.runtime import launch, table_kernels, tuned  # noqa: E402

TRITON = "grouped_conv2d=triton,grouped_linear=triton"
GRADIENTS = ("x", "skip", "weight", "bias", "sample_bias")
# Roundings to float32 that a sum may be off by, times the sum of the terms' absolute values. The worst found is 3.
SUM_ROUNDINGS = 8
GUARD = 64


@dataclass(frozen=True)
class Case:
    """One call of the op; ``present`` lists its optional tensors."""

    counts: tuple[int, ...]
    channels: tuple[int, ...]
    out_channels: tuple[int, ...]
    skip_channels: tuple[int, ...] = ()
    height: int = 3
    width: int = 5
    kernel: int = 3
    resample: str = "none"
    present: str = "bias sample_bias residual"
    dtype: torch.dtype = torch.float32

    @property
    def layout(self) -> Conv2dLayout:
        skip_channels = self.skip_channels or (0,) * len(self.counts)
        widths = (self.channels, skip_channels, self.out_channels)
        return Conv2dLayout(self.counts, *widths, self.height, self.width, self.kernel, self.resample)

    def tensors(self, generator) -> list[Tensor | None]:
        """x, skip, weight, bias, sample_bias, residual, and the cotangent."""
        layout = self.layout
        out_size = sum(layout.out_sizes)
        sizes = (
            sum(layout.source_sizes(layout.channels)),
            sum(layout.source_sizes(layout.skip_channels)) if self.skip_channels else None,
            sum(layout.weight_sizes),
            sum(self.out_channels) if "bias" in self.present.split() else None,
            sum(layout.sample_sizes) if "sample_bias" in self.present else None,
            out_size if "residual" in self.present else None,
            out_size,
        )
        return [None if size is None else guarded(generator, size, self.dtype) for size in sizes]


def guarded(generator, size: int, dtype: torch.dtype) -> Tensor:
    """Random values between NaNs, so that reading beside them shows."""
    memory = torch.full((size + 2 * GUARD,), torch.nan, dtype=dtype)
    memory[GUARD : GUARD + size] = torch.randn(size, generator=generator, dtype=torch.float64)
    return memory[GUARD : GUARD + size]


def beside(tensor: Tensor) -> Tensor:
    """The guards before and behind a guarded tensor."""
    memory = torch.as_strided(tensor, (tensor.numel() + 2 * GUARD,), (1,), tensor.storage_offset() - GUARD)
    return torch.cat([memory[:GUARD], memory[-GUARD:]])


CASES = {
    "one stage": Case((2,), (12,), (8,)),
    "one sample": Case((1,), (8,), (4,), kernel=1, present="bias"),
    "two stages": Case((2, 1), (12, 8), (4, 12), skip_channels=(8, 4)),
    "three stages, one empty": Case((1, 0, 2), (12, 8, 4), (12, 8, 4), skip_channels=(4, 8, 12)),
    "only empty stages": Case((0, 0), (4, 8), (8, 4)),
    "seven stages": Case(
        (1, 2, 0, 1, 3, 0, 1), (4, 8, 12, 4, 3, 16, 40), (8, 4, 4, 40, 3, 8, 16), height=3, width=3
    ),
    "EDM's widths": Case((1, 1, 1), (384, 256, 32), (32, 40, 32), height=2, width=1),
    "EDM's widths 1x1": Case((1, 1, 1), (384, 256, 32), (384, 256, 32), height=2, width=3, kernel=1),
    "EDM's widths, float16": Case(
        (1, 1, 1), (384, 256, 32), (384, 256, 32), height=1, width=2, kernel=1, dtype=torch.float16
    ),
    "EDM's block after a skip": Case(
        (1, 1, 1), (384, 256, 32), (32, 64, 32), skip_channels=(256, 256, 256), height=1, width=3, kernel=1
    ),
    "more than one tile": Case((3, 2), (8, 8), (40, 136), height=7, width=9, kernel=1),
    "several sums over pixels": Case((10, 1), (4, 8), (8, 4), skip_channels=(4, 4), height=7, width=9),
    "image to features": Case((1, 1), (3, 3), (16, 40), height=5, width=3),
    "features to image": Case((2, 1), (16, 8), (3, 3), skip_channels=(8, 8)),
    "without the optional tensors": Case((2, 1), (12, 8), (4, 36), present=""),
    "five taps": Case((1, 1), (4, 4), (4, 8), kernel=5),
    "up": Case((2, 1), (12, 8), (4, 40), skip_channels=(4, 4), resample="up"),
    "up 1x1": Case((2, 1), (12, 8), (4, 40), skip_channels=(4, 4), kernel=1, resample="up"),
    "down": Case((2, 1), (12, 8), (4, 40), skip_channels=(4, 4), height=4, width=6, resample="down"),
    "down 1x1": Case((2, 0, 1), (12, 8, 4), (4, 8, 40), height=2, width=6, kernel=1, resample="down"),
    "float16": Case((2, 1), (16, 8), (8, 40), skip_channels=(8, 8), dtype=torch.float16),
    "float16, odd channels": Case((2, 1), (3, 5), (5, 3), dtype=torch.float16),
    "float16 up": Case((1, 1), (16, 8), (8, 40), resample="up", dtype=torch.float16),
    "float16 down": Case((1, 1), (16, 8), (8, 40), height=4, width=4, resample="down", dtype=torch.float16),
}
EACH_CASE = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def wide(tensors, function=lambda t: t):
    return [None if t is None else function(t.double()) for t in tensors]


def assert_close(case: Case, actual: Tensor, expected: Tensor, magnitude: Tensor) -> None:
    """``magnitude`` is the same sum over absolute values; a pooled source is rounded before it is multiplied."""
    pooled = ROUNDING[case.dtype] if case.resample != "none" else 0
    atol = (SUM_ROUNDINGS * ROUNDING[torch.float32] + pooled) * magnitude
    assert_elements_close(actual, expected, rtol=ROUNDING[case.dtype], atol=atol)


@EACH_CASE
def test_forward_equals_float64(case, generator):
    *inputs, _ = case.tensors(generator)
    with poisoned_memory():
        y = conv_forward(implementation, inputs, case.layout, 0.7)
    expected = conv_forward(reference, wide(inputs), case.layout, 0.7)
    magnitude = conv_forward(reference, wide(inputs, torch.abs), case.layout, 0.7)
    assert_close(case, y, expected, magnitude)


@EACH_CASE
def test_backward_equals_float64(case, generator):
    x, skip, weight, *_, dy = case.tensors(generator)
    wanted = [True, skip is not None, True, True, True]
    with poisoned_memory():
        gradients = conv_backward(implementation, (dy, x, skip, weight), case.layout, wanted)
    inputs = (dy, x, skip, weight)
    expected = conv_backward(reference, wide(inputs), case.layout, wanted)
    magnitude = conv_backward(reference, wide(inputs, torch.abs), case.layout, wanted)
    for name, gradient, *rest in zip(GRADIENTS, gradients, expected, magnitude, strict=True):
        assert (gradient is None) == (name == "skip" and skip is None)
        if gradient is not None:
            assert_close(case, gradient, *rest)


@pytest.fixture
def launches(monkeypatch) -> list[tuple[str, dict]]:
    """The names of the kernels that are launched, and their options."""
    found = []
    run = launch.launch

    def record(kernel, *arguments, **options):
        found.append((kernel.__name__, options))
        run(kernel, *arguments, **options)

    monkeypatch.setattr(launch, "launch", record)
    return found


@pytest.mark.parametrize("present", ["bias residual", "bias sample_bias"])
def test_large_tiles_equal_float64(present, generator, monkeypatch, launches):
    """Those of sm_90, ragged in both directions; biases of single samples need the registers of a smaller tile."""
    monkeypatch.setattr(tuned, "architecture_of", lambda _: 90)
    monkeypatch.setattr(launch, "INTERPRETED_MULTIPROCESSORS", 1)
    case = Case(
        (4, 4), (40, 16), (48, 136), (8, 8), height=7, width=9, present=present, dtype=torch.float16
    )  # fmt: skip
    test_forward_equals_float64(case, generator)
    parameters = tuned.product(90, "half")
    expected = parameters.wide if "sample_bias" in present else parameters.large
    if expected is parameters.large:
        test_backward_equals_float64(case, generator)
    sides = {name: (o["WIDE_M"], o["WIDE_N"]) for name, o in launches if "WIDE_M" in o}
    products = [found for name, found in sides.items() if "wgrad" not in name]
    assert products == [(expected.m, expected.n)] * (2 if expected is parameters.large else 1)


@pytest.fixture(scope="module")
def backward():
    """Of one call by the gradients that are wanted, and all of them."""
    case = CASES["three stages, one empty"]
    x, skip, weight, *_, dy = case.tensors(torch.Generator().manual_seed(0))

    def run(wanted: list[bool]) -> list[Tensor | None]:
        return conv_backward(implementation, (dy, x, skip, weight), case.layout, wanted)

    return run, run([True] * len(GRADIENTS))


@pytest.mark.parametrize("wanted", GRADIENTS)
def test_backward_of_one_input_alone(wanted, backward):
    run, together = backward
    flags = [name == wanted for name in GRADIENTS]
    alone = run(flags)
    assert [g is not None for g in alone] == flags
    position = GRADIENTS.index(wanted)
    # The bias alone is summed over other pieces of the pixels.
    torch.testing.assert_close(alone[position], together[position], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["three stages, one empty", "more than one tile", "up 1x1", "down"])
def test_nothing_is_written_beside_the_results(name, generator):
    case = CASES[name]
    *inputs, dy = tensors = case.tensors(generator)
    x, skip, weight, bias, sample_bias, *_ = inputs
    layout = case.layout
    y, dx, dskip, dweight, dbias, dsample_bias = results = [
        None if like is None else guarded(generator, like.numel(), case.dtype)
        for like in (dy, x, skip, weight, bias, sample_bias)
    ]
    before = [None if t is None else beside(t).clone() for t in (*results, *tensors)]
    implementation.grouped_conv2d_forward(*inputs, y, layout, 1.0, "float32")
    implementation.grouped_conv2d_dgrad(dy, weight, dx, dskip, layout, "float32")
    implementation.grouped_conv2d_wgrad(dy, x, skip, dweight, dbias, dsample_bias, layout, "float32")
    for tensor, expected in zip((*results, *tensors), before, strict=True):
        if tensor is not None:
            torch.testing.assert_close(beside(tensor), expected, rtol=0, atol=0, equal_nan=True)
            assert not tensor.isnan().any()


def test_results_do_not_depend_on_the_grid(generator, monkeypatch):
    case = CASES["more than one tile"]
    x, skip, weight, *_, dy = tensors = case.tensors(generator)
    found = []
    for programs in (1, 5, 5):
        monkeypatch.setattr(launch, "INTERPRETED_MULTIPROCESSORS", programs)
        y = conv_forward(implementation, tensors[:6], case.layout, 1.0)
        wanted = [True, False, True, True, True]
        found.append([y, *conv_backward(implementation, (dy, x, skip, weight), case.layout, wanted)])
    for others in found[1:]:
        for first, other in zip(found[0], others, strict=True):
            assert first is other is None or torch.equal(first, other)


@pytest.mark.parametrize("stages", [1, 2, 7])
@pytest.mark.parametrize("resample", [None, "up"])
def test_one_launch_forward_three_backward(stages, resample, generator, launches):
    channels = tuple(4 * (1 + s % 3) for s in range(stages))
    x = stage_batch(generator, (1,) * stages, channels, 2, 2, requires_grad=True)
    skip = stage_batch(generator, (1,) * stages, channels, 2, 2, requires_grad=True)
    bias = [torch.randn(4, requires_grad=True) for _ in channels]
    sample_bias = stage_batch(generator, (1,) * stages, (4,) * stages, 1, 1, requires_grad=True)
    weights = [torch.randn(4, 2 * c, 1, 1, requires_grad=True) for c in channels]
    with use(TRITON):
        y = grouped_conv2d(x, weights, bias, skip=skip, sample_bias=sample_bias, resample=resample)
        assert [name for name, _ in launches] == ["_grouped_conv2d_forward_kernel"]
        launches.clear()
        y.values.sum().backward()
    assert [name for name, _ in launches] == [
        "_grouped_conv2d_dgrad_kernel",
        "_grouped_conv2d_wgrad_kernel",
        "_grouped_conv2d_sum_partials_kernel",
    ]


@pytest.mark.parametrize("counts", [(5,), (3, 0, 20), (1, 2, 3, 1, 1, 0, 2)], ids=str)
def test_grouped_linear_equals_reference(counts, generator):
    features = [(12, 8), (384, 40), (5, 3), (8, 8), (4, 16), (3, 3), (256, 36)][: len(counts)]
    x = stage_batch(generator, counts, [i for i, _ in features], 1, 1)
    weights = [torch.randn(o, i, generator=generator) for i, o in features]
    biases = [torch.randn(o, generator=generator) for _, o in features]
    leaves = [x.values, *weights, *biases]
    cotangent = torch.randn(
        sum(n * o for n, (_, o) in zip(counts, features, strict=True)), generator=generator
    )
    found = {}
    for backend in ("triton", "reference"):
        dtype = torch.float64 if backend == "reference" else torch.float32
        copies = [leaf.detach().to(dtype).requires_grad_() for leaf in leaves]
        split = 1 + len(weights)
        with use(f"grouped_linear={backend}"):
            y = grouped_linear(x.with_values(copies[0]), copies[1:split], copies[split:]).values
            found[backend] = [y, *torch.autograd.grad(y, copies, cotangent.to(dtype), materialize_grads=True)]
    for actual, expected in zip(*found.values(), strict=True):
        assert_elements_close(actual, expected, rtol=1e-6, atol=2e-5)


def test_auto_never_takes_the_interpreter(generator):
    x = stage_batch(generator, (1, 2), (4, 4), 2, 2)
    weights = [torch.randn(4, 4, 1, 1) for _ in range(2)]
    answer = explain("grouped_conv2d", x, weights)
    assert answer.backend == "library"
    assert "interpreter" in answer.why_not["triton"]
    with use(TRITON):
        assert explain("grouped_conv2d", x, weights).backend == "triton"


def test_tables_are_written_by_value(generator):
    cells = torch.randint(-(2**63), 2**63 - 1, (64,), generator=generator).tolist()
    table = torch.full((192,), 7)
    launch.launch(table_kernels._write_cells_kernel, 1, table, table, by_value=(64, *cells), num_warps=1)
    assert table.tolist() == [7] * 64 + cells + [7] * 64

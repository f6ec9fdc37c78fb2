"""Values, gradients and errors of grouped_conv2d; what every op owes is in test_contract.py."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers import ROUNDING, assert_elements_close, each_backend, poisoned_memory, stage_batch
from msd_kernels import StageBatch, grouped_conv2d
from msd_kernels.dispatch.backends import forced_backend, use
from msd_kernels.ops.grouped_conv2d import BACKENDS, library
from msd_kernels.runtime import processor

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)

# Float32 roundings of the sum of the absolute products. The order of a oneDNN sum is its own: this is the worst found
# over this file, 3.9, doubled.
ROUNDINGS = 8
# Winograd's transforms spread roundings over a tile: of the largest sum of a result, the worst found, 10.6, doubled.
WINOGRAD_ROUNDINGS = 21
# Roundings of the output's sum to the dtype of the activations: after the convolution, two additions and the scale.
STEPS = 4


@dataclass(frozen=True)
class Problem:
    """Sizes and options of one call."""

    counts: Sequence[int]
    channels: Sequence[int]
    out_channels: Sequence[int]
    height: int = 4
    width: int = 6
    kernel: int = 3
    skip_channels: Sequence[int] | int | None = None  # one integer: a dense skip
    options: Sequence[str] = ("bias", "sample_bias", "residual")
    scale: float = 0.75
    resample: str | None = None

    @property
    def in_channels(self) -> list[int]:
        skip = self.skip_channels or 0
        widths = [skip] * len(self.counts) if isinstance(skip, int) else skip
        return [c + d for c, d in zip(self.channels, widths, strict=True)]

    @property
    def out_size(self) -> tuple[int, int]:
        up, down = self.resample == "up", self.resample == "down"
        return (self.height << up) >> down, (self.width << up) >> down


@dataclass(frozen=True)
class Inputs:
    """The tensors of one call; all are leaves or None."""

    x: Tensor
    skip: Tensor | None
    weight: list[Tensor]
    bias: list[Tensor] | None
    sample_bias: Tensor | None
    residual: Tensor | None

    def leaves(self) -> list[Tensor]:
        optional = (self.skip, *(self.bias or ()), self.sample_bias, self.residual)
        return [self.x, *self.weight, *(t for t in optional if t is not None)]

    def map(self, function: Callable[[Tensor], Tensor]) -> Inputs:
        def apply(t):
            return [function(part) for part in t] if isinstance(t, list) else t if t is None else function(t)

        return Inputs(**{name: apply(getattr(self, name)) for name in self.__dataclass_fields__})


def make_inputs(problem: Problem, generator: torch.Generator, dtype: torch.dtype) -> Inputs:
    """Random leaves; weights keep the variance of the activations."""

    def leaf(*size, std=1.0):
        return (torch.randn(size, generator=generator) * std).to(dtype).requires_grad_()

    def batch(channels, height, width):
        return stage_batch(
            generator, problem.counts, channels, height, width, dtype=dtype, requires_grad=True
        ).values

    p = problem
    if isinstance(p.skip_channels, int):
        skip = leaf(sum(p.counts), p.skip_channels, p.height, p.width)
    else:
        skip = None if p.skip_channels is None else batch(p.skip_channels, p.height, p.width)
    return Inputs(
        batch(p.channels, p.height, p.width),
        skip,
        [
            leaf(o, i, p.kernel, p.kernel, std=(i * p.kernel**2) ** -0.5)
            for o, i in zip(p.out_channels, p.in_channels, strict=True)
        ],
        [leaf(o) for o in p.out_channels] if "bias" in p.options else None,
        batch(p.out_channels, 1, 1) if "sample_bias" in p.options else None,
        batch(p.out_channels, *p.out_size) if "residual" in p.options else None,
    )


def batches(problem: Problem, inputs: Inputs) -> dict[str, StageBatch | Tensor | None]:
    """The inputs that are feature maps, as the op takes them."""
    p = problem
    skip = inputs.skip
    if skip is not None and not isinstance(p.skip_channels, int):
        skip = StageBatch(skip, p.counts, p.skip_channels, p.height, p.width)
    found = {"x": StageBatch(inputs.x, p.counts, p.channels, p.height, p.width), "skip": skip}
    for name, size in (("sample_bias", (1, 1)), ("residual", p.out_size)):
        values = getattr(inputs, name)
        found[name] = None if values is None else StageBatch(values, p.counts, p.out_channels, *size)
    return found


def call(problem: Problem, inputs: Inputs) -> Tensor:
    maps = batches(problem, inputs)
    return grouped_conv2d(
        maps.pop("x"), inputs.weight, inputs.bias, scale=problem.scale, resample=problem.resample, **maps
    ).values


def formula(problem: Problem, inputs: Inputs) -> Tensor:
    """Concatenation, resampling, convolution and the sums, one after the other, stage by stage."""
    maps = batches(problem, inputs)
    sources = {
        name: list(m.split(list(problem.counts))) if isinstance(m, Tensor) else m.segments()
        for name, m in maps.items()
        if m is not None
    }
    outputs = []
    for s, weight in enumerate(inputs.weight):
        source = torch.cat([sources[name][s] for name in ("x", "skip") if name in sources], dim=1)
        if source.shape[0] == 0:
            continue
        if problem.resample == "up":
            source = F.interpolate(source, scale_factor=2, mode="nearest")
        elif problem.resample == "down":
            source = F.avg_pool2d(source, 2)
        y = F.conv2d(source, weight, inputs.bias and inputs.bias[s], padding=problem.kernel // 2)
        for name in ("sample_bias", "residual"):
            if name in sources:
                y = y + sources[name][s]
        outputs.append((y * problem.scale).permute(0, 2, 3, 1).reshape(-1))
    return torch.cat(outputs) if outputs else inputs.x.clone()


def derivatives(problem: Problem, inputs: Inputs, dy: Tensor, function) -> list[Tensor]:
    """The result and the gradients of all inputs; zeros for the weights of an empty stage."""
    y = function(problem, inputs)
    return [y, *torch.autograd.grad(y, inputs.leaves(), dy, materialize_grads=True)]


def check(problem: Problem, generator: torch.Generator, dtype: torch.dtype, device: str = "cpu") -> None:
    """Result and all gradients, per element, against the formula in float64, in poisoned memory.

    The sums of products are float32. In a lower precision the factors may be rounded before: the cotangent by the
    scale, the source or its gradient by the resampling; and the output after each of its steps.
    """
    inputs = make_inputs(problem, generator, dtype)
    pixels = problem.out_size[0] * problem.out_size[1]
    size = sum(n * o for n, o in zip(problem.counts, problem.out_channels, strict=True)) * pixels
    dy = torch.randn(size, generator=generator).to(dtype)

    def converted(function: Callable[[Tensor], Tensor]) -> Inputs:
        return inputs.map(lambda t: function(t.detach()).requires_grad_())

    with poisoned_memory():
        found = derivatives(problem, converted(lambda t: t.to(device)), dy.to(device), call)
    expected = derivatives(problem, converted(Tensor.double), dy.double(), formula)
    terms = derivatives(problem, converted(lambda t: t.double().abs()), dy.double().abs(), formula)
    roundings = ROUNDINGS
    if problem.kernel == 3 and forced_backend("grouped_conv2d") == "cpu":
        roundings = WINOGRAD_ROUNDINGS
        terms = [term.detach().amax() if term.numel() else term for term in terms]
    low = dtype != torch.float32
    gradients = len(inputs.leaves())
    factors = [low * (problem.resample == "down")]
    factors += [low * ((problem.scale != 1) + (problem.resample is not None))] * gradients
    steps = [low * STEPS * ROUNDING[dtype] * addends(problem, inputs), *[0.0] * gradients]
    for actual, result, term, rounded, step in zip(found, expected, terms, factors, steps, strict=True):
        assert actual.dtype == dtype
        atol = (roundings * ROUNDING[torch.float32] + rounded * ROUNDING[dtype]) * term.detach() + step
        assert_elements_close(actual, result.detach(), rtol=ROUNDING[dtype], atol=atol)


def addends(problem: Problem, inputs: Inputs) -> Tensor:
    """The largest that an intermediate sum of the output can be: the absolute values of its addends."""
    inputs = inputs.map(lambda t: t.detach().double())
    nothing = replace(inputs, bias=None, sample_bias=None, residual=None)
    zero_weight = [torch.zeros_like(w) for w in inputs.weight]
    absolute = inputs.map(torch.abs)
    return formula(problem, nothing).abs() + formula(problem, replace(absolute, weight=zero_weight))


STAGES = ((2, 0, 1), (12, 8, 4), (6, 4, 8))
FORMS = [
    pytest.param(
        Problem(*STAGES, kernel=kernel, skip_channels=skip_channels, resample=resample),
        id=f"{kernel}x{kernel}-{skip}-{resample or 'plain'}",
    )
    for skip, skip_channels in {"no skip": None, "stage skip": (4, 2, 3), "dense skip": 5}.items()
    for kernel in (1, 3, 5)
    for resample in (None, "up", "down")
]


@each_backend(BACKENDS)
@DTYPES
@pytest.mark.parametrize("problem", FORMS)
def test_grouped_conv2d_equals_the_formula(problem, dtype, backend, generator):
    check(problem, generator, dtype)


@pytest.mark.gpu
@each_backend(BACKENDS, "cuda")
@DTYPES
@pytest.mark.parametrize("problem", FORMS)
def test_grouped_conv2d_on_cuda_equals_the_formula(problem, dtype, backend, generator, exact_cuda):
    check(problem, generator, dtype, "cuda")


@each_backend(BACKENDS)
@DTYPES
@pytest.mark.parametrize(
    "options",
    [(), ("bias",), ("sample_bias",), ("residual",), ("bias", "sample_bias", "residual")],
    ids="-".join,
)
@pytest.mark.parametrize("scale", [1.0, 0.5**0.5])
def test_grouped_conv2d_with_and_without_options(options, scale, dtype, backend, generator):
    check(Problem(*STAGES, options=options, scale=scale), generator, dtype)


@each_backend(BACKENDS)
@DTYPES
@pytest.mark.parametrize(
    "problem",
    [
        Problem((1, 0, 1), (384, 256, 32), (32, 24, 40), 3, 5, scale=1.0),
        Problem((2,), (5,), (7,), 1, 1, skip_channels=(2,), scale=1.0),
        Problem((1, 2), (3, 1), (1, 3), 7, 1, kernel=5, scale=1.0),
        Problem((1, 0, 2, 1, 0, 1, 1), (3, 4, 5, 16, 2, 1, 7), (1, 2, 3, 4, 5, 6, 7), 5, 3, scale=1.0),
        Problem((0, 0, 0), *STAGES[1:], skip_channels=2),
    ],
    ids=["decoder widths", "one pixel", "one column", "7 stages", "all stages empty"],
)
def test_grouped_conv2d_of_odd_sizes(problem, dtype, backend, generator):
    check(problem, generator, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("resample", [None, "up", "down"])
def test_grouped_conv2d_on_a_processor_that_lacks_the_type(dtype, resample, generator, monkeypatch):
    """The library convolves in float32 then, and rounds once."""
    convolved = set()

    def convolve(*arguments):
        convolved.add(arguments[1].dtype)
        return original(*arguments)

    original = library._convolve
    monkeypatch.setattr(library, "_convolve", convolve)
    monkeypatch.setattr(processor, "capabilities", lambda: frozenset({"sse2", "avx2", "avx512_f"}))
    with use("library"):
        check(Problem(*STAGES, skip_channels=2, resample=resample), generator, dtype)
    assert convolved == {torch.float32}


@each_backend(BACKENDS)
def test_grouped_conv2d_of_500_random_shapes(backend, generator):
    draw = random.Random(500)
    for _ in range(500):
        stages = draw.choice((1, 2, 3))
        resample = draw.choice((None, None, "up", "down"))
        counts, channels, outs, skips = (
            [draw.randint(low, high) for _ in range(stages)] for low, high in ((0, 2), (1, 9), (1, 9), (1, 4))
        )
        side = 2 if resample == "down" else 1
        problem = Problem(
            counts,
            channels,
            outs,
            draw.randint(1, 4) * side,
            draw.randint(1, 4) * side,
            draw.choice((1, 3)),
            draw.choice((None, skips, skips[0])),
            [name for name in ("bias", "sample_bias", "residual") if draw.random() < 0.5],
            draw.choice((1.0, 0.5)),
            resample,
        )
        check(problem, generator, draw.choice((torch.float32, torch.bfloat16, torch.float16)))


@each_backend(BACKENDS)
@DTYPES
def test_grouped_conv2d_sums_in_float32(dtype, backend):
    """A sum of ones in bfloat16 would stop at 256, one in float16 at 2,048."""
    x = StageBatch(torch.ones(4096, dtype=dtype), (1,), (4096,), 1, 1)
    y = grouped_conv2d(x, [torch.ones(3, 4096, 1, 1, dtype=dtype)])
    assert torch.equal(y.values, torch.full((3,), 4096, dtype=dtype))


@each_backend(BACKENDS)
@DTYPES
def test_grouped_conv2d_of_stages_equals_separate_calls_bit_for_bit(dtype, backend, generator):
    problem = Problem((2, 0, 1), (384, 256, 32), (48, 32, 8), skip_channels=16, scale=0.5**0.5, resample="up")
    inputs = make_inputs(problem, generator, dtype)
    maps = batches(problem, inputs)
    y = grouped_conv2d(maps.pop("x"), inputs.weight, inputs.bias, scale=problem.scale, resample="up", **maps)
    for stage, segment in enumerate(y.segments()):
        alone = replace(
            problem,
            counts=(problem.counts[stage],),
            channels=(problem.channels[stage],),
            out_channels=(problem.out_channels[stage],),
        )
        parts = {
            name: StageBatch.from_dense(m.segments()[stage]).values
            for name, m in batches(problem, inputs).items()
            if isinstance(m, StageBatch)
        }
        separate = Inputs(
            **parts,
            skip=inputs.skip.split(problem.counts)[stage],
            weight=[inputs.weight[stage]],
            bias=[inputs.bias[stage]],
        )
        assert torch.equal(StageBatch.from_dense(segment).values, call(alone, separate))


def test_grouped_conv2d_takes_weights_and_skips_in_any_memory_order(generator):
    problem = Problem(*STAGES, skip_channels=5)
    inputs = make_inputs(problem, generator, torch.float32)
    expected = call(problem, inputs)
    maps = batches(problem, inputs)
    maps["skip"] = inputs.skip.contiguous(memory_format=torch.channels_last)
    weight = [w.contiguous(memory_format=torch.channels_last) for w in inputs.weight]
    bias = [torch.stack([b, b], dim=1)[:, 0] for b in inputs.bias]
    y = grouped_conv2d(maps.pop("x"), weight, bias, scale=problem.scale, **maps)
    assert torch.equal(y.values, expected)
    maps["skip"] = StageBatch.from_dense(inputs.skip, problem.counts)
    y = grouped_conv2d(batches(problem, inputs)["x"], weight, bias, scale=problem.scale, **maps)
    assert torch.equal(y.values, expected)


def test_grouped_conv2d_has_the_layout_that_it_says(generator):
    x = stage_batch(generator, (2, 0, 1), (3, 2, 1), 4, 6)
    weight = [torch.ones(o, c, 3, 3) for o, c in zip((5, 6, 7), x.channels, strict=True)]
    for resample, size in ((None, (4, 6)), ("up", (8, 12)), ("down", (2, 3))):
        y = grouped_conv2d(x, weight, resample=resample)
        assert (y.counts, y.channels, (y.height, y.width)) == ((2, 0, 1), (5, 6, 7), size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_grouped_conv2d_under_autocast_does_as_pytorch(dtype, generator):
    x, weight = torch.randn(2, 3, 4, 4, generator=generator).to(dtype), torch.ones(5, 3, 3, 3, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    weight = weight.contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, theirs = grouped_conv2d(StageBatch.from_dense(x), [weight]), F.conv2d(x, weight, padding=1)
    assert y.dtype == theirs.dtype
    assert torch.equal(y.dense(), theirs)


X = StageBatch(torch.zeros(3 * 4 * 6 * 2), (1, 2), (2, 2), 4, 6)
W = [torch.zeros(3, 2, 3, 3), torch.zeros(5, 2, 3, 3)]


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((torch.zeros(3, 2, 4, 6), W), {}, TypeError, "x must be a StageBatch, got Tensor"),
        ((X.to(torch.int32), W), {}, TypeError, "x must be float32, .* got torch.int32"),
        (
            (X, W[0]),
            {},
            TypeError,
            "weight must be a sequence of one tensor per stage, got a single tensor",
        ),
        ((X, W[:1]), {}, ValueError, r"weight must hold one tensor per stage \(2\), got 1"),
        (
            (X, [W[0], torch.zeros(5, 3, 3, 3)]),
            {},
            ValueError,
            r"weight of stage 1 must be \[any, 2, any, any\], got \[5, 3, 3, 3\]",
        ),
        (
            (X, [w[:, :, :2, :2] for w in W]),
            {},
            ValueError,
            r"weight must have one odd, square kernel size for all stages, got \[\(2, 2\)\]",
        ),
        (
            (X, [W[0], W[1][..., :1, :1]]),
            {},
            ValueError,
            r"weight must have one odd, .* got \[\(1, 1\), \(3, 3\)\]",
        ),
        (
            (X, W, [torch.zeros(3), torch.zeros(4)]),
            {},
            ValueError,
            r"bias of stage 1 must be \[5\], got \[4\]",
        ),
        (
            (X, [w.half() for w in W]),
            {},
            TypeError,
            "weight of stage 0 must be torch.float32 for x of torch.float32, got torch.float16",
        ),
        ((X, [w.to("meta") for w in W]), {}, ValueError, "weight of stage 0 is on meta, but x is on cpu"),
        ((X, W), {"resample": "left"}, ValueError, "resample must be None, 'up' or 'down', got 'left'"),
        (
            (StageBatch(torch.zeros(15), (1,), (1,), 3, 5), [torch.zeros(1, 1, 3, 3)]),
            {"resample": "down"},
            ValueError,
            "resample='down' needs even height and width, got 3x5",
        ),
        (
            (X, W),
            {"skip": torch.zeros(2, 2, 4, 6)},
            ValueError,
            r"a dense skip must be \[3, D, H, W\], got \(2, 2, 4, 6\)",
        ),
        ((X, W), {"skip": torch.zeros(3, 2, 4, 5)}, ValueError, "skip must have .* at 4x6, got .* at 4x5"),
        ((X, W), {"skip": [X]}, TypeError, "skip must be a StageBatch or a dense tensor, got list"),
        ((X, W), {"sample_bias": X}, ValueError, r"sample_bias must have .*channels=\(3, 5\) at 1x1, got"),
        (
            (X, W),
            {"residual": X},
            ValueError,
            r"residual must have counts=\(1, 2\), channels=\(3, 5\) at 4x6, got",
        ),
        ((X, W), {"residual": torch.zeros(3)}, TypeError, "residual must be a StageBatch, got Tensor"),
    ],
)
def test_grouped_conv2d_says_what_is_wrong(arguments, options, error, message):
    with pytest.raises(error, match=f"^grouped_conv2d: {message}"):
        grouped_conv2d(*arguments, **options)

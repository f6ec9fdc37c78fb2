"""The Winograd convolutions of processors: errors, bits, special values, shares of the library.

Values and gradients of every form of a call, of odd sizes and empty stages are in test_grouped_conv2d.py, for all
backends.
"""

from __future__ import annotations

import math
import resource
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers import stage_batch, unavailable
from msd_kernels import StageBatch, explain, grouped_conv2d
from msd_kernels.dispatch.backends import Call, use
from msd_kernels.layouts import Conv2dLayout
from msd_kernels.ops.grouped_conv2d import cpu, library
from msd_kernels.runtime import processor
from msd_kernels.runtime.extension import load

pytestmark = pytest.mark.skipif(bool(unavailable("cpu")), reason="the CPU kernels are not built")

ISAS = ("avx512bf16", "avx512", "avx2", "portable")
# Relative root mean square errors: of a direct convolution in float32 they are 0.3e-6.
FORWARD, GRADIENT = 1.5e-6, 2e-6


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected).square().mean() / expected.square().mean()).sqrt().item()


def layer(generator, samples, side, channels, outs, dtype=torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """x and weight, leaves, and a cotangent, off-centre as activations are."""

    def draw(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    x = (draw(samples, channels, *side) + 0.5).to(dtype).requires_grad_()
    weight = (draw(outs, channels, 3, 3) / math.sqrt(9 * channels)).to(dtype).requires_grad_()
    return x, weight, draw(samples, outs, *side).to(dtype)


def results(x: Tensor, weight: Tensor, dy: Tensor, backend: str = "cpu") -> list[Tensor]:
    """The output and the gradients of x and the weight."""
    with use(backend):
        y = grouped_conv2d(StageBatch.from_dense(x), [weight]).dense()
        return [y, *torch.autograd.grad(y, (x, weight), dy)]


@pytest.mark.parametrize(
    ("samples", "side", "channels", "outs"),
    [
        (2, (32, 32), 256, 256),
        (2, (16, 16), 640, 384),
        (8, (8, 8), 640, 384),
        (1, (64, 64), 128, 128),
        (1, (32, 32), 32, 32),
        (2, (17, 19), 130, 65),
        (1, (30, 28), 3, 96),
        (1, (30, 28), 96, 3),
        (1, (8, 8), 1280, 64),
    ],
    ids=str,
)
def test_winograd_errors_are_small(samples, side, channels, outs, generator):
    tensors = layer(generator, samples, side, channels, outs)
    found = results(*tensors)
    x, weight, dy = (t.detach().double().requires_grad_() for t in tensors)
    y = F.conv2d(x, weight, padding=1)
    expected = [y.detach(), *torch.autograd.grad(y, (x, weight), dy)]
    for actual, exact, most in zip(found, expected, (FORWARD, GRADIENT, GRADIENT), strict=True):
        assert relative_error(actual, exact) <= most


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_winograd_rounds_sixteen_bits_once(dtype, generator):
    tensors = layer(generator, 2, (12, 10), 72, 40, dtype)
    y, dx, dweight = results(*tensors)
    exact, dx_exact, dweight_exact = results(*(t.detach().float().requires_grad_() for t in tensors))
    assert torch.equal(y, exact.to(dtype))
    assert torch.equal(dx, dx_exact.to(dtype))
    assert torch.equal(dweight, dweight_exact.to(dtype))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_winograd_reads_and_writes_weights_in_their_own_order(isa, dtype, generator, monkeypatch):
    monkeypatch.setenv("MSD_KERNELS_CPU_ISA", isa)
    if load("cpu").module.cpu_isa() != isa:
        pytest.skip(f"this processor has no {isa}")
    counts, channels, outs = (2, 0, 1), (40, 24, 19), (33, 16, 70)
    segments = [torch.randn(n, c, 9, 6, generator=generator) for n, c in zip(counts, channels, strict=True)]
    x = StageBatch.from_segments(segments).to(dtype)
    shapes = zip(outs, channels, strict=True)
    weights = [torch.randn(o, c, 3, 3, generator=generator).to(dtype).requires_grad_() for o, c in shapes]

    def found(tensors: Sequence[Tensor]) -> list[Tensor]:
        values = x.values.clone().requires_grad_()
        with use("cpu"):
            y = grouped_conv2d(x.with_values(values), tensors).values
        return [y, *torch.autograd.grad(y.square().sum(), [values, tensors[0], tensors[2]])]

    turned = [w.detach().contiguous(memory_format=torch.channels_last) for w in weights[:2]]
    turned = [*(w.requires_grad_() for w in turned), weights[2]]
    own, expected = found(turned), found(weights)
    for a, b in zip(own, expected, strict=True):
        assert torch.equal(a, b)
    assert own[2].stride() == turned[0].stride()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_winograd_on_every_instruction_set(isa, dtype, generator, monkeypatch):
    monkeypatch.setenv("MSD_KERNELS_CPU_ISA", isa)
    if load("cpu").module.cpu_isa() != isa:
        pytest.skip(f"this processor has no {isa}")
    tensors = layer(generator, 2, (9, 14), 70, 37, dtype)
    expected = results(*(t.detach().double().requires_grad_() for t in tensors), backend="reference")
    rounding = {torch.float32: 0.0, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}[dtype]
    for actual, exact in zip(results(*tensors), expected, strict=True):
        assert relative_error(actual, exact.detach()) <= GRADIENT + rounding


def mixed_call(generator, counts: Sequence[int], dtype=torch.float32):
    """All that a call can have: two sources, all addends, up-sampling, channels that fill no vector."""
    channels, skips, outs = (48, 33, 8), (40, 5, 16), (72, 64, 7)
    weight = [
        torch.randn(o, c + d, 3, 3, generator=generator)
        for o, c, d in zip(outs, channels, skips, strict=True)
    ]
    bias = [torch.randn(o, generator=generator) for o in outs]
    x, skip = (stage_batch(generator, counts, c, 5, 6, dtype=dtype) for c in (channels, skips))
    sample_bias = stage_batch(generator, counts, outs, 1, 1, dtype=dtype)
    residual = stage_batch(generator, counts, outs, 10, 12, dtype=dtype)
    maps = {"skip": skip, "sample_bias": sample_bias, "residual": residual}
    parameters = [t.to(dtype).requires_grad_() for t in (*weight, *bias)]
    return x, maps, parameters


def run(x, maps, parameters) -> list[Tensor]:
    """The output and all gradients, the cotangent being the output."""
    stages = len(x.counts)
    leaves = {
        name: StageBatch(m.values.detach().requires_grad_(), *m.layout)
        for name, m in {"x": x, **maps}.items()
    }
    with use("cpu"):
        rest = {name: m for name, m in leaves.items() if name != "x"}
        y = grouped_conv2d(
            leaves["x"], parameters[:stages], parameters[stages:], scale=0.7, resample="up", **rest
        ).values
        inputs = [*(m.values for m in leaves.values()), *parameters]
        return [y.detach(), *torch.autograd.grad(y, inputs, y.detach(), materialize_grads=True)]


@pytest.mark.parametrize("threads", [2, 5])
def test_winograd_threads_change_no_bit(threads, generator):
    call = mixed_call(generator, (3, 0, 2))
    one = run(*call)
    torch.set_num_threads(threads)
    for _ in range(3):
        assert all(map(torch.equal, run(*call), one))


def test_winograd_batch_changes_no_bit(generator):
    """Outputs and input gradients of 8 samples are those of each alone, whatever the neighbours are."""
    x, weight, dy = layer(generator, 8, (12, 9), 288, 80)
    y, dx, _ = results(x, weight, dy)
    for i in range(8):
        alone = results(x[i : i + 1].detach().requires_grad_(), weight, dy[i : i + 1])
        assert torch.equal(alone[0][0], y[i])
        assert torch.equal(alone[1][0], dx[i])
    neighbours = x.detach().clone()
    neighbours[1:] = math.nan
    assert torch.equal(results(neighbours.requires_grad_(), weight, dy)[0][0], y[0])


def test_winograd_reads_nothing_that_an_earlier_call_left(generator):
    """Its workspace is kept between calls: the first fills it with NaN."""
    small = layer(generator, 1, (7, 5), 24, 40)
    expected = results(*small)
    x, weight, dy = layer(generator, 2, (16, 16), 200, 150)
    results(torch.full_like(x, math.nan).requires_grad_(), weight, torch.full_like(dy, math.nan))
    assert all(map(torch.equal, results(*small), expected))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 2.0**33, -(2.0**126)])
def test_winograd_leaves_special_samples_to_the_library(value, generator):
    x, weight, dy = layer(generator, 3, (8, 8), 32, 32)
    expected = results(x, weight, dy)
    with torch.no_grad():
        x[1, 7, 3, 3] = value
    y, _, dweight = results(x, weight, dy)
    one = x[1:2].detach().requires_grad_()
    alone = results(one, weight, dy[1:2], "library")
    assert torch.equal(y[1].nan_to_num(9.0), alone[0][0].nan_to_num(9.0))
    assert torch.equal(y[0], expected[0][0])
    assert torch.equal(y[2], expected[0][2])
    assert torch.equal(dweight.nan_to_num(9.0), results(x, weight, dy, "library")[2].nan_to_num(9.0))


def test_winograd_leaves_special_weights_to_the_library(generator):
    x, weight, dy = layer(generator, 2, (8, 8), 32, 32)
    with torch.no_grad():
        weight[3, 4, 0, 0] = 2.0**50
    found = results(x, weight, dy)
    alone = [
        results(x[i : i + 1].detach().requires_grad_(), weight, dy[i : i + 1], "library") for i in range(2)
    ]
    for position in range(2):
        assert torch.equal(found[position], torch.cat([one[position] for one in alone]))


def test_winograd_takes_gradients_one_by_one(generator):
    x, maps, parameters = mixed_call(generator, (2, 1, 0))
    full = run(x, maps, parameters)
    names = ["x", *maps]
    stages = len(x.counts)
    for wanted in ("skip", 0, 4):
        leaves = {n: StageBatch(m.values.detach(), *m.layout) for n, m in {"x": x, **maps}.items()}
        own = [p.detach() for p in parameters]
        leaf = leaves[wanted].values if isinstance(wanted, str) else own[wanted]
        leaf.requires_grad_()
        with use("cpu"):
            rest = {n: m for n, m in leaves.items() if n != "x"}
            y = grouped_conv2d(
                leaves["x"], own[:stages], own[stages:], scale=0.7, resample="up", **rest
            ).values
            (gradient,) = torch.autograd.grad(y, leaf, full[0])
        position = names.index(wanted) if isinstance(wanted, str) else len(names) + wanted
        assert torch.equal(gradient, full[1 + position])


def test_winograd_gives_its_workspace_back(generator):
    """A call of this layer takes 13 MiB and two gradients 20 each; nine calls that kept theirs would show."""
    tensors = layer(generator, 4, (64, 64), 128, 128)
    results(*tensors)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(3):
        results(*tensors)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024


def layout_of(side, channels, outs, counts=(1,), kernel=3) -> Conv2dLayout:
    return Conv2dLayout(counts, channels, (0,) * len(channels), outs, side, side, kernel, "none")


def slower(dtype: torch.dtype, layout: Conv2dLayout) -> str | None:
    return cpu.slower(Call("grouped_conv2d", torch.device("cpu"), dtype, layout))


def on_processor(monkeypatch, *flags: str) -> None:
    monkeypatch.setattr(processor, "capabilities", lambda: frozenset({"sse2", *flags}))


def test_winograd_is_chosen_by_shape_and_processor(monkeypatch):
    on_processor(monkeypatch, "avx2")
    wide = layout_of(32, (256,), (256,))
    assert slower(torch.float32, wide) is None
    assert slower(torch.bfloat16, wide) is None
    assert "3×3" in slower(torch.float32, layout_of(32, (256,), (256,), kernel=1))
    assert "float64" in slower(torch.float64, wide)
    assert "channels" in slower(torch.float32, layout_of(32, (3,), (256,)))
    assert "tiles" in slower(torch.float32, layout_of(1, (256,), (256,)))
    on_processor(monkeypatch, "avx2", "avx512_f", "avx512_bf16", "amx_bf16")
    monkeypatch.setattr(processor, "onednn_accepts", lambda dtype: True)
    assert slower(torch.float32, wide) is None
    assert "bfloat16" in slower(torch.bfloat16, wide)
    on_processor(monkeypatch)
    assert "not measured" in slower(torch.float32, wide)


def test_winograd_choice_looks_at_no_counts(monkeypatch):
    on_processor(monkeypatch, "avx2")
    for counts in ((0, 0), (1, 0), (0, 1), (64, 3)):
        assert slower(torch.float32, layout_of(16, (256, 3), (256, 3), counts)) is None
        assert slower(torch.float32, layout_of(16, (4, 3), (256, 3), counts)) is not None


def test_winograd_shares_a_call_with_the_library(generator, monkeypatch):
    """A stage for which the library is faster has the library's bits, the others their own."""
    on_processor(monkeypatch, "avx2")
    x = stage_batch(generator, (2, 1), (64, 4), 8, 8, requires_grad=True)
    weight = [torch.randn(o, c, 3, 3, generator=generator).requires_grad_() for o, c in ((64, 64), (4, 4))]
    assert explain("grouped_conv2d", x, weight).backend == "cpu"

    def stages(backend):
        with use(backend):
            y = grouped_conv2d(x, weight)
            gradients = torch.autograd.grad(y.values, (x.values, *weight), y.values.detach())
            dx = StageBatch(gradients[0], x.counts, x.channels, 8, 8)
            return [list(each) for each in (y.segments(), dx.segments(), gradients[1:])]

    auto, own, theirs = (stages(backend) for backend in ("auto", "cpu", "library"))
    for found, ours, oneDNN in zip(auto, own, theirs, strict=True):
        assert torch.equal(found[0], ours[0])
        assert torch.equal(found[1], oneDNN[1])


def test_winograd_is_explained_and_may_be_forbidden(generator, monkeypatch):
    on_processor(monkeypatch, "avx2")
    x = stage_batch(generator, (1,), (64,), 8, 8)
    weight = [torch.zeros(64, 64, 3, 3)]
    assert explain("grouped_conv2d", x, weight).backend == "cpu"
    narrow = [torch.zeros(2, 64, 3, 3)]
    assert "2 channels" in explain("grouped_conv2d", x, narrow).why_not["cpu"]
    monkeypatch.setenv("MSD_KERNELS_BACKEND", "grouped_conv2d=library")
    assert explain("grouped_conv2d", x, weight).backend == "library"
    monkeypatch.setattr(cpu, "grouped_conv2d", None)
    grouped_conv2d(x, weight)


def test_winograd_leaves_other_kernels_to_the_library(generator, monkeypatch):
    calls = []
    original = library.grouped_conv2d
    monkeypatch.setattr(library, "grouped_conv2d", lambda *args: calls.append(args[6]) or original(*args))
    x = stage_batch(generator, (1, 2), (4, 5), 3, 3)
    with use("cpu"):
        grouped_conv2d(x, [torch.randn(3, c, 1, 1, generator=generator) for c in (4, 5)])
        grouped_conv2d(x, [torch.randn(3, c, 3, 3, generator=generator) for c in (4, 5)])
    assert [layout.counts for layout in calls] == [(1,), (2,)]


@pytest.mark.parametrize(
    "changes",
    [
        {"kernel": 5},
        {"height": 0},
        {"resample": "left"},
        {"resample": "down", "height": 5},
        {"counts": (-1,)},
    ],
)
def test_winograd_layouts_that_cannot_be_are_refused(changes):
    layout = Conv2dLayout((1,), (4,), (0,), (5,), 6, 6, 3, "none")._replace(**changes)
    with pytest.raises(ValueError, match="winograd: "):
        load("cpu").module.WinogradLayout(*layout, [0])

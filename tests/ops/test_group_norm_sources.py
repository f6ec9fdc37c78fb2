"""GroupNorm of two sources, state and skip, which nothing joins in memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from group_norm_checks import ROUNDINGS as ROUNDINGS_OF_A_SUM
from group_norm_checks import Inputs, double_leaf, formula, magnitudes
from helpers import ROUNDING, assert_elements_close, each_backend, poisoned_memory, stage_batch
from msd_kernels import StageBatch, explain, group_norm
from msd_kernels.dispatch.backends import Call
from msd_kernels.layouts import GroupNormLayout
from msd_kernels.ops.group_norm import BACKENDS, cpu, cuda

# Channels of both sources and groups, per stage: groups across the border, alone on either side, rows of whole
# vectors, which the CPU kernels read in place, and others.
WIDE = ((96, 160, 32), (32, 128, 96), (8, 12, 2))
NARROW = ((24, 5, 3), (8, 10, 3), (4, 3, 1))


def draw(generator, counts, sizes, size, dtype):
    """Both sources, weights, biases and a scale, as leaves."""
    own, skip, _ = sizes
    channels = tuple(c + d for c, d in zip(own, skip, strict=True))

    def batch(widths, *sides):
        drawn = stage_batch(generator, counts, widths, *sides, dtype=dtype)
        return drawn.with_values((drawn.values + 3).detach().requires_grad_())

    weight, bias = (
        [torch.randn(c, generator=generator).requires_grad_() for c in channels] for _ in range(2)
    )
    return batch(own, *size), batch(skip, *size), batch(channels, 1, 1), weight, bias


def gradients(y: StageBatch, leaves, dy):
    return torch.autograd.grad(y.values, leaves, dy, materialize_grads=True)


@each_backend(BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("counts", "sizes"), [((2, 0, 1), WIDE), ((1, 2, 3), NARROW)], ids=["wide", "narrow"]
)
def test_two_sources_give_the_bits_of_one_that_joins_them(counts, sizes, dtype, backend, generator):
    x, skip, scale, weight, bias = draw(generator, counts, sizes, (5, 7), dtype)
    leaves = [x.values, skip.values, scale.values, *weight, *bias]
    options = {"scale": scale, "activation": "silu"}
    with poisoned_memory():
        y = group_norm(x, sizes[2], weight, bias, skip=skip, **options)
        joined = group_norm(StageBatch.concatenate(x, skip), sizes[2], weight, bias, **options)
        dy = torch.randn(y.values.shape, generator=generator).to(dtype)
        found, expected = gradients(y, leaves, dy), gradients(joined, leaves, dy)
    assert y.layout == joined.layout
    assert torch.equal(y.values, joined.values)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@each_backend(BACKENDS)
@pytest.mark.parametrize("sizes", [WIDE, NARROW], ids=["wide", "narrow"])
def test_two_sources_equal_the_formula(sizes, backend, generator):
    counts = (2, 0, 1)
    x, skip, _, weight, bias = draw(generator, counts, sizes, (3, 5), torch.float32)
    y = group_norm(x, sizes[2], weight, bias, skip=skip, activation="silu")
    dy = torch.randn(y.values.shape, generator=generator)
    dx, dskip = gradients(y, [x.values, skip.values], dy)
    parts = zip(x.segments(), skip.segments(), weight, bias, sizes[2], strict=True)
    results = (y, x.with_values(dx), skip.with_values(dskip), y.with_values(dy))
    found = zip(*(batch.segments() for batch in results), strict=True)
    for (own, other, w, b, groups), (result, d_own, d_other, d) in zip(parts, found, strict=True):
        inputs = Inputs(torch.cat([own, other], dim=1), w, b, None, None).map(double_leaf)
        expected = formula(inputs, groups, 1e-5, silu=True)
        (gradient,) = torch.autograd.grad(expected, inputs.x, d.double())
        exact = replace(inputs, x=inputs.x.detach())
        unit = ROUNDING[torch.float32]
        terms = magnitudes(exact, d.double(), groups, 1e-5, True, True)
        tolerances = {name: 2 * ROUNDINGS_OF_A_SUM * unit * terms[name].detach() for name in ("y", "x")}
        assert_elements_close(result, expected.detach(), rtol=unit, atol=tolerances["y"])
        assert_elements_close(torch.cat([d_own, d_other], dim=1), gradient, rtol=unit, atol=tolerances["x"])


@pytest.mark.parametrize("wanted", ["x", "skip"])
@pytest.mark.parametrize("sizes", [WIDE, NARROW], ids=["wide", "narrow"])
def test_one_source_alone_may_want_a_gradient(sizes, wanted, generator):
    x, skip, _, weight, bias = draw(generator, (1, 1, 1), sizes, (3, 3), torch.float32)
    y = group_norm(x, sizes[2], weight, bias, skip=skip)
    dy = torch.randn(y.values.shape, generator=generator)
    expected = gradients(y, [x.values, skip.values], dy)[wanted == "skip"]
    kept, constant = (x, skip.detach()) if wanted == "x" else (skip, x.detach())
    first, second = (kept, constant) if wanted == "x" else (constant, kept)
    alone = group_norm(first, sizes[2], weight, bias, skip=second)
    assert torch.equal(gradients(alone, [kept.values], dy)[0], expected)


def test_a_dense_skip_has_a_dense_gradient(generator):
    counts, sizes = (2, 1), ((8, 4), (6, 6), (2, 5))
    x, _, _, weight, bias = draw(generator, counts, sizes, (2, 3), torch.float32)
    skip = torch.randn(3, 6, 2, 3, generator=generator).requires_grad_()
    y = group_norm(x, sizes[2], weight, bias, skip=skip)
    packed = group_norm(x, sizes[2], weight, bias, skip=StageBatch.from_dense(skip, counts))
    assert torch.equal(y.values, packed.values)
    y.values.square().sum().backward()
    assert skip.grad.shape == skip.shape


def test_the_cpu_kernels_join_nothing(generator, monkeypatch):
    """The widths of every published U-Net's decoders but the narrowest: multiples of 32."""
    monkeypatch.setattr(cpu, "joined", None)
    x, skip, _, weight, bias = draw(generator, (1, 1, 1), WIDE, (8, 8), torch.float32)
    y = group_norm(x, WIDE[2], weight, bias, skip=skip, activation="silu")
    gradients(y, [x.values, skip.values], torch.randn(y.values.shape, generator=generator))


def test_sources_of_no_samples_are_empty(generator):
    x, skip, _, weight, bias = draw(generator, (0, 0, 0), WIDE, (2, 2), torch.float32)
    y = group_norm(x, WIDE[2], weight, bias, skip=skip)
    dx, dskip = gradients(y, [x.values, skip.values], y.values.detach())
    assert y.values.numel() == dx.numel() == dskip.numel() == 0


BATCH = StageBatch(torch.zeros(3 * 4 * 8), (1, 2), (8, 8), 2, 2)


@pytest.mark.parametrize(
    ("x", "skip", "error", "message"),
    [
        (torch.zeros(2, 8, 2, 2), BATCH, TypeError, "skip goes with a StageBatch x, got Tensor"),
        (BATCH, 3, TypeError, "skip must be a StageBatch or a dense tensor, got int"),
        (
            BATCH,
            torch.zeros(2, 4, 2, 2),
            ValueError,
            r"a dense skip must be \[3, D, H, W\], got \(2, 4, 2, 2\)",
        ),
        (
            BATCH,
            torch.zeros(3, 4, 2, 3),
            ValueError,
            r"skip must have counts=\(1, 2\), .* at 2x2, got .* at 2x3",
        ),
        (
            BATCH,
            torch.zeros(3, 4, 2, 2).half(),
            TypeError,
            "skip must be torch.float32 for x of torch.float32",
        ),
        (BATCH, torch.zeros(3, 3, 2, 2), ValueError, "num_groups=4 does not divide channels=11 of stage 0"),
    ],
)
def test_two_sources_say_what_is_wrong(x, skip, error, message):
    with pytest.raises(error, match=f"^group_norm: {message}"):
        group_norm(x, 4, skip=skip)


def test_the_backends_say_whether_they_take_two_sources():
    assert explain("group_norm", BATCH, 4, skip=torch.zeros(3, 4, 2, 2)).backend == "cpu"
    layout = GroupNormLayout((1,), (64,), (32,), (8,), 64, True, 1e-5, False)
    said = cuda.cannot(Call("group_norm", torch.device("cuda"), torch.float32, layout))
    assert said == "takes one source, got two"

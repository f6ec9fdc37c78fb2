"""GroupNorm in Triton, run by Triton's interpreter on CPU tensors."""

from __future__ import annotations

import pytest
import torch
from interpreter import require_interpreter

require_interpreter()

from test_group_norm import check, cotangent, make_inputs  # noqa: E402

from helpers import ROUNDING, stage_batch  # noqa: E402
from msd_kernels import StageBatch, explain, group_norm  # noqa: E402
from msd_kernels.dispatch.backends import use  # noqa: E402
from msd_kernels.ops.group_norm import triton as implementation  # noqa: E402
from msd_kernels.ops.group_norm.masks import multipliers  # noqa: E402

# Triton's interpreter truncates to bfloat16 instead of rounding.
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
LAYOUTS = pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])


@pytest.fixture(autouse=True)
def _triton():
    with use("triton"):
        yield


@DTYPES
@LAYOUTS
@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        ((2, 32, 3, 5), 8),
        ((1, 160, 5, 7), 16),
        ((1, 288, 2, 2), 16),
        ((1, 640, 3, 3), 16),
        ((2, 3, 9, 11), 1),
        ((1, 2048, 1, 2), 32),
        ((1, 48, 24, 24), 2),
        ((3, 8), 2),
        ((1, 8, 1, 1), 8),
    ],
    ids=str,
)
def test_group_norm_equals_the_formula(shape, groups, channels_last, dtype, generator):
    inputs = make_inputs(generator, shape, dtype, channels_last=channels_last and len(shape) > 2)
    check(inputs, groups, "triton", cotangent(inputs, generator))


@pytest.mark.parametrize("present", [(), ("weight",), ("bias", "scale"), ("weight", "shift")], ids=str)
@pytest.mark.parametrize("silu", [False, True])
def test_group_norm_with_some_of_its_parameters(present, silu, generator):
    inputs = make_inputs(generator, (2, 24, 3, 3), present=present, channels_last=True)
    check(inputs, 4, "triton", cotangent(inputs, generator), silu=silu)


@LAYOUTS
def test_group_norm_around_an_outlier(channels_last, generator):
    """Differences from the first element would lose digits."""
    inputs = make_inputs(generator, (1, 8, 24, 24), channels_last=channels_last)
    with torch.no_grad():
        inputs.x[..., 0, 0] += 1e4
    check(inputs, 4, "triton", cotangent(inputs, generator))


@LAYOUTS
@pytest.mark.parametrize("offset", [-100.0, 1000.0])
def test_group_norm_of_off_centre_inputs(offset, channels_last, generator):
    inputs = make_inputs(generator, (1, 24, 12, 12), offset=offset, channels_last=channels_last)
    check(inputs, 4, "triton", cotangent(inputs, generator))


@LAYOUTS
@pytest.mark.parametrize("value", [0.1, -1000.1])
def test_group_norm_of_constant_inputs(value, channels_last, generator):
    inputs = make_inputs(generator, (1, 16, 6, 6), channels_last=channels_last)
    with torch.no_grad():
        inputs.x.fill_(value)
    check(inputs, 4, "triton", cotangent(inputs, generator))


@pytest.mark.parametrize(
    ("counts", "channels", "groups"),
    [
        ((2, 0, 1), (384, 256, 32), (16, 16, 8)),
        ((1, 1), (48, 8), (8, 2)),
        ((0, 1, 2, 0, 1, 1, 0), (8, 12, 16, 20, 24, 28, 32), (2, 3, 4, 5, 6, 7, 8)),
        ((0, 0), (8, 4), (2, 1)),
    ],
    ids=str,
)
def test_group_norm_of_a_stage_batch_equals_separate_calls_bit_for_bit(counts, channels, groups, generator):
    x = stage_batch(generator, counts, channels, 3, 5, requires_grad=True)
    weights = [torch.randn(c, generator=generator).requires_grad_() for c in channels]
    y = group_norm(x, groups, weights, activation="silu")
    dy = y.with_values(torch.randn(y.values.shape, generator=generator))
    dx, *dweights = torch.autograd.grad(y.values, [x.values, *weights], dy.values, materialize_grads=True)
    parts = zip(x.segments(), weights, groups, dy.segments(), strict=True)
    for stage, (segment, weight, g, d) in enumerate(parts):
        segment, weight = segment.detach().clone().requires_grad_(), weight.detach().requires_grad_()
        alone = group_norm(segment, g, weight, activation="silu")
        assert torch.equal(y.segments()[stage], alone)
        found = torch.autograd.grad(alone, [segment, weight], d, materialize_grads=True)
        assert torch.equal(x.with_values(dx).segments()[stage], found[0])
        assert torch.equal(dweights[stage], found[1])


@DTYPES
@pytest.mark.parametrize(
    ("counts", "channels", "skip_channels", "groups"),
    [
        ((2, 0, 1), (24, 16, 8), (16, 16, 16), (4, 8, 3)),
        ((1, 2), (5, 3), (3, 6), (2, 3)),
        ((1,), (96,), (160,), (16,)),
    ],
    ids=str,
)
def test_two_sources_give_the_bits_of_one_that_joins_them(
    counts, channels, skip_channels, groups, dtype, generator
):
    x, skip = (
        stage_batch(generator, counts, widths, 3, 5, dtype=dtype, requires_grad=True)
        for widths in (channels, skip_channels)
    )
    weights = [
        torch.randn(c + d, generator=generator).requires_grad_()
        for c, d in zip(channels, skip_channels, strict=True)
    ]
    leaves, found = [x.values, skip.values, *weights], []
    for source, options in ((x, {"skip": skip}), (StageBatch.concatenate(x, skip), {})):
        y = group_norm(source, groups, weights, activation="silu", **options).values
        dy = torch.linspace(-1, 1, y.numel()).sin().to(dtype)
        found.append([y, *torch.autograd.grad(y, leaves, dy, materialize_grads=True)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@DTYPES
@pytest.mark.parametrize("seed", [5, -(2**63) + 77, 2**40 + 2**33])
def test_dropout_drops_what_its_definition_does(seed, dtype, generator):
    counts, channels, groups, options = (2, 1), (24, 16), (4, 2), {"activation": "silu"}
    x = stage_batch(generator, counts, channels, 3, 5, requires_grad=True)
    x = x.with_values((x.values + 1).detach().to(dtype).requires_grad_())
    seed = torch.tensor([seed])
    y = group_norm(x, groups, dropout=0.3, seed=seed, **options).values
    plain = group_norm(x, groups, **options).values
    factors = multipliers(seed, y.numel(), 0.3, torch.float32)
    dy = torch.linspace(-1, 1, y.numel()).sin().to(dtype)
    (found,) = torch.autograd.grad(y, x.values, dy)
    (expected,) = torch.autograd.grad(plain, x.values, (dy * factors).to(dtype))
    tolerance = 4 * ROUNDING[dtype]
    assert torch.equal(y == 0, factors == 0)
    torch.testing.assert_close(y.float(), plain.float() * factors, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found.float(), expected.float(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("stages", [1, 3, 7])
def test_one_launch_forward_two_backward(stages, generator, monkeypatch):
    launched = []
    run = implementation.launch

    def record(kernel, *arguments, **options):
        launched.append(kernel.__name__)
        run(kernel, *arguments, **options)

    monkeypatch.setattr(implementation, "launch", record)
    x = stage_batch(generator, (1,) * stages, (8,) * stages, 2, 2, requires_grad=True)
    weights = [torch.ones(8, requires_grad=True) for _ in range(stages)]
    group_norm(x, 2, weights).values.sum().backward()
    assert launched == [
        "_group_norm_forward_kernel",
        "_group_norm_backward_kernel",
        "_group_norm_parameters_kernel",
    ]


def test_auto_never_takes_the_interpreter(generator):
    with use("auto"):
        answer = explain("group_norm", torch.randn(1, 8, 2, 2, generator=generator), 2)
    assert answer.backend != "triton"
    assert "interpreter" in answer.why_not["triton"] or "comes first" in answer.why_not["triton"]

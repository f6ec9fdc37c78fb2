"""Values, gradients and errors of group_norm; what every op owes is in test_contract.py."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from group_norm_checks import (
    DTYPES,
    LAYOUTS,
    PARAMETERS,
    ROUNDINGS,
    Inputs,
    call,
    check,
    check_stages_bit_for_bit,
    cotangent,
    double_leaf,
    formula,
    magnitudes,
    make_inputs,
    over_channels,
    random_calls,
    run,
)
from helpers import ROUNDING, assert_elements_close, each_backend, on_cuda, stage_batch
from msd_kernels import StageBatch, group_norm
from msd_kernels.dispatch import stage_weights
from msd_kernels.ops.group_norm import BACKENDS
from msd_kernels.runtime.extension import load

SHAPES = [
    ((3, 32, 8, 8), 8),
    ((2, 160, 5, 7), 16),
    ((1, 288, 4, 4), 16),
    ((2, 384, 3, 3), 16),
    ((1, 640, 8, 8), 16),
    ((2, 3, 9, 11), 1),
    ((2, 3, 9, 11), 3),
    ((1, 2048, 2, 2), 32),
    ((4, 64, 1, 1), 16),
    ((2, 24, 6, 6), 1),
    ((1, 32, 64, 64), 8),
    ((1, 256, 32, 32), 16),
    ((1, 8, 1, 1), 8),
    ((5, 32), 8),
    ((2, 16, 13), 4),
    ((1, 8, 3, 4, 5), 2),
]


@each_backend(BACKENDS)
@LAYOUTS
@pytest.mark.parametrize(("dtype", "parameter_dtype"), DTYPES)
@pytest.mark.parametrize(("shape", "groups"), SHAPES, ids=str)
def test_group_norm_equals_the_formula(
    shape, groups, dtype, parameter_dtype, channels_last, backend, generator
):
    inputs = make_inputs(generator, shape, dtype, parameter_dtype, channels_last=channels_last)
    check(inputs, groups, backend, cotangent(inputs, generator))


@pytest.mark.gpu
@each_backend(BACKENDS, "cuda")
@LAYOUTS
@pytest.mark.parametrize(("dtype", "parameter_dtype"), DTYPES)
@pytest.mark.parametrize(("shape", "groups"), SHAPES, ids=str)
def test_group_norm_on_cuda_equals_the_formula(
    shape, groups, dtype, parameter_dtype, channels_last, backend, generator, exact_cuda
):
    inputs = make_inputs(generator, shape, dtype, parameter_dtype, channels_last=channels_last).map(on_cuda)
    check(inputs, groups, backend, cotangent(inputs, generator))


@each_backend(BACKENDS)
@LAYOUTS
@pytest.mark.parametrize("silu", [False, True], ids=["linear", "silu"])
@pytest.mark.parametrize(
    "present", [s for k in range(5) for s in itertools.combinations(PARAMETERS, k)], ids="-".join
)
def test_group_norm_with_any_subset_of_parameters(present, silu, channels_last, backend, generator):
    for dtype in (torch.float32, torch.bfloat16):
        inputs = make_inputs(
            generator, (2, 48, 5, 6), dtype, dtype, present=present, channels_last=channels_last
        )
        check(inputs, 4, backend, cotangent(inputs, generator), silu=silu)


@each_backend(BACKENDS)
@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("offset", [-100.0, 1000.0])
def test_group_norm_of_off_centre_inputs(offset, dtype, channels_last, backend, generator):
    inputs = make_inputs(generator, (2, 96, 16, 16), dtype, offset=offset, channels_last=channels_last)
    check(inputs, 16, backend, cotangent(inputs, generator))


@pytest.mark.gpu
@each_backend(BACKENDS, "cuda")
@LAYOUTS
@pytest.mark.parametrize("offset", [-100.0, 1000.0])
def test_group_norm_on_cuda_of_off_centre_inputs(offset, channels_last, backend, generator, exact_cuda):
    inputs = make_inputs(generator, (2, 96, 16, 16), offset=offset, channels_last=channels_last).map(on_cuda)
    check(inputs, 16, backend, cotangent(inputs, generator))


@each_backend(BACKENDS)
@LAYOUTS
@pytest.mark.parametrize("value", [0.0, 0.1, -1000.1])
def test_group_norm_of_constant_inputs(value, channels_last, backend, generator):
    """The variance is 0, so rstd is 1/√eps and any error of the mean is amplified by it."""
    inputs = make_inputs(generator, (2, 32, 6, 6), channels_last=channels_last)
    with torch.no_grad():
        inputs.x.fill_(value)
    check(inputs, 8, backend, cotangent(inputs, generator))


@each_backend(BACKENDS)
@LAYOUTS
def test_group_norm_keeps_groups_apart(channels_last, backend, generator):
    """Each group has a scale of its own, so that an element of a neighbour in the sums would show."""
    inputs = make_inputs(generator, (2, 40, 7, 5), channels_last=channels_last)
    with torch.no_grad():
        inputs.x.mul_(over_channels(10.0 ** torch.arange(-4, 4).repeat_interleave(5), inputs.x, 1))
    check(inputs, 8, backend, cotangent(inputs, generator), eps=1e-12)


@each_backend(BACKENDS)
def test_group_norm_of_non_contiguous_inputs(backend, generator):
    inputs = make_inputs(generator, (2, 32, 6, 10))
    dense = torch.randn(4, 64, 6, 10, generator=generator)
    views = {
        "every second channel": dense[:2, ::2],
        "every second sample": dense[::2, :32],
        "cropped": torch.randn(2, 32, 8, 12, generator=generator)[:, :, 1:7, 2:],
        "transposed": torch.randn(2, 32, 10, 6, generator=generator).transpose(2, 3),
        "expanded": torch.randn(1, 32, 1, 10, generator=generator).expand(2, 32, 6, 10),
        "cropped channels_last": torch.randn(2, 6, 12, 32, generator=generator)[:, :, 1:11].permute(
            0, 3, 1, 2
        ),
    }
    for view in views.values():
        strided = replace(inputs, x=view.detach().requires_grad_())
        check(strided, 8, backend, torch.randn(2, 32, 6, 10, generator=generator))


@each_backend(BACKENDS)
@LAYOUTS
def test_group_norm_takes_cotangents_of_the_other_layout(channels_last, backend, generator):
    inputs = make_inputs(generator, (3, 32, 5, 6), channels_last=channels_last)
    other = torch.contiguous_format if channels_last else torch.channels_last
    dy = torch.randn(inputs.x.shape, generator=generator)
    check(inputs, 8, backend, dy.contiguous(memory_format=other))
    check(inputs, 8, backend, dy[:, :, :1, :1].expand_as(dy))


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
@pytest.mark.parametrize("isa", ["avx512bf16", "avx512", "avx2", "portable"])
def test_group_norm_on_every_instruction_set(isa, backend, generator, monkeypatch):
    monkeypatch.setenv("MSD_KERNELS_CPU_ISA", isa)
    if load("cpu").module.cpu_isa() != isa:
        pytest.skip(f"this processor has no {isa}")
    for (shape, groups), dtype, channels_last in itertools.product(
        SHAPES, (torch.float32, torch.bfloat16, torch.float16), (False, True)
    ):
        inputs = make_inputs(generator, shape, dtype, dtype, offset=20.0, channels_last=channels_last)
        check(inputs, groups, backend, cotangent(inputs, generator))


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
@pytest.mark.parametrize("std", [0.5, 1.0])
@pytest.mark.parametrize("isa", ["avx512bf16", "avx512", "avx2", "portable"])
def test_group_norm_of_means_of_1000_is_as_exact_as_of_centred_inputs(
    isa, std, backend, generator, monkeypatch
):
    """What rounding takes from such a mean is 3e-5, which the standard deviation does not make small."""
    monkeypatch.setenv("MSD_KERNELS_CPU_ISA", isa)
    if load("cpu").module.cpu_isa() != isa:
        pytest.skip(f"this processor has no {isa}")
    shapes = [((2, 96, 16, 16), 16), ((1, 4, 9, 9), 2), ((2, 40, 3, 5), 8), ((1, 8, 64, 64), 2), ((3, 48), 4)]
    for (shape, groups), dtype, channels_last in itertools.product(
        shapes, (torch.float32, torch.bfloat16, torch.float16), (False, True)
    ):
        inputs = make_inputs(generator, shape, channels_last=channels_last)
        inputs = replace(inputs, x=(1000 + std * inputs.x.detach()).to(dtype))
        exact = inputs.map(double_leaf)
        arguments = (torch.zeros_like(exact.x), groups, 1e-5, False, False)
        terms = magnitudes(exact, *arguments)["y"].detach()
        expected = formula(exact, groups, 1e-5, silu=False).detach()
        y = call(inputs, groups, 1e-5, silu=False)
        assert_elements_close(
            y, expected, rtol=ROUNDING[dtype], atol=ROUNDINGS * ROUNDING[torch.float32] * terms
        )


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
@pytest.mark.parametrize("isa", ["avx512bf16", "avx512", "avx2", "portable"])
def test_silu_of_huge_numbers_on_every_instruction_set(isa, backend, monkeypatch):
    """As bias: z sigmoid(z) is 0 where exp(-z) overflows, its derivative 0 or 1, and what is no number stays none."""
    monkeypatch.setenv("MSD_KERNELS_CPU_ISA", isa)
    if load("cpu").module.cpu_isa() != isa:
        pytest.skip(f"this processor has no {isa}")
    values = torch.tensor([-2e38, -1e36, -1e30, -200.0, 0.0, 200.0, 1e36, 2e38, torch.nan, -torch.inf])
    for dtype in (torch.float32, torch.bfloat16):
        bias = values.repeat(4).to(dtype)
        x = torch.zeros(1, 40, 2, 2, dtype=dtype, requires_grad=True)
        shift = torch.zeros(1, 40, dtype=dtype, requires_grad=True)
        y = group_norm(x, 40, None, bias, shift=shift, activation="silu")
        (dshift,) = torch.autograd.grad(y, shift, torch.ones_like(y))
        exact = bias.double().requires_grad_()
        expected = exact * torch.sigmoid(exact)
        (derivative,) = torch.autograd.grad(expected, exact, torch.ones_like(expected))
        for found, wanted in ((y[0, :, 0, 0], expected), (dshift[0] / 4, derivative)):
            finite = wanted.isfinite()
            assert_elements_close(found[finite], wanted[finite].detach(), rtol=0.01, atol=1e-30)
            assert not found[~finite].isfinite().any()


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_group_norm_refuses_an_unknown_instruction_set(backend, monkeypatch):
    monkeypatch.setenv("MSD_KERNELS_CPU_ISA", "sse9")
    with pytest.raises(RuntimeError, match=r"MSD_KERNELS_CPU_ISA=sse9 is none of .*avx2, portable"):
        group_norm(X, 4)


@each_backend(BACKENDS)
def test_group_norm_of_500_random_shapes(backend, generator):
    for inputs, groups, silu in random_calls(generator, 500):
        check(inputs, groups, backend, cotangent(inputs, generator), eps=1e-3, silu=silu)


@pytest.mark.parametrize("backend", ["library", "reference"], indirect=True)
def test_group_norm_of_float32_parameters_and_float64_input(backend, generator):
    inputs = make_inputs(generator, (2, 12, 3, 3), torch.float64, torch.float32)
    y = call(inputs, 4, 1e-5, True)
    expected = formula(inputs.map(double_leaf), 4, 1e-5, True)
    assert y.dtype == torch.float64
    assert_elements_close(y, expected.detach(), rtol=0, atol=100 * ROUNDING[torch.float64])


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_group_norm_threads_share_any_batch_with_the_same_bits(batch, dtype, backend, generator):
    """One sample is cut between the threads, many samples are dealt out whole."""
    inputs = make_inputs(generator, (batch, 256, 32, 32), dtype, channels_last=True)
    dy = cotangent(inputs, generator)
    one = run(inputs, dy, 16, 1e-5, True, call)
    torch.set_num_threads(2)
    two = run(inputs, dy, 16, 1e-5, True, call)
    assert all(torch.equal(a, b) for a, b in zip(one.values(), two.values(), strict=True))


@each_backend(BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("counts", [(3, 0, 2), (0, 1, 1), (1, 2, 0), (0, 0, 0)], ids=str)
def test_group_norm_of_a_stage_batch_equals_separate_calls_bit_for_bit(counts, dtype, backend, generator):
    check_stages_bit_for_bit(generator, counts, (384, 256, 32), (16, 16, 8), (8, 8), dtype)


@each_backend(BACKENDS)
@pytest.mark.parametrize(
    ("counts", "channels", "groups"),
    [
        ((4,), (40,), 8),
        ((1, 2), (24, 4), (8, 1)),
        ((2, 0, 1), (12, 8, 4), 4),
        ((1, 0, 2, 1, 0, 1, 1), (16, 4, 8, 160, 4, 12, 20), 4),
    ],
    ids=["1 stage", "2 stages", "3 stages", "7 stages"],
)
def test_group_norm_of_stages_equals_the_formula(counts, channels, groups, backend, generator):
    x = stage_batch(generator, counts, channels, 3, 5)
    weight = [torch.randn(c, generator=generator) for c in channels]
    y = group_norm(x, groups, weight)
    per_stage = groups if isinstance(groups, tuple) else (groups,) * len(counts)
    for segment, result, w, g in zip(x.segments(), y.segments(), weight, per_stage, strict=True):
        inputs = Inputs(segment, w, None, None, None).map(double_leaf)
        expected = formula(inputs, g, 1e-5, silu=False).detach()
        terms = magnitudes(inputs, torch.zeros_like(inputs.x), g, 1e-5, False, True)["y"].detach()
        unit = ROUNDING[torch.float32]
        assert_elements_close(result, expected, rtol=unit, atol=2 * ROUNDINGS * unit * terms)


def test_group_norm_keeps_kind_dtype_and_memory_format(generator):
    x = torch.randn(2, 16, 4, 6, generator=generator).bfloat16()
    assert group_norm(x, 4).is_contiguous()
    y = group_norm(x.contiguous(memory_format=torch.channels_last), 4)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert y.dtype == torch.bfloat16
    volume = torch.randn(2, 16, 2, 3, 4, generator=generator).contiguous(memory_format=torch.channels_last_3d)
    assert group_norm(volume, 4).is_contiguous(memory_format=torch.channels_last_3d)
    batch = group_norm(stage_batch(generator, (1, 2), (8, 4), 3, 3), 4)
    assert (batch.counts, batch.channels, batch.height, batch.width) == ((1, 2), (8, 4), 3, 3)


@pytest.mark.parametrize("given", ["weight", "bias"])
def test_group_norm_among_several_processes_has_gradients_of_zero_for_absent_stages(given, monkeypatch):
    monkeypatch.setattr(stage_weights, "several_processes", lambda: True)
    x = StageBatch.from_dense(torch.randn(2, 8, 2, 2), (2, 0))
    parameters = [torch.ones(8, dtype=torch.float32, requires_grad=True) for _ in range(2)]
    group_norm(x, 4, **{given: parameters}).values.square().sum().backward()
    assert parameters[0].grad.any()
    assert torch.equal(parameters[1].grad, torch.zeros(8))


def test_group_norm_of_no_samples_is_empty_and_has_no_weight_gradients():
    x, weight = torch.empty(0, 8, 4, 4, requires_grad=True), torch.ones(8, requires_grad=True)
    y = group_norm(x, 4, weight, activation="silu")
    y.sum().backward()
    assert y.shape == x.shape == x.grad.shape
    assert weight.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_group_norm_under_autocast_does_as_pytorch(dtype, generator):
    x, weight = torch.randn(2, 8, 4, 4, generator=generator).to(dtype), torch.ones(8, dtype=dtype)
    plain = group_norm(x, 4, weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, theirs = group_norm(x, 4, weight), F.group_norm(x, 4, weight)
    assert y.dtype == theirs.dtype == dtype
    assert torch.equal(y, plain)


BATCH = StageBatch(torch.zeros(3 * 4 * 4 * 8), (1, 2), (8, 8), 4, 4)
X = torch.zeros(2, 8, 4, 4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X, 3), ValueError, "num_groups=3 does not divide channels=8 of stage 0"),
        ((X, 0), ValueError, "num_groups=0 does not divide channels=8 of stage 0"),
        ((BATCH, (4, 5)), ValueError, "num_groups=5 does not divide channels=8 of stage 1"),
        (
            (BATCH, (4, 4, 4)),
            ValueError,
            r"num_groups must be one integer or one per stage \(2\), got \(4, 4, 4\)",
        ),
        ((X, 4, torch.zeros(7)), ValueError, r"weight must be \[8\] for x of \[2, 8, 4, 4\], got \[7\]"),
        ((X, 4, None, torch.zeros(2, 8)), ValueError, r"bias must be \[8\] .* got \[2, 8\]"),
        (
            (X, 4, X.new_zeros(8, dtype=torch.float16)),
            TypeError,
            "weight must be torch.float32 for x of torch.float32, got",
        ),
        ((X, 4, torch.zeros(8, device="meta")), ValueError, "weight is on meta, but x is on cpu"),
        ((X, 4, [torch.zeros(8)]), TypeError, "weight of a dense x must be a tensor, got list"),
        ((X, 4, None, None, -1.0), ValueError, "eps must be >= 0, got -1.0"),
        ((X, 4, None, None, float("nan")), ValueError, "eps must be >= 0, got nan"),
        ((X.long(), 4), TypeError, "x must be float32, bfloat16, float16 or float64, got torch.int64"),
        ((None, 4), TypeError, "x must be a tensor, got NoneType"),
        ((torch.zeros(8), 4), ValueError, r"x must be \[B, C, \*spatial\] with C >= 1, got shape \(8,\)"),
        (
            (torch.zeros(2, 8, 0, 4), 4),
            ValueError,
            r"x must have at least one pixel, got shape \(2, 8, 0, 4\)",
        ),
        ((BATCH, 4, torch.zeros(8)), TypeError, "weight must be a sequence of one tensor per stage"),
        ((BATCH, 4, [torch.zeros(8)]), ValueError, r"weight must hold one tensor per stage \(2\), got 1"),
        (
            (BATCH, 4, [torch.zeros(8), torch.zeros(9)]),
            ValueError,
            r"weight of stage 1 must be \[8\], got \[9\]",
        ),
        (
            (BATCH, 4, [torch.zeros(8), torch.zeros(8).double()]),
            TypeError,
            "weight of stage 1 must be torch.float32 for x of torch.float32, got torch.float64",
        ),
    ],
)
def test_group_norm_says_what_is_wrong(arguments, error, message):
    with pytest.raises(error, match=f"^group_norm: {message}"):
        group_norm(*arguments)


@pytest.mark.parametrize(
    ("x", "options", "error", "message"),
    [
        (X, {"activation": "relu"}, ValueError, "activation must be None or 'silu', got 'relu'"),
        (
            X,
            {"scale": torch.zeros(8)},
            ValueError,
            r"scale must be \[2, 8\] for x of \[2, 8, 4, 4\], got \[8\]",
        ),
        (
            X,
            {"shift": torch.zeros(2, 8).half()},
            TypeError,
            "shift must be torch.float32 for x of torch.float32",
        ),
        (BATCH, {"scale": torch.zeros(3, 8)}, TypeError, "scale must be a StageBatch, got Tensor"),
        (
            BATCH,
            {"shift": StageBatch(torch.zeros(24), (2, 1), (8, 8), 1, 1)},
            ValueError,
            r"shift must have counts=\(1, 2\), channels=\(8, 8\) at 1x1, got counts=\(2, 1\)",
        ),
    ],
)
def test_group_norm_says_what_is_wrong_with_options(x, options, error, message):
    with pytest.raises(error, match=f"^{re.escape('group_norm: ')}{message}"):
        group_norm(x, 4, **options)

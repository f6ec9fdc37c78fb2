"""What the checks that all ops share refuse, each asked through an op."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor

from msd_kernels import (
    StageBatch,
    attention,
    explain,
    group_norm,
    grouped_conv2d,
    grouped_linear,
    optimal_denoiser,
    resample2d,
)

X = torch.randn(2, 6, 4, 4)
BATCH = StageBatch.from_dense(X, (1, 1))
KERNELS = [torch.randn(3, 6, 1, 1)] * 2
MATRICES = [torch.randn(3, 6)] * 2
IMAGES = torch.rand(5, 6, 4, 4)


def packed(num_heads, **options):
    return attention(BATCH, num_heads=num_heads, layout="blocked", **options)


def linear(weight, bias=None, counts=(1, 1)):
    return grouped_linear(X[:, :, 0, 0], weight, bias, counts=counts)


WRONG = {
    "a scale with a gradient": (
        lambda: packed(1, scale=torch.ones((), requires_grad=True)),
        TypeError, "attention: scale must be a number, got tensor",
    ),
    "a scale that is text": (
        lambda: grouped_conv2d(BATCH, KERNELS, scale="2"),
        TypeError, "grouped_conv2d: scale must be a number, got '2'",
    ),
    "a scale that is a truth value": (
        lambda: grouped_conv2d(BATCH, KERNELS, scale=True),
        TypeError, "grouped_conv2d: scale must be a number, got True",
    ),
    "a scale that is not finite": (
        lambda: grouped_conv2d(BATCH, KERNELS, scale=float("nan")),
        ValueError, "grouped_conv2d: scale must be finite, got nan",
    ),
    "no eps": (lambda: group_norm(X, 2, eps=None), TypeError, "group_norm: eps must be a number, got None"),
    "no sigma": (
        lambda: optimal_denoiser(X, None, IMAGES),
        TypeError, "optimal_denoiser: sigma must be a number, got None",
    ),
    "a sequence of sigmas": (
        lambda: optimal_denoiser(X, [1.0, 2.0], IMAGES),
        TypeError, r"optimal_denoiser: sigma must be a number, got \[1.0, 2.0\]",
    ),
    "half a data range": (
        lambda: optimal_denoiser(X, 1.0, IMAGES.to(torch.uint8), data_range=(1,)),
        TypeError, r"optimal_denoiser: data_range must be two numbers, \(low, high\), got \(1,\)",
    ),
    "a data range of text": (
        lambda: optimal_denoiser(X, 1.0, IMAGES.to(torch.uint8), data_range="ab"),
        TypeError, "optimal_denoiser: data_range must be a number, got 'a'",
    ),
    "an array that runs backwards": (
        lambda: optimal_denoiser(X, 1.0, IMAGES.numpy()[::-1]),
        ValueError, "optimal_denoiser: data is an array that PyTorch does not take: .*negative",
    ),
    "an array of foreign bytes": (
        lambda: optimal_denoiser(X, 1.0, IMAGES.numpy().astype(">f4")),
        (TypeError, ValueError), "optimal_denoiser: data is an array that PyTorch does not take: ",
    ),
    "a filter that is text": (
        lambda: resample2d(X, "1331", up=2),
        TypeError, "resample2d: filter must be a sequence of numbers, got str",
    ),
    "a tap that is none": (
        lambda: resample2d(X, [None], up=2),
        TypeError, "resample2d: filter must be a number, got None",
    ),
    "a tap beyond all floats": (
        lambda: resample2d(X, [10**400], up=2),
        ValueError, r"resample2d: filter must have finite taps whose sum is not 0, got \[1000",
    ),
    "taps whose sum is infinite": (
        lambda: resample2d(X, [1e308, 1e308], up=2),
        ValueError, "resample2d: filter must have finite taps whose sum is not 0",
    ),
    "a factor that is no integer": (
        lambda: resample2d(X, [1, 1], up=2.0),
        TypeError, "resample2d: up must be an integer, got 2.0",
    ),
    "heads that are no integer": (
        lambda: packed(2.0),
        TypeError, "attention: num_heads must be one integer or one per stage, got 2.0",
    ),
    "heads of which one is no integer": (
        lambda: packed((2, 2.0)),
        TypeError, r"attention: num_heads must be one integer or one per stage, got \(2, 2.0\)",
    ),
    "a layout that cannot be hashed": (
        lambda: attention(BATCH, layout=["blocked"]),
        ValueError, r"attention: layout must be one of .* got \['blocked'\]",
    ),
    "no weight": (
        lambda: linear(None),
        TypeError, "grouped_linear: weight must be a sequence of one tensor per stage, got NoneType",
    ),
    "weights that can be read only once": (
        lambda: linear(iter(MATRICES)),
        TypeError, "grouped_linear: weight must be a sequence of one tensor per stage, got list_iterator",
    ),
    "a weight missing": (
        lambda: linear([MATRICES[0], None]),
        TypeError, "grouped_linear: weight of stage 1 must be a tensor, got NoneType",
    ),
    "an array as a weight": (
        lambda: grouped_conv2d(BATCH, [KERNELS[0], KERNELS[1].numpy()]),
        TypeError, "grouped_conv2d: weight of stage 1 must be a tensor, got ndarray",
    ),
    "a bias missing": (
        lambda: linear(MATRICES, [None, torch.zeros(3)]),
        TypeError, "grouped_linear: bias of stage 0 must be a tensor, got NoneType",
    ),
    "one count": (
        lambda: linear(MATRICES, counts=2),
        TypeError, "grouped_linear: counts must be integers, one per stage, got 2",
    ),
    "counts that are no integers": (
        lambda: linear(MATRICES, counts=(1.0, 1.0)),
        TypeError, r"grouped_linear: counts must be integers, one per stage, got \(1.0, 1.0\)",
    ),
    "a sparse tensor": (
        lambda: group_norm(X.to_sparse(), 2),
        TypeError, "group_norm: x must be a dense tensor, got a torch.sparse_coo one",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), WRONG.values(), ids=WRONG)
def test_wrong_arguments_are_named(call, error, message):
    with pytest.raises(error, match=f"^{message}"):
        call()


@pytest.mark.parametrize("number", [1, np.float32(0.5), Fraction(1, 4), np.int64(2)])
def test_what_stands_for_a_number_is_one(number):
    expected = grouped_conv2d(BATCH, KERNELS, scale=float(number)).values
    assert torch.equal(grouped_conv2d(BATCH, KERNELS, scale=number).values, expected)


def test_what_stands_for_an_integer_is_one():
    two = np.int64(2)
    assert torch.equal(resample2d(X, [1, 1], up=two), resample2d(X, [1, 1], up=2))
    assert torch.equal(packed(two).values, packed(2).values)
    counts = np.array([1, 1])
    assert linear(MATRICES, counts=counts).counts == (1, 1)


def test_an_empty_list_of_biases_is_no_absent_one():
    linear(MATRICES)  # a call that is remembered
    with pytest.raises(ValueError, match=r"grouped_linear: bias must hold one tensor per stage \(2\), got 0"):
        linear(MATRICES, [])


def test_weights_may_be_a_parameter_list():
    parameters = torch.nn.ParameterList(MATRICES)
    assert torch.equal(linear(parameters).values, linear(MATRICES).values)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_autocast_lets_no_other_dtype_through(dtype):
    wrong = [m.to(dtype) for m in MATRICES]
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(TypeError, match="grouped_linear: weight of stage 0 must be"),
    ):
        linear(wrong)


@pytest.mark.parametrize("chunks", [iter, lambda chunks: (chunk for chunk in chunks)])
def test_explain_takes_no_chunk_of_an_iterator(chunks):
    data = chunks([IMAGES, IMAGES])
    with pytest.raises(TypeError, match="optimal_denoiser: explain would use up the first chunk"):
        explain("optimal_denoiser", X, 1.0, data)
    assert len(list(data)) == 2


def test_explain_checks_as_the_call_does():
    with pytest.raises(ValueError, match="optimal_denoiser: data must hold at least one chunk"):
        explain("optimal_denoiser", X, 1.0, [])
    with pytest.raises(ValueError, match="low < high"):
        explain("optimal_denoiser", X, 1.0, IMAGES.to(torch.uint8), data_range=(1, -1))
    assert explain("optimal_denoiser", X, 1.0, [IMAGES], statistics=True).backend


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: StageBatch.from_dense(None), TypeError, "from_dense takes a tensor, got NoneType"),
        (
            lambda: StageBatch.concatenate(BATCH, None),
            TypeError,
            "concatenate takes two StageBatches, got None",
        ),
    ],
)
def test_packed_values_name_what_is_wrong(call, error, message):
    with pytest.raises(error, match=f"^StageBatch: {message}"):
        call()


def test_packed_values_have_no_gaps():
    pack = BATCH.with_values
    values = torch.arange(2.0 * X.numel(), requires_grad=True)
    strided: Tensor = values[::2]
    found = pack(strided).values
    assert found.is_contiguous()
    assert torch.equal(found, strided)
    (gradient,) = torch.autograd.grad(found.sum(), values)
    assert torch.equal(gradient[::2], torch.ones_like(strided))
    assert not gradient[1::2].any()
    dense = strided.detach().clone()
    assert pack(dense).values is dense


def test_packed_values_are_compared_by_identity():
    assert BATCH == BATCH
    assert BATCH.with_values(BATCH.values) != BATCH
    assert BATCH in [BATCH.with_values(BATCH.values), BATCH]

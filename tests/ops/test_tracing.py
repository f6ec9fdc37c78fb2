"""``torch.jit.trace`` and ``torch.fx``: a recorded call is right at every shape that it takes, or refuses it."""

from __future__ import annotations

import io
import warnings

import pytest
import torch
from torch import Tensor, nn

from msd_kernels import (
    StageBatch,
    attention,
    group_norm,
    grouped_conv2d,
    grouped_linear,
    optimal_denoiser,
    resample2d,
)
from op_calls import CALLS

CHANNELS_LAST = torch.channels_last


def per_sample(x: Tensor) -> Tensor:
    """``[B, C]``, from the pixels."""
    return x.flatten(2).mean(2)


DATA = torch.linspace(-2, 2, 24, dtype=torch.float64).sin().reshape(6, 4)
# Functions of one dense tensor, and shapes of which many have the elements of the first.
DENSE = {
    "group_norm": (
        lambda x: group_norm(x, 2),
        [(2, 4, 4, 4), (4, 4, 4, 2), (4, 8, 2, 2), (1, 4, 8, 4), (2, 4, 3, 5)],
    ),
    "group_norm, modulated": (
        lambda x: group_norm(x, 2, scale=per_sample(x), shift=per_sample(x) * 2, activation="silu"),
        [(2, 4, 4, 4), (4, 8, 2, 2), (1, 4, 7, 3)],
    ),
    "group_norm, channels last": (
        lambda x: group_norm(x.contiguous(memory_format=CHANNELS_LAST), 2, eps=1e-3),
        [(2, 4, 4, 4), (4, 4, 4, 2), (4, 8, 2, 2)],
    ),
    "group_norm of sequences": (lambda x: group_norm(x, 2), [(2, 4, 6), (4, 6, 2), (6, 4, 2), (0, 4, 2)]),
    "group_norm of vectors": (lambda x: group_norm(x, 2), [(2, 4), (1, 8)]),
    "attention": (
        lambda x: attention(x, x * 2, x + 1),
        [(2, 2, 4, 4), (4, 2, 2, 4), (2, 1, 8, 4), (2, 2, 3, 5)],
    ),
    "attention, scaled": (lambda x: attention(x, x * 2, x + 1, scale=0.2), [(2, 2, 4, 4), (4, 1, 4, 4)]),
    **{
        f"attention, {layout}{', channels last' if last else ''}": (
            lambda x, layout=layout, last=last: attention(
                x.contiguous(memory_format=CHANNELS_LAST) if last else x, num_heads=2, layout=layout
            ),
            [(2, 12, 2, 4), (4, 12, 2, 2), (1, 24, 4, 2), (2, 12, 4, 2), (2, 6, 3, 5)],
        )
        for layout in ("interleaved", "per_head", "blocked")
        for last in (False, True)
    },
    **{
        f"resample2d, {len(taps)} taps, up {up}, down {down}": (
            lambda x, taps=taps, up=up, down=down: resample2d(x, taps, up, down),
            [(2, 4, 4, 4), (4, 4, 4, 2), (4, 2, 2, 8), (2, 3, 7, 5), (0, 3, 4, 4)],
        )
        for taps in ([1, 1], [1, 3, 3, 1], [1, 3, 2])
        for up, down in ((1, 1), (2, 1), (1, 2))
    },
    "optimal_denoiser": (
        lambda x: optimal_denoiser(x.flatten(1)[:, :4], 0.5, DATA.to(x.dtype)),
        [(2, 4, 2), (4, 4, 1), (1, 2, 2)],
    ),
}


def traced(function, *example):
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)  # and this library's calls are quiet
        return torch.jit.trace(function, example)


def saved(trace):
    file = io.BytesIO()
    torch.jit.save(trace, file)
    file.seek(0)
    return torch.jit.load(file)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(("function", "shapes"), DENSE.values(), ids=DENSE)
def test_tracing_dense_calls_follow_the_shape(function, shapes, generator):
    trace = saved(torch.jit.trace(function, torch.randn(shapes[0], generator=generator, dtype=torch.float64)))
    for shape in shapes:
        x = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
        y, expected = trace(x), function(x)
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
        if x.numel():
            weights = torch.randn(y.shape, generator=generator, dtype=y.dtype)
            pair = (torch.autograd.grad(out, x, weights)[0] for out in (y, expected))
            torch.testing.assert_close(*pair, rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "case",
    ["group_norm, modulated", "attention", "attention, blocked", "resample2d, 4 taps, up 2, down 1"],
)
def test_tracing_keeps_dtype_and_layout(case, dtype, generator):
    function, shapes = DENSE[case]
    for order in (torch.contiguous_format, CHANNELS_LAST):
        x = torch.randn(shapes[0], generator=generator).to(dtype).contiguous(memory_format=order)
        # PyTorch's check takes the rounding of 16 bits for an error.
        y, expected = torch.jit.trace(function, x, check_trace=False)(x), function(x)
        if not case.endswith("attention"):
            assert y.stride() == expected.stride()
        # Eager kernels and PyTorch's own round the result once, their sums apart.
        torch.testing.assert_close(
            y, expected, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps
        )


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_tracing_checks_the_call():
    with pytest.raises(ValueError, match="group_norm: num_groups=3 does not divide channels=4"):
        traced(lambda x: group_norm(x, 3), torch.zeros(2, 4, 2, 2))
    with pytest.raises(ValueError, match="group_norm: scale must be"):
        traced(lambda x: group_norm(x, 2, scale=x[0, :, 0]), torch.zeros(2, 4, 2, 4))


WEIGHTS = [torch.linspace(-1, 1, 16).cos().reshape(4, 4)]
KERNELS = [torch.linspace(-1, 1, 144).cos().reshape(4, 4, 3, 3)]
# Functions of a dense tensor [2, 4, 4, 4] that make a StageBatch of it.
STAGES = {
    "group_norm": lambda x: group_norm(StageBatch.from_dense(x), 2).values,
    "grouped_linear": lambda x: grouped_linear(x.reshape(-1, 4), WEIGHTS).values,
    "grouped_linear of stages": lambda x: grouped_linear(StageBatch.from_dense(x), WEIGHTS).dense(),
    "grouped_conv2d": lambda x: grouped_conv2d(StageBatch.from_dense(x), KERNELS).dense(),
    "attention": lambda x: attention(*[StageBatch.from_segments([x])] * 3).dense(),
    "resample2d": lambda x: resample2d(StageBatch.from_dense(x), [1, 1], up=2).dense(),
    "the batch alone": lambda x: StageBatch.from_dense(x, (1, 1)).map(torch.square).dense(),
}
OTHERS = [(4, 4, 4, 2), (2, 4, 2, 8), (4, 4, 2, 4), (2, 4, 4, 5), (4, 2, 4, 4), (1, 4, 4, 4), (0, 4, 4, 4)]


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("name", STAGES)
def test_tracing_stage_batches_refuses_other_layouts(name, generator):
    function = STAGES[name]
    x = torch.randn(2, 4, 4, 4, generator=generator)
    trace = saved(traced(function, x))
    other = torch.randn(2, 4, 4, 4, generator=generator)
    assert torch.equal(trace(other), function(other))
    for shape in OTHERS:
        if name == "grouped_linear" and torch.Size(shape).numel() == x.numel():
            continue  # the reshaped batch is the same
        with pytest.raises(
            RuntimeError, match=r"split_with_sizes expects split_sizes to sum exactly|reshape"
        ):
            trace(torch.randn(shape, generator=generator))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize(
    "case", [case for case in CALLS if "stages" in case or case == "grouped_conv2d with everything"]
)
def test_tracing_flat_buffers_refuses_other_sizes(case, generator):
    call = CALLS[case][1](4)
    leaves = call.leaves(generator)
    trace = traced(call.function, *leaves)
    others = [torch.randn_like(t).requires_grad_() for t in leaves]
    y, expected = trace(*others), call.function(*others)
    assert torch.equal(y, expected)
    for a, b in zip(*(torch.autograd.grad(out.sum(), others) for out in (y, expected)), strict=True):
        assert torch.equal(a, b)
    for position, leaf in enumerate(leaves):
        wrong = list(leaves)
        wrong[position] = torch.cat([leaf, leaf])
        with pytest.raises(RuntimeError):
            trace(*wrong)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_tracing_refuses_sizes_of_tensors_as_a_layout():
    def function(x):
        batch, channels, height, width = x.shape
        return StageBatch(x.permute(0, 2, 3, 1).reshape(-1), (batch,), (channels,), height, width).values

    with pytest.raises(TypeError, match=r"torch\.jit\.trace, which makes tensors of sizes, would keep them"):
        torch.jit.trace(function, torch.zeros(2, 4, 2, 2))


class Symbolic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))

    def forward(self, x):
        h = group_norm(x, 2, self.weight, bias=self.bias, activation="silu")
        h = resample2d(h, (1, 3, 3, 1), down=2)
        h = attention(h, h * 2, h + 1, scale=0.5)
        rows = h.flatten(0, 2)
        return grouped_linear(rows, [self.weight[None, :2]]).values, optimal_denoiser(
            rows, 1.0, rows.detach()
        )


def test_fx_records_calls_as_leaves(generator):
    module = Symbolic()
    graph = torch.fx.symbolic_trace(module)
    targets = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert {group_norm, resample2d, attention, grouped_linear, optimal_denoiser} <= set(targets)
    for shape in ((2, 4, 4, 4), (3, 4, 4, 4)):
        x = torch.randn(shape, generator=generator)
        assert all(map(torch.equal, graph(x), module(x)))
    graph.recompile()


def test_fx_refuses_stage_batches():
    with pytest.raises(TypeError, match="StageBatch: from_dense takes a tensor, got Proxy"):
        torch.fx.symbolic_trace(lambda x: grouped_conv2d(StageBatch.from_dense(x), KERNELS).values)

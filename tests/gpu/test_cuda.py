"""What only a CUDA device shows: no synchronisation, CUDA graphs, streams, devices. Values on CUDA are in tests/ops."""

from __future__ import annotations

import pytest
import torch

from helpers import backend_names, waiting_is_an_error, warm_up
from msd_kernels import explain, group_norm
from op_calls import CALLS, Call, assert_same_bits, cotangent_of, forward_and_backward

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("exact_cuda")]

every_call = pytest.mark.parametrize(
    ("build", "backend"),
    [
        pytest.param(build, name, id=f"{case}-{name}")
        for case, (backends, build) in CALLS.items()
        for name in backend_names(backends, "cuda")
    ],
    indirect=["backend"],
)


def step(call: Call, leaves, dy):
    """Forward and backward with a cotangent that is already on the device."""
    y = call.function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


@every_call
def test_cuda_forward_and_backward_do_not_synchronise(build, backend, generator):
    call = build(8)
    leaves = call.leaves(generator, device="cuda")
    dy = cotangent_of(call.function(*leaves))
    step(call, leaves, dy)  # loads kernels and chooses algorithms
    torch.cuda.synchronize()
    with waiting_is_an_error():
        step(call, leaves, dy)


def test_cuda_synchronisation_would_show():
    x = torch.ones(1, device="cuda")
    with waiting_is_an_error(), pytest.raises(RuntimeError, match="synchroniz"):
        x.item()


@every_call
def test_cuda_graph_replays_with_new_inputs(build, backend, generator):
    call = build(8)
    leaves = call.leaves(generator, device="cuda")
    dy = cotangent_of(call.function(*leaves))
    warm_up(lambda: step(call, leaves, dy))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(call, leaves, dy)
    with torch.no_grad():
        for leaf in leaves:
            leaf.copy_(torch.randn(leaf.shape, generator=generator))
    graph.replay()
    assert_same_bits(captured, step(call, leaves, dy))


@every_call
def test_cuda_repetition_does_not_change_a_bit(build, backend, generator):
    call = build(32)
    leaves = call.leaves(generator, dtype=torch.bfloat16, device="cuda")
    assert_same_bits(forward_and_backward(call, leaves), forward_and_backward(call, leaves))


@every_call
def test_cuda_another_stream_gives_the_same(build, backend, generator):
    call = build(8)
    leaves = call.leaves(generator, device="cuda")
    expected = forward_and_backward(call, leaves)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = forward_and_backward(call, leaves)
    torch.cuda.current_stream().wait_stream(stream)
    assert_same_bits(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_cuda_group_norm_under_autocast_is_float32(dtype, generator):
    x = torch.randn(2, 8, 4, 4, generator=generator).to("cuda", dtype)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        y, theirs = group_norm(x, 4), torch.nn.functional.group_norm(x, 4)
    assert y.dtype == theirs.dtype == torch.float32


def test_cuda_explain_says_why_the_cpu_kernel_does_not_serve():
    explanation = explain("group_norm", torch.zeros(1, 8, 2, 2, device="cuda"), 4)
    assert explanation.why_not["cpu"] == "serves cpu tensors, got a cuda tensor"

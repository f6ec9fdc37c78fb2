"""The Triton attention kernels on a GPU: agreement with float64, no waiting, CUDA graphs, determinism."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from attention_checks import check_close
from helpers import exact_float32, waiting_is_an_error
from msd_kernels import StageBatch, attention, explain
from msd_kernels.dispatch.backends import use
from msd_kernels.layouts import AttentionLayout
from msd_kernels.ops.attention import triton as implementation
from msd_kernels.runtime import launch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(bool(launch.unavailable()), reason=launch.unavailable() or "-"),
    pytest.mark.skipif(launch.interpreted(), reason="TRITON_INTERPRET is set"),
]

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
LAYOUTS = {
    "EDM 16x16": AttentionLayout((3, 1, 2), (1, 1, 1), (384, 256, 32), 256, 256, "nthd", None),
    "EDM 16x16 interleaved": AttentionLayout((3, 1, 2), (1, 1, 1), (384, 256, 32), 256, 256, "nthdp", None),
    "EDM 8x8 interleaved": AttentionLayout((2, 0, 3), (1, 1, 1), (384, 256, 32), 64, 64, "nthdp", None),
    "one image, NCHW": AttentionLayout((2,), (1,), (384,), 256, 256, "nhpdt", None),
    "several heads": AttentionLayout((1, 2, 1), (6, 4, 2), (32, 40, 24), 200, 200, "ntphd", None),
    "odd sizes": AttentionLayout((2, 1), (3, 1), (20, 33), 37, 37, "nthpd", None),
    "one token": AttentionLayout((3,), (2,), (64,), 1, 1, "nhtd", None),
    "context of one token": AttentionLayout((2, 2), (2, 1), (64, 160), 100, 1, "nthd", None),
    "cross attention": AttentionLayout((2, 1), (4, 2), (40, 32), 1024, 77, "nthd", None),
    "long context": AttentionLayout((1, 1), (2, 2), (16, 64), 50, 1000, "nthd", None),
    "LDM": AttentionLayout((1, 1, 1), (8, 6, 4), (32, 32, 32), 1024, 1024, "nthpd", None),
    "streamed stages": AttentionLayout((1, 1, 1), (1, 1, 1), (384, 256, 32), 700, 700, "nthd", None),
    "streamed planar": AttentionLayout((1,), (2,), (80,), 320, 320, "nphdt", None),
    "largest head": AttentionLayout((1,), (1,), (512,), 300, 300, "nthd", None),
    "4096 tokens": AttentionLayout((1,), (2,), (40,), 4096, 4096, "nhtd", None),
}
EACH_LAYOUT = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def make_inputs(layout, dtype: torch.dtype, scale: float = 1.0) -> list[Tensor | None]:
    """q, k, v and the cotangent on the GPU; ``scale`` is the size of q."""
    size, context = sum(layout.out_sizes), sum(layout.out_sizes) // layout.tokens * layout.context
    generator = torch.Generator("cuda").manual_seed(7)
    sizes = [3 * size, None, None] if layout.packed else [size, context, context]
    drawn = [
        None if n is None else torch.randn(n, generator=generator, device="cuda").to(dtype)
        for n in (*sizes, size)
    ]
    drawn[0] *= scale
    return drawn


def run(tensors: Sequence[Tensor | None], layout) -> list[Tensor | None]:
    """The output and all gradients."""
    q, k, v, dy = tensors
    y, log_sum = implementation.attention(q, k, v, layout)
    wanted = [t is not None for t in (q, k, v)]
    return [y, *implementation.attention_backward(dy, q, k, v, y, log_sum, layout, wanted)]


def check(tensors: Sequence[Tensor | None], found: Sequence[Tensor | None], layout) -> None:
    *inputs, dy = tensors
    y, *gradients = found
    stages = zip(
        layout.inputs(*inputs), layout.outputs(dy), layout.outputs(y), layout.inputs(*gradients), strict=True
    )
    for qkv, cotangent, output, dqkv in stages:
        if output.numel():
            check_close((output, *dqkv), *qkv, cotangent)


@EACH_LAYOUT
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_equal_float64(layout, dtype):
    tensors = make_inputs(layout, dtype)
    with exact_float32(torch.backends.cuda.matmul):
        found = run(tensors, layout)
    check(tensors, found, layout)


@pytest.mark.parametrize("name", ["EDM 16x16", "streamed stages"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_of_magnitude_100(name, dtype):
    layout = LAYOUTS[name]
    tensors = make_inputs(layout, dtype, scale=100.0)
    with exact_float32(torch.backends.cuda.matmul):
        found = run(tensors, layout)
    check(tensors, found, layout)


@EACH_LAYOUT
def test_results_repeat_bit_for_bit(layout):
    tensors = make_inputs(layout, torch.bfloat16)
    first, second = run(tensors, layout), run(tensors, layout)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_auto_serves_a_mixed_batch_here():
    q = StageBatch(torch.zeros(2 * 64 * 64, device="cuda"), (1, 1), (32, 96), 8, 8)
    assert explain("attention", q, q, q).backend == "triton"


def test_the_librarys_log_sum_serves_the_backward_here():
    """Forward by SDPA and backward by Triton is what a long sequence gets."""
    shape = (2, 4, 1024, 64)
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    dy = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    assert explain("attention", q, k, v).backend == "library"
    y = attention(q, k, v)
    found = [y, *torch.autograd.grad(y, (q, k, v), dy)]
    check_close(found, q, k, v, dy)
    with use("triton"):
        mine = torch.autograd.grad(attention(q, k, v), (q, k, v), dy)
    for ours, theirs in zip(mine, found[1:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2**-6, atol=2**-6)


def test_new_counts_never_wait_for_the_device():
    layout = LAYOUTS["EDM 16x16"]
    run(make_inputs(layout, torch.bfloat16), layout)  # compiles
    others = layout._replace(counts=(2, 1, 3)), layout._replace(counts=(1, 0, 4))
    inputs = [make_inputs(other, torch.bfloat16) for other in others]
    torch.cuda.synchronize()
    with waiting_is_an_error():
        for tensors, other in zip(inputs, others, strict=True):
            run(tensors, other)


@pytest.mark.parametrize("name", ["EDM 16x16 interleaved", "LDM"])
@pytest.mark.parametrize("planned_before", [True, False], ids=["planned before", "planned inside"])
def test_a_captured_step_replays_with_new_data(name, planned_before):
    known = LAYOUTS[name]
    layout = known if planned_before else known._replace(counts=(1, 3, 1))
    run(make_inputs(known, torch.bfloat16), known)
    tensors = make_inputs(layout, torch.bfloat16)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(tensors, layout)
    for tensor in tensors:
        if tensor is not None:
            tensor.copy_(torch.randn_like(tensor))
    graph.replay()
    expected = run(tensors, layout)
    torch.cuda.synchronize()
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


def test_tensors_beyond_32_bit_offsets():
    free, _ = torch.cuda.mem_get_info()
    if free < 40 * 2**30:
        pytest.skip(f"needs 40 GiB of free device memory, {free / 2**30:.0f} are free")
    layout = AttentionLayout((2**17 + 8, 1), (1, 1), (64, 32), 256, 256, "nthd", None)
    size = sum(layout.out_sizes)
    q, k, v = (torch.zeros(size, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    v[-(64 + 32) * 256 :] = 1
    y, _ = implementation.attention(q, k, v, layout)
    assert y[: -(64 + 32) * 256].count_nonzero().item() == 0
    assert (y[-(64 + 32) * 256 :] == 1).all()

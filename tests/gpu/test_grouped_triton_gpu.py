"""The grouped Triton kernels on a GPU: agreement with float64, no waiting, CUDA graphs, determinism."""

from __future__ import annotations

import pytest
import torch

from helpers import (
    ROUNDING,
    assert_elements_close,
    conv_backward,
    conv_forward,
    exact_float32,
    waiting_is_an_error,
)
from msd_kernels.layouts import Conv2dLayout
from msd_kernels.ops.grouped_conv2d import reference
from msd_kernels.ops.grouped_conv2d import triton as implementation
from msd_kernels.runtime import launch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(bool(launch.unavailable()), reason=launch.unavailable() or "-"),
    pytest.mark.skipif(launch.interpreted(), reason="TRITON_INTERPRET is set"),
]

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# Roundings to float32 per sum, times the sum of the terms' absolute values: tensor cores truncate some of them.
SUM_ROUNDINGS = 32
LAYOUTS = {
    "EDM 16x16": Conv2dLayout((3, 1, 2), (384, 256, 32), (256, 256, 256), (384, 256, 32), 16, 16, 3, "none"),
    "one stage": Conv2dLayout((2,), (160,), (0,), (96,), 9, 7, 3, "none"),
    "empty stage": Conv2dLayout((2, 0, 1), (64, 128, 32), (0, 0, 0), (32, 64, 128), 8, 8, 1, "none"),
    "odd channels": Conv2dLayout((2, 1), (3, 5), (0, 0), (12, 40), 7, 5, 3, "none"),
    "up": Conv2dLayout((1, 2), (256, 32), (0, 0), (256, 32), 8, 8, 3, "up"),
    "up 1x1": Conv2dLayout((1, 2), (256, 32), (0, 0), (384, 32), 8, 8, 1, "up"),
    "down": Conv2dLayout((1, 2), (128, 32), (0, 0), (128, 32), 16, 8, 3, "down"),
    "linear": Conv2dLayout((300, 4, 9), (512, 512, 512), (0, 0, 0), (384, 256, 32), 1, 1, 1, "none"),
    "linear, few rows": Conv2dLayout((5, 3, 8), (512, 512, 512), (0, 0, 0), (384, 256, 32), 1, 1, 1, "none"),
}
EACH_LAYOUT = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def make_inputs(layout, dtype):
    """x, skip, weight, bias, sample_bias, residual and the cotangent on the GPU."""
    sizes = (
        sum(layout.source_sizes(layout.channels)),
        sum(layout.source_sizes(layout.skip_channels)),
        sum(layout.weight_sizes),
        sum(layout.out_channels),
        sum(layout.sample_sizes),
        sum(layout.out_sizes),
        sum(layout.out_sizes),
    )
    generator = torch.Generator("cuda").manual_seed(7)
    return [torch.randn(n, generator=generator, device="cuda").to(dtype) if n else None for n in sizes]


def run(tensors, layout):
    """The output and all gradients."""
    x, skip, weight, *_, dy = tensors
    y = conv_forward(implementation, tensors[:6], layout, 0.7)
    wanted = [True, skip is not None, True, True, True]
    return [y, *conv_backward(implementation, (dy, x, skip, weight), layout, wanted)]


def run_reference(tensors, layout, function=lambda t: t):
    wide = [None if t is None else function(t.double()) for t in tensors]
    x, skip, weight, *_, dy = wide
    y = conv_forward(reference, wide[:6], layout, 0.7)
    wanted = [True, skip is not None, True, True, True]
    return [y, *conv_backward(reference, (dy, x, skip, weight), layout, wanted)]


@EACH_LAYOUT
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_equal_float64(layout, dtype):
    tensors = make_inputs(layout, dtype)
    with exact_float32(torch.backends.cudnn.conv):
        found = run(tensors, layout)
    magnitudes = run_reference(tensors, layout, torch.abs)
    pooled = ROUNDING[dtype] if layout.resample != "none" else 0
    for actual, expected, magnitude in zip(found, run_reference(tensors, layout), magnitudes, strict=True):
        if actual is not None:
            atol = (SUM_ROUNDINGS * ROUNDING[torch.float32] + pooled) * magnitude.cpu()
            assert_elements_close(actual, expected.cpu(), rtol=ROUNDING[dtype], atol=atol)


@EACH_LAYOUT
def test_results_repeat_bit_for_bit(layout):
    tensors = make_inputs(layout, torch.bfloat16)
    first, second = run(tensors, layout), run(tensors, layout)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_new_counts_never_wait_for_the_device():
    layout = LAYOUTS["EDM 16x16"]
    tensors = make_inputs(layout, torch.bfloat16)
    run(tensors, layout)  # compiles
    others = layout._replace(counts=(2, 1, 3)), layout._replace(counts=(1, 0, 4))
    inputs = [make_inputs(other, torch.bfloat16) for other in others]
    torch.cuda.synchronize()
    with waiting_is_an_error():
        for tensors, other in zip(inputs, others, strict=True):
            run(tensors, other)


@pytest.mark.parametrize("planned_before", [True, False], ids=["planned before", "planned inside"])
def test_a_captured_step_replays_with_new_data(planned_before):
    layout = LAYOUTS["EDM 16x16"]
    if not planned_before:
        layout = layout._replace(counts=(1, 3, 1))
    tensors = make_inputs(layout, torch.bfloat16)
    warm = tensors if planned_before else make_inputs(LAYOUTS["EDM 16x16"], torch.bfloat16)
    run(warm, layout if planned_before else LAYOUTS["EDM 16x16"])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(tensors, layout)
    for tensor in tensors:
        tensor.copy_(torch.randn_like(tensor))
    graph.replay()
    expected = run(tensors, layout)
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


def test_tensors_beyond_32_bit_offsets():
    free, _ = torch.cuda.mem_get_info()
    layout = Conv2dLayout((2**21 + 8, 3), (1024, 32), (0, 0), (16, 16), 1, 1, 1, "none")
    if free < 20 * 2**30:
        pytest.skip(f"needs 20 GiB of free device memory, {free / 2**30:.0f} are free")
    rows, channels = layout.counts[0], layout.channels[0]
    x = torch.zeros(rows * channels + 3 * 32, device="cuda", dtype=torch.bfloat16)
    x[-3 * 32 - channels :] = 1
    weight = torch.ones(16 * (1024 + 32), device="cuda", dtype=torch.bfloat16)
    y = implementation.grouped_conv2d(x, None, weight, None, None, None, layout, 1.0)
    assert y[: (rows - 1) * 16].count_nonzero().item() == 0
    assert (y[(rows - 1) * 16 : rows * 16] == 1024).all()
    assert (y[rows * 16 :] == 32).all()

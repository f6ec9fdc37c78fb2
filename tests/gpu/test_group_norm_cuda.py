"""The CUDA kernels of GroupNorm on a GPU: every way through them, against float64; their logic is tested by
tests/ops/test_group_norm_emulated.py, too."""

from __future__ import annotations

import pytest
import torch

from group_norm_checks import (
    DTYPES,
    LAYOUTS,
    check,
    check_stages_bit_for_bit,
    cotangent,
    make_inputs,
)
from helpers import on_cuda, unavailable, waiting_is_an_error
from msd_kernels import explain, group_norm
from msd_kernels.dispatch.backends import use
from msd_kernels.layouts import GroupNormLayout
from msd_kernels.runtime import cuda
from msd_kernels.runtime.extension import compiled_layout

pytestmark = pytest.mark.gpu

# Feature maps by the way that they take on an H200; other devices may take another one.
MAPS = {
    "one block": ((2, 64, 8, 8), 8),
    "cluster": ((1, 256, 32, 32), 16),
    "large cluster": ((1, 64, 64, 64), 8),
    "two passes": ((1, 16, 256, 256), 1),
    "two passes, odd": ((1, 9, 257, 251), 1),
}
EACH_MAP = pytest.mark.parametrize(("shape", "groups"), MAPS.values(), ids=MAPS)


@pytest.fixture(autouse=True)
def _cuda(exact_cuda):
    if reason := unavailable("cuda"):
        pytest.skip(reason)
    with use("cuda"):
        yield


def device_facts() -> list[int]:
    """As ``group_norm_cuts`` takes them."""
    device = torch.cuda.get_device_properties(0)
    per_block = device.shared_memory_per_block_optin
    per_multiprocessor = device.shared_memory_per_multiprocessor
    return [device.multi_processor_count, per_block, per_multiprocessor, 1024, int(device.major >= 9)]


def step(inputs, groups, dy):
    y = group_norm(num_groups=groups, activation="silu", **inputs.present())
    return [y, *torch.autograd.grad(y, list(inputs.present().values()), dy)]


@EACH_MAP
@LAYOUTS
@pytest.mark.parametrize(("dtype", "parameter_dtype"), DTYPES[::2])
def test_every_way_equals_the_formula(shape, groups, dtype, parameter_dtype, channels_last, generator):
    inputs = make_inputs(generator, shape, dtype, parameter_dtype, channels_last=channels_last).map(on_cuda)
    check(inputs, groups, "cuda", cotangent(inputs, generator))


@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("channels", [32, 160, 256, 288, 384, 512, 640])
def test_channels_of_the_networks_equal_the_formula(channels, dtype, channels_last, generator):
    inputs = make_inputs(generator, (3, channels, 16, 16), dtype, offset=3.0, channels_last=channels_last)
    inputs = inputs.map(on_cuda)
    check(inputs, 16, "cuda", cotangent(inputs, generator))


@EACH_MAP
@LAYOUTS
@pytest.mark.parametrize("offset", [-100.0, 1000.0])
def test_off_centre_inputs(shape, groups, offset, channels_last, generator):
    inputs = make_inputs(generator, shape, offset=offset, channels_last=channels_last).map(on_cuda)
    check(inputs, groups, "cuda", cotangent(inputs, generator))


@pytest.mark.parametrize("shape", [(4, 64, 1, 1), (5, 32), (1, 8, 3, 4, 5)], ids=str)
def test_few_pixels(shape, generator):
    inputs = make_inputs(generator, shape).map(on_cuda)
    check(inputs, 8, "cuda", cotangent(inputs, generator))


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_maps_take_the_ways_they_are_here_for(backward):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the maps were chosen for Hopper")
    for name, ((n, channels, height, width), groups) in MAPS.items():
        layout = GroupNormLayout((n,), (channels,), (0,), (groups,), height * width, True, 1e-5, False)
        compiled = compiled_layout(cuda.kernels().GroupNormLayout, layout, torch.empty(0), *[None] * 4)
        ((one_pass, _, parts, *_),) = cuda.kernels().group_norm_cuts(compiled, backward, device_facts())
        assert bool(one_pass) != name.startswith("two passes")
        if one_pass:
            assert (parts > 1) == name.endswith("cluster")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("counts", "channels", "groups", "size"),
    [
        ((3, 0, 2), (384, 256, 32), (16, 16, 8), (8, 8)),
        ((3, 0, 2), (384, 256, 32), (16, 16, 8), (32, 32)),
        ((1, 2, 1), (3, 64, 36), (3, 16, 4), (9, 10)),
        ((3, 1, 5), (8, 256, 2), (1, 4, 1), (64, 64)),
        ((1,) * 19, (4, *(8,) * 17, 6), (2,) * 19, (16, 16)),
        ((0, 0), (8, 4), (2, 1), (4, 4)),
    ],
    ids=["8x8", "32x32", "unaligned stages", "unlike clusters", "19 stages", "no samples"],
)
def test_a_stage_batch_equals_separate_calls_bit_for_bit(counts, channels, groups, size, dtype, generator):
    check_stages_bit_for_bit(generator, counts, channels, groups, size, dtype, device="cuda")


@EACH_MAP
@LAYOUTS
def test_repetition_does_not_change_a_bit(shape, groups, channels_last, generator):
    inputs = make_inputs(generator, shape, torch.bfloat16, channels_last=channels_last).map(on_cuda)
    dy = cotangent(inputs, generator)
    first = step(inputs, groups, dy)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, step(inputs, groups, dy), strict=True))


@EACH_MAP
def test_no_way_waits_for_the_device_and_all_can_be_captured(shape, groups, generator):
    inputs = make_inputs(generator, shape, torch.bfloat16, channels_last=True).map(on_cuda)
    dy = cotangent(inputs, generator)
    step(inputs, groups, dy)
    torch.cuda.synchronize()
    with waiting_is_an_error():
        step(inputs, groups, dy)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(inputs, groups, dy)
    with torch.no_grad():
        inputs.x.normal_()
    graph.replay()
    expected = step(inputs, groups, dy)
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


def test_tensors_beyond_32_bit_offsets():
    free, _ = torch.cuda.mem_get_info()
    if free < 20 * 2**30:
        pytest.skip(f"needs 20 GiB of free device memory, {free / 2**30:.0f} are free")
    samples = 2**13 + 2
    x = torch.zeros(samples, 32, 32, 256, device="cuda", dtype=torch.bfloat16).movedim(-1, 1)
    x[-2:].normal_()
    y = group_norm(x, 16)
    assert y[:-2].count_nonzero().item() == 0
    expected = torch.nn.functional.group_norm(x[-2:].double(), 16)
    # The rounding to bfloat16, and that of the statistics in float32.
    torch.testing.assert_close(y[-2:].double(), expected, rtol=2.0**-8, atol=1e-6)


def test_cuda_comes_first():
    x = torch.zeros(1, 8, 2, 2, device="cuda")
    with use("auto"):
        assert explain("group_norm", x, 4).backend == "cuda"
        wide = explain("group_norm", torch.zeros(1, 4096, 1, 2, device="cuda"), 1)
    assert wide.backend == "triton"
    assert wide.why_not["cuda"] == "takes up to 2048 channels per group, got 4096"

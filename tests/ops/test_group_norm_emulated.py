"""GroupNorm in CUDA, run on CPU tensors by the emulator; what only a GPU shows is in tests/gpu."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

import cuda_emulator
from cuda_emulator import Device
from group_norm_checks import (
    DTYPES,
    LAYOUTS,
    check,
    check_stages_bit_for_bit,
    cotangent,
    make_inputs,
    over_channels,
    random_calls,
)
from msd_kernels import group_norm
from msd_kernels.dispatch.backends import Call, use
from msd_kernels.layouts import GroupNormLayout
from msd_kernels.ops.group_norm import BACKENDS
from msd_kernels.ops.group_norm import cuda as cuda_group_norm
from msd_kernels.runtime.extension import compiled_layout

# Which way a feature map of SLAB with 4 groups takes.
SLAB = (1, 64, 24, 24)
PATHS = {
    "one block": Device(multiprocessors=1, shared_per_block=227 << 10, clusters=False),
    "cluster": Device(multiprocessors=64, shared_per_block=18_900),
    "two passes": Device(multiprocessors=4, shared_per_block=16 << 10, clusters=False),
}
EACH_PATH = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
DEVICES = [
    Device(),
    Device(multiprocessors=132, shared_per_block=227 << 10),
    Device(multiprocessors=1, shared_per_block=227 << 10, clusters=False),
    Device(multiprocessors=64, shared_per_block=40 << 10),
    Device(multiprocessors=4, shared_per_block=40 << 10, clusters=False),
]
# As cudaDeviceGetAttribute says: multiprocessors, shared memory per block, per multiprocessor, reserved, clusters.
H200 = (132, 227 << 10, 228 << 10, 1 << 10, 1)
A100 = (108, 163 << 10, 164 << 10, 1 << 10, 0)
RTX4090 = (128, 99 << 10, 100 << 10, 1 << 10, 0)


@pytest.fixture(autouse=True)
def emulator(emulated_cuda):
    emulated_cuda.use(Device())
    with cuda_emulator.served_by(emulated_cuda, BACKENDS), use("cuda"):
        yield emulated_cuda


def cuts(kernels, count, channels, groups, spatial, channels_last, dtype, backward, device):
    """How one stage is cut: (one pass, groups of a unit, parts, pixels of a part, bytes of shared memory)."""
    layout = GroupNormLayout((count,), (channels,), (0,), (groups,), spatial, channels_last, 1e-5, False)
    compiled = compiled_layout(kernels.GroupNormLayout, layout, torch.empty(0, dtype=dtype), *[None] * 4)
    (found,) = kernels.group_norm_cuts(compiled, backward, device)
    return found


@LAYOUTS
@pytest.mark.parametrize(("dtype", "parameter_dtype"), DTYPES)
@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        ((2, 32, 8, 8), 8),
        ((2, 160, 5, 7), 16),
        ((1, 256, 6, 6), 16),
        ((1, 288, 4, 4), 16),
        ((2, 384, 3, 3), 16),
        ((1, 512, 2, 2), 16),
        ((1, 640, 4, 3), 16),
        ((2, 3, 9, 11), 1),
        ((4, 64, 1, 1), 16),
        ((2, 24, 6, 6), 1),
        ((5, 32), 8),
        ((1, 8, 3, 4, 5), 2),
        ((1, 2048, 1, 2), 1),
        ((1, 300, 2, 2), 300),
    ],
    ids=str,
)
def test_group_norm_equals_the_formula(shape, groups, dtype, parameter_dtype, channels_last, generator):
    inputs = make_inputs(generator, shape, dtype, parameter_dtype, channels_last=channels_last)
    check(inputs, groups, "cuda", cotangent(inputs, generator))


@EACH_PATH
@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_group_norm_by_every_path(path, channels_last, dtype, emulator, generator):
    inputs = make_inputs(generator, SLAB, dtype, channels_last=channels_last)
    emulator.use(path)
    y = group_norm(inputs.x, 4, inputs.weight)
    forward = emulator.launches()
    emulator.use(path)
    y.backward(cotangent(inputs, generator))
    expected = {
        "one block": [(1, 0), (2, 0)],
        "cluster": [(0, 1), (1, 1)],
        "two passes": [(3, 0), (4, 0)],
    }
    assert [forward, emulator.launches()] == expected[next(name for name in PATHS if PATHS[name] is path)]
    check(inputs, 4, "cuda", cotangent(inputs, generator))


@LAYOUTS
@pytest.mark.parametrize("cut", [[1, 1], [2, 1], [4, 2], [1, 4], [2, 8], [4, 0], [1, 0]], ids=str)
def test_group_norm_in_any_cut(cut, channels_last, emulator, generator, monkeypatch):
    emulator.use(PATHS["one block"] if cut[1] in (0, 1) else Device(shared_per_block=227 << 10))
    monkeypatch.setattr(cuda_group_norm, "CUT", cut)
    inputs = make_inputs(generator, SLAB, channels_last=channels_last)
    group_norm(inputs.x.detach(), 4)
    assert emulator.launches() == ((3, 0) if cut[1] == 0 else (1, 0) if cut[1] == 1 else (0, 1))
    check(inputs, 4, "cuda", cotangent(inputs, generator))


def test_group_norm_refuses_an_impossible_cut(emulator, monkeypatch):
    for cut in ([3, 1], [1, 16], [1, 8]):
        monkeypatch.setattr(cuda_group_norm, "CUT", cut)
        with pytest.raises(
            RuntimeError, match="8 channels in 4 groups: the cut that is asked for is impossible"
        ):
            group_norm(torch.zeros(1, 8, 1, 2), 4)


@EACH_PATH
@LAYOUTS
@pytest.mark.parametrize("offset", [-100.0, 1000.0])
def test_group_norm_of_off_centre_inputs(offset, channels_last, path, emulator, generator):
    emulator.use(path)
    inputs = make_inputs(generator, SLAB, offset=offset, channels_last=channels_last)
    check(inputs, 4, "cuda", cotangent(inputs, generator))


@EACH_PATH
@LAYOUTS
def test_group_norm_around_an_outlier(channels_last, path, emulator, generator):
    """Sums of differences from the first element would lose digits."""
    emulator.use(path)
    inputs = make_inputs(generator, SLAB, channels_last=channels_last)
    with torch.no_grad():
        inputs.x[..., 0, 0] += 1e4
    check(inputs, 4, "cuda", cotangent(inputs, generator))


def test_group_norm_of_a_share_that_ends_before_a_teams_part(emulator, generator):
    """In NCHW the eighth share has 997 of 1028 pixels, and some threads get none of them."""
    emulator.use(Device(multiprocessors=64, shared_per_block=6 << 10))
    inputs = make_inputs(generator, (1, 1, 3, 2731))
    group_norm(inputs.x.detach(), 1)
    assert emulator.launches() == (0, 1)
    check(inputs, 1, "cuda", cotangent(inputs, generator))


@EACH_PATH
@LAYOUTS
@pytest.mark.parametrize("value", [0.1, -1000.1])
def test_group_norm_of_constant_inputs(value, channels_last, path, emulator, generator):
    emulator.use(path)
    inputs = make_inputs(generator, SLAB, channels_last=channels_last)
    with torch.no_grad():
        inputs.x.fill_(value)
    check(inputs, 4, "cuda", cotangent(inputs, generator))


@LAYOUTS
def test_group_norm_keeps_groups_apart(channels_last, generator):
    inputs = make_inputs(generator, (2, 40, 7, 5), channels_last=channels_last)
    with torch.no_grad():
        inputs.x.mul_(over_channels(10.0 ** torch.arange(-4, 4).repeat_interleave(5), inputs.x, 1))
    check(inputs, 8, "cuda", cotangent(inputs, generator), eps=1e-12)


@LAYOUTS
@pytest.mark.parametrize("silu", [False, True], ids=["linear", "silu"])
@pytest.mark.parametrize("present", [(), ("weight",), ("bias", "scale"), ("weight", "shift")], ids="-".join)
def test_group_norm_with_some_of_its_parameters(present, silu, channels_last, generator):
    inputs = make_inputs(generator, (2, 24, 3, 3), present=present, channels_last=channels_last)
    check(inputs, 4, "cuda", cotangent(inputs, generator), silu=silu)


@LAYOUTS
def test_group_norm_takes_cotangents_of_the_other_layout(channels_last, generator):
    inputs = make_inputs(generator, (3, 32, 5, 6), channels_last=channels_last)
    other = torch.contiguous_format if channels_last else torch.channels_last
    dy = torch.randn(inputs.x.shape, generator=generator)
    check(inputs, 8, "cuda", dy.contiguous(memory_format=other))
    check(inputs, 8, "cuda", dy[:, :, :1, :1].expand_as(dy))


@pytest.mark.parametrize("calls", [100, pytest.param(500, marks=pytest.mark.full)])
def test_group_norm_of_random_shapes(calls, emulator, generator):
    draw = random.Random(calls)
    for inputs, groups, silu in random_calls(generator, calls):
        emulator.use(draw.choice(DEVICES))
        check(inputs, groups, "cuda", cotangent(inputs, generator), eps=1e-3, silu=silu)


@EACH_PATH
@pytest.mark.parametrize(
    ("counts", "channels", "groups", "dtype"),
    [
        ((2, 0, 1), (384, 256, 32), (16, 16, 8), torch.bfloat16),
        ((1, 2, 1), (3, 64, 36), (3, 16, 4), torch.float16),
        ((3, 1, 5), (8, 256, 2), (1, 4, 1), torch.float32),
        ((1,) * 19, (4, *(8,) * 17, 6), (2,) * 19, torch.float32),
        ((0, 0), (8, 4), (2, 1), torch.float32),
    ],
    ids=["EDM", "unaligned stages", "stages of unlike clusters", "19 stages", "no samples"],
)
def test_group_norm_of_a_stage_batch_equals_separate_calls_bit_for_bit(
    counts, channels, groups, dtype, path, emulator, generator
):
    emulator.use(path)
    check_stages_bit_for_bit(generator, counts, channels, groups, (9, 10), dtype)


@EACH_PATH
@LAYOUTS
def test_group_norm_does_not_depend_on_the_order_of_threads(path, channels_last, emulator, generator):
    """A barrier too few would show."""
    inputs = make_inputs(generator, (1, 36, 24, 23), channels_last=channels_last)
    dy = cotangent(inputs, generator)
    results = []
    for order in (0, 1, 2, 3):
        emulator.use(Device(path.multiprocessors, path.shared_per_block, path.clusters, order))
        y = group_norm(num_groups=3, activation="silu", **inputs.present())
        results.append(
            [y, *torch.autograd.grad(y, list(inputs.present().values()), dy, materialize_grads=True)]
        )
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_group_norm_refuses_wide_groups(emulator):
    with pytest.raises(
        RuntimeError, match="4096 channels in 1 groups: at most 2048 channels per group are served"
    ):
        group_norm(torch.zeros(1, 4096, 1, 2), 1)
    layout = GroupNormLayout((1,), (4096,), (0,), (1,), 2, True, 1e-5, False)
    said = cuda_group_norm.cannot(Call("group_norm", torch.device("cuda"), torch.float32, layout))
    assert said == "takes up to 2048 channels per group, got 4096"


@pytest.mark.parametrize("device", [H200, A100, RTX4090], ids=["H200", "A100", "RTX4090"])
def test_cuts_of_random_shapes_are_possible(device, emulator):
    draw = random.Random(1)
    for _ in range(500):
        group_channels, groups = (
            draw.choice((1, 3, 4, 7, 10, 16, 24, 40, 64, 2048)),
            draw.choice((1, 2, 8, 12, 16, 32)),
        )
        spatial, count = (
            draw.choice((1, 2, 35, 64, 256, 1024, 4096, 2**18, 2**30)),
            draw.choice((1, 8, 64, 512)),
        )
        channels_last, backward = draw.random() < 0.5, draw.random() < 0.5
        dtype = draw.choice((torch.float16, torch.float32))
        one_pass, block_groups, parts, part_pixels, shared = cuts(
            emulator.kernels,
            count,
            group_channels * groups,
            groups,
            spatial,
            channels_last,
            dtype,
            backward,
            device,
        )
        assert 1 <= block_groups <= groups
        assert block_groups * group_channels <= 2048
        assert (parts - 1) * part_pixels < spatial <= parts * part_pixels
        assert shared <= device[1]
        assert channels_last or parts == 1 or part_pixels * dtype.itemsize % 16 == 0
        if one_pass:
            assert parts in ((1, 2, 4, 8) if device[4] else (1,))


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(
    ("channels", "groups", "side"),
    [(c, 16, s) for c, s in itertools.product((160, 256, 288, 384, 512, 640), (8, 16, 32))]
    + [(32, 8, 32), (224, 32, 64), (448, 32, 32), (896, 32, 8)],
)
def test_hopper_reads_the_networks_feature_maps_once(channels, groups, side, backward, emulator):
    for count, channels_last in itertools.product((1, 8, 64, 512), (False, True)):
        layout = (channels, groups, side**2, channels_last, torch.bfloat16, backward)
        assert cuts(emulator.kernels, count, *layout, H200)[0]


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("barrier for some", "some threads wait at a barrier that others never reach"),
        ("copy without wait", "ends without waiting for its copies (block 0, thread 0)"),
        ("unaligned copy", "unaligned copy"),
        ("copy outside", "copy to the outside of shared memory"),
        ("write outside", "writes behind its shared memory"),
        ("read after end", "reads the shared memory of a block that has ended (block 1"),
        ("half a barrier", "ends between arriving at and waiting for the cluster"),
    ],
)
def test_emulator_finds(fault, said, emulator):
    assert said in emulator.fault(fault)


def test_emulator_shows_a_missing_barrier(emulator):
    emulator.use(Device(order=0))
    forwards = emulator.fault("missing barrier")
    emulator.use(Device(order=1))
    assert emulator.fault("missing barrier") != forwards

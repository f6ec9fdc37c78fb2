"""Dense DTensors of two processes, over Gloo on the CPU."""

from __future__ import annotations

import pytest

import forks

# Both ranks run all cases, for starting them takes longest; each prints what went wrong with its own view.
SCRIPT = """
import sys, torch, torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
from msd_kernels import StageBatch, attention, group_norm, resample2d

torch.set_num_threads(1)
rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
generator = torch.Generator().manual_seed(3)
SAMPLES, ALL = Shard(0), Replicate()

def random(*shape):
    return torch.randn(shape, generator=generator, dtype=torch.float64)

def norm(x, weight, bias, scale, shift):
    return group_norm(x, 2, weight, bias, scale=scale, shift=shift, activation="silu")

def packed(x):
    return attention(x, num_heads=2, layout="per_head")

def down(x):
    return resample2d(x, [1, 3, 3, 1], down=2)

def shard(t, placement):
    if placement != SAMPLES:
        return distribute_tensor(t, mesh, [placement]).requires_grad_()
    own = [*t.chunk(2), t[:0]][rank]  # in its own memory format, which distribute_tensor does not keep
    return DTensor.from_local(own, mesh, [placement], shape=t.shape, stride=t.stride()).requires_grad_()

def check(name, function, tensors, placements, kept):
    leaves = [t.clone().requires_grad_() for t in tensors]
    expected = function(*leaves)
    dy = random(*expected.shape)
    gradients = torch.autograd.grad(expected, leaves, dy)
    shards = [shard(t, p) for t, p in zip(tensors, placements)]
    y = function(*shards)
    assert isinstance(y, DTensor) and y.placements == (kept,), y.placements
    assert y.shape == expected.shape
    if kept == SAMPLES == placements[0]:
        assert y.stride() == expected.stride(), (name, y.stride(), expected.stride())
    found = torch.autograd.grad(y, shards, distribute_tensor(dy, mesh, [kept]))
    for ours, theirs in zip((y, *found), (expected, *gradients), strict=True):
        torch.testing.assert_close(ours.full_tensor(), theirs, rtol=1e-12, atol=1e-12)

def last(x):
    return x.contiguous(memory_format=torch.channels_last)

for batch in (4, 3, 1):  # 1 leaves nothing to the second rank
    x, per_sample = random(batch, 12, 4, 4), [random(batch, 12), random(batch, 12)]
    affine = [random(12), random(12)]
    for layout in (x, last(x)):
        norm_inputs = [layout, *affine, *per_sample]
        for placements, kept in (
            ((SAMPLES, ALL, ALL, SAMPLES, SAMPLES), SAMPLES),
            ((SAMPLES, SAMPLES, ALL, ALL, SAMPLES), SAMPLES),
            ((ALL, ALL, SAMPLES, ALL, SAMPLES), ALL),
            ((Shard(1), ALL, ALL, ALL, ALL), ALL),
        ):
            check("group_norm", norm, norm_inputs, placements, kept)
        for placement, kept in ((SAMPLES, SAMPLES), (ALL, ALL), (Shard(1), ALL)):
            check("packed attention", packed, [layout], [placement], kept)
            check("resample2d", down, [layout], [placement], kept)
    q, k, v = random(batch, 2, 5, 3), random(batch, 2, 4, 3), random(batch, 2, 4, 3)
    check("attention", attention, [q, k, v], [SAMPLES, ALL, SAMPLES], SAMPLES)

x = distribute_tensor(random(4, 8, 2, 2), mesh, [SAMPLES])
try:
    group_norm(x, 2, random(8), random(8))
except TypeError as error:
    print(error)
values = distribute_tensor(random(4 * 8 * 4), mesh, [SAMPLES])
try:
    group_norm(StageBatch(values, (2, 2), (8, 8), 2, 2), 2)
except NotImplementedError as error:
    print(error)
print("done")
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def printed(tmp_path_factory) -> list[list[str]]:
    store = tmp_path_factory.mktemp("sharding") / "store"
    ranks = [forks.Program(SCRIPT, rank, store) for rank in range(2)]
    try:
        for program in ranks:
            program.wait(180)
    finally:
        for program in ranks:
            program.kill()
    assert [program.returncode for program in ranks] == [0, 0], [program.stderr for program in ranks]
    return [program.stdout.splitlines() for program in ranks]


def test_sharded_samples_stay_sharded_and_have_the_values_and_gradients_of_whole_ones(printed):
    assert [lines[-1] for lines in printed] == ["done", "done"]


def test_sharded_samples_with_ordinary_parameters_are_refused(printed):
    assert {lines[0] for lines in printed} == {"group_norm: weight must be a DTensor as x is, got Tensor"}


def test_sharded_stage_batches_are_refused_by_pytorch(printed):
    assert all(
        "msd_kernels.group_norm.default does not have a sharding strategy" in lines[1] for lines in printed
    )

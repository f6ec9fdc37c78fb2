"""What a training step moves on a GPU, counted where there is none."""

from __future__ import annotations

import json

import pytest
import torch

from helpers import import_benchmarks
from msd_kernels import StageBatch, group_norm
from msd_kernels.runtime import launch as triton_launch

import_benchmarks()

import step_traffic  # noqa: E402

from multistage_diffusion import presets  # noqa: E402

pytestmark = pytest.mark.skipif(
    bool(triton_launch.unavailable()) or triton_launch.interpreted() or torch.cuda.is_available(),
    reason="needs Triton, and no GPU",
)

# The most ops and bytes that a step, or an evaluation, may need of each preset and mix.
BOUNDS = {
    ("edm-cifar10", (92, 3, 1), "step"): (527, 52.32e9),
    ("edm-cifar10", (92, 3, 1), "forward"): (206, 12.44e9),
    ("edm-celeba", (92, 3, 1), "step"): (661, 109.31e9),
    ("edm-celeba", (92, 3, 1), "forward"): (257, 30.28e9),
    ("ncsnpp-cifar10", (32, 32, 32), "step"): (1159, 66.46e9),
    ("ncsnpp-cifar10", (32, 32, 32), "forward"): (447, 13.15e9),
    ("uvit-cifar10", (32, 32, 32), "step"): (350, 50.16e9),
    ("uvit-cifar10", (32, 32, 32), "forward"): (167, 13.57e9),
    ("ldm-celebahq256", (16, 16, 16), "step"): (487, 86.67e9),
    ("ldm-celebahq256", (16, 16, 16), "forward"): (206, 18.47e9),
}


def test_ops_count_with_what_they_read_and_write():
    with step_traffic.counted() as traffic:
        x = torch.empty(3, 5)
        x.clone().zero_().add_(x[0]).view(15).t()
    ((_, found),) = traffic.parts.items()
    assert {name: (e.ops, e.read, e.written) for name, e in found.items()} == {
        "clone float32": (1, 60, 60),
        "zero_ float32": (1, 0, 60),
        "add_ float32": (1, 60 + 20, 60),
    }


def test_scratch_of_an_op_counts():
    """The backward's sums per sample and channel lie in memory between its two launches; so do the joined weights."""
    with step_traffic.counted() as traffic:
        x = StageBatch(
            torch.empty(2 * 16 * 8, dtype=torch.bfloat16, requires_grad=True), (1, 1), (8, 8), 4, 4
        )
        weight = [torch.empty(8, dtype=torch.bfloat16, requires_grad=True) for _ in range(2)]
        group_norm(x, 2, weight).values.square().sum().backward()
    found = traffic.parts[""]["group_norm_backward"]
    joined, parts, tables = 2 * 8 * 2, 2 * 8 * 4, 4096
    assert found.ops == 1
    assert 2 * (joined + parts) <= found.scratch <= 2 * (joined + parts) + tables


@pytest.mark.full
@pytest.mark.parametrize(("preset", "counts", "what"), BOUNDS, ids=str)
def test_a_step_moves_no_more_than_it_did(preset, counts, what):
    run = step_traffic.forward if what == "forward" else step_traffic.training_step
    ops, size = BOUNDS[preset, counts, what]
    found = step_traffic.summary(run(presets.find(preset), counts))
    assert found["ops"] <= ops
    assert found["bytes"] <= size


def test_the_command_prints_totals_of_all_parts(capsys, monkeypatch):
    entries = {"add float32": step_traffic.Entry(2, 30, 20, 1)}
    traffic = step_traffic.Traffic({"update": entries, "loss and gradients": entries})
    monkeypatch.setattr(step_traffic, "training_step", lambda preset, counts: traffic)
    assert step_traffic.main(["--preset", "edm-cifar10", "--counts", "92,3,1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["ops"], found["bytes"]) == (4, 102)
    assert found["parts"]["update"] == {"ops": 2, "bytes": 51}
    assert step_traffic.main([]) == 0
    assert "add float32" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        step_traffic.main(["--counts", "1,2"])
    assert "has 3 stages" in capsys.readouterr().err

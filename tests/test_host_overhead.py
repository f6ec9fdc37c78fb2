"""The tables of what calls and their plans cost the host."""

from __future__ import annotations

import json

import pytest
import torch

from helpers import import_benchmarks
from msd_kernels.runtime import launch

import_benchmarks()

import host_overhead  # noqa: E402


def test_every_op_is_measured_in_both_directions(capsys):
    assert host_overhead.main(["--json", "--seconds", "0"]) == 0
    calls = json.loads(capsys.readouterr().out)["calls"]
    ops = {name.partition(",")[0].removesuffix(" of stages") for name in calls}
    assert ops == {"attention", "group_norm", "grouped_conv2d", "grouped_linear", "resample2d"}
    assert sum(name.endswith("forward and backward") for name in calls) == len(calls) // 2
    assert all(entry["us"] > 0 and entry["of_torch"] > 0 for entry in calls.values())


@pytest.mark.slow
@pytest.mark.skipif(
    bool(launch.unavailable()) or launch.interpreted() or torch.cuda.is_available(),
    reason="needs Triton's compiler, and no GPU",
)
@pytest.mark.full
def test_planning_is_measured_for_every_op_of_a_step(capsys):
    import host_planning

    assert host_planning.main(["--json", "--mixes", "1"]) == 0
    planning = json.loads(capsys.readouterr().out)["planning"]
    assert planning["plans"] == 89
    assert planning["us_each"].keys() == {
        "attention.plan",
        "group_norm.plan",
        "grouped_conv2d._plan_dgrad",
        "grouped_conv2d._plan_forward",
        "grouped_conv2d._plan_wgrad",
    }

"""The table of what a call costs the host."""

from __future__ import annotations

import json

from helpers import import_benchmarks

import_benchmarks()

import host_overhead  # noqa: E402


def test_every_op_is_measured_in_both_directions(capsys):
    assert host_overhead.main(["--json", "--seconds", "0"]) == 0
    calls = json.loads(capsys.readouterr().out)["calls"]
    ops = {name.partition(",")[0].removesuffix(" of stages") for name in calls}
    assert ops == {"attention", "group_norm", "grouped_conv2d", "grouped_linear", "resample2d"}
    assert sum(name.endswith("forward and backward") for name in calls) == len(calls) // 2
    assert all(entry["us"] > 0 and entry["of_torch"] > 0 for entry in calls.values())

"""The races of the benchmarks on a clock of their own: none takes longer than it may, and each says that it begins."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

from helpers import import_benchmarks

import_benchmarks()

from harness import OURS, ROOT, Rounds  # noqa: E402


class Machine:
    """A clock that only the calls of its cases move on, each by so many seconds; its first call may take longer."""

    def __init__(self, seconds: dict[str, float], compilation: float = 0.0) -> None:
        self.now, self._seconds, self._compiling = 0.0, seconds, dict.fromkeys(seconds, compilation)
        self.cases = {name: lambda name=name: self._run(name) for name in seconds}

    def _run(self, name: str) -> None:
        self.now += self._seconds[name] + self._compiling[name]
        self._compiling[name] = 0.0

    def timer(self, function) -> float:
        before = self.now
        function()
        return self.now - before

    def race(self, seconds: float, *, span: float = 0.0, warm: bool = False):
        return Rounds(self.cases, self.timer, span, lambda: self.now).run(seconds, warm=warm)


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("span", [0.0, 0.01])
@pytest.mark.parametrize("budget", [0.0, 0.2, 3.0, 30.0])
@pytest.mark.parametrize("slowest", [1e-5, 1e-3, 0.04, 0.7, 9.0, 100.0])
def test_a_race_takes_no_longer_than_its_budget_and_one_round(slowest, budget, span, warm):
    costs = {OURS: slowest, "fast": slowest / 7, "middle": slowest / 2}
    machine = Machine(costs, compilation=0.0 if warm else 40.0)
    comparison = machine.race(budget, span=span, warm=warm)
    first_calls = 0.0 if warm else sum(costs.values()) + 3 * 40.0
    one_round = sum(sum(turns[-1]) for turns in comparison.turns.values())
    assert machine.now - first_calls <= budget + one_round + 1e-9
    counts = {len(turns) for turns in comparison.turns.values()}
    assert len(counts) == 1
    assert min(counts) >= 1
    assert Rounds.MOST_ROUNDS in counts or machine.now - first_calls + 2 * one_round > budget
    for name, cost in costs.items():
        assert comparison.time(name).median == pytest.approx(cost)


def test_turns_are_of_as_many_calls_as_last_a_while():
    comparison = Machine({OURS: 0.001, "peer": 0.005, "tiny": 1e-6}).race(10.0, span=0.01)
    assert {name: len(turns[0]) for name, turns in comparison.turns.items()} == {
        OURS: 10,
        "peer": 2,
        "tiny": Rounds.MOST_CALLS,
    }
    assert comparison.ratio("peer").median == pytest.approx(5.0)


def test_the_peers_take_turns_in_following_ours():
    order = []
    machine = Machine({OURS: 0.1, "a": 0.1, "b": 0.1})
    cases = {
        name: lambda name=name, run=run: (order.append(name), run()) for name, run in machine.cases.items()
    }
    Rounds(cases, machine.timer, clock=lambda: machine.now).run(1.0, warm=True)
    assert order == [OURS, "a", "b", OURS, "b", "a", OURS, "a", "b"]


RACE = """
import time

def test_two_functions(race, capsys):
    print("is captured")
    comparison = race({"ours": lambda: time.sleep(0.002), "peer compiled": lambda: time.sleep(0.001)}, seconds=0.2)
    assert comparison.ratio("peer compiled").median > 0
"""


def test_a_benchmark_says_that_it_begins_and_hands_its_times_on(tmp_path):
    (tmp_path / "bench_two.py").write_text(RACE)
    command = [sys.executable, "-m", "pytest", "-p", "conftest", "-c", os.devnull, "--rootdir", str(tmp_path)]
    command += [str(tmp_path / "bench_two.py"), f"--benchmark-json={tmp_path / 'found.json'}"]
    # Not as a part of this run: pytest-benchmark measures nothing where it finds that it has been started in parallel.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        command, capture_output=True, text=True, env=environment, check=False, cwd=tmp_path
    )
    assert result.returncode == 0, result.stdout + result.stderr
    begins, first, *_ = re.findall(
        r"^(?:\d\d:\d\d:\d\d two_functions|         first calls .*)$", result.stdout, re.MULTILINE
    )
    assert begins.endswith("two_functions")
    assert first.strip() == "first calls and 0.2 s of ours, peer compiled"
    assert "1 benchmarks in" in result.stdout
    (found,) = json.loads((tmp_path / "found.json").read_text())["benchmarks"]
    assert found["stats"]["rounds"] == found["extra_info"]["rounds"] > 0
    assert found["stats"]["median"] == pytest.approx(found["extra_info"]["seconds"]["ours"][0], rel=1e-3)

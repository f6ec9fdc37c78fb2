"""The comparison with another commit: what the processes of both trees are asked, and what is made of their answers."""

from __future__ import annotations

import io
import json
import sys

import pytest
import torch

from helpers import import_benchmarks

import_benchmarks()

import compare  # noqa: E402

from harness import ROOT  # noqa: E402


class Tree:
    """Answers as a process does."""

    failures = ()

    def __init__(self, name: str, turns: dict[str, float], size: float = 1.0) -> None:
        self.name, self.names, self._turns, self._size = name, list(turns), turns, size

    def ask(self, request: str, case: str) -> float:
        if self._turns[case] < 0:
            raise RuntimeError(f"{self.name}: it broke")
        return self._size if request == "prepare" else self._turns[case]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(compare, "PAUSE", 0.0)


def test_ratios_above_one_say_that_this_tree_is_faster(capsys):
    this, base = Tree("this", {"a": 1.0, "b": 2.0, "c": 1.0}), Tree("base 123", {"a": 2.0, "b": 1.0, "c": -1})
    found = compare.compare(this, base, [], seconds=0.0)
    assert {name: found[name]["ratio"]["base"][0] for name in "ab"} == {"a": 2.0, "b": 0.5}
    assert found["c"] == {"error": "base 123: it broke"}
    assert compare.row("a", found["a"]) == ("a", "1000.000", "2000.000", "2.000 [2.000, 2.000]", "")
    assert compare.row("c", found["c"])[-1] == "base 123: it broke"
    assert capsys.readouterr().err.count("\n") == 3


def test_only_some_cases_are_compared():
    turns = {"op norm": 1.0, "host norm": 1.0}
    assert list(compare.compare(Tree("this", turns), Tree("base", turns), ["host"], seconds=0.0)) == [
        "host norm"
    ]


def test_results_that_differ_are_marked():
    turns = {"a": 1.0}
    for size, said in ((1.04, ""), (1.06, "differs"), (0.0, "differs"), (float("nan"), "differs")):
        found = compare.compare(Tree("this", turns), Tree("base", turns, size), [], seconds=0.0)
        assert compare.row("a", found["a"])[-1] == said


def test_a_case_that_the_base_lacks_says_why():
    base = Tree("base", {})
    base.failures = ["ops: ImportError: no such name"]
    found = compare.compare(Tree("this", {"a": 1.0}), base, [], seconds=0.0)
    assert found == {"a": {"error": "base: ops: ImportError: no such name"}}


def test_a_process_answers_line_by_line(monkeypatch):
    def broken_group():
        raise ImportError("no such name")

    def group():
        return {"ones": lambda: lambda: (None, torch.full((3,), -2.0)), "fails": lambda: 1 / 0}

    answers = io.StringIO()
    requests = [["prepare", "ones"], ["turn", "ones"], ["prepare", "fails"]]
    monkeypatch.setattr(compare, "GROUPS", (broken_group, group))
    monkeypatch.setattr(compare, "TURN", 0.0)
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(map(json.dumps, requests))))
    monkeypatch.setattr(sys, "stdout", answers)
    compare.serve(ROOT)
    greeting, ready, turn, failure = map(json.loads, answers.getvalue().splitlines())
    assert greeting == {
        "names": ["ones", "fails"],
        "failures": ["broken_group: ImportError: no such name"],
    }
    assert ready == {"value": 2.0}
    assert 0 < turn["value"] < 1
    assert failure == {"error": "ZeroDivisionError: division by zero"}


def test_a_process_of_another_tree_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="is not of"):
        compare.serve(tmp_path)


def test_every_case_is_made_by_this_tree(monkeypatch):
    """The ops and the calls alone: whole steps take a network of published size."""
    monkeypatch.setattr(compare, "GROUPS", (compare.whole_steps, compare.host))
    served = compare.Served()
    assert served.failures == []
    assert {name.split()[0] for name in served.names} == {"training", "sampling", "host"}
    assert served.prepare("host group_norm, forward") > 0
    monkeypatch.setattr(compare, "GROUPS", (compare.ops,))
    served = compare.Served()
    assert served.failures == []
    assert len(served.names) == 14
    assert served.prepare("op grouped_linear, step") > 0

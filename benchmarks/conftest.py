"""The fixtures of the benchmarks, facts about the machine in place of pytest-benchmark's, and the table at the end."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

import harness
from harness import OURS, Comparison, Function, Rounds

ROWS = pytest.StashKey[list[list]]()  # label, Comparison, dict of notes
# Seconds of a turn: short ones say more about what the case before has left in the caches than about the op.
TURN = 0.01
FACTS = pytest.StashKey[dict[str, object]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []
    config.stash[FACTS] = harness.machine_facts()  # the load, before this run adds to it
    # The rest is in the JSON; what counts here is the table of ratios.
    config.option.benchmark_columns = ["median", "iqr", "rounds"]


def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict[str, object]:
    return dict(config.stash[FACTS])


def pytest_benchmark_generate_commit_info(config: pytest.Config) -> dict[str, object]:
    return {"id": harness.commit()}


@pytest.fixture(scope="session")
def bandwidth() -> float:
    """Bytes per second of a copy on this machine, in this run."""
    return harness.copy_bandwidth()


@pytest.fixture(params=[False, True], ids=["forward", "step"])
def backward(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.fixture
def two_threads() -> Iterator[None]:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("the goals are for two cores, this machine gives one")
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


class Race:
    """Interleaves ``cases["ours"]`` with its peers and records medians and ratios."""

    def __init__(self, benchmark, request: pytest.FixtureRequest) -> None:
        self._benchmark, self._rows = benchmark, request.config.stash[ROWS]
        self._label = request.node.name.removeprefix("test_")

    def __call__(self, cases: dict[str, Function], seconds: float) -> Comparison:
        """Races for about so many seconds."""
        rounds = Rounds(cases, span=TURN)
        count = rounds.calibrate(seconds)
        # Teardown runs after every round and is not in its time. At last comes one call more, which does not count.
        self._benchmark.pedantic(
            rounds.ours, teardown=rounds.peers, rounds=count, iterations=rounds.calls[OURS]
        )
        if self._benchmark.disabled:  # then it has made one call only
            rounds.peers()
        comparison = rounds.comparison(count)
        self._benchmark.extra_info.update(comparison.as_dict(), threads=torch.get_num_threads())
        self._rows.append([self._label, comparison, {}])
        return comparison

    def note(self, **facts: object) -> None:
        """Adds facts to the last race."""
        self._benchmark.extra_info.update(facts)
        self._rows[-1][2].update(facts)


@pytest.fixture
def race(benchmark, request: pytest.FixtureRequest) -> Race:
    return Race(benchmark, request)


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    rows = config.stash[ROWS]
    if not rows:
        return
    terminalreporter.section("ours and peers in turns of several calls: median [quartiles]")
    facts = config.stash[FACTS]
    if facts["load"] > 0.5 * facts["cores"]:
        terminalreporter.write_line(
            f"Other processes were at work, load {facts['load']} on {facts['cores']} cores: do not trust these times."
        )
    terminalreporter.write_line("  ".join(f"{name} {value}" for name, value in facts.items()))
    header = ("case", "ours ms", "peer", "peer ms", "peer / ours", "first calls", "fastest", "")
    lines = [
        (
            label,
            harness.milliseconds(comparison.time().median),
            peer,
            harness.milliseconds(comparison.time(peer).median),
            harness.ratio_text(comparison.ratio(peer)),
            f"{comparison.first_ratio(peer):.2f}x",
            f"{comparison.best_ratio(peer):.2f}x",
            "  ".join(f"{name} {value}" for name, value in notes.items()),
        )
        for label, comparison, notes in rows
        for peer in comparison.peers
    ]
    terminalreporter.write_line(harness.table(lines, header))

"""The fixtures of the benchmarks, what they say while they run, facts about the machine in place of pytest-benchmark's,
and the table at the end.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import replay
import torch
import whole_step
from whole_step import WholeStep

import harness
from harness import OURS, Comparison, Function, Rounds

ROWS = pytest.StashKey[list[list]]()  # label, Comparison, dict of notes
# Seconds of a turn: short ones say more about what the case before has left in the caches than about the op.
TURN = 0.01
# Seconds from which on a race says that it begins: none of the others is long.
SAID = 5.0
FACTS = pytest.StashKey[dict[str, object]]()
SECONDS = pytest.StashKey[dict[str, float]]()  # of every benchmark, by its name


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    """Without the name of a file or a folder pytest runs the tests; with ``-m goal`` the goals, which are here."""
    named = sorted(Path(argument).name for argument in config.args) != sorted(config.getini("testpaths"))
    return None if named or "goal" in config.option.markexpr else True


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS], config.stash[SECONDS] = [], {}
    config.stash[FACTS] = harness.machine_facts()  # the load, before this run adds to it
    # The rest is in the JSON; what counts here is the table of ratios.
    config.option.benchmark_columns = ["median", "iqr", "rounds"]
    config.option.benchmark_timer = "replay.clock"


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


@pytest.fixture
def say(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Writes a line at once, whatever pytest captures."""
    reporter = request.config.pluginmanager.getplugin("terminalreporter")
    capture = request.config.pluginmanager.getplugin("capturemanager")

    def write(text: str) -> None:
        with capture.global_and_fixture_disabled():
            reporter.ensure_newline()
            reporter.write_line(text)

    return write


@pytest.fixture(autouse=True)
def _announced(request: pytest.FixtureRequest, say: Callable[[str], None]) -> Iterator[None]:
    """Every benchmark says that it begins, and how long it took is remembered."""
    began, name = time.monotonic(), label(request)
    say(f"{time.strftime('%H:%M:%S')} {name}")
    yield
    request.config.stash[SECONDS][name] = time.monotonic() - began


def label(request: pytest.FixtureRequest) -> str:
    return request.node.name.removeprefix("test_")


class Race:
    """Interleaves ``cases["ours"]`` with its peers and records medians and ratios."""

    def __init__(self, benchmark, request: pytest.FixtureRequest, say: Callable[[str], None]) -> None:
        self._benchmark, self._rows, self._say = benchmark, request.config.stash[ROWS], say
        self._label = label(request)

    def __call__(self, cases: dict[str, Function], seconds: float, *, warm: bool = False) -> Comparison:
        """Races for so many seconds, and at most one round more; see ``Rounds.run``."""
        if seconds >= SAID or any("compiled" in name for name in cases):
            self._say(f"         first calls and {seconds:g} s of {', '.join(cases)}")
        comparison = Rounds(cases, span=TURN).run(0.0 if self._benchmark.disabled else seconds, warm=warm)
        replay.record(self._benchmark, comparison.seconds(OURS))
        self._benchmark.extra_info.update(comparison.as_dict(), threads=torch.get_num_threads())
        self._rows.append([self._label, comparison, {}])
        return comparison

    def note(self, **facts: object) -> None:
        """Adds facts to the last race."""
        self._benchmark.extra_info.update(facts)
        self._rows[-1][2].update(facts)


@pytest.fixture
def race(benchmark, request: pytest.FixtureRequest, say: Callable[[str], None]) -> Race:
    return Race(benchmark, request, say)


@pytest.fixture
def race_step(
    race: Race, say: Callable[[str], None], two_threads: None
) -> Callable[[WholeStep], dict[str, object]]:
    """Measures a whole step; returns what whole_step.py prints."""

    def measure(step: WholeStep) -> dict[str, object]:
        found = whole_step.measure(step, say=say, race=lambda cases, seconds: race(cases, seconds, warm=True))
        race.note(peak_bytes=found["peak_bytes"])
        return found

    return measure


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    if seconds := config.stash[SECONDS]:
        longest = max(seconds, key=seconds.get)
        terminalreporter.write_line(
            f"{len(seconds)} benchmarks in {sum(seconds.values()):.0f} s; {longest} took {seconds[longest]:.0f} s"
        )
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

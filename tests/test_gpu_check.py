"""What ``make gpu-check`` does with parts that fail, stall or die, without a GPU."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from helpers import import_benchmarks

TESTS = Path(__file__).resolve().parent
import_benchmarks()

import gpu_check  # noqa: E402
import gpu_races  # noqa: E402
from gpu_check import Clock, Part, Record  # noqa: E402

PASSING, STALLING = "def test_one(): pass\n", "import time\ndef test_two(): time.sleep(60)\n"
DEAF = "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nprint('deaf')\ntime.sleep(60)\n"


@pytest.fixture(autouse=True)
def logs(tmp_path, monkeypatch) -> Path:
    """The folder that OUT names; parts may be short here."""
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    monkeypatch.setattr(gpu_check, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(gpu_check, "GRACE_SECONDS", 0.5)
    return tmp_path / "out"


def run_python(name: str, code: str, limit: float = 30.0) -> Part:
    return gpu_check.run_part(name, [sys.executable, "-c", code], limit)


def test_gpu_check_runs_every_gpu_test_in_one_suite():
    # The lookahead passes over the mark in a string of this file.
    marked = [path for path in TESTS.rglob("*.py") if re.search(r"mark\.gpu\b(?!\\)", path.read_text())]
    assert len(marked) > 5
    for path in marked:
        suites = [
            name
            for name, paths in gpu_check.SUITES.items()
            for top in paths
            if path.is_relative_to(TESTS.parent / top)
        ]
        assert len(suites) == 1, f"{path}: {suites}"
        assert path.name.startswith("test_"), f"{path} is not collected"


def test_gpu_check_suites_name_what_there_is():
    paths = [path for suite in gpu_check.SUITES.values() for path in suite]
    assert [path for path in paths if not (TESTS.parent / path).exists()] == []
    assert set(gpu_check.SECONDS) == {
        "build",
        *gpu_check.SUITES,
        *gpu_check.BENCHMARKS,
        *gpu_check.SANITIZERS,
    }
    assert set(gpu_check.BENCHMARKS) == set(gpu_races.BENCHMARKS)


def test_gpu_check_shares_the_time_that_is_left(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(gpu_check.time, "monotonic", lambda: now[0])
    assert sum(gpu_check.SECONDS.values()) == gpu_check.TOTAL_SECONDS
    clock, used_up = Clock(gpu_check.TOTAL_SECONDS), []
    for name in gpu_check.SECONDS:
        used_up.append(clock.share(name))
        now[0] += used_up[-1]
    assert used_up == pytest.approx(list(gpu_check.SECONDS.values()))
    now[0] = 0.0
    clock = Clock(gpu_check.TOTAL_SECONDS)
    assert clock.share("build") == pytest.approx(gpu_check.SECONDS["build"])
    assert clock.share("tests cuda") > gpu_check.SECONDS["tests cuda"]
    assert clock.share("compiled_steps") == pytest.approx(gpu_check.TOTAL_SECONDS)


def test_gpu_check_logs_everything_and_shows_the_end_of_what_fails(logs, capsys):
    assert run_python("build", "print(*range(100), sep='\\n')").status == "passed"
    assert capsys.readouterr().out.count("\n") == 1
    part = run_python("build", "print(*range(100, 200), sep='\\n'); raise SystemExit(3)")
    assert (part.status, part.detail) == ("failed", "exit status 3")
    shown = capsys.readouterr().out.splitlines()
    assert shown[1:] == [f"  | {number}" for number in range(170, 200)]
    assert {str(number) for number in range(200)} <= set((logs / "build.log").read_text().split())


def test_gpu_check_writes_few_files(logs):
    """Its log files and the result are eight at most."""
    assert len({gpu_check.log_file(name) for name in gpu_check.SECONDS}) <= 7
    assert gpu_check.log_file("tests cuda") == logs / "tests-cuda.log"


def test_gpu_check_kills_what_does_not_heed_an_interrupt(logs):
    start = time.monotonic()
    part = run_python("memcheck", DEAF, limit=2.0)
    assert part.status == "stopped"
    assert time.monotonic() - start < 10
    assert gpu_check.log_end(logs / "sanitizers.log").split() == ["memcheck", "deaf"]


@pytest.mark.parametrize("ignored", [False, True], ids=["", "started by a shell in the background"])
def test_gpu_check_counts_the_tests_of_a_suite_that_is_stopped(ignored, tmp_path, monkeypatch):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN if ignored else signal.default_int_handler)
    try:
        stop_a_suite(tmp_path, monkeypatch)
    finally:
        signal.signal(signal.SIGINT, before)


def stop_a_suite(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "GRACE_SECONDS", 30.0)  # more than a busy machine needs for the report
    monkeypatch.setattr(gpu_check, "find_spec", lambda name: None)
    test_file = tmp_path / "test_stalls.py"
    test_file.write_text("import pytest\npytestmark = pytest.mark.gpu\n" + PASSING + STALLING)
    monkeypatch.setitem(gpu_check.SUITES, "tests rest", (str(test_file), "-p", "no:xdist"))
    part = gpu_check.test("tests rest", 38.0, tmp_path)
    assert (part.status, part.detail) == ("stopped", "1 passed, 0 failed, 0 skipped; after 8 s")
    assert part.seconds < 37


def test_gpu_check_leaves_out_tests_whose_packages_are_missing(tmp_path, monkeypatch):
    """A file that cannot be imported would end pytest before the first test."""
    training = "tests/multistage_diffusion/test_training.py"
    commands = []

    def fake(name, command, limit):
        commands.append(command)
        return Part(name, "passed")

    monkeypatch.setattr(gpu_check, "run_part", fake)
    monkeypatch.setattr(gpu_check, "log_end", lambda log: "")
    monkeypatch.setattr(gpu_check, "find_spec", lambda name: None if name == "tqdm" else object())
    part = gpu_check.test("tests rest", 30.0, tmp_path)
    assert part.detail == f"0 passed, 0 failed, 0 skipped; {training} left out: no tqdm"
    monkeypatch.setattr(gpu_check, "find_spec", lambda name: object())
    assert gpu_check.test("tests rest", 30.0, tmp_path).detail == "0 passed, 0 failed, 0 skipped"
    assert [training in command for command in commands] == [False, True]
    assert "worksteal" in commands[0]


@pytest.mark.parametrize("report", [None, "<testsuites><testsuite name="], ids=["missing", "half"])
def test_gpu_check_counts_lines_without_a_report(report, tmp_path):
    path = tmp_path / "tests.xml"
    if report:
        path.write_text(report)
    assert gpu_check.report_counts(path) == ""
    output = (
        "tests/gpu/test_cuda.py::test_a[a b] PASSED     [  1%]\n"
        "tests/gpu/test_cuda.py::test_b FAILED     [  2%]\n"
        "tests/gpu/test_cuda.py::test_c SKIPPED (no)     [  3%]\n"
        "[gw11] [  4%] PASSED tests/gpu/test_cuda.py::test_d \n"
        "[gw0] [100%] ERROR tests/gpu/test_cuda.py::test_e \n"
        "tests/gpu/test_cuda.py::test_f \n"
        "FAILED tests/gpu/test_cuda.py::test_b - assert 1 == 2\n"
    )
    assert gpu_check.verbose_counts(output) == "2 passed, 2 failed, 1 skipped"


def test_gpu_check_keeps_the_results_of_a_benchmark_killed_while_it_wrote(tmp_path, monkeypatch):
    lines = '{"benchmark": "attention", "not_run": "large"}\n{"benchmark": "atten'

    def killed(name, command, limit):
        Path(command[command.index("--out") + 1]).write_text(lines)
        return Part(name, "stopped", limit, "after 3 s")

    monkeypatch.setattr(gpu_check, "run_part", killed)
    part, results = gpu_check.benchmark("attention", 11.0, tmp_path)
    assert results == [{"benchmark": "attention", "not_run": "large"}]
    assert (part.status, part.detail) == ("stopped", "after 3 s; not run: large")


@pytest.mark.parametrize(
    ("nvcc", "built", "status"),
    [("nvcc", False, "failed"), (None, False, "passed"), ("nvcc", True, "passed")],
)
def test_gpu_check_build_without_the_cuda_extension(nvcc, built, status, logs, monkeypatch, tmp_path, capsys):
    def compiled(name, command, limit, **environment):
        assert environment["MAX_JOBS"] == "7"
        return run_part(name, [sys.executable, "-c", "print('x.cu(1): error: no')"], limit)

    run_part = gpu_check.run_part
    report = tmp_path / "report.json"
    report.write_text(json.dumps({"cuda": {"built": built, "reason": "" if built else "nvcc failed"}}))
    monkeypatch.setattr(gpu_check, "BUILD_REPORT", report)
    monkeypatch.setattr(gpu_check, "run_part", compiled)
    monkeypatch.setattr(gpu_check, "find_nvcc", lambda: nvcc)
    monkeypatch.setattr(gpu_check.os, "cpu_count", lambda: 7)
    monkeypatch.delenv("MAX_JOBS", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    part = gpu_check.build(30.0)
    assert part.status == status
    assert part.detail == ("cuda built" if built else "cuda left out: nvcc failed")
    assert "x.cu(1): error: no" in (logs / "build.log").read_text()
    assert ("x.cu(1): error: no" in capsys.readouterr().out) == (status == "failed")


def test_gpu_check_writes_the_result_after_every_part(tmp_path, monkeypatch):
    """In the order of the parts, in both folders, and with the status of what must pass."""
    record = Record({"gpu": "NVIDIA H200"}, [tmp_path / "results", tmp_path / "out"])
    written = []

    def fake(name, *rest, **more):
        written.append(
            [len(json.loads(file.read_text())["parts"]) for file in record.files() if file.exists()]
        )
        return Part(name, "passed")

    monkeypatch.setattr(gpu_check, "build", lambda limit: fake("build"))
    monkeypatch.setattr(gpu_check, "test", fake)
    monkeypatch.setattr(gpu_check, "sanitize", fake)
    monkeypatch.setattr(gpu_check, "benchmark", lambda name, *rest: (fake(name), [{"benchmark": name}]))
    gpu_check.run_all(record, tmp_path)
    assert written == [[]] + [[n, n] for n in range(1, len(gpu_check.SECONDS))]
    for file in record.files():
        assert file.name == "gpu-nvidia-h200.json"
        found = json.loads(file.read_text())
        assert [part["name"] for part in found["parts"]] == list(gpu_check.SECONDS)
        assert [result["benchmark"] for result in found["results"]] == list(gpu_check.BENCHMARKS)
        assert list(file.parent.glob("*.unfinished")) == []
    assert gpu_check.exit_status(record.parts) == 0
    record.parts[8].status = "stopped"
    assert record.parts[8].name == "tests rest"
    assert gpu_check.exit_status(record.parts) == 1


def test_gpu_check_shows_ops_and_networks():
    """Ops with a cold L2 only; networks, whose L2 is as the call before has left it, with their peak memory."""

    def result(benchmark, case, l2, **more):
        times = {"seconds": {"ours": [2e-3, 1e-3, 3e-3]}, "ratio": {"eager": [2.5, 2.4, 2.6]}}
        return {
            "benchmark": benchmark,
            "case": case,
            "backend": None,
            "l2": l2,
            "share_of_floor": 0.5,
            **times,
            **more,
        }

    printed = gpu_check.summary(
        [Part("training_step", "passed", 12.3)],
        [
            result("group_norm", "small", "cold"),
            result("group_norm", "small", "warm"),
            result("training_step", "3+3+2 step", "as found", peak_bytes={"ours": 2**30, "loop": 3 * 2**29}),
            {"benchmark": "training_step", "not_run": "large"},
        ],
    )
    table = [line.split() for line in printed.splitlines()]
    assert ["group_norm", "small", "cold", "2000.0", "0.50", "eager", "2.50x"] in table
    assert ["training_step", "3+3+2", "step", "as", "found", "2000.0", "0.50", "eager", "2.50x"] in table
    assert "warm" not in printed
    assert (
        "training_step, 3+3+2 step: peak memory beside the weights: ours 1.00 GiB  loop 1.50 GiB" in printed
    )


def test_a_worker_whose_device_is_lost_gives_way(request, monkeypatch):
    """Only after a failed GPU test, and only where a fresh worker takes over."""
    hook = request.config.pluginmanager.getplugin(str(TESTS / "conftest.py")).pytest_runtest_logreport
    codes = []

    def lost():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    hook(SimpleNamespace(failed=False, keywords={"gpu": 1}))
    hook(SimpleNamespace(failed=True, keywords={}))
    assert codes == []
    hook(SimpleNamespace(failed=True, keywords={"gpu": 1}))
    assert codes == [70]
    monkeypatch.delenv("PYTEST_XDIST_WORKER")
    hook(SimpleNamespace(failed=True, keywords={"gpu": 1}))
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    hook(SimpleNamespace(failed=True, keywords={"gpu": 1}))
    assert codes == [70]

"""What ``make gpu-smoke`` and ``make gpu-check`` do with parts that fail, stall or die, without a GPU."""

from __future__ import annotations

import json
import os
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

import gpu_cases  # noqa: E402
import gpu_check  # noqa: E402
import gpu_parts  # noqa: E402
import gpu_races  # noqa: E402
import gpu_smoke  # noqa: E402
from gpu_parts import Clock, Part, Record  # noqa: E402

DEAF = "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nprint('deaf')\ntime.sleep(60)\n"
SMALL = gpu_cases.Case(gpu_cases.linear("small", (3, 0, 2), (8, 4, 5), (3, 2, 16)), "triton", "fp32")


@pytest.fixture(autouse=True)
def short_parts(monkeypatch):
    """Parts may be short here."""
    monkeypatch.setattr(gpu_parts, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(gpu_parts, "GRACE_SECONDS", 0.5)


@pytest.fixture
def log(tmp_path) -> Path:
    return tmp_path / "part.log"


@pytest.fixture
def record(tmp_path) -> Record:
    return Record("smoke", {"gpu": "NVIDIA H200"}, [tmp_path / "out", tmp_path / "results"])


def run_python(code: str, log: Path, limit: float = 30.0) -> Part:
    return gpu_parts.run_part("part", [sys.executable, "-c", code], limit, log)


@pytest.mark.parametrize(("target", "most"), [(gpu_smoke, 200), (gpu_check, 400)], ids=["smoke", "check"])
def test_gpu_plans_fit_their_seconds(target, most):
    """All parts together, whatever each does with its share; what ends early gives its time to the others."""
    assert sum(target.SECONDS.values()) + 15 <= most  # the imports, and the copy of the cache
    assert all(seconds > 2 * gpu_parts.LEAST_SECONDS for seconds in target.SECONDS.values())
    clock = Clock(target.SECONDS)
    now = time.monotonic()
    shares = [clock.share(name) for name in target.SECONDS]
    assert shares[0] == pytest.approx(next(iter(target.SECONDS.values())), abs=0.5)
    assert shares[-1] == pytest.approx(sum(target.SECONDS.values()) - (time.monotonic() - now), abs=0.5)


def test_gpu_clock_shares_what_is_left(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(gpu_parts.time, "monotonic", lambda: now[0])
    clock, used_up = Clock(gpu_check.SECONDS), []
    for name in gpu_check.SECONDS:
        used_up.append(clock.share(name))
        now[0] += used_up[-1]
    assert used_up == pytest.approx(list(gpu_check.SECONDS.values()))


def test_gpu_check_has_a_part_for_every_benchmark_and_compiles_last():
    assert [name for name in gpu_check.SECONDS if name != "build"] == list(gpu_races.BENCHMARKS)
    assert list(gpu_check.SECONDS)[-2:] == ["compiled_ops", "compiled_steps"]


def test_gpu_smoke_has_every_backend_in_one_part():
    backends = [backend for part in gpu_smoke.OPS.values() for backend in part]
    found = {case.backend for case in gpu_cases.all_cases()}
    assert sorted(backends) == sorted(found)
    assert set(gpu_smoke.SECONDS) == {*gpu_smoke.OPS, "build", "step", "memcheck"}
    planned = [case for part in gpu_smoke.OPS for case in gpu_smoke.plan()[part]]
    assert sorted(planned) == sorted(map(str, gpu_cases.all_cases()))
    assert len(set(planned)) == len(planned)


def test_gpu_smoke_has_edm_and_odd_shapes():
    labels = " ".join(case.call.label for case in gpu_cases.all_cases())
    for wanted in ("EDM", "empty stage", "NCHW", "640", "65", "160"):
        assert wanted in labels
    kinds = {(case.call.op, case.kind) for case in gpu_cases.all_cases()}
    assert all((op, "bf16") in kinds for op in gpu_cases.CALLS if op != "optimal_denoiser")


def test_gpu_part_logs_everything_and_shows_the_end_of_what_fails(log, capsys):
    assert run_python("print(*range(100), sep='\\n')", log).status == "passed"
    assert capsys.readouterr().out.count("\n") == 1
    part = run_python("print(*range(100, 200), sep='\\n'); raise SystemExit(3)", log)
    assert (part.status, part.detail) == ("failed", "exit status 3")
    shown = capsys.readouterr().out.splitlines()
    assert shown[1:] == [f"  | {number}" for number in range(170, 200)]
    assert {str(number) for number in range(200)} <= set(log.read_text().split())


def test_gpu_part_kills_what_does_not_heed_an_interrupt(log):
    start = time.monotonic()
    part = run_python(DEAF, log, limit=2.0)
    assert part.status == "stopped"
    assert time.monotonic() - start < 10
    assert gpu_parts.log_end(log).split() == ["part", "deaf"]


@pytest.mark.parametrize("ignored", [False, True], ids=["", "started by a shell in the background"])
def test_gpu_part_is_interrupted_before_it_is_killed(ignored, log, monkeypatch):
    monkeypatch.setattr(gpu_parts, "GRACE_SECONDS", 20.0)  # more than a busy machine needs
    code = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('said so', flush=True)"
    before = signal.signal(signal.SIGINT, signal.SIG_IGN if ignored else signal.default_int_handler)
    try:
        part = run_python(code, log, limit=23.0)
    finally:
        signal.signal(signal.SIGINT, before)
    assert part.status == "stopped"
    assert gpu_parts.log_end(log).splitlines() == ["part", "said so"]


def test_gpu_results_of_a_part_killed_while_it_writes_stay_whole(record, log):
    """Each is in the files at once, in both; of the last one, half of which is written, nothing is left."""
    code = f"""
import sys, time
sys.path[:0] = {[str(TESTS.parent / "benchmarks"), str(TESTS.parent)]!r}
from pathlib import Path
files = [Path(name) for name in {list(map(str, record.files))!r}]
for number in range(3):
    with files[0].open("a") as a, files[1].open("a") as b:
        line = '{{"case": "%d", "status": "right"}}' % number + chr(10)
        a.write(line), b.write(line)
for file in files:
    with file.open("a") as half:
        half.write('{{"case": "3", "sta')
time.sleep(60)
"""
    part = run_python(code, log, limit=4.0)
    assert part.status == "stopped"
    assert len(record.results("case")) == 3  # with the half line still there
    record.add(part)
    for file in record.files:
        assert file.name == "gpu-smoke-nvidia-h200.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        assert lines[0] == {"machine": {"gpu": "NVIDIA H200"}}
        assert [line["case"] for line in lines[1:-1]] == ["0", "1", "2"]
        assert lines[-1]["part"]["status"] == "stopped"


@pytest.mark.parametrize(
    ("nvcc", "built", "status"),
    [("nvcc", False, "failed"), (None, False, "passed"), ("nvcc", True, "passed")],
)
def test_gpu_build_without_the_cuda_extension(nvcc, built, status, log, monkeypatch, tmp_path, capsys):
    def compiled(name, command, limit, log, **environment):
        assert environment["MAX_JOBS"] == "7"
        assert environment["TORCH_CUDA_ARCH_LIST"] == "9.0a"
        return run_part(name, [sys.executable, "-c", "print('x.cu(1): error: no')"], limit, log)

    run_part = gpu_parts.run_part
    report = tmp_path / "report.json"
    report.write_text(json.dumps({"cuda": {"built": built, "reason": "" if built else "nvcc failed"}}))
    monkeypatch.setattr(gpu_parts, "BUILD_REPORT", report)
    monkeypatch.setattr(gpu_parts, "run_part", compiled)
    monkeypatch.setattr(gpu_parts, "find_nvcc", lambda: nvcc)
    monkeypatch.setattr(gpu_parts.os, "cpu_count", lambda: 7)
    for name in ("MAX_JOBS", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    part = gpu_parts.build(30.0, log)
    assert part.status == status
    assert part.detail == ("cuda built" if built else "cuda left out: nvcc failed")
    assert "x.cu(1): error: no" in log.read_text()
    assert ("x.cu(1): error: no" in capsys.readouterr().out) == (status == "failed")


def test_gpu_case_is_judged_against_float64(monkeypatch):
    """By the library here; an error of a few roundings too many is wrong, and so is NaN."""
    right = gpu_smoke.judge(SMALL, "cpu", "library")
    assert right["status"] == "right"
    assert right["case"] == "grouped_linear, small, fp32, triton"
    assert 0 <= right["share_of_norm_tolerance"] <= 0.5
    run = gpu_cases.Case.run
    for factor, status in ((1 + 1e-7, "right"), (1 + 1e-4, "wrong"), (float("nan"), "wrong")):
        monkeypatch.setattr(
            gpu_cases.Case,
            "run",
            lambda *a, f=factor: [*run(*a)[:-1], run(*a)[-1] * f],  # the last gradient
        )
        assert gpu_smoke.judge(SMALL, "cpu", "library")["status"] == status


def test_gpu_case_that_raises_is_wrong_and_one_that_is_refused_is_not():
    refused = gpu_smoke.judge(SMALL, "cpu", "cuda")
    assert refused["status"] == "refused"
    assert "has no implementation of this op" in refused["error"]

    def broken(*leaves):
        raise ValueError("no such kernel")

    case = gpu_cases.Case(gpu_cases.Call("grouped_linear", "broken", [(3,)], broken), "triton", "fp32")
    assert gpu_smoke.judge(case, "cpu", "library")["error"] == "ValueError: no such kernel"


@pytest.mark.parametrize("kind", ["bf16", "fp16", "tf32"])
def test_gpu_tolerances_admit_the_roundings_of_a_dtype_and_little_more(kind):
    case = gpu_cases.Case(SMALL.call, "triton", kind)
    assert 0.02 < max(case.errors("cpu", "library")) < 0.6 or kind == "tf32"
    exact = [torch.linspace(-1.0, 1.0, 1000, dtype=torch.float64)]
    assert max(gpu_cases.compare([exact[0] * 1.02], exact, kind)) > 1


def judged_in_order(monkeypatch, wrong: str, lost: bool) -> None:
    """Without computing anything."""
    cases = [
        gpu_cases.Case(gpu_cases.Call("group_norm", name, [(1,)], None), "triton", "bf16") for name in "abc"
    ]
    monkeypatch.setattr(gpu_smoke, "part_cases", lambda part, op, rehearsed: cases)
    monkeypatch.setattr(
        gpu_smoke,
        "judge",
        lambda case, *_: {"case": str(case), "status": "wrong" if case.call.label == wrong else "right"},
    )
    monkeypatch.setattr(gpu_smoke, "is_lost", lambda: lost)


@pytest.mark.parametrize(("lost", "status", "written"), [(False, 0, "abc"), (True, gpu_smoke.LOST, "ab")])
def test_gpu_worker_goes_on_behind_a_wrong_case_unless_the_gpu_is_lost(
    lost, status, written, monkeypatch, tmp_path
):
    judged_in_order(monkeypatch, "b", lost)
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda *_, **__: None)
    monkeypatch.setattr(gpu_smoke.gpu_cache, "Watch", lambda: SimpleNamespace(as_dict=dict))
    files = [tmp_path / "results.jsonl"]
    assert gpu_smoke.work("triton", "group_norm", set(), files, False) == status
    lines = gpu_parts.read_lines(files[0])
    assert [line["case"].split(", ")[1] for line in lines if "case" in line] == list(written)
    if lost:  # another process goes on
        judged_in_order(monkeypatch, "b", False)
        assert gpu_smoke.work("triton", "group_norm", gpu_smoke.finished(files), files, False) == 0
        assert len(gpu_smoke.finished(files)) == 3


@pytest.mark.parametrize(
    ("deaths", "wrong"), [([], []), ([0], ["0"]), ([0, 2, 3], ["0", "2", "3"])], ids=["none", "one", "three"]
)
def test_gpu_smoke_runs_every_case_behind_processes_that_die(deaths, wrong, monkeypatch, tmp_path):
    """The case at which one died is wrong, and the exit status is known when all have run."""
    files, started = [tmp_path / "results.jsonl"], []

    def part_cases(part, op, rehearsed):
        return [str(number) for number in range(4)] if op == "attention" else []

    class Worker:
        def __init__(self):
            self.returncode = 0
            for case in part_cases("triton", "attention", False):
                if case in gpu_smoke.finished(files):
                    continue
                if int(case) in deaths:
                    self.returncode = -11
                    return
                gpu_parts.append(files, {"case": case, "status": "right"})

        def poll(self):
            return self.returncode

    def start_worker(*arguments):
        started.append(arguments)
        return Worker()

    monkeypatch.setattr(gpu_smoke, "part_cases", part_cases)
    monkeypatch.setattr(gpu_smoke, "start_worker", start_worker)
    assert gpu_smoke.run_ops("triton", files, False) == int(bool(wrong))
    lines = gpu_parts.read_lines(files[0])
    assert sorted(line["case"] for line in lines) == list("0123")
    assert [line["case"] for line in lines if line["status"] == "wrong"] == wrong
    assert len(started) == len(deaths) + (3 not in deaths)


def test_gpu_smoke_rehearses_through_its_own_processes(tmp_path, monkeypatch):
    """The smallest op, in a process of its own, by the library."""
    monkeypatch.setattr(
        gpu_smoke.gpu_cases, "CALLS", {"optimal_denoiser": gpu_cases.CALLS["optimal_denoiser"]}
    )
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    assert gpu_smoke.run_ops("triton", files, True) == 0
    assert files[0].read_bytes() == files[1].read_bytes()
    assert [line["status"] for line in gpu_parts.read_lines(files[0]) if "case" in line] == ["right"] * 2


@pytest.mark.parametrize("wrong", [False, True])
def test_gpu_captured_step_is_checked(wrong, tmp_path, monkeypatch):
    """On the processor, where the step runs without a graph."""
    named = gpu_smoke.training_steps.GraphedStep.named

    def off(step):
        return {name: 1.01 * value if name == "loss" else value for name, value in named(step).items()}

    if wrong:
        monkeypatch.setattr(gpu_smoke.training_steps.GraphedStep, "named", off)
    monkeypatch.setattr(gpu_smoke, "STEP_TOLERANCES", {torch.float32: 1e-3})
    monkeypatch.setattr(
        gpu_smoke, "NETWORK", {**gpu_smoke.NETWORK, "image_size": 8, "attn_resolutions": (4,)}
    )
    files = [tmp_path / "results.jsonl"]
    published = gpu_smoke.whole_networks.CONFIG
    assert gpu_smoke.run_step(files, "cpu") == int(wrong)
    assert gpu_smoke.whole_networks.CONFIG is published  # of which the races are
    assert gpu_smoke.whole_networks.published.cache_info().currsize == 0
    (line,) = [line for line in gpu_parts.read_lines(files[0]) if "case" in line]
    assert line["status"] == ("wrong" if wrong else "right")
    assert ("loss is off" in line.get("error", "")) == wrong


@pytest.mark.parametrize(
    ("found", "code", "status"),
    [(None, 0, "not run"), ("tool", 0, "passed"), ("tool", 9, "failed"), ("tool", 2, "not run")],
    ids=["no tool", "clean", "an error", "a tool that cannot"],
)
def test_gpu_memory_checker_that_cannot_work_is_no_failure(found, code, status, log, monkeypatch):
    def run(name, command, limit, log, **environment):
        assert command[0] == "tool"
        assert environment == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        return Part(name, *(("failed", 1.0, f"exit status {code}") if code else ("passed",)))

    monkeypatch.setattr(gpu_smoke.shutil, "which", lambda name: found)
    monkeypatch.setattr(gpu_smoke, "run_part", run)
    assert gpu_smoke.memcheck(30.0, log).status == status


@pytest.mark.parametrize("target", [gpu_smoke, gpu_check], ids=["smoke", "check"])
def test_gpu_parts_are_written_one_by_one_in_their_order(target, record, log, monkeypatch):
    written = []

    def fake(name, *rest, **more):
        written.append([sum("part" in line for line in gpu_parts.read_lines(file)) for file in record.files])
        return Part(name, "passed")

    monkeypatch.setattr(target, "build", lambda *_: fake("build"))
    monkeypatch.setattr(target, "run_part", fake)
    monkeypatch.setattr(gpu_smoke, "memcheck", lambda *_: fake("memcheck"))
    target.run_all(record, log)
    assert written == [[n, n] for n in range(len(target.SECONDS))]
    assert [part.name for part in record.parts] == list(target.SECONDS)
    assert target.exit_status(record.parts) == 0
    record.parts[0].status = "failed"
    assert target.exit_status(record.parts) == 1


def test_gpu_smoke_exits_with_1_when_a_part_is_stopped_and_with_0_without_a_tool():
    parts = [Part(name, "passed") for name in gpu_smoke.SECONDS]
    parts[-1].status = "not run"
    assert gpu_smoke.exit_status(parts) == 0
    parts[0].status = "stopped"
    assert gpu_smoke.exit_status(parts) == 1


@pytest.mark.parametrize(
    ("stopped", "lost", "status"),
    [(None, 0, 0), ("step", 0, 1), (None, 1, 1)],
    ids=["well", "a part", "a kernel"],
)
def test_gpu_smoke_rehearsal_fails_with_a_part_or_a_kernel(stopped, lost, status, monkeypatch, capsys):
    def run_part(name, command, limit, log):
        assert limit >= 10 * gpu_smoke.SECONDS[name]
        return Part(name, "stopped" if name == stopped else "passed")

    monkeypatch.setattr(gpu_smoke, "run_part", run_part)
    monkeypatch.setattr(gpu_smoke, "launches", dict)
    monkeypatch.setattr(gpu_smoke.gpu_cache, "not_made", str)
    monkeypatch.setattr(gpu_smoke.gpu_cache, "rehearse", lambda found: lost)
    assert gpu_smoke.rehearse() == status
    printed = capsys.readouterr().out
    assert "gpu-smoke: 185 s in 5 parts" in printed
    assert "    grouped_conv2d, EDM 16x16 with a skip, bf16, triton\n" in printed
    assert "build     not run     0 s  a rehearsal" in printed


def test_gpu_check_names_what_failed_or_did_not_fit(record, log, monkeypatch):
    lines = [
        {"benchmark": "attention", "failed": "wide", "error": "AssertionError: off"},
        {"benchmark": "attention", "not_run": "large"},
        {"benchmark": "group_norm", "not_run": "other"},
    ]

    def stopped(name, command, limit, log):
        assert [f"--out={file}" for file in record.files] == command[-2:]
        for line in lines:
            gpu_parts.append(record.files, line)
        return Part(name, "stopped", limit, "after 3 s")

    monkeypatch.setattr(gpu_check, "run_part", stopped)
    part = gpu_check.benchmark("attention", 11.0, record, log)
    assert part.status == "failed"
    assert part.detail == "after 3 s; wide failed: AssertionError: off; not run: large"


def test_gpu_check_shows_ops_and_networks(record):
    """Ops with a cold L2 only; networks, whose L2 is as the call before has left it, with their peak memory."""

    def result(benchmark, case, l2, **more):
        times = {"seconds": {"ours": [2e-3, 1e-3, 3e-3]}, "ratio": {"eager": [2.5, 2.4, 2.6]}}
        line = {"benchmark": benchmark, "case": case, "backend": None, "l2": l2, "share_of_floor": 0.5}
        gpu_parts.append(record.files, {**line, **times, **more})

    result("group_norm", "small", "cold")
    result("group_norm", "small", "warm")
    result("training_step", "3+3+2 step", "as found", peak_bytes={"ours": 2**30, "loop": 3 * 2**29})
    gpu_parts.append(record.files, {"benchmark": "training_step", "not_run": "large"})
    record.add(Part("training_step", "passed", 12.3))
    printed = gpu_check.summary(record)
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

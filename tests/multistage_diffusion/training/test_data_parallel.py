"""Runs that several processes share, over Gloo on the CPU."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import forks
from multistage_diffusion import cli
from multistage_diffusion.training import checkpoints
from multistage_diffusion.training.data_parallel import ProcessError, Processes
from multistage_diffusion.training.run_log import RunLog
from multistage_diffusion.training.trainer import Trainer
from stand_ins import (
    SMALL_UNET,
    TinyNetwork,
    assert_same_run,
    config_of,
    no_plots,  # noqa: F401
    one_thread,  # noqa: F401
    tiny_images,
    weights_of,
)

HERE = Path(__file__).parent.parent

# Two processes run all the scenarios one after the other, because starting them takes longest; each process prints what
# every scenario returned to it, or its traceback.
SCRIPT = """
import json, os, signal, sys, time, traceback, torch
torch.set_num_threads(1)
from multistage_diffusion.training.data_parallel import Processes
from multistage_diffusion.training.trainer import Trainer
from stand_ins import SMALL_UNET, config_of, tiny_images
Trainer._plot = lambda self: None

def trainer(processes, directory, dropout, **changes):
    config = config_of(network={**SMALL_UNET, "dropout": dropout}, eps=1.0, **changes)
    return Trainer(config, directory, data=tiny_images(), processes=processes, quiet=True)

def train(processes, directory, resume=False, **changes):
    result = trainer(processes, directory, **changes).run(resume)
    return [result.step, result.stopped_by, result.checkpoint.name]

def train_until_stopped(processes, directory, victim):
    run = trainer(processes, directory, 0.1, steps=1000, log_every=1)
    original = run._train_step
    def step():
        original()
        if run.step == 3 and processes.rank == victim:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.05 * processes.rank)  # the processes are at different places when the signal comes
    run._train_step = step
    result = run.run()
    return [result.step, result.stopped_by, result.checkpoint.name]

def train_until_stopped_while_waiting(processes, directory):
    run = trainer(processes, directory, 0.0, steps=20)
    original, calls = processes.largest, []
    def largest(number):
        calls.append(original(number))
        if len(calls) == 3 and processes.rank == 0:  # before the others' answer is looked at
            os.kill(os.getpid(), signal.SIGTERM)
        return calls[-1]
    processes.largest = largest
    result = run.run()
    processes.largest = original
    return [result.step, result.stopped_by, result.checkpoint.name]

def errors(processes, directory):
    found = []
    def caught(function):
        try:
            function()
        except Exception as error:
            found.append([type(error).__name__, str(error)])
    class Awkward(Exception):  # cannot be pickled here
        pass
    def fail():
        raise Awkward("only the first one calls this")
    caught(lambda: processes.first_does(fail))
    def full():
        raise OSError(28, "No space left on device")
    caught(lambda: processes.first_does(full))
    caught(lambda: processes.require_same(seed=4, images="a" if processes.rank == 0 else "b"))
    caught(lambda: trainer(processes, directory + "/taken", 0.0).run())
    run = trainer(processes, directory + "/nan", 0.0)
    if processes.rank == 1:
        original = run._backward
        run._backward = lambda *a: original(*a) * float("nan")
    caught(run.run)
    caught(lambda: trainer(processes, directory, 0.0, batch_size=9))
    caught(trainer(processes, directory + "/seeds", 0.0, seed=processes.rank).run)
    return found

def basics(processes):
    total = processes.sum(torch.arange(3.0) + processes.rank)
    return [processes.rank, processes.size, total.tolist(), processes.largest(7 * processes.rank),
            processes.first_does(lambda: processes.rank), processes.is_first]

def weights_apart(processes, directory):
    run = trainer(processes, directory, 0.0, steps=2)
    with torch.no_grad():
        for parameter in run.network.parameters():
            parameter.add_(processes.rank)
    run.run()
    return [float(p.double().sum()) for p in [*run.network.parameters(), *run.ema.network.parameters()]]

def outcome(processes, name, arguments):
    try:
        return globals()[name](processes, **arguments)
    except Exception:
        return traceback.format_exc()

processes = Processes.join()
print(json.dumps({label: outcome(processes, *call) for label, call in json.loads(sys.argv[1]).items()}))
processes.leave()
"""


def run(calls: dict[str, tuple[str, dict]], size: int = 2) -> list[dict]:
    """What the scenarios return in every process."""
    programs = forks.run_ranks(SCRIPT, size, json.dumps(calls), path=[HERE])
    return [json.loads(program.stdout) for program in programs]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def outcomes(folder) -> list[dict]:
    """Per process, what each scenario returned."""
    (folder / "errors" / "taken").mkdir(parents=True)
    (folder / "errors" / "taken" / "log.jsonl").write_text('{"step": 1}\n')
    noisy = {"dropout": 0.1, "accumulate": 2}
    parts = {"directory": str(folder / "parts"), **noisy}
    return run(
        {
            "basics": ("basics", {}),
            "two": ("train", {"directory": str(folder / "two"), "dropout": 0.0}),
            "whole": ("train", {"directory": str(folder / "whole"), **noisy}),
            "part": ("train", {**parts, "steps": 7}),
            "resumed": ("train", {**parts, "resume": True}),
            "stopped 0": ("train_until_stopped", {"directory": str(folder / "stopped 0"), "victim": 0}),
            "stopped 1": ("train_until_stopped", {"directory": str(folder / "stopped 1"), "victim": 1}),
            "waiting": ("train_until_stopped_while_waiting", {"directory": str(folder / "waiting")}),
            "weights": ("weights_apart", {"directory": str(folder / "weights")}),
            "errors": ("errors", {"directory": str(folder / "errors")}),
        }
    )


def train_alone(directory: Path, resume: bool = False, **changes) -> int:
    """A run of this process alone, with the scenarios' settings; returns its last step."""
    config = config_of(network={**SMALL_UNET, "dropout": changes.pop("dropout")}, eps=1.0, **changes)
    return Trainer(config, directory, data=tiny_images(), quiet=True).run(resume).step


def test_alone_there_is_nothing_to_agree_on():
    processes = Processes()
    assert (processes.rank, processes.size, processes.is_first) == (0, 1, True)
    assert torch.equal(processes.sum(torch.ones(2)), torch.ones(2))
    assert processes.largest(-3) == -3
    assert processes.first_does(lambda: "done") == "done"
    processes.require_same(anything=1)
    with pytest.raises(ZeroDivisionError):
        processes.first_does(lambda: 1 / 0)


def test_what_processes_tell_each_other(outcomes):
    for rank, outcome in enumerate(outcomes):
        assert outcome["basics"] == [rank, 2, [1.0, 3.0, 5.0], 7, 0, rank == 0]


def test_two_processes_train_what_one_does(outcomes, folder):
    assert [outcome["two"] for outcome in outcomes] == [[12, None, "step-00000012"]] * 2
    train_alone(folder / "one", dropout=0.0)
    for name in ("network", "ema", "optimizer"):
        two, one = weights_of(folder / "two", 12, name), weights_of(folder / "one", 12, name)
        assert two.keys() == one.keys()
        for key, value in two.items():  # float32 sums in another order
            torch.testing.assert_close(value, one[key], rtol=1e-4, atol=1e-6)
    records = [RunLog(folder / name / "log.jsonl").read() for name in ("two", "one")]
    assert [r["samples_stage"] for r in records[0]] == [r["samples_stage"] for r in records[1]]
    for a, b in zip(*records, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


def test_a_shared_run_resumes_to_the_same_bits(outcomes, folder):
    assert outcomes[0]["part"][0] == 7
    assert outcomes[0]["resumed"] == outcomes[0]["whole"] == [12, None, "step-00000012"]
    assert_same_run(folder / "whole", folder / "parts", 12)
    # Any number of processes goes on.
    assert train_alone(folder / "parts", dropout=0.1, accumulate=2, steps=14, resume=True) == 14


@pytest.mark.parametrize("victim", [0, 1])
def test_a_signal_to_one_process_stops_all_after_the_same_step(outcomes, folder, victim):
    name = f"stopped {victim}"
    assert [outcome[name] for outcome in outcomes] == [[3, signal.SIGTERM, "step-00000003"]] * 2
    assert checkpoints.damage(folder / name / "checkpoints" / "step-00000003") is None


def test_a_signal_while_a_process_waits_for_the_others_is_not_lost(outcomes):
    assert [outcome["waiting"] for outcome in outcomes] == [[3, signal.SIGTERM, "step-00000003"]] * 2


def test_a_log_stays_as_it_is_where_processes_resume_from_other_steps(tmp_path):
    class Apart(Processes):
        def require_same(self, **facts):
            if "step" in facts:
                raise ProcessError("the processes differ in step")

    config = config_of(steps=7)
    Trainer(config, tmp_path, data=tiny_images(), network=TinyNetwork(), quiet=True).run()
    (tmp_path / "log.jsonl").open("a").write('{"step": 8}\n')
    before = (tmp_path / "log.jsonl").read_text()
    trainer = Trainer(
        config, tmp_path, data=tiny_images(), network=TinyNetwork(), processes=Apart(), quiet=True
    )
    with pytest.raises(ProcessError):
        trainer.run(resume=True)
    assert (tmp_path / "log.jsonl").read_text() == before


def test_processes_begin_with_the_first_ones_weights(outcomes):
    assert isinstance(outcomes[0]["weights"], list)
    assert outcomes[0]["weights"] == outcomes[1]["weights"]


def test_errors_reach_every_process(outcomes):
    (awkward, *first), (told, *second) = (outcome["errors"] for outcome in outcomes)
    assert awkward == ["Awkward", "only the first one calls this"]
    assert told == ["RuntimeError", "Awkward: only the first one calls this"]
    assert first == second
    expected = (
        r"OSError: \[Errno 28\] No space left on device",
        r"ProcessError: the processes differ in images: a in process 0, b in process 1",
        r"RunError: .*taken holds a run already",
        r"TrainingDiverged: the loss of 4 of 8 samples is nan at step 1: .*there is no checkpoint yet",
        r"ValueError: training: 2 processes with accumulate=1 do not divide batch_size=9",
        r"ProcessError: the processes differ in seed: 0 in process 0, 1 in process 1; all need the same",
    )
    for (kind, text), pattern in zip(first, expected, strict=True):
        assert re.match(pattern, f"{kind}: {text}"), (pattern, kind, text)


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("size", [1, 3])
def test_dealt_items_are_equal_shares_of_all(count, size):
    items = list(range(10, 10 + count))
    shares = [Processes(rank, size).deal(items) for rank in range(size)]
    assert len({len(share) for share in shares}) == 1
    dealt = [share[i] for i in range(len(shares[0])) for share in shares]
    assert dealt[:count] == items
    assert set(dealt) == set(items)
    assert len(dealt) - count < size


def torchrun(*arguments) -> subprocess.CompletedProcess:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [
            *launcher,
            "-m",
            "--",
            "multistage_diffusion",
            *map(str, arguments),
            "--threads",
            "1",
            "--device",
            "cpu",
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=180,
    )


@pytest.mark.full
def test_the_commands_work_in_the_processes_of_torchrun(tmp_path):
    options = "--data digits --decoder-widths 8,8,4 --encoder-widths 8 --channel-mult 1 --num-blocks 1"
    options += " --attn-resolutions 16 --steps 4 --batch 8"
    done = torchrun("train", "--out", tmp_path / "run", *options.split())
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("trained 4 steps") == 1, done.stdout
    assert RunLog(tmp_path / "run" / "log.jsonl").read()[-1]["step"] == 4

    sample = ["sample", "--run", tmp_path / "run", "--steps", "2", "--seeds", "5,0-3"]
    done = torchrun(*sample, "--out", tmp_path / "two.npz")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("5 images") == 1, done.stdout
    assert cli.main([*map(str, sample), "--out", str(tmp_path / "one.npz"), "--device", "cpu"]) == 0
    with np.load(tmp_path / "two.npz") as two, np.load(tmp_path / "one.npz") as one:
        assert two["seeds"].tolist() == [5, 0, 1, 2, 3]
        assert two["images"].shape == one["images"].shape
        difference = np.abs(two["images"].astype(int) - one["images"].astype(int))
    assert difference.max() <= 1  # batches of other sizes round differently

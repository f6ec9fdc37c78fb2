"""A diagnostic or a side file never makes an intact run unusable."""

import errno
import json
import os
import shutil
import warnings

import pytest
import torch

from multistage_diffusion.training import checkpoints
from multistage_diffusion.training.checkpoints import CheckpointError
from multistage_diffusion.training.run_log import RunLog
from multistage_diffusion.training.trainer import RunError, Trainer
from stand_ins import build, one_thread, trainer_of, weights_of  # noqa: F401

DRAWN = {"sample_every": 1, "sample_count": 1}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of two steps with everything in it, and one of three to compare with."""
    folder = tmp_path_factory.mktemp("folder")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the tests, which are to find the same bits
    for name, changes in (
        ("part", {"steps": 2, "log_every": 1, "checkpoint_every": 1, **DRAWN}),
        ("whole", {"steps": 3}),
    ):
        trainer = trainer_of(folder / name, **changes)
        trainer._plot = (folder / name / "loss.png").touch
        trainer.run()
    torch.set_num_threads(threads)
    return folder


@pytest.fixture
def without_plots(monkeypatch):
    monkeypatch.setattr(Trainer, "_plot", lambda self: None)


def remove(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def truncate(path):
    remove(path)
    path.write_bytes(b"")


def become_a_folder(path):
    remove(path)
    (path / "with").mkdir(parents=True)


def become_other_text(path):
    remove(path)
    path.write_bytes(b"\xff\xfe{ no JSON \x00\n")


def become_other_json(path):
    remove(path)
    path.write_text('{"step": "x", "lr": 5}\n[[]]\n')


def become_a_pipe(path):
    remove(path)
    os.mkfifo(path)


HARMS = {
    ".lock": [remove, become_a_folder, become_other_text],
    "config.json": [remove, truncate, become_a_folder, become_other_text, become_other_json, become_a_pipe],
    "stages.json": [remove, become_a_folder, become_other_text],
    "log.jsonl": [remove, truncate, become_a_folder, become_other_text, become_other_json, become_a_pipe],
    "loss.png": [become_a_folder, become_a_pipe],
    "samples": [remove, truncate, become_a_pipe],
    "samples/step-00000002.png": [become_a_folder],
    "checkpoints/step-00000001": [truncate, become_a_folder, become_a_pipe],
    "checkpoints/step-00000001/checkpoint.json": [
        remove,
        become_a_folder,
        become_other_text,
        become_other_json,
    ],
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("name", "harm"),
    [(name, harm) for name, harms in HARMS.items() for harm in harms],
    ids=lambda part: part if isinstance(part, str) else part.__name__,
)
def test_an_intact_checkpoint_goes_on_and_samples_whatever_else_is_broken(
    runs, tmp_path, name, harm, monkeypatch
):
    if name != "loss.png":
        monkeypatch.setattr(Trainer, "_plot", lambda self: None)
    run = tmp_path / "run"
    shutil.copytree(runs / "part", run)
    harm(run / name)
    assert checkpoints.load_model(run, build=build).step == 2
    pictures = DRAWN if name.startswith("samples") else {}
    assert trainer_of(run, steps=3, log_every=1, **pictures).run(resume=True).step == 3
    ours, theirs = weights_of(run, 3), weights_of(runs / "whole", 3)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert json.loads((run / "config.json").read_text())["steps"] == 3
    assert RunLog(run / "log.jsonl").read()[-1]["step"] == 3
    assert checkpoints.load_model(run, build=build).step == 3


STRAYS = {
    "step-abc": "a folder",
    "step-00000010.bak": "a folder",
    "step-00000003": "a file",
    "step-00000004": "a folder",
    "step-00000099": "a folder",
    "step-": "a file",
    "notes.txt": "a file",
    ".writing-step-00000003": "a file",
    ".old-step-00000001": "a folder",
    ".damaged-step-00000003": "a file",
    "step-\u0660\u0660\u0660\u0660\u0660\u0660\u0660\u0668": "a folder",
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", STRAYS)
def test_strays_among_the_checkpoints_harm_nothing(runs, tmp_path, name, without_plots):
    run = tmp_path / "run"
    shutil.copytree(runs / "part", run)
    stray = run / "checkpoints" / name
    if STRAYS[name] == "a file":
        stray.write_text("a user's")
    else:
        stray.mkdir()
        (stray / "notes.txt").write_text("a user's")
    assert checkpoints.load_model(run, build=build).step == 2
    assert trainer_of(run, steps=4, checkpoint_every=1).run(resume=True).step == 4
    kept = [path.read_text() for path in run.rglob("*") if path.is_file() and path.suffix in (".txt", "")]
    assert name.startswith((".", "step-00000003")) or "a user's" in kept


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_checkpoint_that_may_not_be_read_is_passed_over(runs, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(runs / "part", run)
    original = checkpoints._description

    def protected(path):  # permissions do not stop the superuser, who may run the tests
        if path.name == "step-00000002":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path / "checkpoint.json"))
        return original(path)

    monkeypatch.setattr(checkpoints, "_description", protected)
    with pytest.warns(checkpoints.CheckpointWarning, match=r"checkpoint\.json: Permission denied"):
        assert checkpoints.load_model(run, build=build).step == 1


def test_an_old_checkpoint_that_cannot_be_removed_costs_no_training(tmp_path, monkeypatch, without_plots):
    original = type(tmp_path).rename

    def protected(self, target):
        if self.name == "step-00000001":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return original(self, target)

    monkeypatch.setattr(type(tmp_path), "rename", protected)
    with pytest.warns(
        checkpoints.CheckpointWarning, match="step-00000001 could not be removed: Permission denied"
    ):
        result = trainer_of(tmp_path, steps=3, checkpoint_every=1, keep_checkpoints=1).run()
    assert result.step == 3
    assert [path.name for path in checkpoints.list_checkpoints(tmp_path / "checkpoints")] == [
        "step-00000001",
        "step-00000003",
    ]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("log", [None, "", '{"step'])
def test_a_folder_without_checkpoint_and_records_is_as_good_as_empty(tmp_path, resume, log, without_plots):
    def fails():
        raise torch.OutOfMemoryError("out of memory")

    trainer = trainer_of(tmp_path, steps=1, batch_size=16)
    trainer._train_step = fails
    with pytest.raises(torch.OutOfMemoryError):
        trainer.run()
    if log is not None:
        (tmp_path / "log.jsonl").write_text(log)
    assert trainer_of(tmp_path, steps=1).run(resume).step == 1  # with a smaller batch
    assert json.loads((tmp_path / "config.json").read_text())["batch_size"] == 8
    assert len(RunLog(tmp_path / "log.jsonl").read()) == 1


def test_records_without_a_checkpoint_are_those_of_a_run(tmp_path, without_plots):
    trainer_of(tmp_path, steps=1).run()
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(RunError, match=r"holds a run already \(log\.jsonl\)"):
        trainer_of(tmp_path, steps=1).run()
    with pytest.raises(RunError, match=r"another configuration, says config\.json: batch_size: 8"):
        trainer_of(tmp_path, steps=1, batch_size=4).run(resume=True)
    assert trainer_of(tmp_path, steps=2).run(resume=True).step == 2
    assert [record["step"] for record in RunLog(tmp_path / "log.jsonl").read()] == [2]


def test_a_file_in_place_of_the_checkpoints_is_named_before_training(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    for resume in (False, True):
        with pytest.raises(RunError, match="checkpoints is no folder; move it away"):
            trainer_of(tmp_path).run(resume)


def test_what_a_kill_left_goes_when_the_run_goes_on(runs, tmp_path, without_plots):
    run = tmp_path / "run"
    shutil.copytree(runs / "part", run)
    left = [
        run / ".writing-123-config.json",
        run / "samples" / ".writing-123-step-00000002.png",
        run / ".writing-abcdef" / ".writing",
        run / "checkpoints" / ".writing-step-00000002" / ".tmpXyZ",
        run / "checkpoints" / ".old-step-00000001" / "checkpoint.json",
    ]
    for path in left:
        path.parent.mkdir(exist_ok=True)
        path.write_text("half")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert trainer_of(run, steps=2).run(resume=True).step == 2
    assert not [path for path in run.rglob(".*") if path.name != ".lock"]


def test_numbers_that_could_not_be_resumed_are_not_saved(tmp_path, without_plots):
    for place in ("ema", "optimizer"):
        trainer = trainer_of(tmp_path / place, steps=1)
        trainer.run()
        if place == "ema":
            trainer.ema.network.encoder.bias[0] = torch.nan
        else:
            trainer.optimizer.state[next(trainer.network.parameters())]["exp_avg_sq"][0] = torch.inf
        trainer.step = 2
        what = {"ema": r"1 of 8 averaged weights", "optimizer": r"1 of 24 tensors of the optimizer"}[place]
        with pytest.raises(RuntimeError, match=rf"{what} are not finite after step 2, first encoder"):
            trainer._save()
        assert [path.name for path in (tmp_path / place / "checkpoints").iterdir()] == ["step-00000001"]


def test_nothing_of_a_damaged_run_is_guessed(runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs / "part", run)
    for path in checkpoints.list_checkpoints(run / "checkpoints"):
        (path / "ema.safetensors").unlink()
    with (
        pytest.warns(checkpoints.CheckpointWarning),
        pytest.raises(CheckpointError, match=r"none of the 2 .* the newest, step-00000002: ema\.safetensors"),
    ):
        trainer_of(run).run(resume=True)

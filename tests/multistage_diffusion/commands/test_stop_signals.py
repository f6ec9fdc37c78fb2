"""A signal ends a run after the step, with everything saved; one that is ignored does not."""

import os
import signal

import pytest

from multistage_diffusion.training import checkpoints
from multistage_diffusion.training.trainer import Trainer
from stand_ins import no_plots, one_thread, trainer_of  # noqa: F401


@pytest.fixture
def hang_up():
    """SIGHUP as the system has it, also where the tests run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield signal.SIGHUP
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_during_a_save_waits_for_it(tmp_path, monkeypatch, number, hang_up):
    original = checkpoints.write_tensors

    def interrupted(path, tensors):
        if path.name == "ema.safetensors":
            os.kill(os.getpid(), number)
        original(path, tensors)

    monkeypatch.setattr(checkpoints, "write_tensors", interrupted)
    before = signal.getsignal(number)
    result = trainer_of(tmp_path).run()
    assert (result.step, result.stopped_by) == (5, number)
    assert checkpoints.damage(tmp_path / "checkpoints" / "step-00000005") is None
    assert signal.getsignal(number) is before


def test_a_run_that_is_to_outlive_its_terminal_does(tmp_path, monkeypatch, hang_up):
    signal.signal(hang_up, signal.SIG_IGN)  # as nohup does
    trainer = trainer_of(tmp_path)
    original = trainer._train_step
    monkeypatch.setattr(trainer, "_train_step", lambda: (os.kill(os.getpid(), hang_up), original()))
    result = trainer.run()
    assert (result.step, result.stopped_by) == (12, None)
    assert signal.getsignal(hang_up) is signal.SIG_IGN


def test_a_signal_while_the_loss_is_drawn_ends_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "_plot", lambda self: os.kill(os.getpid(), signal.SIGTERM))
    result = trainer_of(tmp_path, steps=1).run()
    assert (result.step, result.stopped_by) == (1, None)


def test_a_signal_before_the_first_step_of_the_loop_saves_what_there_is(tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path)
    stopped_by = trainer._stopped_by
    monkeypatch.setattr(
        trainer, "_stopped_by", lambda stop: os.kill(os.getpid(), signal.SIGTERM) or stopped_by(stop)
    )
    result = trainer.run()
    assert (result.step, result.stopped_by, result.checkpoint.name) == (0, signal.SIGTERM, "step-00000000")
    assert trainer_of(tmp_path).run(resume=True).step == 12


def test_a_signal_after_the_last_step_ends_nothing_early(tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path, steps=3)
    original = trainer._save
    monkeypatch.setattr(trainer, "_save", lambda: (os.kill(os.getpid(), signal.SIGTERM), original())[1])
    assert trainer.run().stopped_by is None

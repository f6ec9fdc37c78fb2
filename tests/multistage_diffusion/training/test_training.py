import dataclasses
import errno
import json
import math
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

import forks
from broken_streams import without_reader
from helpers import waiting_is_an_error
from multistage_diffusion import networks
from multistage_diffusion.common import plots
from multistage_diffusion.data.images import ImageData
from multistage_diffusion.noise.stages import Stages
from multistage_diffusion.training import checkpoints, loss_curves
from multistage_diffusion.training.checkpoints import CheckpointError
from multistage_diffusion.training.config import TrainingConfig
from multistage_diffusion.training.run_lock import RunLock
from multistage_diffusion.training.run_log import LossWindow, RunLog, TrainingDiverged
from multistage_diffusion.training.trainer import PictureWarning, RunError, Trainer
from stand_ins import (
    SMALL_UNET,
    TINY,
    TinyNetwork,
    assert_same_run,
    build,
    config_of,
    no_plots,  # noqa: F401
    one_thread,  # noqa: F401
    tiny_images,
    trainer_of,
    weights_of,
)

PLOT = Trainer._plot  # the tests here do without, but for one


# ---------------------------------------------------------------------------------------- configuration


def test_config_json_round_trip():
    stages = Stages.from_boundaries([0, 1, 2, math.inf])
    config = config_of(stages=stages, stage_probabilities=(0.2, 0.3, 0.5))
    text = json.dumps(config.to_json(), allow_nan=False)
    assert TrainingConfig.from_json(json.loads(text)) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps=0"),
        ({"batch_size": 1.5}, r"batch_size=1\.5"),
        ({"lr": 0}, "lr=0"),
        ({"lr": math.inf}, "lr=inf"),
        ({"precision": "fp16"}, "precision='fp16' must be one of fp32, bf16"),
        ({"stage_sampling": "random"}, "stage_sampling='random' must be one of mixed, stratified"),
        ({"lr_decay": "step"}, "lr_decay='step'"),
        ({"accumulate": 3}, "accumulate=3 does not divide batch_size=8"),
        ({"stage_sampling": "mixed", "importance_weights": True}, 'stage_sampling="stratified"'),
        ({"stage_probabilities": (1, 1)}, "2 probabilities"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"gradient_clip": 0}, "gradient_clip=0"),
        ({"keep_checkpoints": 0}, "keep_checkpoints=0"),
        ({"P_std": -1}, "P_std=-1"),
        ({"seed": -1}, "seed=-1"),
        ({"network": "edm"}, "network='edm' must be a dictionary"),
    ],
)
def test_config_rejects(changes, message):
    with pytest.raises(ValueError, match=message):
        config_of(**changes)


def test_config_names_unknown_keys():
    with pytest.raises(ValueError, match=r"unknown key\(s\) learning_rate; known: P_mean"):
        TrainingConfig.from_json({**config_of().to_json(), "learning_rate": 1})


def test_learning_rate():
    config = config_of(lr=2.0, warmup_images=40, steps=100)
    assert [config.lr_at(s) for s in range(6)] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0, 2.0])
    cosine = config_of(lr=2.0, lr_decay="cosine", steps=100)
    assert [cosine.lr_at(s) for s in (0, 50, 100)] == pytest.approx([2, 1, 0])


# ---------------------------------------------------------------------------------------- what a step sees


def test_accumulation_changes_nothing_but_rounding(tmp_path):
    weights = []
    for accumulate in (1, 4):
        network = TinyNetwork(dropout=0)
        network.load_state_dict(_fixed_weights())
        # Adam divides the gradient by its own size: a small eps would amplify the rounding of tiny ones.
        trainer = trainer_of(tmp_path / str(accumulate), network, accumulate=accumulate, steps=3, eps=1.0)
        trainer.run()
        weights.append(torch.cat([p.detach().flatten() for p in network.parameters()]))
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-5, atol=1e-7)  # float32 sums in another order


def _fixed_weights():
    torch.manual_seed(2)
    return TinyNetwork(dropout=0).state_dict()


def test_training_lowers_the_loss(tmp_path):
    trainer_of(tmp_path, steps=150, log_every=30, checkpoint_every=150, lr=0.01, stage_sampling="mixed").run()
    records = RunLog(tmp_path / "log.jsonl").read()
    # Falls from 1.13 to 0.68 in these 150 steps; most of the rest is noise that nothing can predict.
    assert records[-1]["loss"] < 0.75 * records[0]["loss"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_records(tmp_path, precision):
    trainer_of(tmp_path, precision=precision, warmup_images=16, seed=7).run()
    records = RunLog(tmp_path / "log.jsonl").read()
    assert [r["step"] for r in records] == [
        2,
        4,
        5,
        6,
        8,
        10,
        12,
    ]  # every two steps, and with every checkpoint
    assert [r["images"] for r in records] == [8 * r["step"] for r in records]
    assert [sum(r["samples_stage"]) for r in records] == [16, 16, 8, 8, 16, 16, 16]
    for r in records:
        total = sum(n * loss for n, loss in zip(r["samples_stage"], r["loss_stage"], strict=True) if n)
        assert total / sum(r["samples_stage"]) == pytest.approx(r["loss"], rel=1e-6)
    assert records[0]["lr"] == pytest.approx(1e-3)


def test_a_stage_without_samples_has_no_loss(tmp_path):
    trainer_of(tmp_path, stage_probabilities=(0.5, 0.5, 0), steps=2).run()
    assert RunLog(tmp_path / "log.jsonl").read()[0]["loss_stage"][2] is None


def test_run_folder(tmp_path):
    result = trainer_of(tmp_path).run()
    assert result.step == 12
    assert result.stopped_by is None
    kept = checkpoints.list_checkpoints(tmp_path / "checkpoints")
    assert [p.name for p in kept] == ["step-00000010", "step-00000012"]
    assert result.checkpoint == kept[-1]
    assert TrainingConfig.from_json(json.loads((tmp_path / "config.json").read_text())) == config_of()
    assert Stages.load(tmp_path / "stages.json") == Stages.edm()
    metadata = checkpoints.read_metadata(kept[-1])
    assert metadata["images"] == 96
    assert metadata["data_fingerprint"] == tiny_images().fingerprint


def test_gradient_clipping(tmp_path):
    trainer = trainer_of(tmp_path, gradient_clip=1e-3, steps=1)
    seen = []
    trainer.optimizer.register_step_pre_hook(
        lambda *_: seen.append(torch.stack([p.grad.norm() for p in trainer.network.parameters()]).norm())
    )
    trainer.run()
    assert float(seen[0]) == pytest.approx(1e-3, rel=1e-4)


def test_data_must_fit_the_network(tmp_path):
    with pytest.raises(ValueError, match=r"1 channel\(s\) at 8 pixels, .* 1 channel\(s\) at 16 pixels"):
        trainer_of(tmp_path, TinyNetwork(image_size=16))


# -------------------------------------------------------------------------------------- things that go wrong


class Exploding(TinyNetwork):
    """Returns NaN for one stage from the seventh call on."""

    calls = 0

    def forward(self, x, noise, stage, **conditioning):
        self.calls += 1
        out = super().forward(x, noise, stage, **conditioning)
        bad = (torch.as_tensor(stage) == 1) & (self.calls >= 7)
        return torch.where(bad[:, None, None, None], math.nan, out)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(TrainingDiverged) as caught:
        trainer_of(tmp_path, Exploding()).run()
    message = str(caught.value)
    assert "of 8 samples is nan at step 7: stage 1, sigma " in message
    low, high = (
        float(v) for v in message.split("sigma ")[1].split(". The")[0].split(". the")[0].split(" to ")
    )
    assert 2.5103 < low <= high <= 7.6577
    assert "step-00000005" in message
    assert [p.name for p in checkpoints.list_checkpoints(tmp_path / "checkpoints")] == ["step-00000005"]
    good = checkpoints.read_tensors(tmp_path / "checkpoints" / "step-00000005", "network")
    assert all(bool(torch.isfinite(t).all()) for t in good.values())


def test_losses_are_checked_when_they_are_read():
    # On an accelerator the losses of a whole log interval are read at once.
    window, config = LossWindow(Stages.edm()), config_of()
    for step in (1, 2, 3):
        levels = config.noise_levels().draw(8, torch.Generator().manual_seed(step))
        losses = torch.ones(8)
        if step >= 2:
            losses[levels.stage == 2] = math.inf
        window.add(step, levels, losses)
    with pytest.raises(TrainingDiverged, match="samples is inf at step 2: stage 2, sigma"):
        window.summary()


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    trainer = trainer_of(tmp_path, steps=1)
    trainer.run()
    with torch.no_grad():
        trainer.network.encoder.bias[0] = math.nan
    trainer.step = 2
    with pytest.raises(TrainingDiverged, match=r"1 of 8 weights .* after step 2, first encoder\.bias"):
        trainer._save()
    assert [p.name for p in checkpoints.list_checkpoints(tmp_path / "checkpoints")] == ["step-00000001"]


def test_a_folder_with_a_run_is_not_overwritten(tmp_path):
    trainer_of(tmp_path, steps=2).run()
    before = (tmp_path / "log.jsonl").read_bytes()
    with pytest.raises(RunError, match="holds a run already"):
        trainer_of(tmp_path, steps=2).run()
    assert (tmp_path / "log.jsonl").read_bytes() == before


@pytest.mark.parametrize("part", ["log.jsonl", "checkpoints"])
def test_what_is_left_of_a_run_is_not_overwritten(tmp_path, part):
    trainer_of(tmp_path, steps=2).run()
    for path in tmp_path.iterdir():
        if path.name not in (part, ".lock"):
            path.unlink() if path.is_file() else shutil.rmtree(path)
    with pytest.raises(RunError, match=rf"holds a run already \({part}\); resume it, or choose another"):
        trainer_of(tmp_path, steps=2).run()
    assert {path.name for path in tmp_path.iterdir()} == {part, ".lock"}


@pytest.mark.parametrize("config", ["edited", "lost"])
def test_resume_compares_with_the_checkpoint(tmp_path, config):
    trainer_of(tmp_path, steps=2).run()
    (tmp_path / "config.json").unlink()
    if config == "edited":
        (tmp_path / "config.json").write_text(json.dumps(config_of(steps=2, seed=5).to_json()))
    source = "checkpoints/step-00000002/checkpoint.json"
    with pytest.raises(RunError, match=f"another configuration, says {source}: seed: 0 in the .*, now 5$"):
        trainer_of(tmp_path, seed=5).run(resume=True)
    if config == "lost":
        assert trainer_of(tmp_path).run(resume=True).step == 12


def test_the_same_images_may_have_moved(tmp_path):
    trainer_of(tmp_path, steps=2).run()
    assert trainer_of(tmp_path, steps=3, data="elsewhere").run(resume=True).step == 3
    assert json.loads((tmp_path / "config.json").read_text())["data"] == "elsewhere"


def test_a_folder_that_another_process_trains_in_is_left_alone(tmp_path):
    trainer_of(tmp_path, steps=2).run()
    unfinished = tmp_path / "checkpoints" / ".writing-step-00000005"  # by the other one
    unfinished.mkdir()
    with RunLock(tmp_path) as lock:
        lock.acquire()
        for resume in (False, True):
            with pytest.raises(RunError, match="another process trains in"):
                trainer_of(tmp_path).run(resume)
    assert unfinished.is_dir()
    assert trainer_of(tmp_path).run(resume=True).step == 12


def test_a_run_that_fails_frees_its_folder(tmp_path):
    with pytest.raises(TrainingDiverged):
        trainer_of(tmp_path, Exploding()).run()
    assert trainer_of(tmp_path).run(resume=True).step == 12


def test_a_run_that_is_training_holds_its_folder(tmp_path):
    trainer = trainer_of(tmp_path, steps=1)
    original = trainer._train_step

    def step():
        with pytest.raises(RunError, match="another process trains in"):
            RunLock(tmp_path).acquire()
        original()

    trainer._train_step = step
    assert trainer.run().step == 1


def test_resume_names_what_differs(tmp_path):
    trainer_of(tmp_path, steps=2).run()
    with pytest.raises(RunError, match=r"batch_size: 8 in the checkpoint, now 4; lr: 0.001 .*, now 0.5$"):
        trainer_of(tmp_path, steps=2, batch_size=4, lr=0.5).run(resume=True)


def test_resume_rejects_other_images(tmp_path):
    trainer_of(tmp_path, steps=2).run()
    other = Trainer(config_of(steps=4), tmp_path, data=tiny_images(41), network=build(TINY), quiet=True)
    with pytest.raises(RunError, match="images of tiny have changed"):
        other.run(resume=True)


def test_resume_rejects_another_network(tmp_path):
    trainer_of(tmp_path, steps=2).run()
    with pytest.raises(CheckpointError, match="made by another network"):
        trainer_of(tmp_path, TinyNetwork(width=5), steps=4).run(resume=True)


# ---------------------------------------------------------------------------------------- resume


def records_without_times(directory):
    timed = ("images_per_second", "seconds")
    return [{k: v for k, v in r.items() if k not in timed} for r in RunLog(directory / "log.jsonl").read()]


def test_two_runs_are_bit_identical_and_the_seed_matters(tmp_path):
    trainer_of(tmp_path / "a").run()
    trainer_of(tmp_path / "b").run()
    trainer_of(tmp_path / "c", seed=1).run()
    assert_same_run(tmp_path / "a", tmp_path / "b", 12)
    assert not torch.equal(
        weights_of(tmp_path / "a")["encoder.weight"], weights_of(tmp_path / "c")["encoder.weight"]
    )


def test_resume_is_bit_identical(tmp_path):
    trainer_of(tmp_path / "whole").run()
    trainer_of(tmp_path / "parts", steps=7).run()
    torch.rand(1000)  # the global generator is somewhere else now; dropout must not notice
    trainer_of(tmp_path / "parts", build({**TINY}), steps=12).run(resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts", 12)


def test_resume_passes_over_a_damaged_checkpoint(tmp_path):
    trainer_of(tmp_path / "whole").run()
    trainer_of(tmp_path / "parts", steps=10).run()
    newest = checkpoints.list_checkpoints(tmp_path / "parts" / "checkpoints")[-1]
    (newest / "ema.safetensors").write_bytes(b"")
    with pytest.warns(checkpoints.CheckpointWarning):
        trainer_of(tmp_path / "parts").run(resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts", 12)
    assert records_without_times(tmp_path / "whole") == records_without_times(tmp_path / "parts")


def test_a_damaged_checkpoint_is_set_aside_and_the_new_one_stays(tmp_path):
    trainer_of(tmp_path, steps=6).run()
    damaged = tmp_path / "checkpoints" / "step-00000006"
    metadata = (damaged / "checkpoint.json").read_text()
    (damaged / "checkpoint.json").write_text(metadata.replace('"seconds"', '"secnods"'))
    with pytest.warns(checkpoints.CheckpointWarning, match=r"checkpoint\.json has changed"):
        result = trainer_of(tmp_path, steps=5, keep_checkpoints=1).run(resume=True)
    assert result.checkpoint == checkpoints.latest_checkpoint(tmp_path / "checkpoints")
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {
        "step-00000005",
        "damaged-step-00000006",
    }


def test_a_finished_run_says_that_nothing_is_left(tmp_path, capsys):
    trainer_of(tmp_path, steps=6).run()
    for steps in (3, 6, 7):
        trainer = trainer_of(tmp_path, steps=steps)
        trainer.quiet = False
        trainer.run(resume=True)
        said = capsys.readouterr().err
        assert (f"has finished 6 steps, {steps} were asked for: nothing is left to train" in said) == (
            steps < 7
        )
        assert ("resuming" in said) == (steps == 7)


def test_training_goes_on_where_nobody_reads_what_it_says(tmp_path, monkeypatch):
    trainer_of(tmp_path, steps=2).run()
    with without_reader() as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        trainer = trainer_of(tmp_path, log_every=1)
        trainer.quiet = False
        assert trainer.run(resume=True).checkpoint.name == "step-00000012"


def test_log_truncation_drops_later_and_torn_records(tmp_path):
    log = RunLog(tmp_path / "log.jsonl")
    for step in (2, 4, 6):
        log.append({"step": step})
    with log.path.open("a") as file:
        file.write('{"step": 8, "lo')
    log.truncate(4)
    assert log.read() == [{"step": 2}, {"step": 4}]


RUN_SCRIPT = """
import sys, time, torch
torch.set_num_threads(1)
from multistage_diffusion.training.trainer import Trainer
from multistage_diffusion.networks import build
from stand_ins import SMALL_UNET, config_of, tiny_images
Trainer._plot = lambda self: None
directory, resume, pause = sys.argv[1], sys.argv[2] == "resume", float(sys.argv[3])
network = build({**SMALL_UNET, "dropout": 0.1}).config
config = config_of(network=network, steps=36, checkpoint_every=5, log_every=3)
trainer = Trainer(config, directory, data=tiny_images(), quiet=True)
original = trainer._train_step
def slowly():
    original()
    time.sleep(pause)
trainer._train_step = slowly
print("started", flush=True)
result = trainer.run(resume)
print("ended at", result.step, "by", result.stopped_by)
"""


def start(directory, mode, pause=0.0) -> forks.Program:
    return forks.Program(RUN_SCRIPT, directory, mode, pause, path=[Path(__file__).parent.parent])


def test_a_killed_run_resumes_to_the_same_bits(tmp_path):
    whole = start(tmp_path / "whole", "fresh")
    assert whole.wait() == 0, whole.stderr
    seed = random.randrange(1000)
    rng = random.Random(seed)
    mode, kills = "fresh", 0
    for _ in range(3):
        process = start(tmp_path / "killed", mode, pause=0.01)
        process.wait_for("started\n")
        time.sleep(rng.uniform(0.1, 0.6))
        process.kill()
        kills += process.returncode == -signal.SIGKILL
        mode = "resume"
    last = start(tmp_path / "killed", "resume")
    assert last.wait() == 0, last.stderr
    assert kills >= 1
    assert_same_run(tmp_path / "whole", tmp_path / "killed", 36)
    assert records_without_times(tmp_path / "whole") == records_without_times(tmp_path / "killed"), f"{seed=}"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_and_saves(tmp_path, number):
    process = start(tmp_path / "run", "fresh", pause=0.02)
    process.wait_for("started\n")
    time.sleep(0.5)
    process.send_signal(number)
    assert process.wait() == 0, process.stderr
    *_, step, _, stopped_by = process.stdout.split()
    step = int(step)
    assert 0 < step < 36
    assert stopped_by == str(int(number))
    newest = checkpoints.latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert checkpoints.read_metadata(newest)["step"] == step
    assert RunLog(tmp_path / "run" / "log.jsonl").read()[-1]["step"] == step


DEVICE = "cuda"


def gpu_trainer(directory, **changes):
    graphs = changes.pop("cuda_graphs", False)
    told = 9 if changes.get("augment") else 0
    network = networks.build({**SMALL_UNET, "dropout": changes.pop("dropout", 0.1), "augment_dim": told})
    config = config_of(network=network.config, stage_sampling="systematic", **changes)
    where = {"device": DEVICE, "cuda_graphs": graphs}
    return Trainer(config, directory, data=tiny_images(), network=network, quiet=True, **where)


@pytest.mark.gpu
@pytest.mark.parametrize("cuda_graphs", [False, True], ids=["", "graphs"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_does_not_wait_for_the_device(tmp_path, precision, cuda_graphs):
    trainer = gpu_trainer(tmp_path, precision=precision, cuda_graphs=cuda_graphs, augment=0.5)
    for _ in range(12):  # compiles, allocates, and captures all mixes
        trainer._train_step()
    with waiting_is_an_error():
        trainer._train_step()


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_from_graphs_gives_the_bits_of_training_without_on_a_gpu(tmp_path, precision, exact_cuda):
    for graphs in (False, True):
        torch.manual_seed(0)
        changes = {"precision": precision, "dropout": 0.0, "accumulate": 2, "gradient_clip": 1.0}
        gpu_trainer(tmp_path / str(graphs), cuda_graphs=graphs, **changes).run()
    assert_same_run(tmp_path / "False", tmp_path / "True", 12)


@pytest.mark.gpu
def test_dropout_in_graphs_is_a_function_of_the_step(tmp_path, exact_cuda):
    for name, steps in (("whole", (12,)), ("parts", (7, 12))):
        for last in steps:
            torch.manual_seed(0)
            run = gpu_trainer(tmp_path / name, cuda_graphs=True, steps=last)
            run.run(resume=last != steps[0])
    assert_same_run(tmp_path / "whole", tmp_path / "parts", 12)
    torch.manual_seed(0)
    gpu_trainer(tmp_path / "none", cuda_graphs=True, dropout=0.0).run()
    weights, others = weights_of(tmp_path / "whole"), weights_of(tmp_path / "none")
    assert not all(torch.equal(value, others[name]) for name, value in weights.items())


def test_sample_grids_do_not_change_the_run(tmp_path, monkeypatch):
    grids = []
    plots = type(sys)("multistage_diffusion.common.plots")
    plots.save_sample_grid = lambda images, path: grids.append((tuple(images.shape), path.name))
    monkeypatch.setitem(sys.modules, "multistage_diffusion.common.plots", plots)
    trainer_of(tmp_path / "without").run()
    trainer_of(tmp_path / "with", sample_every=6, sample_count=4).run()
    assert grids == [((4, 1, 8, 8), "step-00000006.png"), ((4, 1, 8, 8), "step-00000012.png")]
    assert_same_run(tmp_path / "without", tmp_path / "with", 12)


def test_of_four_channels_the_grid_shows_three(tmp_path):
    images = ImageData(torch.randint(0, 256, (8, 4, 8, 8), dtype=torch.uint8), name="tiny")
    network = TinyNetwork(in_channels=4)
    config = config_of(steps=1, sample_every=1, sample_count=4)
    Trainer(config, tmp_path, data=images, network=network, quiet=True).run()
    with Image.open(tmp_path / "samples" / "step-00000001.png") as image:
        assert image.mode == "RGB"


@pytest.mark.parametrize(("module", "picture"), [(plots, "save_sample_grid"), (loss_curves, "plot_loss")])
def test_a_picture_that_fails_costs_no_training(tmp_path, monkeypatch, module, picture):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module, picture, full)
    monkeypatch.setattr(Trainer, "_plot", PLOT)
    with pytest.warns(PictureWarning, match=r"after step 2 is missing: OSError: .*No space left"):
        result = trainer_of(tmp_path, steps=2, sample_every=2, sample_count=1).run()
    assert result.checkpoint == checkpoints.latest_checkpoint(tmp_path / "checkpoints")


def test_config_is_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        config_of().steps = 3

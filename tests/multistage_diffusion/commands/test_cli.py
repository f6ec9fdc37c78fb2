import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from broken_streams import on_a_full_disk, without_reader
from multistage_diffusion import cli
from multistage_diffusion.commands import load_commands, sample, train
from multistage_diffusion.data import images as data
from multistage_diffusion.noise.parsing import parse_stages
from multistage_diffusion.noise.stages import Stages
from multistage_diffusion.presets import DIGITS, TRAINABLE, VARIANTS
from multistage_diffusion.training import checkpoints
from multistage_diffusion.training.configure import FolderWarning, saved_settings
from multistage_diffusion.training.run_log import RunLog
from multistage_diffusion.training.trainer import Trainer
from stand_ins import one_thread  # noqa: F401

TINY = [
    *("--data", "digits", "--image-size", "8", "--batch", "8", "--device", "cpu"),
    *("--encoder-widths", "8", "--decoder-widths", "8,8,4", "--channel-mult", "1", "--num-blocks", "1"),
    *("--attn-resolutions", "8", "--log-every", "2", "--checkpoint-every", "3"),
    *("--lr-decay", "constant", "--warmup-kimg", "0"),
]


def msd(*arguments):
    return cli.main([str(a) for a in arguments])


@pytest.fixture(autouse=True)
def _keep_warnings_as_they_are(monkeypatch):
    monkeypatch.setattr("warnings.showwarning", __import__("warnings").showwarning)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of four steps of a tiny network."""
    directory = tmp_path_factory.mktemp("cli") / "run"
    assert msd("train", *TINY, "--out", directory, "--steps", 4) == 0
    return directory


# ---------------------------------------------------------------------------------------- help and errors


def command_names():
    return [module.__name__.rpartition(".")[2] for module in load_commands()]


def test_the_expected_commands_exist():
    assert {"info", "sample", "train"} <= set(command_names())


@pytest.mark.parametrize("name", command_names())
def test_help_teaches(name, capsys):
    assert msd(name, "--help") == 0
    text = capsys.readouterr().out
    assert "examples:" in text
    assert f"msd {name}" in text


def test_without_a_command_the_help_is_shown(capsys):
    assert msd() == 0
    assert "COMMAND" in capsys.readouterr().out


def test_help_does_not_load_torch():
    code = (
        "import sys; from multistage_diffusion import cli; cli.main(['train', '--help']);"
        "assert 'torch' not in sys.modules"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train", "--out"),
        ("train --out x", "--data is needed"),
        ("train --out x --data digits --steps 0", "0 must be at least 1"),
        ("train --out x --data digits --sample-every 0", "0 must be at least 1"),
        ("train --out x --data digits --lr 0", "0 must be above 0"),
        ("train --out x --data digits --lr fast", "'fast' is not a number"),
        ("train --out x --data digits --decoder-widths 8,x", "'x' is not a whole number"),
        ("train --out x --data digits --stages wide", "--stages wide"),
        ("train --out x --data digits --stages 3,2", "its lower end must lie below"),
        ("train --out x --data digits --stages nowhere.json", "cannot read nowhere.json"),
        ("train --out x --data digits --stages 1,2,3", "network has 3 stage(s) but 4 were given"),
        ("train --out x --data nowhere", "nowhere"),
        (
            "train --out x --data digits --schedule vp --stages single --p-mean 0",
            "--p-mean: only schedule edm or flow has",
        ),
        ("train --out x --data digits --preset uvit-cifar10 --schedule edm", "cut in t; give --stages, too"),
        (
            "train --out x --data digits --preset ncsnpp-cifar10 --class-conditional",
            "ncsnpp takes no classes; edm",
        ),
        ("train --out x --data digits --schedule vp --stages 2,3", "its lower end must lie below"),
        (
            "train --out x --data digits --prediction v",
            "prediction must be one of epsilon with schedule edm, got 'v'",
        ),
        ("train --out x --data digits --augment 2", "argument --augment: 2 must be at most 1"),
        ("train --out x --data digits --depth 5", "edm does not take these arguments"),
        ("train --out x --resume", "holds no run to resume"),
        ("train --out x --data digits --device tpu", "--device tpu"),
        ("train --out x --data digits --device cuda:99", "CUDA device(s)"),
        ("sample --run nowhere --out x.png", "there is no folder nowhere"),
        ("sample --run nowhere --out x.jpg", "must end in .png, .npz, or / for a folder"),
        ("sample --run nowhere --out x.png --seeds 4-2", "'4-2' is neither a seed nor a range"),
        ("sample --run nowhere --out x.png --seeds 1,²", "'²' is neither a seed nor a range"),
        ("sample --run nowhere --out x.png --seeds 0-99999999999", "are more than 10000000 seeds"),
        ("sample --run nowhere --out x.png --seeds 4 --num 2", "exclude each other"),
        ("sample --run nowhere --out x.png --sigma-min 90", "sigma_min=90"),
        ("sample --run nowhere --out x.png --device cpu --cuda-graphs", "--cuda-graphs: needs a CUDA device"),
        ("paint", "'paint'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert msd(*arguments.split()) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.count("\n") == 1
    assert errors.startswith("msd")
    assert not (tmp_path / "x").exists()


def test_debug_shows_the_traceback(capsys, tmp_path):
    assert msd("sample", "--run", tmp_path / "nowhere", "--out", "x.png", "--debug") == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_failed_run_is_exit_code_1(capsys, tmp_path):
    assert msd("train", *TINY, "--out", tmp_path / "run", "--steps", 20, "--lr", 1e30) == 1
    errors = capsys.readouterr().err
    assert "not finite" in errors or "is nan at step" in errors or "is inf at step" in errors
    assert "Traceback" not in errors


def start(*arguments, **streams):
    """``msd`` in a process of its own, with buffered streams as users have them."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONUNBUFFERED": ""}
    command = [sys.executable, "-m", "multistage_diffusion", *map(str, arguments)]
    return subprocess.Popen(command, env=environment, text=True, **streams)


def test_training_outlives_the_readers_of_its_output(tmp_path):
    options = ("--steps", 6, "--log-every", 1, "--out", tmp_path / "run")
    with without_reader() as stream:
        assert start("train", *TINY, *options, stdout=stream, stderr=stream).wait(120) == 0
    assert checkpoints.latest_checkpoint(tmp_path / "run" / "checkpoints").name == "step-00000006"


@pytest.mark.parametrize("arguments", [("info",), ("train", "--help")], ids=" ".join)
def test_a_reader_who_leaves_may_have_what_it_wanted(arguments):
    with without_reader() as stream:
        process = start(*arguments, stdout=stream, stderr=subprocess.PIPE)
        assert process.communicate(timeout=120)[1] == ""
        assert process.returncode == 0


@pytest.mark.parametrize(("name", "code"), [("info", 0), ("flops", 0), ("sample", 1), ("train", 1)])
def test_a_command_that_nobody_listens_to_did_not_succeed_unless_it_only_prints(
    name, code, capsys, monkeypatch
):
    def broken(args):
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    module = {m.__name__.rpartition(".")[2]: m for m in load_commands()}[name]
    monkeypatch.setattr(module, "run", broken)
    needed = {"flops": ["--preset", "edm-cifar10"], "sample": ["--run", "x", "--out", "y.png"]}
    assert msd(name, *needed.get(name, []), *(["--out", "x"] if name == "train" else [])) == code
    left = f"msd {name}: the reader of what it prints has left before the end (Broken pipe)\n"
    assert capsys.readouterr().err == (left if code else "")


def test_what_cannot_be_printed_in_the_end_is_noticed(monkeypatch, capsys):
    with on_a_full_disk() as stream:
        stream.reconfigure(line_buffering=False)
        monkeypatch.setattr(sys, "stdout", stream)
        assert msd("info") == 1
    assert capsys.readouterr().err == "msd info: No space left on device\n"


def test_a_warning_that_nobody_reads_is_no_error(monkeypatch):
    with without_reader() as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        cli._show_warning("lost", UserWarning, "file", 1)


# ---------------------------------------------------------------------------------------- train


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_before_the_first_step_says_what_happened(number, tmp_path, capsys, monkeypatch):
    before = signal.signal(number, signal.SIG_DFL)  # under nohup it is ignored

    def stopped(*arguments, **options):
        os.kill(os.getpid(), number)
        time.sleep(10)  # the handler runs at once

    monkeypatch.setattr(data, "load_images", stopped)
    out = tmp_path / "run"
    assert msd("train", *TINY, "--out", out) == 128 + number
    assert capsys.readouterr().err == (
        f"msd train: stopped by {number.name} before the first step; {out} can be used again\n"
    )
    assert signal.signal(number, before) is signal.SIG_DFL


def test_a_signal_that_is_ignored_stops_no_start(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "load_images", lambda *_, **__: os.kill(os.getpid(), signal.SIGHUP) or 1 / 0)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert msd("train", *TINY, "--out", tmp_path / "run") == 1
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_start_that_ran_out_of_memory_can_be_repeated(tmp_path, monkeypatch, capsys):
    out, small = tmp_path / "run", ("--out", tmp_path / "run", "--steps", 1)
    original = Trainer._train_step

    def out_of_memory(self):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Trainer, "_train_step", out_of_memory)
    for again in ((), ("--batch", 4), ("--resume",), ("--resume", "--batch", 8)):
        assert msd("train", *TINY, *small, *again) == 1
        assert "out of memory" in capsys.readouterr().err
    assert {path.name for path in out.iterdir()} == {".lock", "config.json", "stages.json"}
    monkeypatch.setattr(Trainer, "_train_step", original)
    assert msd("train", *TINY, *small, "--batch", 4) == 0
    assert json.loads((out / "config.json").read_text())["batch_size"] == 4


def test_train_writes_the_run_folder(run):
    assert {"config.json", "stages.json", "log.jsonl", "loss.png", "checkpoints"} <= {
        p.name for p in run.iterdir()
    }
    config = json.loads((run / "config.json").read_text())
    assert config["network"]["decoder_widths"] == [8, 8, 4]
    assert config["network"]["in_channels"] == 1
    assert "label_dim" in config["network"]  # defaults are written out
    assert RunLog(run / "log.jsonl").read()[-1]["step"] == 4


def test_train_does_not_overwrite(run, capsys):
    assert msd("train", *TINY, "--out", run) == 2
    assert "holds a run already" in capsys.readouterr().err


def test_resume_takes_the_settings_of_the_run(run, tmp_path, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert msd("train", *TINY, "--out", whole, "--steps", 7) == 0
    assert msd("train", *TINY, "--out", parts, "--steps", 4) == 0
    assert msd("train", "--out", parts, "--resume", "--steps", 7, "--device", "cpu") == 0
    assert "resuming" in capsys.readouterr().err
    for name in ("network", "ema", "optimizer"):
        a, b = (checkpoints.read_tensors(d / "checkpoints" / "step-00000007", name) for d in (whole, parts))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    "damage",
    [
        lambda config: 5,
        lambda config: None,
        lambda config: {k: v for k, v in config.items() if k != "stages"},
        lambda config: config | {"network": 3},
        lambda config: config | {"stages": {"stages": [5]}},
        lambda config: config | {"spirit": 1},
        lambda config: config | {"steps": "many"},
    ],
)
def test_a_configuration_that_is_damaged_is_taken_from_the_checkpoint(damage, run, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(run, out)
    config = out / "config.json"
    saved = json.loads(config.read_text())
    config.write_text(json.dumps(damage(saved)))
    args = train_arguments("--out", out, "--resume")
    with pytest.warns(
        FolderWarning, match=r"config\.json is damaged: .*that of the newest checkpoint is taken"
    ):
        assert saved_settings(args.out) == saved
    shutil.rmtree(out / "checkpoints")
    with pytest.warns(FolderWarning, match="there is no checkpoint to take another from"):
        assert saved_settings(args.out) is None


def train_arguments(*arguments):
    return cli.build_parser().parse_args(["train", *map(str, arguments)])


def test_what_the_checkpoint_says_is_resumed(run, tmp_path):
    """Of an edited configuration only what may differ between a run and its continuation counts."""
    out = tmp_path / "run"
    shutil.copytree(run, out)
    config = out / "config.json"
    saved = json.loads(config.read_text())
    config.write_text(json.dumps(saved | {"lr": 0.5, "log_every": 3, "steps": 9}))
    with pytest.warns(
        FolderWarning, match=r"lr: 0\.002 in the checkpoint, now 0\.5; the run goes on as the newest"
    ):
        assert saved_settings(out) == saved | {
            "log_every": 3,
            "steps": 9,
        }


def test_resume_from_another_folder_and_of_moved_data(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    images = np.random.default_rng(0).integers(0, 256, (10, 8, 8, 1), dtype=np.uint8)
    np.save(tmp_path / "here" / "a.npy", images)
    run = tmp_path / "run"
    monkeypatch.chdir(tmp_path / "here")
    assert msd("train", *TINY, "--data", "a.npy", "--out", run, "--steps", 1) == 0
    monkeypatch.chdir(tmp_path / "there")
    assert msd("train", "--out", run, "--resume", "--steps", 2, "--device", "cpu") == 0
    (tmp_path / "here" / "a.npy").rename(tmp_path / "there" / "b.npy")
    assert msd("train", "--out", run, "--resume", "--steps", 3, "--device", "cpu", "--data", "b.npy") == 0
    assert json.loads((run / "config.json").read_text())["data"] == str(tmp_path / "there" / "b.npy")
    np.save(tmp_path / "there" / "b.npy", images // 2)
    assert msd("train", "--out", run, "--resume", "--steps", 4, "--device", "cpu") == 2


def test_resume_takes_a_lost_configuration_from_the_checkpoint(run, tmp_path, capsys):
    lost = tmp_path / "run"
    shutil.copytree(run, lost)
    before = json.loads((lost / "config.json").read_text())
    (lost / "config.json").unlink()
    assert msd("train", "--out", lost, "--resume", "--steps", 5, "--lr", 0.3, "--device", "cpu") == 2
    assert "lr: 0.002 in the checkpoint, now 0.3" in capsys.readouterr().err
    (lost / "config.json").write_text("{")
    assert msd("train", "--out", lost, "--resume", "--steps", 5, "--device", "cpu") == 0
    assert "config.json is damaged: " in capsys.readouterr().err
    assert json.loads((lost / "config.json").read_text()) == {**before, "steps": 5}


def test_sample_grids_can_be_left_out_again():
    saved = train.make_config(parsed("--sample-every", "5"), None, "digits", Digits()).to_json()
    assert saved["sample_every"] == 5
    for options, every in (((), 5), (("--sample-every", "none"), None), (("--sample-every", "2"), 2)):
        assert train.make_config(parsed(*options), saved, "digits", Digits()).sample_every == every


def test_resume_refuses_a_variant_without_its_preset(run, capsys):
    assert msd("train", "--out", run, "--resume", "--variant", "unified") == 2
    assert "--variant: is that of a preset" in capsys.readouterr().err


def test_mixed_sampling_needs_no_shares():
    args = parsed("--preset", "ncsnpp-cifar10", "--stage-sampling", "mixed")
    config = train.make_config(args, None, "images", Images())
    assert (config.stage_sampling, config.stage_probabilities) == ("mixed", None)


def test_resume_names_settings_that_differ(run, capsys):
    assert msd("train", "--out", run, "--resume", "--lr", 0.5, "--decoder-widths", "8,8,8") == 2
    errors = capsys.readouterr().err
    assert "lr: 0.002 in the checkpoint, now 0.5" in errors
    assert "network.decoder_widths: [8, 8, 4] in the checkpoint, now [8, 8, 8]" in errors


def parsed(*arguments):
    return cli.build_parser().parse_args(["train", "--out", "x", *arguments])


class Digits:
    image_size, channels, labels = 16, 1, torch.arange(10)


def test_options_go_before_the_preset():
    args = parsed(
        "--preset", "digits", "--decoder-widths", "16,8", "--stages", "1", "--kimg", "2", "--batch", "64"
    )
    config = train.make_config(args, None, "digits", Digits())
    assert config.network["decoder_widths"] == [16, 8]
    assert config.network["encoder_widths"] == DIGITS.network["encoder_widths"]
    assert config.stages == Stages.from_boundaries([0, 1, float("inf")])
    assert config.steps == 32  # 2000 images in batches of 64, rounded up
    args = parsed("--class-conditional", "--ema-kimg", "3", "--warmup-kimg", "0.5")
    config = train.make_config(args, None, "digits", Digits())
    assert config.network["label_dim"] == 10
    assert (config.ema_halflife_images, config.warmup_images) == (3000, 500)


class Images:
    image_size, channels, labels = 32, 3, torch.arange(1000)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", TRAINABLE)
def test_presets_are_valid(name, variant):
    config = train.make_config(parsed("--preset", name, "--variant", variant), None, "images", Images())
    preset = TRAINABLE[name]
    stages = {"multistage": preset.stages(), "separate": preset.stages()}.get(variant)
    assert config.stages == (stages or Stages.single(config.noise_schedule().variable))
    assert len(config.stages) == len(config.network["decoder_widths"])
    assert config.schedule == preset.schedule
    shares = preset.stage_shares() if stages else (1.0,)
    assert _shares(config) == pytest.approx(shares, abs=0.02)
    if variant == "separate":
        assert config.network["encoder_widths"] == config.network["decoder_widths"]


def _shares(config):
    """The share of each stage among many noise levels drawn as the configuration says."""
    counts = config.noise_levels().draw(20_000, torch.Generator().manual_seed(0)).counts
    return [count / 20_000 for count in counts]


def test_the_network_is_told_of_the_augmentation():
    def made(*options):
        config = train.make_config(parsed("--preset", "edm-cifar10", *options), None, "images", Images())
        return config.augment, config.network["augment_dim"]

    assert made() == (0.12, 9)
    assert made("--augment", "0") == (0.0, 9)
    assert made("--augment", "none") == (None, 0)
    assert made("--values", "latents") == (None, 0)
    config = train.make_config(parsed("--preset", "ncsnpp-cifar10"), None, "images", Images())
    assert config.augment == 0  # flips, of which it is told nothing
    with pytest.raises(ValueError, match=r"augment=0\.5 needs a network that is told"):
        train.make_config(parsed("--preset", "ncsnpp-cifar10", "--augment", "0.5"), None, "images", Images())


def test_parse_stages(tmp_path):
    inf = float("inf")
    assert parse_stages("edm") == parse_stages("2.5103,7.6577") == parse_stages("0,2.5103,7.6577,inf")
    assert parse_stages("single") == Stages.single()
    assert parse_stages("single", "vp") == Stages.single("t")
    assert parse_stages("0.4,0.6", "vp") == Stages.from_boundaries([0, 0.4, 0.6, 1], "t")
    assert parse_stages("441,1000", "ldm") == Stages.from_boundaries([0, 441, 1000], "step")
    path = tmp_path / "stages.json"
    Stages([[(0, 1), (2, inf)], [(1, 2)]]).save(path)
    assert parse_stages(str(path)) == Stages.load(path)


# ---------------------------------------------------------------------------------------- sample, info, demo


def test_sample_writes_arrays(run, tmp_path, capsys):
    out = tmp_path / "new" / "samples.npz"
    assert msd("sample", "--run", run, "--seeds", "5,2-3", "--steps", 3, "--out", out, "--device", "cpu") == 0
    arrays = np.load(out)
    assert arrays["images"].shape == (3, 8, 8, 1)
    assert arrays["images"].dtype == np.uint8
    assert arrays["seeds"].tolist() == [5, 2, 3]
    assert "5 network evaluations each" in capsys.readouterr().out


def test_sample_writes_a_grid(run, tmp_path):
    checkpoint = checkpoints.latest_checkpoint(run / "checkpoints")
    for weights in ("ema", "network"):
        out = tmp_path / f"{weights}.png"
        options = ("--weights", weights, "--num", 4, "--steps", 2, "--s-churn", 4, "--device", "cpu")
        assert msd("sample", "--run", checkpoint, "--out", out, *options) == 0
        with Image.open(out) as image:
            assert image.width == image.height
    assert (tmp_path / "ema.png").read_bytes() != (tmp_path / "network.png").read_bytes()


def test_sample_rejects_a_class_of_an_unconditional_model(run, tmp_path, capsys):
    assert msd("sample", "--run", run, "--out", tmp_path / "x.png", "--class", 3) == 2
    assert "class 3: this model has no classes" in capsys.readouterr().err


def test_class_conditional_training_and_sampling(tmp_path):
    out = tmp_path / "run"
    assert msd("train", *TINY, "--out", out, "--steps", 2, "--class-conditional") == 0
    for k in (0, 7):
        options = ("--class", k, "--num", 2, "--steps", 2, "--device", "cpu")
        assert msd("sample", "--run", out, "--out", tmp_path / f"{k}.png", *options) == 0
    assert msd("sample", "--run", out, "--out", tmp_path / "x.png", "--class", 10, "--device", "cpu") == 2
    assert msd("sample", "--run", out, "--out", tmp_path / "x.png", "--num", 3, "--device", "cpu") == 0


def test_seed_list():
    assert sample.seed_list("0-3,7") == [0, 1, 2, 3, 7]


def test_info(capsys):
    assert msd("info") == 0
    assert "torch" in capsys.readouterr().out.lower()

"""Training and sampling of every family of networks, each with its own schedule, at tiny size."""

from __future__ import annotations

import hashlib
import itertools
import json

import numpy as np
import pytest
import torch

from multistage_diffusion import cli
from multistage_diffusion.data.images import ImageData
from multistage_diffusion.noise.losses import denoising_loss
from multistage_diffusion.noise.preconditioning import EDMPreconditioner, SchedulePreconditioner
from multistage_diffusion.noise.schedules import vp_sigma
from multistage_diffusion.noise.stages import Stages
from multistage_diffusion.presets import TRAINABLE
from multistage_diffusion.training import checkpoints
from multistage_diffusion.training.config import TrainingConfig
from multistage_diffusion.training.configure import configure
from multistage_diffusion.training.trainer import RunError, Trainer
from stand_ins import (  # noqa: F401
    RecordingNetwork,
    TinyNetwork,
    assert_same_run,
    by_earlier_versions,
    one_thread,
    tiny_images,
)

UNET = {"channel_mult": [1, 1], "num_blocks": 1, "attn_resolutions": [4], "dropout": 0.1}
# The presets' networks with few channels; everything else of a run is the preset's.
SMALL = {
    "edm-cifar10": {**UNET, "encoder_widths": [8], "decoder_widths": [8, 8, 4]},
    "ncsnpp-cifar10": {**UNET, "encoder_widths": [8], "decoder_widths": [8, 8, 4]},
    "uvit-cifar10": {"encoder_widths": [16], "decoder_widths": [24, 16, 8], "depth": 5, "num_heads": 2},
    "ldm-celebahq256": {
        **UNET,
        "encoder_widths": [32],
        "decoder_widths": [32, 32, 32],
        "in_channels": 5,
        "out_channels": 5,
    },
    "ldm-imagenet256": {
        **UNET,
        "encoder_widths": [32],
        "decoder_widths": [32, 32, 32],
        "context_dim": 6,
        "label_dim": 3,
    },
}
each_family = pytest.mark.parametrize("name", SMALL)


def data_for(name: str) -> ImageData:
    generator = torch.Generator().manual_seed(0)
    if name.startswith("ldm"):
        channels = 5 if name == "ldm-celebahq256" else 4
        latents = 3 * torch.randn(12, channels, 8, 8, generator=generator)
        return ImageData(latents, torch.arange(12) % 3, values="latents", name="latents")
    images = torch.randint(0, 256, (12, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return ImageData(images, name="images")


def config_of(name: str, **changes) -> TrainingConfig:
    preset = TRAINABLE[name]
    settings = {
        **preset.training_settings(),
        "network": preset.config(image_size=8, **SMALL[name]),
        "values": "latents" if name.startswith("ldm") else "images",
        "steps": 4,
        "batch_size": 6,
        "checkpoint_every": 2,
        "log_every": 2,
        "warmup_images": 0,
    }
    return TrainingConfig(**{**settings, **changes})


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    monkeypatch.setattr(Trainer, "_plot", lambda self: None)


def train(name: str, directory, resume: bool = False, **changes):
    config = config_of(name, **changes)
    return Trainer(config, directory, data=data_for(name), quiet=True).run(resume)


@each_family
def test_a_resumed_run_ends_with_the_same_bits(name, tmp_path):
    train(name, tmp_path / "whole")
    train(name, tmp_path / "parts", steps=2)
    result = train(name, tmp_path / "parts", resume=True)
    assert result.step == 4
    assert_same_run(tmp_path / "whole", tmp_path / "parts", 4)


@each_family
def test_a_trained_model_loads_with_its_own_schedule_and_stages(name, tmp_path):
    train(name, tmp_path, steps=2)
    denoiser = checkpoints.load_model(tmp_path).denoiser
    preset = TRAINABLE[name]
    kind = EDMPreconditioner if preset.schedule == "edm" else SchedulePreconditioner
    assert type(denoiser) is kind
    expected = preset.denoiser(denoiser.network)
    assert denoiser.stages == expected.stages
    sigma = torch.tensor([0.1, 3.0, 6.5], dtype=torch.float64)
    for ours, theirs in zip(denoiser.coefficients(sigma), expected.coefficients(sigma), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["ncsnpp-cifar10", "ldm-imagenet256"])
def test_the_loss_of_a_schedule_is_the_mean_squared_error_of_the_predicted_noise(name):
    y = data_for(name).sample(range(4))
    n = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    config = config_of(name)
    levels = config.noise_levels().draw(4, torch.Generator().manual_seed(2))
    network = RecordingNetwork(F=lambda x, noise, stage: 0.3 * x, in_channels=y.shape[1])
    loss = denoising_loss(config.denoiser(network), y, levels.sigma, levels.stage, noise=n)
    sigma = levels.sigma.float()[:, None, None, None]
    s = 1 / (1 + sigma**2).sqrt()
    expected = (0.3 * s * (y + sigma * n) - n).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(config.loss_scale(y[0].numel()) * loss, expected, rtol=1e-4, atol=1e-5)


def test_a_schedules_times_are_drawn_evenly_in_each_stage():
    levels = config_of("ncsnpp-cifar10").noise_levels().draw(6000, torch.Generator().manual_seed(3))
    assert levels.counts == (2000, 2000, 2000)
    ends = (1e-5, 0.4420, 0.6308, 1.0)
    for stage, (low, high) in enumerate(itertools.pairwise(ends)):
        sigma = levels.sigma[levels.stage == stage]
        assert vp_sigma(low) < sigma.min() < sigma.max() <= vp_sigma(high)
        share = float((sigma <= vp_sigma((low + high) / 2)).double().mean())
        assert share == pytest.approx(0.5, abs=0.04)


def test_augmented_images_come_with_their_labels(tmp_path):
    seen = []
    config = config_of("edm-cifar10", augment=1.0, steps=1)
    trainer = Trainer(config, tmp_path, data=data_for("edm-cifar10"), quiet=True)
    trainer.network.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    trainer.run()
    labels = seen[0]["augment_labels"]
    assert labels.shape == (6, 9)
    assert labels.count_nonzero() > 6  # more than the x flips


def test_flips_alone_are_told_to_nobody(tmp_path):
    images = torch.zeros(8, 1, 8, 8, dtype=torch.uint8)
    images[..., :4] = 255
    network = TinyNetwork(dropout=0)
    config = TrainingConfig(network={"family": "tiny"}, augment=0.0, steps=1, batch_size=8, P_mean=-9.0)
    trainer = Trainer(config, tmp_path, data=ImageData(images), network=network, quiet=True)
    seen = []
    network.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args[0], kwargs)), with_kwargs=True
    )
    trainer.run()
    x, kwargs = seen[0]
    assert not kwargs
    left = x[..., :4].mean(dim=(1, 2, 3)) > 0
    assert 0 < int(left.sum()) < 8  # some images have their bright half on the left, others on the right
    assert torch.equal(left, x[..., 4:].mean(dim=(1, 2, 3)) < 0)


def test_weight_decay_is_that_of_adamw(tmp_path):
    network = TinyNetwork(dropout=0)
    config = TrainingConfig(network={"family": "tiny"}, steps=1, batch_size=4, lr=0.1, weight_decay=0.5)
    trainer = Trainer(config, tmp_path, data=tiny_images(), network=network, quiet=True)
    for decoder in network.decoders:  # nothing comes through: the encoder's gradient is 0
        torch.nn.init.zeros_(decoder.weight)
    before = network.encoder.weight.detach().clone()
    trainer.run()
    torch.testing.assert_close(network.encoder.weight.detach(), 0.95 * before)


def test_runs_of_before_there_were_schedules_go_on(tmp_path):
    """Their configuration lacks the keys that came later, and their optimizer knew the layers' flat parameters."""
    every = {"augment": None, "stage_sampling": "stratified"}  # every step has samples of every stage
    train("edm-cifar10", tmp_path / "whole", **every)
    parts = tmp_path / "parts"
    train("edm-cifar10", parts, steps=2, **every)
    checkpoint = parts / "checkpoints" / "step-00000002"
    content = json.loads((checkpoint / "checkpoint.json").read_text())
    config = without_later_keys(content["config"])
    group = content["optimizer"]["param_groups"][0]
    tensors = checkpoints.read_tensors(checkpoint, "optimizer")
    state, group["params"] = by_earlier_versions(tensors, group["params"], together=True)
    checkpoints.write_tensors(checkpoint / "optimizer.safetensors", state)
    data = (checkpoint / "optimizer.safetensors").read_bytes()
    content["files"]["optimizer.safetensors"] = {
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    del content["optimizer"]["state"]
    del content["sha256"]
    content["format"] = checkpoints.WITHOUT_OWN_CHECKSUM
    (checkpoint / "checkpoint.json").write_text(json.dumps(content))
    (parts / "config.json").write_text(json.dumps(config))
    assert type(checkpoints.load_model(parts).denoiser) is EDMPreconditioner
    assert train("edm-cifar10", parts, resume=True, **every).step == 4
    assert_same_run(tmp_path / "whole", parts, 4)


def without_later_keys(config: dict) -> dict:
    for key in ("schedule", "prediction", "values", "augment", "weight_decay"):
        del config[key]
    return config


def test_a_resume_that_fails_leaves_the_configuration_alone(tmp_path):
    train("edm-cifar10", tmp_path, steps=2, augment=None)
    before = (tmp_path / "config.json").read_text()
    config = config_of("edm-cifar10", steps=4, augment=None)
    other = ImageData(torch.zeros(12, 3, 8, 8, dtype=torch.uint8), name="others")
    with pytest.raises(RunError, match="have changed"):
        Trainer(config, tmp_path, data=other, quiet=True).run(resume=True)
    assert (tmp_path / "config.json").read_text() == before


def test_latents_for_images_are_refused(tmp_path):
    config = config_of("ldm-imagenet256", values="images")
    with pytest.raises(ValueError, match="the data are latents, the configuration says values='images'"):
        Trainer(config, tmp_path, data=data_for("ldm-imagenet256"), quiet=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": "cosine"}, "schedule='cosine' must be one of edm, vp, ve, ldm, flow"),
        (
            {"schedule": "edm", "prediction": "v"},
            "prediction must be one of epsilon with schedule edm, got 'v'",
        ),
        ({"stages": Stages.single("step"), "stage_probabilities": None}, "needs stages of 't'"),
        ({"augment": 1.5}, "augment=1.5 must be at most 1"),
        ({"augment": 0.1}, "needs a network that is told of it"),
        ({"values": "latents"}, "latents are no images"),
        ({"weight_decay": -1}, "weight_decay=-1 must be at least 0"),
    ],
)
def test_config_rejects(changes, message):
    with pytest.raises(ValueError, match=message):
        config_of("ncsnpp-cifar10", **changes)


def test_a_network_that_needs_a_text_is_refused(tmp_path):
    config = config_of("ldm-imagenet256", network={**SMALL_TEXT})
    with pytest.raises(ValueError, match="takes a context of 6 channels"):
        Trainer(config, tmp_path, data=data_for("ldm-imagenet256"), quiet=True)


SMALL_TEXT = {
    "family": "ldm",
    "image_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    **SMALL["ldm-imagenet256"],
    "label_dim": 0,
}


def msd(*arguments) -> int:
    return cli.main([str(argument) for argument in arguments])


def test_latents_from_the_command_line(tmp_path):
    generator = np.random.default_rng(0)
    latents = generator.normal(0, 3, (12, 5, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "latents.npz", latents=latents)
    widths = ("--encoder-widths", "32", "--decoder-widths", "32,32,32", "--channel-mult", "1")
    options = ("--num-blocks", "1", "--attn-resolutions", "", "--batch", "6", "--device", "cpu")
    source = ("--data", tmp_path / "latents.npz", "--values", "latents", "--preset", "ldm-celebahq256")
    run = tmp_path / "run"
    assert msd("train", *source, *widths, *options, "--steps", 2, "--out", run) == 0
    assert msd("train", "--out", run, "--resume", "--steps", 3, "--device", "cpu") == 0
    out = tmp_path / "samples.npz"
    assert msd("sample", "--run", run, "--num", 2, "--steps", 3, "--out", out, "--device", "cpu") == 0
    assert np.load(out)["latents"].shape == (2, 5, 8, 8)
    assert msd("sample", "--run", run, "--out", tmp_path / "x.png", "--device", "cpu") == 2


def test_score_sde_from_the_command_line(tmp_path, capsys):
    widths = (
        "--encoder-widths",
        "8",
        "--decoder-widths",
        "8,8,4",
        "--channel-mult",
        "1",
        "--num-blocks",
        "1",
    )
    options = ("--attn-resolutions", "", "--batch", "6", "--steps", "2", "--sample-every", "2")
    source = ("--data", "digits", "--image-size", "8", "--preset", "ncsnpp-cifar10", "--device", "cpu")
    run = tmp_path / "run"
    assert msd("train", *source, *widths, *options, "--out", run) == 0
    assert (run / "samples" / "step-00000002.png").exists()
    assert Stages.load(run / "stages.json").variable == "t"
    out = tmp_path / "grid.png"
    assert msd("sample", "--run", run, "--num", 4, "--out", out, "--device", "cpu") == 0
    assert "20 network evaluations each" in capsys.readouterr().out


@pytest.mark.parametrize("variant", ["unified", "separate"])
@each_family
def test_a_baseline_is_trained_on_the_noise_levels_of_the_multi_stage_model(name, variant):
    preset = TRAINABLE[name]

    def levels(variant: str):
        config = TrainingConfig(network={"augment_dim": 9}, **preset.training_settings(variant))
        assert TrainingConfig.from_json(config.to_json()) == config
        return config.noise_levels().draw(64, torch.Generator().manual_seed(3))

    baseline, multistage = levels(variant), levels("multistage")
    assert torch.equal(baseline.sigma, multistage.sigma)
    assert torch.equal(baseline.weight, multistage.weight)
    assert baseline.counts == ((64,) if variant == "unified" else multistage.counts)


def test_stages_or_sampling_of_ones_own_replace_those_of_the_baseline():
    data = data_for("ncsnpp-cifar10")
    unified = {
        "preset": "ncsnpp-cifar10",
        "variant": "unified",
        "network": {"attn_resolutions": [8]},
    }
    assert configure(data, "x", **unified).drawn_stages == TRAINABLE["ncsnpp-cifar10"].stages()
    for changes in ({"stages": "single"}, {"stage_sampling": "mixed"}):
        config = configure(data, "x", **unified, **changes)
        assert (config.drawn_stages, config.stage_sampling) == (None, "mixed")
    resumed = configure(data, "x", saved=configure(data, "x", **unified).to_json(), steps=7)
    assert resumed.drawn_stages == TRAINABLE["ncsnpp-cifar10"].stages()

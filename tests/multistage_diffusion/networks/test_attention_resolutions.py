"""Attention at resolutions that the image never has: refused, and left out where a saved network had left it out."""

from __future__ import annotations

import json

import pytest
import torch

from multistage_diffusion import cli, networks, official
from multistage_diffusion.commands import train
from multistage_diffusion.official import convert
from multistage_diffusion.presets import TRAINABLE
from multistage_diffusion.training import checkpoints
from multistage_diffusion.training.config import TrainingConfig
from multistage_diffusion.training.trainer import Trainer
from stand_ins import SMALL_UNET, config_of, no_plots, one_thread, tiny_images  # noqa: F401 - fixtures

UNETS = {
    "edm": {"encoder_widths": (8,), "decoder_widths": (8, 4)},
    "ncsnpp": {"encoder_widths": (8,), "decoder_widths": (8, 4)},
    "ldm": {"encoder_widths": (32,), "decoder_widths": (64, 32)},
}
TWO_LEVELS = {"image_size": 28, "channel_mult": (1, 2), "num_blocks": 1}


def attentions(network: torch.nn.Module) -> int:
    return sum(name.endswith("attention") for name, _ in network.named_modules())


def built(config) -> torch.nn.Module:
    with torch.device("meta"):
        return networks.build(config)


@pytest.mark.parametrize("family", UNETS)
@pytest.mark.parametrize(
    ("given", "named", "instead"),
    [
        ((16,), "16", r"\[14\]"),
        ((16, 28), "16", r"\[28, 14\]"),
        ((7,), "7", r"\[14\]"),
        ((14, 0, 56), "0, 56", r"\[28, 14\]"),
    ],
    ids=str,
)
def test_a_resolution_that_the_image_never_has_is_refused(family, given, named, instead):
    message = (
        rf"names {named}, but with image_size=28 and 2 levels the resolutions are 28, 14; .*"
        rf"attn_resolutions={instead}, or give none"
    )
    with pytest.raises(ValueError, match=message):
        built({"family": family, **TWO_LEVELS, **UNETS[family], "attn_resolutions": given})


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("edm-cifar10", 28),
        ("edm-celeba", 96),
        ("ncsnpp-cifar10", 40),
        ("ldm-celebahq256", 128),
        ("ldm-imagenet256", 48),
    ],
)
def test_a_preset_at_another_size_keeps_its_attention_or_says_that_it_cannot(name, size):
    config = TRAINABLE[name].config()
    with pytest.raises(
        ValueError, match=rf"attn_resolutions=.* with image_size={size} .* the resolutions are {size}, "
    ):
        built({**config, "image_size": size})
    attending = [size * resolution // config["image_size"] for resolution in config["attn_resolutions"]]
    moved = built({**config, "image_size": size, "attn_resolutions": attending})
    assert attentions(moved) == attentions(built(config)) > 2


@pytest.mark.parametrize("family", UNETS)
def test_a_saved_configuration_keeps_the_attention_that_its_network_had(family):
    config = {"family": family, **TWO_LEVELS, **UNETS[family], "attn_resolutions": [16, 14]}
    kept = networks.in_effect(config)
    assert kept == {**config, "attn_resolutions": [14]}
    assert built(kept).config["attn_resolutions"] == [14]


@pytest.mark.parametrize("family", UNETS)
@pytest.mark.parametrize(("size", "attending"), [(32, [16, 32]), (28, []), (16, [8, 16])])
def test_the_default_is_what_there_is_of_the_published_resolutions(family, size, attending):
    network = built({"family": family, **TWO_LEVELS, **UNETS[family], "image_size": size})
    published = {8, 16, 32} if family == "ldm" else {16}
    assert network.config["attn_resolutions"] == [r for r in attending if r in published]


@pytest.mark.parametrize(
    "config",
    [
        {"family": "uvit", "image_size": 28},
        {"family": "own", "attn_resolutions": [16]},
        {"family": ["edm"]},
        {"family": "edm", "image_size": "28", "attn_resolutions": [16]},
        {"family": "edm", "image_size": 28, "attn_resolutions": 16},
        {"family": "edm"},
        {},
    ],
    ids=str,
)
def test_other_configurations_stay_as_they_are(config):
    assert networks.in_effect(config) == config


def test_an_old_file_of_a_network_loads(tmp_path):
    network = networks.build({**SMALL_UNET, "attn_resolutions": ()})
    network.config["attn_resolutions"] = [16]  # as earlier versions saved it
    convert.save_network(tmp_path / "old.safetensors", network)
    loaded = convert.load_network(tmp_path / "old.safetensors")
    assert loaded.config["attn_resolutions"] == []
    for name, tensor in network.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


@pytest.fixture
def old_run(tmp_path):
    """The folder of a run whose configuration names a resolution that its images never have."""
    network = networks.build({**SMALL_UNET, "attn_resolutions": ()}).config
    config = config_of(network=network, steps=2, stage_sampling="mixed", log_every=1)
    Trainer(config, tmp_path, data=tiny_images(), quiet=True).run()
    (checkpoint,) = checkpoints.list_checkpoints(tmp_path / "checkpoints")
    path = tmp_path / "config.json"
    saved = json.loads(path.read_text())
    saved["network"]["attn_resolutions"] = [16]
    path.write_text(json.dumps(saved))
    path = checkpoint / checkpoints.METADATA
    metadata = json.loads(path.read_text())
    metadata["config"]["network"]["attn_resolutions"] = [16]
    metadata[checkpoints._CHECKSUM] = checkpoints._checksum(metadata)
    path.write_text(json.dumps(metadata))
    return tmp_path


def test_an_old_run_loads_and_goes_on(old_run, monkeypatch):
    assert checkpoints.load_model(old_run).denoiser.network.config["attn_resolutions"] == []
    saved = json.loads((old_run / "config.json").read_text())
    config = TrainingConfig.from_json({**saved, "steps": 3})
    assert config.network["attn_resolutions"] == []
    assert config.differences({**saved, "steps": 3}) == []
    assert Trainer(config, old_run, data=tiny_images(), quiet=True).run(resume=True).step == 3
    monkeypatch.setattr("multistage_diffusion.data.images.load_images", lambda *args, **kwargs: tiny_images())
    assert cli.main(["train", "--out", str(old_run), "--resume", "--steps", "4", "--device", "cpu"]) == 0
    assert json.loads((old_run / "config.json").read_text())["network"]["attn_resolutions"] == []


def parsed(*arguments):
    return cli.build_parser().parse_args(["train", "--out", "x", "--preset", "edm-cifar10", *arguments])


class Digits28:
    image_size, channels, labels = 28, 1, None


def test_the_command_line_takes_other_resolutions():
    with pytest.raises(ValueError, match=r"the resolutions are 28, 14, 7; .* attn_resolutions=\[14\]"):
        train.make_config(parsed(), None, "digits", Digits28())
    for text, attending in (("14", [14]), ("14,7", [14, 7]), ("", [])):
        config = train.make_config(parsed("--attn-resolutions", text), None, "digits", Digits28())
        assert config.network["attn_resolutions"] == attending


REFERENCE = {
    "edm": {
        "img_resolution": 28,
        "en_model_channels": 8,
        "de_model_channels": [8, 4],
        "channel_mult": [1, 1],
    },
    "ncsnpp": {"image_size": 28, "en_nf": 8, "de_nfs": [8, 4], "ch_mult": [1, 1], "num_res_blocks": 1},
    "ldm": {
        "image_size": 28,
        "model_channels": 32,
        "de_nfs": [32, 32],
        "channel_mult": [1, 1],
        "num_head_channels": 32,
    },
}
ABSENT = {
    "edm": ("attn_resolutions", [16]),
    "ncsnpp": ("attn_resolutions", [16]),
    "ldm": ("attention_resolutions", [4]),
}


@pytest.mark.parametrize("family", REFERENCE)
def test_the_arguments_of_the_reference_mean_what_they_mean_there(family):
    """It passes over resolutions that it never meets, the default's, too."""
    name, absent = ABSENT[family]
    with torch.device("meta"):
        for given in ({name: absent}, {}):
            network = official.build(family, {**REFERENCE[family], **given})
            assert network.config["attn_resolutions"] == []


def test_a_factor_of_latent_diffusion_counts_halvings():
    """28 // 3 is no resolution, and 8 // 3 would be that of a factor of 4."""
    config = {**REFERENCE["ldm"], "image_size": 8, "channel_mult": [1, 1, 1], "attention_resolutions": [3, 2]}
    with torch.device("meta"):
        assert official.build("ldm", config).config["attn_resolutions"] == [4]


def test_no_heads_at_all_are_refused():
    with pytest.raises(ValueError, match="num_heads=0"):
        built({"family": "ldm", **TWO_LEVELS, **UNETS["ldm"], "attn_resolutions": (14,), "num_heads": 0})

"""Small networks and data for the tests of the training layer."""

from pathlib import Path

import pytest
import torch
from torch import nn

from multistage_diffusion import networks
from multistage_diffusion.data.images import ImageData
from multistage_diffusion.presets import find
from multistage_diffusion.training import checkpoints
from multistage_diffusion.training.config import TrainingConfig
from multistage_diffusion.training.trainer import Trainer

TINY = {"family": "tiny", "image_size": 8}
SMALLEST = {
    "image_size": 8,
    "encoder_widths": [16],
    "decoder_widths": [16, 16, 8],
    "channel_mult": [1],
    "num_blocks": 1,
    "attn_resolutions": [],
}
SMALL_UNET = {
    "family": "edm",
    "image_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "encoder_widths": (8,),
    "decoder_widths": (8, 8, 4),
    "channel_mult": (1, 1),
    "num_blocks": 1,
    "attn_resolutions": (8,),
}


@pytest.fixture(autouse=True)
def one_thread():
    """These networks are too small to be worth a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    monkeypatch.setattr(Trainer, "_plot", lambda self: None)


class TinyNetwork(nn.Module):
    """One shared convolution, one convolution per stage; a few hundred weights and some dropout."""

    def __init__(self, image_size=8, num_stages=3, width=4, dropout=0.1, in_channels=1):
        super().__init__()
        self.config = {
            "family": "tiny",
            "image_size": image_size,
            "num_stages": num_stages,
            "width": width,
            "dropout": dropout,
        }
        self.num_stages, self.in_channels, self.image_size = num_stages, in_channels, image_size
        self.encoder = nn.Conv2d(in_channels + 1, width, 3, padding=1)
        self.dropout = nn.Dropout(dropout)
        self.decoders = nn.ModuleList(nn.Conv2d(width, in_channels, 3, padding=1) for _ in range(num_stages))

    def forward(self, x, noise, stage, *, class_labels=None, augment_labels=None):
        plane = noise[:, None, None, None].expand(-1, 1, *x.shape[2:])
        h = self.dropout(torch.relu(self.encoder(torch.cat([x, plane], 1))))
        out = torch.zeros_like(x)
        for k, decoder in enumerate(self.decoders):
            mine = torch.as_tensor(stage) == k
            out[mine] = decoder(h[mine]).to(out.dtype)
        return out


class RecordingNetwork(nn.Module):
    """Returns a fixed function of its input, and remembers what it was called with."""

    def __init__(self, num_stages=3, F=lambda x, noise, stage: x, in_channels=1, image_size=4):
        super().__init__()
        self.num_stages, self.in_channels, self.image_size = num_stages, in_channels, image_size
        self.config = {"family": "recording"}
        self.F, self.calls = F, []

    def forward(self, x, noise, stage, **conditioning):
        self.calls.append((x, noise, stage, conditioning))
        return self.F(x, noise, stage)


def build(config):
    """What ``multistage_diffusion.networks.build`` does, for the family "tiny"."""
    return TinyNetwork(**{k: v for k, v in config.items() if k != "family"})


def config_of(**changes):
    values = {
        "network": TINY,
        "data": "tiny",
        "steps": 12,
        "batch_size": 8,
        "checkpoint_every": 5,
        "log_every": 2,
        "stage_sampling": "stratified",
    }
    return TrainingConfig(**{**values, **changes})


def tiny_images(count=40, image_size=8, classes=None):
    """Images of one brightness each: something a tiny network can learn to denoise; labels in turn, where asked for."""
    brightness = torch.rand(count, 1, 1, 1, generator=torch.Generator().manual_seed(5))
    images = (brightness * 255).to(torch.uint8).expand(-1, 1, image_size, image_size).contiguous()
    labels = None if classes is None else torch.arange(count) % classes
    return ImageData(images, labels, name="tiny")


def trainer_of(directory, network=None, **changes):
    """A quiet trainer of tiny images; ``changes`` are of the configuration."""
    config = config_of(**changes)
    if network is None:
        torch.manual_seed(1)
        network = build(config.network)
    return Trainer(config, directory, data=tiny_images(), network=network, quiet=True)


def weights_of(directory, step=12, name="network"):
    """One file of a run's checkpoint."""
    return checkpoints.read_tensors(directory / "checkpoints" / f"step-{step:08d}", name)


def assert_same_run(a, b, step):
    """The checkpoints of two runs after a step hold the same bits."""
    for name in ("network", "ema", "optimizer"):
        x, y = weights_of(a, step, name), weights_of(b, step, name)
        assert x.keys() == y.keys()
        assert all(torch.equal(x[k], y[k]) for k in x), name


def untrained_run(directory: Path, preset: str, values: str = "images", **changes) -> Path:
    """A run folder with a network of a preset's family, as small as ``SMALLEST`` but for the changes."""
    torch.manual_seed(0)
    preset = find(preset)
    network = networks.build({"family": preset.network["family"], **SMALLEST, **changes})
    for parameter in network.parameters():  # the last layers of an untrained network are zero
        torch.nn.init.normal_(parameter, std=0.05)
    config = {
        "network": network.config,
        "stages": preset.stages().to_json(),
        "schedule": preset.schedule,
        "sigma_data": 0.5,
        "values": values,
    }
    tensors = {"network": network.state_dict(), "ema": network.state_dict()}
    checkpoints.save_checkpoint(directory / "checkpoints", 1, tensors, {"images": 1, "config": config})
    return directory


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """As earlier versions kept a stage's part of a weight: a vector, a convolution's channels innermost."""
    if not tensor.dim():
        return tensor
    return (tensor.permute(0, 2, 3, 1) if tensor.dim() == 4 else tensor).reshape(-1)


def by_earlier_versions(tensors: dict, names: list[str], *, together: bool) -> tuple[dict, list[str]]:
    """The state of an optimizer of vectors, one per stage or one for all stages, and its parameters' names."""
    if not together:
        return {name: flat(tensor) for name, tensor in tensors.items()}, names
    groups: dict[str, list[str]] = {}
    for name in names:
        prefix, _, stage = name.rpartition(".")
        groups.setdefault(prefix if stage.isdigit() else name, []).append(name)
    joined = {}
    for group, parts in groups.items():
        if f"{parts[0]}.step" not in tensors:
            continue  # without a gradient there is no state
        for entry in ("exp_avg", "exp_avg_sq"):
            joined[f"{group}.{entry}"] = torch.cat([flat(tensors[f"{part}.{entry}"]) for part in parts])
        joined[f"{group}.step"] = tensors[f"{parts[0]}.step"]
    return joined, list(groups)

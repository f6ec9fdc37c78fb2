"""Counted costs against the paper's, and the presets that they are counted for."""

from __future__ import annotations

import functools
import json
import math
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

from multistage_diffusion import Stages, TrainingConfig, costs, networks, official
from multistage_diffusion.cli import main
from multistage_diffusion.flops import NetworkCost, conditioning, count, expected
from multistage_diffusion.networks.layers import StageModule
from multistage_diffusion.noise.distributions import LogNormal
from multistage_diffusion.noise.losses import denoising_loss
from multistage_diffusion.noise.noise_levels import RestagedNoise, StratifiedNoise
from multistage_diffusion.noise.schedules import LDM, SCHEDULES, VP
from multistage_diffusion.official.network_files import save_network
from multistage_diffusion.presets import PRESETS, Preset, find
from multistage_diffusion.sampling.table import find_sampler

# The paper's networks, run in the reference implementation: GMACs per stage, of the unified baseline, its parameters
# and those of the decoders in millions.
PUBLISHED = {
    "edm-cifar10": ((35.75, 21.19, 7.73), 21.19, 55.734, (68.285, 36.101, 4.775)),
    "ncsnpp-cifar10": ((30.99, 18.59, 7.16), 18.59, 107.521, (125.996, 64.039, 3.652)),
    "ldm-celebahq256": ((120.44, 84.15, 56.64), 101.20, 274.06, None),
    "ldm-imagenet256": ((65.74, 49.24, 36.37), 57.04, 394.98, None),
    "uvit-cifar10": ((18.04, 11.32, 6.10), 11.32, 44.255, None),
}
# The reference builds the decoders of latent diffusion with less attention.
AS_BUILT = {
    "ldm-celebahq256": ((120.44, 78.21, 53.41), (208.06, 115.92, 61.96)),
    "ldm-imagenet256": ((65.74, 41.48, 30.50), (273.06, 158.99, 64.18)),
}
AGREEMENT = 0.005
VARIANTS = ("multistage", "unified", "separate")
TOTALS = {"edm-cifar10": 128.793, "ncsnpp-cifar10": 237.169}


@functools.cache
def counted(config: str) -> NetworkCost:
    """The cost of a network, counted once for all tests of this file; ``config`` is JSON."""
    with torch.device("meta"):
        network = networks.build(json.loads(config))
    found = count(network)
    assert found.total_parameters == sum(p.numel() for p in network.parameters())
    return found


def cost(preset: Preset, variant: str = "multistage", **changes) -> NetworkCost:
    return counted(json.dumps(preset.config(variant, **changes)))


def giga(macs) -> list[float]:
    return [m / 1e9 for m in macs]


@pytest.mark.parametrize("name", PUBLISHED)
def test_costs_are_those_of_the_paper(name):
    macs, unified_macs, unified_parameters, decoders = PUBLISHED[name]
    preset = find(name)
    found, unified = cost(preset), cost(preset, "unified")

    def published(c) -> list[float]:
        attention = c.attention_macs if not preset.published_attention else (0,) * len(c.macs)
        return giga(m - a for m, a in zip(c.macs, attention, strict=True))

    assert published(found) == pytest.approx(macs, rel=AGREEMENT)
    assert published(unified) == pytest.approx([unified_macs], rel=AGREEMENT)
    assert unified.total_parameters / 1e6 == pytest.approx(unified_parameters, rel=AGREEMENT)
    if decoders is not None:
        assert [round(p / 1e6, 3) for p in found.parameters] == list(decoders)
        assert round(found.total_parameters / 1e6, 3) == TOTALS[name]


@pytest.mark.parametrize("name", AS_BUILT)
def test_costs_of_the_references_structure_are_those_of_the_paper(name):
    macs, parameters = AS_BUILT[name]
    found = cost(find(name), reduced_attention=True)
    assert giga(found.macs) == pytest.approx(macs, rel=AGREEMENT)
    assert [p / 1e6 for p in found.parameters] == pytest.approx(parameters, rel=AGREEMENT)


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_are_counted_once(name):
    assert all(cost(find(name), variant).total_parameters > 0 for variant in VARIANTS)


def test_separate_networks_share_nothing():
    found = cost(find("edm-cifar10"), "separate")
    assert found.shared_parameters == found.shared_macs == 0
    # The width of 128 is that of the unified network, which has the same structure.
    assert found.macs[1] == cost(find("edm-cifar10"), "unified").macs[0]


def test_shared_macs_are_those_of_the_encoder():
    """A decoder of another width costs the difference of the totals; what is left is the encoder."""
    small = {"image_size": 8, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4]}
    preset = find("edm-cifar10")
    first, second = (cost(preset, **small, decoder_widths=[w, 64, 16]) for w in (128, 192))
    assert first.shared_macs == second.shared_macs > 0
    assert first.macs[1:] == second.macs[1:]


def test_reduced_attention_leaves_the_shared_layers_as_they_are():
    preset = find("ldm-celebahq256")
    full, reduced = cost(preset), cost(preset, reduced_attention=True)
    assert full.shared_macs == reduced.shared_macs
    assert full.shared_parameters == reduced.shared_parameters


def test_counting_needs_the_meta_device():
    network = networks.build(
        {"family": "uvit", "image_size": 8, "encoder_widths": [16], "decoder_widths": [16]}
    )
    with pytest.raises(ValueError, match=r"must be on the meta device, got cpu"):
        count(network)
    assert count(network.to("meta")).macs[0] > 0


def test_pytorchs_own_layers_are_counted_too():
    class Network(nn.Module):
        num_stages, in_channels, image_size = 1, 3, 4

        def __init__(self):
            super().__init__()
            self.conv, self.linear = nn.Conv2d(3, 5, 3, padding=1), nn.Linear(5, 7)

        def forward(self, x, noise, stage):
            return self.linear(self.conv(x).permute(0, 2, 3, 1))

    assert count(Network().to("meta")).macs == (16 * 3 * 5 * 9 + 16 * 5 * 7,)


def test_expected_cost_weighs_the_stages():
    assert expected((4.0, 2.0), (0.25, 0.75)) == 2.5
    with pytest.raises(ValueError, match=r"one per stage \(2\) and sum up to 1, got \(0\.5, 0\.2\)"):
        expected((4.0, 2.0), (0.5, 0.2))


def test_heun_evaluates_the_stages_18_4_and_13_times():
    """Counted in the reference implementation for CIFAR-10."""
    assert find("edm-cifar10").evaluations() == (18, 4, 13)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 20])
@pytest.mark.parametrize("sampler", ["dpm-singlestep", "dpm-multistep", "ddim"])
@pytest.mark.parametrize("schedule", [VP(), LDM()], ids=["VP", "LDM"])
def test_a_sampler_evaluates_as_often_as_it_says_from_noise_to_data(sampler, schedule, steps):
    config = find_sampler(sampler).config(schedule, steps)
    levels = schedule.value(torch.tensor(config.evaluated_levels(), dtype=torch.float64))
    assert len(levels) == steps
    assert (levels.diff() < 0).all()
    assert levels[0].item() == pytest.approx(1 if schedule.variable == "t" else 999, rel=1e-12)
    assert levels.max() <= schedule.domain[1] * (1 + 1e-12)


def test_shares_of_the_stages_in_training():
    assert [round(share, 3) for share in find("edm-cifar10").stage_shares()] == [0.961, 0.035, 0.004]
    assert find("uvit-cifar10").stage_shares() == (1 / 3, 1 / 3, 1 / 3)


def test_presets_name_what_they_do_not_know():
    with pytest.raises(ValueError, match=r"unknown preset 'vgg'; there are edm-cifar10, edm-celeba"):
        find("vgg")
    with pytest.raises(ValueError, match=r"variant must be one of multistage, unified, separate, got 'half'"):
        find("edm-cifar10").config("half")
    for variant, name in (("unified", "decoder_widths"), ("separate", "encoder_widths")):
        with pytest.raises(ValueError, match=rf"the {variant} network's widths follow .* got {name}"):
            find("edm-cifar10").config(variant, **{name: [64]})
    with pytest.raises(ValueError, match=r"sampler must be one of heun, .* got 'euler'"):
        find_sampler("euler")


@pytest.mark.parametrize("name", PRESETS)
def test_the_command_prints_a_table_and_the_same_as_json(name, capsys, monkeypatch):
    monkeypatch.setattr(costs, "count_config", lambda config: counted(json.dumps(config)))
    assert main(["flops", "--preset", name, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["stages"]) == 3
    if name in PUBLISHED:
        published = [row["published_macs"] / 1e9 for row in found["stages"]]
        assert published == pytest.approx(PUBLISHED[name][0], rel=AGREEMENT)
    assert main(["flops", "--preset", name]) == 0
    text = capsys.readouterr().out
    assert f"{found['stages'][0]['macs'] / 1e9:.2f}" in text
    assert f"{found['unified']['parameters'] / 1e6:.3f} M" in text


def test_the_command_counts_in_seconds(capsys):
    start = time.monotonic()
    assert main(["flops", "--preset", "edm-cifar10"]) == 0
    assert time.monotonic() - start < 20
    assert "GMACs per image" in capsys.readouterr().out


def test_the_command_takes_other_widths_shares_and_samplers(capsys):
    options = [
        "--decoder-widths",
        "128,64,32",
        "--shares",
        "0.5,0.3,0.2",
        "--sampler",
        "ddim",
        "--steps",
        "10",
    ]
    assert main(["flops", "--preset", "edm-cifar10", *options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["decoder_width"] for row in found["stages"]] == [128, 64, 32]
    assert sum(found["sampling"]["evaluations"]) == 10
    macs = [row["macs"] for row in found["stages"]]
    mean = sum(share * m for share, m in zip((0.5, 0.3, 0.2), macs, strict=True))
    assert found["training"]["macs_per_image"] == pytest.approx(3 * mean)
    assert main(["flops", "--preset", "edm-cifar10", "--decoder-widths", "128,64"]) == 2
    assert "one width per stage (3) is needed" in capsys.readouterr().err


TINY = {
    "family": "edm",
    "image_size": 8,
    "encoder_widths": [8],
    "decoder_widths": [16, 8, 8],
    "channel_mult": [1],
    "num_blocks": 1,
    "attn_resolutions": [],
}


def counted_of(capsys, *arguments) -> dict:
    assert main(["flops", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_users_own_configurations_and_files_are_counted(tmp_path, capsys):
    """A network alone has the stages of its family's published model; a run and a converted file have their own."""
    network = networks.build(TINY)
    (tmp_path / "network.json").write_text(json.dumps(TINY))
    stages = Stages.from_boundaries([0, 1, 5, math.inf])
    config = TrainingConfig(
        TINY, stages=stages, stage_sampling="stratified", stage_probabilities=(0.5, 0.3, 0.2)
    )
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(config.to_json()))
    save_network(tmp_path / "model.safetensors", config.denoiser(network))
    alone = counted_of(capsys, tmp_path / "network.json")
    assert alone["training"]["shares"] == list(find("edm-cifar10").stage_shares())
    assert alone["sampling"]["evaluations"] == [18, 4, 13]
    for source in ("run", "run/config.json", "model.safetensors"):
        found = counted_of(capsys, tmp_path / source)
        assert [row["macs"] for row in found["stages"]] == [row["macs"] for row in alone["stages"]]
        assert found["stages"][0]["noise_levels"] == "sigma in (0, 1]"
        own = (0.5, 0.3, 0.2) if "run" in source else stages.probabilities(LogNormal())
        assert found["training"]["shares"] == pytest.approx(own)
        macs, evaluations = [row["macs"] for row in found["stages"]], found["sampling"]["evaluations"]
        assert sum(evaluations) == 35
        assert found["training"]["macs_per_image"] == pytest.approx(3 * expected(macs, own))
        assert found["sampling"]["macs_per_image"] == sum(
            n * m for n, m in zip(evaluations, macs, strict=True)
        )
        assert found["sampling"]["unified_macs_per_image"] == 35 * found["unified"]["macs"]
    assert found["unified"]["macs"] == cost_of(TINY | {"decoder_widths": [8]}).macs[0]


def cost_of(config: dict) -> NetworkCost:
    return counted(json.dumps(config))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no JSON of a configuration"),
        ("[]", "is no configuration of a network or of a run"),
        (json.dumps(TINY | {"decoder_widths": [8, 8]}), "does not say where its 2 stages are cut"),
        (json.dumps({"family": "vgg"}), "vgg"),
    ],
)
def test_what_cannot_be_counted_is_named(content, message, tmp_path, capsys):
    (tmp_path / "x.json").write_text(content)
    assert main(["flops", str(tmp_path / "x.json")]) == 2
    assert message in capsys.readouterr().err


def test_the_share_of_a_stage_among_levels_that_another_cut_draws():
    drawn = StratifiedNoise(Stages.from_boundaries([0, 1, 5, math.inf]), (0.5, 0.3, 0.2))
    noise = RestagedNoise(drawn, Stages([[(0, 0.5), (2, 5)], [(0.5, 2), (5, math.inf)]]))
    counts = noise.draw(100_000, torch.Generator().manual_seed(0)).counts
    # The standard deviation of a share of 100,000 independent draws is at most 0.0016.
    assert [count / 100_000 for count in counts] == pytest.approx(noise.shares(), abs=0.008)
    assert sum(noise.shares()) == pytest.approx(1)
    assert RestagedNoise(drawn, Stages.single()).shares() == pytest.approx((1.0,))


def test_help_is_quick_because_presets_need_no_torch():
    code = "import sys, multistage_diffusion.presets; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


ATTENDING = {"image_size": 8, "attn_resolutions": [4]}
SMALL = {
    "edm": {**ATTENDING, "encoder_widths": [16], "decoder_widths": [32, 16, 8], "num_blocks": 1},
    "ncsnpp": {**ATTENDING, "encoder_widths": [16], "decoder_widths": [32, 16, 8], "num_blocks": 1},
    "ldm": {**ATTENDING, "encoder_widths": [32], "decoder_widths": [64, 32, 32], "num_blocks": 1},
    "uvit": {
        "image_size": 8,
        "encoder_widths": [32],
        "decoder_widths": [48, 32, 16],
        "depth": 3,
        "num_heads": 4,
    },
}


def tiny_space(preset: Preset) -> dict[str, object]:
    """The preset's own widths and depths on the smallest images that it can halve, attention on the same levels."""
    levels = len(preset.network.get("channel_mult", (1, 1)))
    size = 2 ** (levels - 1)
    changes = {"image_size": size}
    if "attn_resolutions" in preset.network:
        factor = preset.network["image_size"] // size
        changes["attn_resolutions"] = [max(r // factor, 1) for r in preset.network["attn_resolutions"]]
    return changes


def train_one_step(preset: Preset, variant: str, changes: dict[str, object]) -> torch.nn.Module:
    """One step on random data in bf16, with the preset's own loss; every parameter must stay finite."""
    torch.manual_seed(0)
    network = networks.build(preset.config(variant, **changes))
    stages = preset.stages()
    denoiser = preset.denoiser(network)
    batch = len(stages)
    sigma = torch.tensor([0.5, 4.0, 20.0], dtype=torch.float64)
    y = torch.randn(batch, network.in_channels, network.image_size, network.image_size)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        loss = denoising_loss(denoiser, y, sigma, noise=torch.randn_like(y), **conditioning(network, batch))
    loss.mean().backward()
    optimizer.step()
    assert loss.isfinite().all()
    assert all(p.grad is not None and p.isfinite().all() for p in network.parameters())
    return network


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", PRESETS)
def test_a_narrow_preset_trains_in_bf16_and_exports_again(name, variant):
    preset = find(name)
    changes = dict(SMALL[preset.network["family"]])
    if variant == "unified":
        changes = {k: v for k, v in changes.items() if not k.endswith("widths")}
        preset = Preset(**{**vars(preset), "network": {**preset.network, "encoder_widths": [32]}})
    elif variant == "separate":
        del changes["encoder_widths"]
    network = train_one_step(preset, variant, changes)
    if variant != "separate":
        assert len(official.export(network)) >= len({id(p) for p in network.parameters()})


@pytest.mark.full
@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_trains_in_bf16_and_exports_again(name):
    preset = find(name)
    network = train_one_step(preset, "multistage", tiny_space(preset))
    exported = official.export(network)
    assert sum(tensor.numel() for tensor in exported.values()) >= sum(p.numel() for p in network.parameters())
    layers = [layer for layer in network.modules() if isinstance(layer, StageModule)]
    assert all(torch.isfinite(layer.weight[0]).all() for layer in layers)


def test_every_preset_has_a_schedule():
    assert {preset.schedule for preset in PRESETS.values()} <= SCHEDULES.keys()

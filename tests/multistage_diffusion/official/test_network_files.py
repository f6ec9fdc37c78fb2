"""What a converted file knows: it gives the denoiser of the original file, or a message says what is missing."""

from __future__ import annotations

import json
import math
import pickle
import re

import pytest
import torch
from edm_snapshots import persistence, snapshot

import multistage_diffusion
from fixtures import config, group
from multistage_diffusion import (
    EDMPreconditioner,
    Stages,
    generate,
    load_denoiser,
    load_network,
    networks,
    official,
    precondition,
    sampler_config,
)
from multistage_diffusion.cli import main
from multistage_diffusion.noise.schedules import LDM
from multistage_diffusion.official.convert import CheckpointFileError, save_network
from multistage_diffusion.sampling.samplers import schedule_of
from multistage_diffusion.training.checkpoints import write_tensors
from multistage_diffusion.training.trainer import Trainer
from stand_ins import SMALL_UNET, config_of, tiny_images

__all__ = ["persistence"]  # a fixture

UNIFIED = {
    "img_resolution": 8,
    "in_channels": 2,
    "out_channels": 2,
    "model_channels": 8,
    "channel_mult": [1],
    "num_blocks": 1,
    "attn_resolutions": [],
}
SIGMA = torch.tensor([0.003, 0.5, 3.0, 60.0], dtype=torch.float64)


def unified(**changes) -> tuple[torch.nn.Module, dict]:
    """A network with weights that all show in its output, and its arguments."""
    torch.manual_seed(0)
    network = official.build("edm", UNIFIED | changes)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0, 0.1)
    return network, UNIFIED | changes


def edm(sigma, s=0.5):
    return (
        s**2 / (sigma**2 + s**2),
        sigma * s / (sigma**2 + s**2).sqrt(),
        (sigma**2 + s**2).rsqrt(),
        sigma.log() / 4,
    )


def vp(sigma, d=19.9, m=0.1, M=1000):
    t = ((m**2 + 2 * d * (1 + sigma**2).log()).sqrt() - m) / d
    return torch.ones_like(sigma), -sigma, (sigma**2 + 1).rsqrt(), (M - 1) * t


def ve(sigma):
    return torch.ones_like(sigma), sigma, torch.ones_like(sigma), (sigma / 2).log()


def iddpm(sigma, C_1=0.001, C_2=0.008, M=1000):
    u = [0.0]
    for j in range(M, 0, -1):
        below, here = (math.sin(math.pi / 2 * i / (M * (C_2 + 1))) ** 2 for i in (j - 1, j))
        u.insert(0, math.sqrt((u[0] ** 2 + 1) / max(below / here, C_1) - 1))
    nearest = (sigma[:, None] - torch.tensor(u, dtype=torch.float64)).abs().argmin(1)
    return torch.ones_like(sigma), -sigma, (sigma**2 + 1).rsqrt(), M - 1 - nearest.double()


CASES = [
    ("EDMPrecond", {"sigma_data": 0.5, "sigma_min": 0.0, "sigma_max": math.inf}, edm),
    ("EDMPrecond", {"sigma_data": 1.0}, lambda sigma: edm(sigma, 1.0)),
    ("VPPrecond", {"beta_d": 19.9, "beta_min": 0.1, "M": 1000, "epsilon_t": 1e-5}, vp),
    ("VPPrecond", {"beta_d": 10.0, "beta_min": 0.2, "M": 4000}, lambda s: vp(s, 10.0, 0.2, 4000)),
    ("VEPrecond", {"sigma_min": 0.02, "sigma_max": 100.0}, ve),
    ("VEPrecond", {}, ve),
    ("iDDPMPrecond", {"C_1": 0.001, "C_2": 0.008, "M": 1000}, iddpm),
    ("iDDPMPrecond", {"C_1": 0.01, "C_2": 0.1, "M": 50}, lambda s: iddpm(s, 0.01, 0.1, 50)),
]
CASE_IDS = [f"{name}-{index}" for index, (name, _, _) in enumerate(CASES)]


def convert_snapshot(persistence, tmp_path, class_name, constants, *options, **changes):
    network, arguments = unified(**changes)
    path, out = tmp_path / "snapshot.pkl", tmp_path / "model.safetensors"
    wrapper = snapshot(persistence, official.export(network), class_name, constants, arguments)
    if "sigma_max" not in constants:
        del wrapper.sigma_max
    path.write_bytes(pickle.dumps({"ema": wrapper}, 4))
    return network, main(["convert", str(path), "--family", "edm", "--out", str(out), *options]), out


@pytest.mark.parametrize(("class_name", "constants", "coefficients"), CASES, ids=CASE_IDS)
def test_the_denoiser_is_that_of_the_files_own_preconditioner(
    class_name, constants, coefficients, persistence, tmp_path, capsys
):
    """In float64, by the formulas of arXiv 2206.00364, table 1, around the very network that was converted."""
    changes = {"out_channels": 4} if class_name == "iDDPMPrecond" else {}
    network, code, out = convert_snapshot(persistence, tmp_path, class_name, constants, **changes)
    said = capsys.readouterr()
    assert code == 0, said.err
    schedule = {"EDMPrecond": "edm", "VPPrecond": "vp", "VEPrecond": "ve", "iDDPMPrecond": "iddpm"}[
        class_name
    ]
    assert f"denoiser: {schedule} (" in said.out
    assert "as the file says" in said.out
    assert all(f"{name}={value}" in said.out for name, value in constants.items())
    denoiser = load_denoiser(out).double()
    assert not denoiser.training
    x = torch.randn(4, 2, 8, 8, dtype=torch.float64)
    c_skip, c_out, c_in, c_noise = (c[:, None, None, None] for c in coefficients(SIGMA))
    with torch.no_grad():
        F = network.double().eval()(c_in * x, c_noise.flatten(), [0] * 4)[:, :2]
        actual = denoiser(x, SIGMA)
    # Both sides are float64 sums of the same float32 weights.
    torch.testing.assert_close(actual, c_skip * x + c_out * F, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("class_name", ["iDDPMPrecond", "VEPrecond"])
def test_samplers_take_the_files_own_noise_levels(class_name, persistence, tmp_path):
    changes = {"out_channels": 4} if class_name == "iDDPMPrecond" else {}
    out = convert_snapshot(persistence, tmp_path, class_name, {}, **changes)[2]
    denoiser = load_denoiser(out)
    settings = sampler_config("heun", schedule_of(denoiser), 3)
    lowest = 0.02 if class_name == "VEPrecond" else float(denoiser.schedule.sigmas[0])
    assert min(settings.evaluated_levels()) == pytest.approx(lowest)
    images = generate(denoiser, [0, 1], (2, 8, 8), settings).images
    assert images.shape == (2, 2, 8, 8)
    assert bool(images.isfinite().all())
    levels = sampler_config("heun", schedule_of(denoiser))
    by_default = generate(denoiser, [0, 1], (2, 8, 8)).images
    assert torch.equal(by_default, generate(denoiser, [0, 1], (2, 8, 8), levels).images)
    assert levels.sigma_min >= lowest or levels.sigma_min == pytest.approx(lowest)


def test_the_preconditionings_differ_so_much_that_a_wrong_one_shows():
    x = torch.randn(4, 2, 8, 8, dtype=torch.float64)
    network = unified(out_channels=2)[0].double().eval()
    found = [
        precondition(network, Stages.single(), name, **constants)(x, SIGMA)
        for name, constants in (
            ("edm", {}),
            ("edm", {"sigma_data": 1}),
            ("vp", {}),
            ("ve", {}),
            ("iddpm", {}),
        )
    ]
    found = [D.detach() for D in found]
    for index, one in enumerate(found):
        for other in found[index + 1 :]:
            assert float((one - other).abs().max() / other.abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--preconditioning", "edm"], "contradicts the file: the file says vp, not edm"),
        (["--preconditioning", "vp,M=500"], "contradicts the file: the file says M=1000, not 500"),
        (["--stages", "0.3,0.6"], "--stages names 3 stages, the network has 1"),
        (["--preconditioning", "vp,sigma_data=1"], "vp takes beta_d"),
        (["--preconditioning", "vp,epsilon_t=0.5,beta_d=nan"], "must be finite"),
        (["--preconditioning", "vp,prediction=v"], "the file says prediction='epsilon', not 'v'"),
        (["--preconditioning", "vp,beta_d"], "'beta_d' is no constant such as sigma_data=0.5"),
        (["--preconditioning", "ddpm"], "'ddpm' is none of edm, vp, ve, ldm, flow, iddpm"),
    ],
)
def test_what_contradicts_the_file_is_refused(options, message, persistence, tmp_path, capsys):
    code = convert_snapshot(persistence, tmp_path, "VPPrecond", {"M": 1000}, *options)[1]
    assert code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("value", ["0.5", None, [1.0], math.nan, -math.inf, True, 10**400])
def test_constants_that_are_no_numbers_are_refused(value, persistence, tmp_path, capsys):
    assert convert_snapshot(persistence, tmp_path, "EDMPrecond", {"sigma_data": value})[1] == 2
    assert re.search("the preconditioner's sigma_data is (no|a huge) number", capsys.readouterr().err)


def test_a_preconditioner_that_is_not_known_is_not_guessed(persistence, tmp_path, capsys):
    _, code, out = convert_snapshot(persistence, tmp_path, "MyPrecond", {})
    assert code == 0
    assert (
        "denoiser: not kept: the file has a preconditioner of the class MyPrecond, which"
        in capsys.readouterr().out
    )
    with pytest.raises(
        ValueError, match=r"does not say how its network becomes a denoiser.*give preconditioning="
    ):
        load_denoiser(out)
    assert load_network(out).num_stages == 1
    code = convert_snapshot(persistence, tmp_path, "MyPrecond", {}, "--preconditioning", "ve,sigma_max=80")[1]
    assert code == 0
    assert (
        "denoiser: ve (sigma_min=0.01, sigma_max=80, prediction=epsilon), as asked" in capsys.readouterr().out
    )
    assert load_denoiser(out).schedule.sigma_max == 80


@pytest.fixture
def vp_file(persistence, tmp_path):
    return convert_snapshot(persistence, tmp_path, "VPPrecond", {})[2]


def test_another_preconditioner_around_a_converted_network_is_refused(vp_file):
    network = load_network(vp_file)
    assert not network.training
    with pytest.raises(
        ValueError, match=r"is of another denoiser: the file says vp, not edm; load_denoiser gives"
    ):
        EDMPreconditioner(network, Stages.single())
    with pytest.raises(ValueError, match="the file says M=1000, not 999"):
        precondition(network, Stages.single(), "vp", M=999)
    own = precondition(network, Stages.single("t"), "vp")
    x = torch.randn(4, 2, 8, 8)
    assert torch.equal(own(x, SIGMA), load_denoiser(vp_file)(x, SIGMA))
    network.preconditioning = None
    assert EDMPreconditioner(network, Stages.single()).sigma_data == 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preconditioning": "edm"}, "the file says vp, not edm"),
        ({"M": 500}, "the file says M=1000, not 500"),
        ({"sigma_data": 0.5}, "the file's vp has no sigma_data"),
        ({"stages": Stages.edm()}, r"the file says Stages\(\(0, inf\]; sigma\), not Stages\(\(0, 2"),
    ],
)
def test_arguments_that_contradict_a_converted_file_are_refused(arguments, message, vp_file):
    with pytest.raises(ValueError, match=message):
        load_denoiser(vp_file, **arguments)
    assert load_denoiser(vp_file, preconditioning="vp", M=1000, stages=Stages.single("t")).schedule.M == 1000


def test_a_file_without_that_knowledge_gives_its_network_and_asks_for_the_rest(tmp_path):
    """As an earlier version wrote it."""
    network = networks.build(SMALL_UNET)
    path = tmp_path / "old.safetensors"
    metadata = {"format": "multistage_diffusion.network", "config": json.dumps(network.config)}
    write_tensors(path, network.state_dict(), metadata)
    assert load_network(path).config == network.config
    for arguments in ({}, {"preconditioning": "edm"}):
        with pytest.raises(
            ValueError, match=r"an earlier version wrote it.*Convert the original file again, or give"
        ):
            load_denoiser(path, **arguments)
    with pytest.raises(ValueError, match=r"the network has 3 stage\(s\) but 1"):
        load_denoiser(path, preconditioning="edm", stages=Stages.single())
    with pytest.raises(ValueError, match=r"load_denoiser: vp takes beta_d, .*, not 'sigma_data'"):
        load_denoiser(path, preconditioning="vp", stages=Stages.edm(), sigma_data=1)
    given = load_denoiser(path, preconditioning="edm", stages=Stages.edm(), sigma_data=1.0)
    assert (given.sigma_data, given.stages, given.training) == (1.0, Stages.edm(), False)


def test_what_is_saved_again_keeps_its_knowledge(vp_file, tmp_path):
    save_network(tmp_path / "again.safetensors", load_network(vp_file))
    assert load_denoiser(tmp_path / "again.safetensors").to_json() == load_denoiser(vp_file).to_json()


@pytest.mark.parametrize(
    ("family", "prefix", "changes", "expected"),
    [
        ("edm", "a/", {}, ("edm", Stages.edm(), "as its arguments say")),
        ("edm", "a/", {"stage_interval": None}, ("edm", Stages.edm(), "the published ones")),
        (
            "ncsnpp",
            "",
            {},
            ("vp", Stages.from_boundaries([0, 0.442, 0.6308, 1], "t"), "as its arguments say"),
        ),
        (
            "ncsnpp",
            "",
            {"stage_interval": None},
            ("vp", Stages.from_boundaries([0, 0.442, 0.6308, 1], "t"), "published"),
        ),
        ("uvit", "", {}, ("vp", Stages.from_boundaries([0, 0.442, 0.6308, 1], "t"), "as its arguments say")),
        (
            "ldm",
            "u/",
            {},
            ("ldm", Stages.from_boundaries([0, 441, 630, 1000], "step"), "as its arguments say"),
        ),
        (
            "ldm",
            "c/",
            {"stage_interval": None},
            ("ldm", Stages.from_boundaries([0, 441, 630, 1000], "step"), "published"),
        ),
    ],
)
def test_state_dicts_take_the_familys_default_and_say_so(family, prefix, changes, expected, tmp_path, capsys):
    schedule, stages, source = expected
    state = group(family, f"{prefix}sd/")
    content = {f"model.diffusion_model.{name}": t for name, t in state.items()} if family == "ldm" else state
    torch.save({"state_dict": content} if family == "ldm" else content, tmp_path / "weights.pth")
    (tmp_path / "config.json").write_text(json.dumps(config(family, prefix) | changes))
    arguments = ["convert", str(tmp_path / "weights.pth"), "--config", str(tmp_path / "config.json")]
    out = tmp_path / "model.safetensors"
    assert main([*arguments, "--family", family, "--weights", "raw", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert f"denoiser: {schedule} (" in said
    assert "the family's default" in said
    assert source in said
    denoiser = load_denoiser(out)
    assert denoiser.to_json()["schedule"] == schedule
    expected = precondition(denoiser.network, stages, schedule).stages
    assert denoiser.stages == expected


@pytest.mark.parametrize(
    ("options", "schedule", "constants", "stages"),
    [
        (
            ["--preconditioning", "vp,beta_d=10,M=500", "--stages", "0.3,0.6"],
            "vp",
            {"beta_d": 10, "M": 500},
            "t",
        ),
        (["--preconditioning", "edm,sigma_data=1", "--stages", "edm"], "edm", {"sigma_data": 1.0}, "sigma"),
        (
            ["--preconditioning", "ldm,prediction=v", "--stages", "400,600"],
            "ldm",
            {"prediction": "v"},
            "step",
        ),
        (["--preconditioning", "iddpm", "--stages", "1,5"], "iddpm", {"M": 1000}, "sigma"),
    ],
)
def test_what_is_asked_for_is_kept(options, schedule, constants, stages, tmp_path):
    torch.save(group("edm", "a/sd/"), tmp_path / "weights.pth")
    (tmp_path / "config.json").write_text(json.dumps(config("edm", "a/") | {"stage_interval": None}))
    out = tmp_path / "model.safetensors"
    arguments = ["convert", str(tmp_path / "weights.pth"), "--config", str(tmp_path / "config.json")]
    assert main([*arguments, "--family", "edm", "--out", str(out), *options]) == 0
    denoiser = load_denoiser(out)
    said = denoiser.to_json()
    assert said["schedule"] == schedule
    assert {name: said[name] for name in constants} == constants
    edges = {"t": [0, 0.3, 0.6, 1], "step": [0, 400, 600, 1000], "sigma": [0, 1, 5, math.inf]}[stages]
    given = Stages.edm() if schedule == "edm" else Stages.from_boundaries(edges, stages)
    own = precondition(denoiser.network, given, schedule, **constants)
    assert own.stages == denoiser.stages


def test_stages_that_nobody_names_are_not_guessed(tmp_path, capsys):
    """Two decoders fit no published stages; an interval in sigma fits no other preconditioning."""
    torch.save(group("edm", "a/sd/"), tmp_path / "weights.pth")
    (tmp_path / "config.json").write_text(json.dumps(config("edm", "a/")))
    out = tmp_path / "model.safetensors"
    arguments = [
        "convert",
        str(tmp_path / "weights.pth"),
        "--config",
        str(tmp_path / "config.json"),
        "--family",
        "edm",
    ]
    assert main([*arguments, "--out", str(out), "--preconditioning", "vp"]) == 0
    assert (
        "denoiser: not kept: nothing says where its 3 stages are cut; give --stages"
        in capsys.readouterr().out
    )
    (tmp_path / "config.json").write_text(json.dumps(config("edm", "a/") | {"stage_interval": "[1, 2, 3]"}))
    assert main([*arguments, "--out", str(out)]) == 2
    assert "stage_interval does not cut the noise levels into stages" in capsys.readouterr().err


@pytest.mark.parametrize(("steps", "even"), [(1000, True), (50, True), (40, False)])
def test_latent_diffusions_betas_come_along(steps, even, tmp_path, capsys):
    ends = torch.tensor([0.0015, 0.0195], dtype=torch.float64)
    betas = torch.linspace(*ends.sqrt().tolist(), steps, dtype=torch.float64).square()
    if not even:
        betas = torch.linspace(*ends.tolist(), steps, dtype=torch.float64)
    state = {f"model.diffusion_model.{name}": t for name, t in group("ldm", "u/sd/").items()}
    torch.save({"state_dict": state | {"betas": betas.float()}}, tmp_path / "last.ckpt")
    given = config("ldm", "u/") | {"stage_interval": [steps // 3, steps // 2, steps]}
    (tmp_path / "config.json").write_text(json.dumps(given))
    out = tmp_path / "model.safetensors"
    arguments = [
        "convert",
        str(tmp_path / "last.ckpt"),
        "--config",
        str(tmp_path / "config.json"),
        "--family",
        "ldm",
    ]
    assert main([*arguments, "--weights", "raw", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "as the file says, but for the prediction, which is the usual one" in said
    assert ("linear_start=0.0015" if even else f"betas={steps} of its own") in said
    denoiser = load_denoiser(out)
    alpha_bar = (1 - betas).cumprod(0)
    sigmas = ((1 - alpha_bar) / alpha_bar).sqrt()
    torch.testing.assert_close(denoiser.schedule.sigmas, sigmas, rtol=1e-6, atol=0)  # betas came in float32
    if even and steps == 1000:
        assert denoiser.schedule == LDM()
    # The reference's interval names the first step of every following stage.
    assert denoiser.stages.assign(denoiser.schedule.sigmas).tolist() == [
        (step >= steps // 3) + (step >= steps // 2) for step in range(steps)
    ]


def test_betas_that_no_schedule_has_are_not_replaced_by_others(tmp_path, capsys):
    """Such as those of a schedule that ends in pure noise."""
    state = {f"model.diffusion_model.{name}": t for name, t in group("ldm", "u/sd/").items()}
    torch.save({"state_dict": state | {"betas": torch.linspace(0.1, 1.0, 9)}}, tmp_path / "last.ckpt")
    (tmp_path / "config.json").write_text(json.dumps(config("ldm", "u/")))
    arguments = ["convert", str(tmp_path / "last.ckpt"), "--config", str(tmp_path / "config.json")]
    out = ["--family", "ldm", "--weights", "raw", "--out", str(tmp_path / "model.safetensors")]
    assert main([*arguments, *out]) == 0
    assert (
        "denoiser: not kept: the file has betas that are not all between 0 and 1" in capsys.readouterr().out
    )
    assert main([*arguments, *out, "--preconditioning", "ldm,num_steps=0.5"]) == 2
    assert "convert: a constant of ldm is of another type" in capsys.readouterr().err


@pytest.mark.parametrize(
    "constants", [{"beta_min": 0.2, "beta_max": 10.2}, {"beta_min": "x", "beta_max": None}]
)
def test_score_sdes_arguments_name_constants(constants, tmp_path):
    torch.save(group("ncsnpp", "sd/"), tmp_path / "weights.pth")
    (tmp_path / "config.json").write_text(json.dumps(config("ncsnpp") | constants))
    out = tmp_path / "model.safetensors"
    arguments = ["convert", str(tmp_path / "weights.pth"), "--config", str(tmp_path / "config.json")]
    assert main([*arguments, "--family", "ncsnpp", "--out", str(out)]) == 0
    schedule = load_denoiser(out).schedule
    expected = (10.0, 0.2) if constants["beta_min"] == 0.2 else (19.9, 0.1)
    assert (schedule.beta_d, schedule.beta_min) == pytest.approx(expected)


def test_a_multistage_start_keeps_the_preconditioning(persistence, tmp_path, capsys):
    options = ("--start-multistage", "12,8,4")
    _, code, out = convert_snapshot(persistence, tmp_path, "EDMPrecond", {"sigma_data": 1.0}, *options)
    assert code == 0
    assert "the published ones" in capsys.readouterr().out
    assert load_denoiser(out).stages == Stages.edm()
    assert load_denoiser(out).sigma_data == 1.0
    code = convert_snapshot(persistence, tmp_path, "VPPrecond", {}, *options, "--stages", "0.4,0.6")[1]
    assert code == 0
    assert load_denoiser(out).stages.num_stages == 3


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two steps with a preconditioning of its own."""
    directory = tmp_path_factory.mktemp("run")
    configuration = config_of(network=SMALL_UNET, schedule="edm", sigma_data=0.7, steps=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_plot", lambda self: None)
        Trainer(configuration, directory, data=tiny_images(), quiet=True).run()
    return directory


def test_runs_and_their_files_are_read_too(run):
    (checkpoint,) = (run / "checkpoints").iterdir()
    for path in (run, checkpoint, checkpoint / "ema.safetensors"):
        denoiser = load_denoiser(path)
        assert (denoiser.sigma_data, denoiser.training) == (0.7, False)
        network = load_network(path)
        assert not network.training
        with pytest.raises(ValueError, match=r"the file says sigma_data=0\.7, not 0\.5"):
            EDMPreconditioner(network, Stages.edm())
    raw, averaged = load_network(run, "network"), load_network(checkpoint / "network.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(raw.parameters(), averaged.parameters(), strict=True))
    with pytest.raises(ValueError, match=r"the file says sigma_data=0\.7, not 0\.5"):
        load_denoiser(run, sigma_data=0.5)
    with pytest.raises(multistage_diffusion.CheckpointError):
        load_network(run.parent)


@pytest.mark.parametrize(
    "said",
    [
        "[" * 5000,
        "5",
        '{"schedule": "vp"',
        '{"schedule": []}',
        '{"schedule": "vp"}',
        '{"schedule": "vp", "stages": {"boundaries": [0, 1, "inf"]}}',
        '{"schedule": "vp", "M": "many", "stages": {"boundaries": [0, "inf"]}}',
        '{"schedule": "vp", "M": 1000000000000, "stages": {"boundaries": [0, "inf"]}}',
        '{"schedule": "ldm", "num_steps": 1000000000000, "stages": {"boundaries": [0, "inf"]}}',
        '{"schedule": "ldm", "betas": {}, "stages": {"boundaries": [0, "inf"]}}',
        '{"schedule": "ldm", "betas": 5, "stages": {"boundaries": [0, "inf"]}}',
        '{"schedule": "iddpm", "C_1": null, "stages": {"boundaries": [0, "inf"]}}',
        '{"schedule": "edm", "sigma_data": NaN, "stages": {"boundaries": [0, "inf"]}}',
        '{"schedule": "edm", "sigma_data": [], "stages": {"boundaries": [0, "inf"]}}',
        '{"schedule": "edm", "surprise": 1, "stages": {"boundaries": [0, "inf"]}}',
        '{"schedule": "vp", "prediction": [], "stages": {"boundaries": [0, "inf"]}}',
    ],
)
def test_a_forged_description_is_refused(said, tmp_path):
    network = unified()[0]
    metadata = {
        "format": "multistage_diffusion.network",
        "config": json.dumps(network.config),
        "denoiser": said,
    }
    write_tensors(tmp_path / "forged.safetensors", network.state_dict(), metadata)
    for load in (load_network, load_denoiser):
        with pytest.raises(CheckpointFileError, match=r"forged\.safetensors"):
            load(tmp_path / "forged.safetensors")

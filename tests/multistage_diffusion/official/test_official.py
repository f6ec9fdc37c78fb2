"""The networks against the paper's reference networks, and the import and export of their parameters."""

from __future__ import annotations

import re

import pytest
import torch

from fixtures import config, group, relative_error
from multistage_diffusion import networks, official
from multistage_diffusion.noise.preconditioning import EDMPreconditioner
from multistage_diffusion.noise.stages import Stages

# Outputs and gradients were recorded in float32, and the sums run in another order here: a few hundred roundings of
# 6e-8 in sequence. The fixtures' own bound is 1e-5.
RELATIVE = 1e-5
# Gradients that vanish analytically (the bias of attention's keys) are rounding noise in both.
VANISHING = 1e-4
# Fixture, prefix of the network in it, name of its noise input.
NETWORKS = {
    "edm DDPM++": ("edm", "a/", "noise_labels"),
    "edm NCSN++": ("edm", "b/", "noise_labels"),
    "ncsnpp": ("ncsnpp", "", "time_cond"),
    "uvit": ("uvit", "", "time_cond"),
    "ldm unconditional": ("ldm", "u/", "t"),
    "ldm context": ("ldm", "c/", "t"),
}
CONDITIONING = ("class_labels", "augment_labels", "context")
each_network = pytest.mark.parametrize(("family", "prefix", "noise"), NETWORKS.values(), ids=NETWORKS.keys())


def load(family: str, prefix: str):
    return official.load(group(family, f"{prefix}sd/"), family, config(family, prefix)).eval()


@each_network
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_network_equals_the_reference(family, prefix, noise, stage):
    recorded = group(family, f"{prefix}s{stage}/")
    conditioning = {name: recorded[name] for name in CONDITIONING if name in recorded}
    network = load(family, prefix)
    x = recorded["x"].requires_grad_()
    if "context" in conditioning:
        conditioning["context"].requires_grad_()

    out = network(x, recorded[noise], [stage] * x.shape[0], **conditioning)
    (out * recorded["gout"]).sum().backward()

    assert relative_error(out, recorded["out"]) < RELATIVE
    assert relative_error(x.grad, recorded["gx"]) < RELATIVE
    if "context" in conditioning:
        assert relative_error(conditioning["context"].grad, recorded["gcontext"]) < RELATIVE
    gradients = official.export(network, values="gradients")
    scale = recorded["gout"].norm()
    for name, expected in group(family, f"{prefix}s{stage}/g/").items():
        vanishes = expected.norm() < VANISHING * scale
        absolute = float((gradients[name] - expected).norm() / scale)
        assert (absolute if vanishes else relative_error(gradients[name], expected)) < RELATIVE, name


@pytest.mark.parametrize(
    ("family", "prefix", "noise"),
    [entry for entry in NETWORKS.values() if entry[1] != "b/"],
    ids=lambda entry: entry,
)
def test_mixed_batch_equals_the_reference_of_each_samples_stage(family, prefix, noise):
    recorded = group(family, f"{prefix}mixed/")
    conditioning = {name: recorded[name] for name in CONDITIONING if name in recorded}
    out = load(family, prefix)(recorded["x"], recorded[noise], recorded["stage"], **conditioning)
    assert relative_error(out, recorded["out"]) < RELATIVE


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_preconditioned_edm_equals_the_reference(stage):
    recorded = group("edm", f"a/precond/s{stage}/")
    denoiser = EDMPreconditioner(load("edm", "a/"), Stages.edm())
    out = denoiser(recorded["x"], recorded["sigma"])
    assert relative_error(out, recorded["out"]) < RELATIVE


@each_network
def test_export_returns_what_load_took(family, prefix, noise):
    given = group(family, f"{prefix}sd/")
    exported = official.export(load(family, prefix))
    assert exported.keys() == given.keys()
    for name, tensor in given.items():
        expected = tensor.to(exported[name].dtype)
        if name == "sigmas":  # computed, not loaded: another processor's exponential may round the other way
            torch.testing.assert_close(exported[name], expected, rtol=1e-6, atol=0)
        else:
            assert torch.equal(exported[name], expected), name
        assert exported[name].is_contiguous()


@each_network
def test_export_names_every_gradient(family, prefix, noise):
    network = load(family, prefix)
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    constants = {
        name for name in group(family, f"{prefix}sd/") if name.endswith((".freqs", "filter", "sigmas"))
    }
    assert official.export(network, "gradients").keys() | constants == group(family, f"{prefix}sd/").keys()


def renamed(family: str, names: dict[str, str]) -> dict[str, torch.Tensor]:
    """A network's first decoder as the family's original, unified network names it."""
    given = group(family, {"edm": "a/sd/", "ldm": "u/sd/"}.get(family, "sd/"))
    found = {}
    for name, tensor in given.items():
        for ours, theirs in names.items():
            name = re.sub(ours, theirs, name)
        if not re.match(r"(decs|de_modules|outs|norm|decoder_pred|final_layer)\.\d", name):
            found[name] = tensor
    return found


@pytest.mark.parametrize(
    ("family", "names", "changes"),
    [
        ("edm", {r"^decs\.0\.": "dec."}, {"de_model_channels": [12], "stage_interval": None}),
        ("ldm", {r"^de_modules\.0\.": "output_blocks.", r"^outs\.0\.": "out."}, {"de_nfs": [64]}),
        (
            "uvit",
            {r"^de_modules\.0\.": "out_blocks.", r"^(norm|decoder_pred|final_layer)\.0\.": r"\1."},
            {"de_nfs": [48]},
        ),
        (
            "ncsnpp",
            {r"^en_modules\.": "all_modules.", r"^de_modules\.0\.": "all_modules.11+"},
            {"de_nfs": [12]},
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_load_takes_the_names_of_the_original_unified_networks(family, names, changes):
    state = renamed(family, names)
    state = {
        re.sub(r"11\+(\d+)", lambda m: str(11 + int(m[1])), name): tensor for name, tensor in state.items()
    }
    given = config(family, {"edm": "a/", "ldm": "u/"}.get(family, "")) | changes
    given = {name: value for name, value in given.items() if name not in ("stage_num", "stage_interval")}
    network = official.load(state, family, given)
    assert network.num_stages == 1
    exported = official.export(network)
    assert len(exported) == len(state)


def test_original_edm_has_32_groups():
    network = official.build(
        "edm", {"img_resolution": 8, "model_channels": 128, "channel_mult": [1], "num_blocks": 1}
    )
    assert network.config["max_groups"] == 32
    assert network.config["encoder_widths"] == network.config["decoder_widths"] == [128]


def test_load_names_the_missing_parameter():
    given = group("edm", "a/sd/")
    del given["enc.8x8_conv.weight"]
    with pytest.raises(ValueError, match=r"1 missing: enc\.8x8_conv\.weight"):
        official.load(given, "edm", config("edm", "a/"))


def test_load_names_the_unexpected_parameter():
    given = group("edm", "a/sd/") | {"enc.extra": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"1 unexpected: enc\.extra"):
        official.load(given, "edm", config("edm", "a/"))


def test_load_names_the_wrong_shape():
    given = group("edm", "a/sd/") | {"map_layer0.bias": torch.zeros(5)}
    with pytest.raises(ValueError, match=r"map_layer0\.bias is \[5\], the network needs \[32\]"):
        official.load(given, "edm", config("edm", "a/"))


def test_load_refuses_another_filter_than_that_of_the_config():
    with pytest.raises(
        ValueError, match=r"constants that contradict config: enc\.4x4_down\.conv0\.resample_filter"
    ):
        official.load(group("edm", "a/sd/"), "edm", config("edm", "a/") | {"resample_filter": [1, 3, 3, 1]})


@pytest.mark.parametrize("family", ["edm", "ncsnpp", "ldm", "uvit"])
def test_load_says_which_family_does_not_fit(family):
    other = "uvit" if family != "uvit" else "ncsnpp"
    prefix = {"edm": "a/", "ldm": "u/"}.get(family, "")
    with pytest.raises(
        ValueError, match=rf"does not fit a {family} network.*missing.*unexpected.*check family"
    ):
        official.load(group(other, "sd/"), family, config(family, prefix))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: official.load({}, "gan", {}), r"family must be one of edm, ncsnpp, ldm, uvit, got 'gan'"),
        (
            lambda: official.build("edm", {"img_resolution": 8, "colour": 1}),
            r"unknown arguments for edm: colour",
        ),
        (
            lambda: official.build(
                "edm", {"img_resolution": 8, "de_model_channels": [4], "stage_interval": "[1, 2]"}
            ),
            r"stage_interval names 2 stages, but 1 decoder widths",
        ),
        (lambda: official.build("edm", {}), r"edm needs the argument img_resolution"),
        (
            lambda: official.build("ncsnpp", {"image_size": 8, "resblock": "ddpm"}),
            r"resblock='ddpm' are not supported, only 'biggan'",
        ),
        (lambda: official.build("ldm", {"image_size": 8}), r"needs num_heads or num_head_channels"),
        (
            lambda: official.build("uvit", {"image_size": 8, "stage_num": 3}),
            r"stage_num=3 for de_nfs=\[512\]",
        ),
        (lambda: official.export(torch.nn.Linear(1, 1)), r"family must be one of .*, got 'Linear'"),
        (
            lambda: official.export(load("uvit", ""), values="weights"),
            r"values must be one of parameters, gradients",
        ),
    ],
)
def test_bad_calls_say_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_export_refuses_separate_networks():
    network = networks.build(
        {"family": "uvit", "image_size": 8, "encoder_widths": [16, 8], "decoder_widths": [16, 8]}
    )
    with pytest.raises(ValueError, match="needs a shared encoder, got separate networks"):
        official.export(network)

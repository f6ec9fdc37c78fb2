"""The networks against the paper's reference networks, and the import and export of their parameters."""

from __future__ import annotations

import pytest
import torch

from fixtures import config, group, relative_error
from multistage_diffusion import official

# Outputs and gradients were recorded in float32, and the sums run in another order here: a few hundred roundings of
# 6e-8 in sequence. The fixtures' own bound is 1e-5.
RELATIVE = 1e-5
# Gradients that vanish analytically (the bias of attention's keys) are rounding noise in both.
VANISHING = 1e-4
EDM_FIXED = ("x", "noise_labels", "stage", "gout", "out", "gx", "sigma")


def load_edm(network: str):
    return official.load(group("edm", f"{network}/sd/"), "edm", config("edm", f"{network}/")).eval()


@pytest.mark.parametrize("network", ["a"])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_edm_equals_the_reference(network, stage):
    recorded = group("edm", f"{network}/s{stage}/")
    labels = {k: v for k, v in recorded.items() if k.endswith("_labels") and k != "noise_labels"}
    model = load_edm(network)
    x = recorded["x"].requires_grad_()

    out = model(x, recorded["noise_labels"], [stage] * x.shape[0], **labels)
    (out * recorded["gout"]).sum().backward()

    assert relative_error(out, recorded["out"]) < RELATIVE
    assert relative_error(x.grad, recorded["gx"]) < RELATIVE
    gradients = official.export(model, values="gradients")
    for name, expected in group("edm", f"{network}/s{stage}/g/").items():
        vanishes = expected.norm() < VANISHING * recorded["gout"].norm()
        error = (gradients[name] - expected).norm() / recorded["gout"].norm() if vanishes else None
        assert (error if vanishes else relative_error(gradients[name], expected)) < RELATIVE, name


def test_edm_mixed_batch_equals_the_reference_of_each_samples_stage():
    recorded = group("edm", "a/mixed/")
    out = load_edm("a")(recorded["x"], recorded["noise_labels"], recorded["stage"])
    assert relative_error(out, recorded["out"]) < RELATIVE


def test_edm_export_returns_what_load_took():
    given = group("edm", "a/sd/")
    exported = official.export(load_edm("a"))
    assert exported.keys() == given.keys()
    for name, tensor in given.items():
        assert torch.equal(exported[name], tensor), name


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


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: official.load({}, "gan", {}), r"family must be one of edm"),
        (lambda: official.load({}, "edm", {"img_resolution": 8, "colour": 1}), r"unknown arguments for edm: colour"),
        (
            lambda: official.load({}, "edm", {"img_resolution": 8, "de_model_channels": [4], "stage_interval": "[1, 2]"}),
            r"stage_interval names 2 stages, de_model_channels 1",
        ),
        (lambda: official.export(torch.nn.Linear(1, 1)), r"family must be one of edm, got 'Linear'"),
    ],
)
def test_bad_calls_say_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()

"""``msd evaluate``: the forms of samples, of real images and of features that it takes, and what it writes."""

import json
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from multistage_diffusion import cli, evaluate
from stand_ins import untrained_run

FIGURES = ["frechet", "precision", "recall", "kid"]


def means(batch):
    """Four features: the means of the quarters of an image, of eight bits."""
    assert batch.dtype == torch.uint8
    return torch.nn.functional.adaptive_avg_pool2d(batch.double() / 255, 2).mean(1)


@pytest.fixture(autouse=True)
def _features(monkeypatch):
    module = ModuleType("users_features")
    module.means = means
    monkeypatch.setitem(sys.modules, "users_features", module)
    monkeypatch.setattr("warnings.showwarning", __import__("warnings").showwarning)


@pytest.fixture
def folder(tmp_path):
    """Twenty samples as PNG, thirty real images as an array; and the batches that they are."""
    generator = torch.Generator().manual_seed(0)
    samples, real = (
        torch.randint(low, 256, (n, 1, 8, 8), generator=generator, dtype=torch.uint8)
        for n, low in ((20, 0), (30, 40))
    )
    (tmp_path / "samples").mkdir()
    for i, image in enumerate(samples):
        Image.fromarray(image[0].numpy()).save(tmp_path / "samples" / f"{i:02}.png")
    np.savez(tmp_path / "real.npz", arr_0=real.permute(0, 2, 3, 1).numpy())
    np.save(tmp_path / "samples.npy", samples.numpy())
    return tmp_path, samples, real


def msd_evaluate(samples, *arguments):
    options = ("--features", "users_features:means", "--device", "cpu")
    return cli.main(["evaluate", str(samples), *options, *map(str, arguments)])


@pytest.mark.parametrize("form", ["samples", "samples.npy"])
def test_figures_are_those_of_the_function(form, folder, capsys):
    path, samples, real = folder
    assert msd_evaluate(path / form, "--against", path / "real.npz", "--json", path / "found.json") == 0
    found = json.loads((path / "found.json").read_text())
    expected = evaluate(samples, real, means)
    assert list(found["figures"]) == FIGURES
    for name, value in expected.items():
        assert found["figures"][name]["value"] == pytest.approx(value, rel=1e-9)
        assert found["figures"][name]["images"] == 20
    assert found["reference_images"] == 30
    printed = capsys.readouterr().out
    assert "20 samples, features users_features:means, against 30 images of" in printed
    assert all(name in printed for name in FIGURES)


def test_statistics_take_the_place_of_images(folder):
    path, samples, real = folder
    options = ("--against", path / "real.npz", "--save-statistics", path / "statistics.npz")
    assert msd_evaluate(path / "samples", *options) == 0
    options = ("--against", path / "statistics.npz", "--json", path / "found.json")
    assert msd_evaluate(path / "samples", *options) == 0
    found = json.loads((path / "found.json").read_text())
    assert list(found["figures"]) == ["frechet"]
    expected = evaluate(samples, real, means)["frechet"]
    assert found["figures"]["frechet"]["value"] == pytest.approx(expected, rel=1e-9)


def test_a_run_is_sampled(folder, capsys):
    path, _, _ = folder
    run = untrained_run(path / "run", "edm-cifar10", in_channels=1, out_channels=1)
    options = ("--against", path / "real.npz", "--num", 6, "--steps", 2, "--batch", 4)
    assert msd_evaluate(run, *options) == 0
    assert "6 samples" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("samples", "--against", "real.npz", "--num", "5"), "--num: is for a run that is sampled, and"),
        (("samples", "--against", "missing.npz"), "missing.npz does not exist"),
        (("missing", "--against", "real.npz"), "missing does not exist"),
        (("samples", "--against", "real.npz", "--features", "no:such"), "'no:such' cannot be imported"),
        (("samples", "--against", "real.npz", "--k", "20"), "must be more than 20 images for k=20, got 20"),
        (("samples", "--against", "real.npz", "--json", "samples"), "--json"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(arguments, message, folder, monkeypatch, capsys):
    path, *_ = folder
    monkeypatch.chdir(path)
    assert msd_evaluate(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1

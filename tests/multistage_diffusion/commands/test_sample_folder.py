"""``msd sample --out DIR/``: a PNG for each image, the same files however often it was stopped."""

import json

import numpy as np
import pytest
from PIL import Image

from multistage_diffusion import cli
from multistage_diffusion.data.images import load_images
from multistage_diffusion.sampling import samplers
from stand_ins import untrained_run

MODELS = {
    "edm": ("edm-cifar10", {"label_dim": 3}, "images"),
    "ldm": ("ldm-celebahq256", {"encoder_widths": [32], "decoder_widths": [32, 32, 32]}, "latents"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs")
    for name, (preset, changes, values) in MODELS.items():
        untrained_run(directory / name, preset, values, **changes)
    return directory


@pytest.fixture(autouse=True)
def _keep_warnings_as_they_are(monkeypatch):
    monkeypatch.setattr("warnings.showwarning", __import__("warnings").showwarning)


def msd_sample(run, out, *arguments):
    options = ("--num", "7", "--batch", "3", "--steps", "2", "--device", "cpu")
    return cli.main(["sample", "--run", str(run), "--out", f"{out}/", *options, *map(str, arguments)])


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_folder_holds_a_png_for_each_seed_and_their_classes(runs, tmp_path, capsys):
    out = tmp_path / "samples"
    assert msd_sample(runs / "edm", out, "--seed", 3) == 0
    assert "7 images of step-" in capsys.readouterr().out
    names = [f"{seed:08}.png" for seed in range(3, 10)]
    assert sorted(files(out)) == [*names, "dataset.json", "samples.json"]
    labels = json.loads((out / "dataset.json").read_text())["labels"]
    assert labels == [[name, seed % 3] for name, seed in zip(names, range(3, 10), strict=True)]
    cli.main([
        "sample", "--run", str(runs / "edm"), "--out", str(tmp_path / "array.npz"), "--seed", "3",
        "--num", "7", "--batch", "3", "--steps", "2", "--device", "cpu",
    ])  # fmt: skip
    with np.load(tmp_path / "array.npz") as array:
        for name, image in zip(names, array["images"], strict=True):
            assert np.array_equal(np.asarray(Image.open(out / name)), image)
    assert load_images(out).num_images == 7


def test_a_killed_call_goes_on_with_the_same_files(runs, tmp_path, monkeypatch):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert msd_sample(runs / "edm", whole) == 0
    drawn, generate = [], samplers.generate

    def killed_in_the_second_batch(denoiser, seeds, *args, **kwargs):
        drawn.append(list(seeds))
        if len(drawn) == 2:
            (cut / ".unfinished-1-3").write_bytes(b"half an image")
            raise KeyboardInterrupt
        return generate(denoiser, seeds, *args, **kwargs)

    monkeypatch.setattr(samplers, "generate", killed_in_the_second_batch)
    assert msd_sample(runs / "edm", cut) == 130
    (cut / "00000001.png").unlink()  # of the first batch, which is drawn again as a whole
    assert msd_sample(runs / "edm", cut, "--resume") == 0
    assert drawn == [[0, 1, 2], [3, 4, 5], [0, 1, 2], [3, 4, 5], [6]]
    assert files(cut) == files(whole)
    drawn.clear()
    assert msd_sample(runs / "edm", cut, "--resume") == 0
    assert drawn == []


def test_other_samples_stay_untouched(runs, tmp_path, capsys):
    out = tmp_path / "samples"
    assert msd_sample(runs / "edm", out) == 0
    before = files(out)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"cat")
    (tmp_path / "file").write_bytes(b"file")
    for folder, arguments, message in (
        ("samples", (), "is not empty; add --resume to go on with its samples, or name another folder"),
        ("samples", ("--resume", "--seed", 1), "have seeds [0, 6, 7], got [1, 7, 7]"),
        ("samples", ("--resume", "--sampler", "ddim"), "have sampler 'heun', got 'ddim'"),
        ("samples", ("--resume", "--class", 1), "have class None, got 1"),
        ("photos", (), "is not empty; name another folder"),
        ("photos", ("--resume",), "holds no samples to go on with"),
        ("file", (), "is a file, and a folder is asked for"),
    ):
        capsys.readouterr()
        assert msd_sample(runs / "edm", tmp_path / folder, *arguments) == 2
        assert message in capsys.readouterr().err
    assert files(out) == before
    assert files(tmp_path / "photos") == {"cat.png": b"cat"}


def test_what_no_folder_of_png_can_hold_is_refused(runs, tmp_path, capsys):
    assert msd_sample(runs / "ldm", tmp_path / "latents") == 2
    assert "trained on latents, which are no picture" in capsys.readouterr().err
    arguments = ["sample", "--run", str(runs / "edm"), "--resume", "--out", str(tmp_path / "grid.png")]
    assert cli.main(arguments) == 2
    assert "--resume: is for a folder of samples, --out DIR/" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []

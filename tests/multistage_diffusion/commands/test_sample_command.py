"""``msd sample``: which sampler runs, which options it takes, and what is written."""

import numpy as np
import pytest
import torch
from PIL import Image

from msd_kernels.runtime import processor
from multistage_diffusion import cli
from multistage_diffusion.commands.sample import check_output, write_samples, written_form
from multistage_diffusion.common import plots
from multistage_diffusion.data.images import load_images
from multistage_diffusion.noise.schedules import LDM, VP
from multistage_diffusion.sampling.samplers import DDIMConfig, generate, sampler_config
from multistage_diffusion.training import checkpoints
from stand_ins import one_thread, untrained_run  # noqa: F401

MODELS = {
    "edm": ("edm-cifar10", {"in_channels": 1, "out_channels": 1}, "images"),
    "vp": ("ncsnpp-cifar10", {}, "images"),
    "ldm": (
        "ldm-celebahq256",
        {"encoder_widths": [32], "decoder_widths": [32, 32, 32], "in_channels": 5, "out_channels": 5},
        "latents",
    ),
}


def msd_sample(run, *arguments):
    return cli.main(["sample", "--run", str(run), "--device", "cpu", *map(str, arguments)])


@pytest.fixture(autouse=True)
def _keep_warnings_as_they_are(monkeypatch):
    monkeypatch.setattr("warnings.showwarning", __import__("warnings").showwarning)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with an untrained model of each schedule, that of LDM for latents."""
    directory = tmp_path_factory.mktemp("runs")
    for name, (preset, changes, values) in MODELS.items():
        untrained_run(directory / name, preset, values, **changes)
    return directory


@pytest.mark.parametrize(
    ("model", "options", "told"),
    [
        ("edm", (), "heun, 35 network evaluations each (stages 18 / 4 / 13)"),
        ("vp", (), "dpm-singlestep, 20 network evaluations each"),
        ("ldm", (), "dpm-multistep, 20 network evaluations each"),
        ("vp", ("--steps", 7), "dpm-singlestep, 7 network evaluations each"),
        ("vp", ("--sampler", "heun", "--steps", 3), "heun, 5 network evaluations each"),
        ("ldm", ("--sampler", "ddim", "--denoise-to-zero"), "ddim, 21 network evaluations each"),
        ("edm", ("--sampler", "ddim", "--eta", 1, "--steps", 4), "ddim, 4 network evaluations each"),
    ],
)
def test_the_sampler_is_that_of_the_schedule_unless_another_is_asked_for(
    runs, tmp_path, capsys, model, options, told
):
    out = tmp_path / "samples.npz"
    assert msd_sample(runs / model, "--num", 2, "--out", out, *options) == 0
    assert told in capsys.readouterr().out


def test_options_reach_the_sampler(runs, tmp_path):
    options = ("--sampler", "ddim", "--eta", 0.5, "--steps", 3, "--denoise-to-zero", "--seeds", "4,9")
    assert msd_sample(runs / "ldm", "--out", tmp_path / "x.npz", *options) == 0
    config = sampler_config("ddim", LDM(), 3, eta=0.5, denoise_to_zero=True)
    assert isinstance(config, DDIMConfig)
    denoiser = checkpoints.load_model(runs / "ldm").denoiser
    expected = generate(denoiser, [4, 9], (5, 8, 8), config).images.float().numpy()
    np.testing.assert_allclose(np.load(tmp_path / "x.npz")["latents"], expected, rtol=1e-4, atol=1e-4)


def test_heun_starts_and_ends_within_the_schedule(runs, tmp_path, capsys):
    for options in ((), ("--sigma-min", 0.05, "--sigma-max", 70), ("--s-churn", 1, "--s-max", 50)):
        out = tmp_path / "x.npz"
        assert msd_sample(runs / "ldm", "--sampler", "heun", "--steps", 3, "--out", out, *options) == 0
    for model, option, value, has in (
        ("ldm", "--sigma-min", 0.01, "the ldm schedule has 0.0387589 to 83.8225"),
        ("ldm", "--sigma-max", 90, "the ldm schedule has 0.0387589 to 83.8225"),
        ("vp", "--sigma-max", 200, f"the vp schedule has 0 to {float(VP().sigma(1)):.6g}"),
    ):
        out = tmp_path / "none.npz"
        assert msd_sample(runs / model, "--sampler", "heun", "--out", out, option, value) == 2
        assert has in capsys.readouterr().err
        assert not out.exists()


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("vp", "--sampler dpm-singlestep --rho 5", "--rho is for --sampler heun, not for dpm-singlestep"),
        ("vp", "--s-churn 0", "--s-churn is for --sampler heun, not for dpm-singlestep"),
        ("ldm", "--sigma-max 50", "--sigma-max is for --sampler heun, not for dpm-multistep"),
        ("ldm", "--sampler ddim --s-max 50", "--s-max is for --sampler heun, not for ddim"),
        ("edm", "--eta 0.5", "--eta is for --sampler ddim, not for heun"),
        ("edm", "--sampler dpm-multistep --eta 0", "--eta is for --sampler ddim, not for dpm-multistep"),
        ("edm", "--denoise-to-zero", "for --sampler dpm-singlestep or dpm-multistep or ddim, not for heun"),
        ("edm", "--sampler ddim --eta 1.5", "eta=1.5 must lie within 0 and 1"),
        ("edm", "--sampler euler", "'euler'"),
    ],
)
def test_an_option_of_another_sampler_is_refused(runs, tmp_path, capsys, model, options, message):
    out = tmp_path / "none.npz"
    assert msd_sample(runs / model, "--out", out, *options.split()) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--eta 2", "eta=2.0 must lie within 0 and 1"),
        ("--sampler ddim --rho 3", "--rho is for --sampler heun, not for ddim"),
        ("--eta 1 --rho 3", "--rho, --eta: no sampler takes all of these"),
        ("--s-min 3 --s-max 2", "S_min=3.0, S_max=2.0"),
        ("--rho 1e-9", "rho=1e-09 the 18 noise levels from sigma_max=80.0 to sigma_min=0.002 do not fall"),
        ("--rho 1e-320", "rho=1e-320 the 18 noise levels"),
        ("--rho inf", "argument --rho: inf must be finite"),
        ("--s-noise inf", "argument --s-noise: inf must be finite"),
        ("--sigma-max nan", "argument --sigma-max: nan must be above 0"),
        ("--seed 18446744073709551616", "18446744073709551616 must be at most 18446744073709551615"),
        ("--seeds 3,18446744073709551616", "seed 18446744073709551616 does not fit into 64 bits; allowed"),
        ("--seed 18446744073709551615 --num 2", "seed 18446744073709551616 does not fit into 64 bits"),
    ],
)
def test_wrong_options_show_before_the_model_is_loaded(tmp_path, capsys, options, message):
    assert msd_sample(tmp_path / "nowhere", "--out", tmp_path / "x.png", *options.split()) == 2
    assert message in capsys.readouterr().err


def test_latents_are_written_as_they_are_and_can_be_read_again(runs, tmp_path, capsys):
    out = tmp_path / "latents.npz"
    assert msd_sample(runs / "ldm", "--seeds", "5,2-3", "--steps", 3, "--out", out) == 0
    assert "3 latents of step-00000001" in capsys.readouterr().out
    arrays = np.load(out)
    assert sorted(arrays.files) == ["latents", "seeds"]
    assert (arrays["latents"].shape, arrays["latents"].dtype) == ((3, 5, 8, 8), np.float32)
    assert np.abs(arrays["latents"]).max() > 1  # neither clipped nor scaled to eight bits
    assert arrays["seeds"].tolist() == [5, 2, 3]
    assert np.array_equal(load_images(out, values="latents").images.numpy(), arrays["latents"])


def test_latents_are_no_picture(runs, tmp_path, capsys):
    assert msd_sample(runs / "ldm", "--out", tmp_path / "x.png") == 2
    errors = capsys.readouterr().err
    assert "trained on latents, which are no picture before the autoencoder decodes them" in errors
    assert "write them as .npz" in errors
    assert not (tmp_path / "x.png").exists()


def test_images_of_a_vp_model_are_written_as_pictures(runs, tmp_path):
    assert msd_sample(runs / "vp", "--num", 4, "--steps", 2, "--out", tmp_path / "x.png") == 0
    with Image.open(tmp_path / "x.png") as image:
        assert image.mode == "RGB"
    assert msd_sample(runs / "vp", "--num", 4, "--steps", 2, "--out", tmp_path / "x.npz") == 0
    arrays = np.load(tmp_path / "x.npz")
    assert (arrays["images"].shape, arrays["images"].dtype) == ((4, 8, 8, 3), np.uint8)


# ------------------------------------------------------------------ what is written


def fill_disk(path, *arguments, **arrays):
    """Stands in for a writer of files on a disk that is full after some bytes."""
    path.write_bytes(b"the first bytes")
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("suffix", [".npz", ".png"])
def test_samples_that_cannot_be_written_leave_the_old_ones(runs, tmp_path, capsys, monkeypatch, suffix):
    out = tmp_path / f"keep{suffix}"
    assert msd_sample(runs / "vp", "--num", 1, "--steps", 2, "--out", out) == 0
    before = out.read_bytes()
    monkeypatch.setattr(np, "savez_compressed", fill_disk)
    monkeypatch.setattr(plots, "save_sample_grid", lambda images, path: fill_disk(path))
    assert msd_sample(runs / "vp", "--num", 2, "--steps", 2, "--out", out) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert out.read_bytes() == before
    assert list(tmp_path.iterdir()) == [out]


def test_where_samples_cannot_go_shows_before_the_model_is_loaded(tmp_path, capsys):
    (tmp_path / "x.png").mkdir()
    (tmp_path / "file").write_text("")
    for out, message in (("x.png", "is a folder"), ("file/x.npz", "is no folder")):
        assert msd_sample(tmp_path / "nowhere", "--out", tmp_path / out) == 2
        assert f"--out {tmp_path / out}: " in (errors := capsys.readouterr().err)
        assert message in errors


def test_channels_that_are_no_picture_are_refused_before_sampling(runs, tmp_path, capsys, monkeypatch):
    for channels in (1, 3):
        check_output(tmp_path / "x.png", "images", channels, tmp_path)
    check_output(tmp_path / "x.npz", "images", 4, tmp_path)
    load = checkpoints.load_model

    def load_as_images(*arguments):
        model = load(*arguments)
        model.metadata["config"]["values"] = "images"
        return model

    monkeypatch.setattr(checkpoints, "load_model", load_as_images)
    monkeypatch.setattr(
        "multistage_diffusion.sampling.samplers.generate", lambda *a, **k: pytest.fail("sampled")
    )
    assert msd_sample(runs / "ldm", "--out", tmp_path / "x.png") == 2
    assert "makes images of 5 channels, a PNG has 1 or 3; write them as .npz" in capsys.readouterr().err


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("name", "values"), [("x.png", "images"), ("x.npz", "images"), ("x.npz", "latents")])
def test_samples_that_are_not_finite_are_refused(tmp_path, value, name, values):
    samples = torch.zeros(3, 1, 2, 2, dtype=torch.float64)
    samples[1:, 0, 1, 0] = value
    with pytest.raises(
        ValueError, match=f"2 of 3 {values} hold NaN or infinite values, so nothing is written"
    ):
        written_form(tmp_path / name, samples, values)
    samples[1:, 0, 1, 0] = 1e39  # finite, but not in float32
    with pytest.raises(ValueError, match="hold NaN or infinite"):
        written_form(tmp_path / name, samples, values)


def test_noise_that_overflows_is_no_black_image(runs, tmp_path, capsys):
    out = tmp_path / "nan.npz"
    assert msd_sample(runs / "edm", "--steps", 2, "--s-churn", "inf", "--s-noise", 1e300, "--out", out) == 2
    assert "16 of 16 images hold NaN or infinite values" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("seeds", "dtype"),
    [([5, 2], np.int64), ([2**63 - 1, 2**63, 2**63 + 1], np.uint64), ([0, 2**64 - 1], np.uint64)],
)
def test_seeds_are_written_as_they_are(tmp_path, seeds, dtype):
    write_samples(tmp_path / "x.npz", torch.zeros(len(seeds), 1, 1, 1, dtype=torch.uint8), seeds)
    written = np.load(tmp_path / "x.npz")["seeds"]
    assert (written.tolist(), written.dtype) == (seeds, dtype)


def test_the_largest_seeds_are_sampled(runs, tmp_path):
    out = tmp_path / "x.npz"
    assert msd_sample(runs / "edm", "--seed", 2**64 - 2, "--num", 2, "--steps", 2, "--out", out) == 0
    assert np.load(out)["seeds"].tolist() == [2**64 - 2, 2**64 - 1]


def test_batch_invariant_images_do_not_depend_on_the_batch(runs, tmp_path):
    """In latents, which are written as the sampler gives them."""
    written = []
    for batch, seeds in ((3, "4,9,6"), (2, "6,4,9"), (1, "9,6,4")):
        out = tmp_path / f"{batch}.npz"
        options = ("--steps", 2, "--seeds", seeds, "--batch", batch, "--batch-invariant", "--out", out)
        assert msd_sample(runs / "ldm", *options) == 0
        with np.load(out) as file:
            written.append(dict(zip(file["seeds"].tolist(), file["latents"], strict=True)))
    for seed in (4, 6, 9):
        assert np.array_equal(written[0][seed], written[1][seed])
        assert np.array_equal(written[0][seed], written[2][seed])


@pytest.mark.parametrize("present", [False, True])
def test_bf16_warns_where_it_is_no_faster(runs, tmp_path, capsys, monkeypatch, present):
    monkeypatch.setattr(processor, "computes_in", lambda dtype: present or dtype == torch.float32)
    out = tmp_path / "images.npz"
    assert msd_sample(runs / "edm", "--steps", 1, "--num", 1, "--precision", "bf16", "--out", out) == 0
    assert ("warning: --precision bf16: no faster than fp32 here" in capsys.readouterr().err) != present

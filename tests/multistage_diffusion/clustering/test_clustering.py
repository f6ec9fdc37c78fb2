"""Finding the stages: similarities, splits, widths, and the command."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from multistage_diffusion import Stages, clustering, load_images
from multistage_diffusion.cli import main
from multistage_diffusion.clustering import (
    Similarity,
    gradient_similarity,
    similarity_matrix,
    split,
    split_from_ends,
    split_uniformly,
    suggest_widths,
    sweep,
)
from multistage_diffusion.noise.schedules import EDM, LDM, VP

SIGMAS = torch.tensor([0.02, 0.5, 1.0, 2.0, 4.0, 60.0], dtype=torch.float64)


@pytest.fixture(scope="module")
def digits() -> torch.Tensor:
    """200 digits ``[N, 1, 8, 8]``, uint8."""
    return load_images("digits", image_size=8).images[:200]


def known(matrix, sigmas=None) -> Similarity:
    matrix = torch.as_tensor(matrix, dtype=torch.float64)
    sigmas = torch.logspace(-2, 2, len(matrix), dtype=torch.float64) if sigmas is None else sigmas
    return Similarity(sigmas, matrix, torch.zeros_like(matrix), torch.linspace(1, 0, len(matrix)).double())


def random_matrix(levels: int, seed: int) -> torch.Tensor:
    matrix = torch.rand(levels, levels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (matrix + matrix.T) / 2


# ---------------------------------------------------------------------------- similarity


def plain_similarity(data, sigmas, samples, form, measure, seed=0):
    """One sample and one pair at a time, two passes over the data for each: the paper's words."""
    y = data.double().flatten(1) / 127.5 - 1
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(y), generator=generator)[:samples]
    noise = torch.randn(samples, y.shape[1], dtype=torch.float64, generator=generator)
    variance = (y[order] - y.mean(0)).square().sum(1).mean() / y.shape[1]

    def f(image, eps, sigma):
        x = image + sigma * eps
        weights = torch.softmax(-(x - y).square().sum(1) / (2 * sigma**2), 0)
        D = weights @ y
        return D if form == "x0" else (x - D) / sigma

    scores = torch.empty(samples, len(sigmas), len(sigmas), dtype=torch.float64)
    for k, (a, s), (b, t) in itertools.product(range(samples), enumerate(sigmas), enumerate(sigmas)):
        difference = f(y[order[k]], noise[k], s) - f(y[order[k]], noise[k], t)
        if measure == "pixels":
            limit = 2 / 256 * (2 if form == "x0" else 1)
            scores[k, a, b] = (difference.abs() < limit).double().mean()
        else:
            scale = variance if form == "x0" else 1.0
            scores[k, a, b] = 1 / (1 + difference.square().mean() / scale)
    return scores.mean(0), scores.std(0) / math.sqrt(samples)


@pytest.mark.parametrize("form", ["x0", "eps"])
@pytest.mark.parametrize("measure", ["pixels", "smooth"])
def test_similarity_matrix_equals_the_plain_loop(form, measure, digits):
    found = similarity_matrix(digits, SIGMAS, num_samples=6, form=form, measure=measure)
    matrix, error = plain_similarity(digits, SIGMAS, 6, form, measure)
    # Float64 on both sides; no difference of this data lies within 1e-9 of the threshold.
    torch.testing.assert_close(found.matrix, matrix, rtol=0, atol=1e-9)
    torch.testing.assert_close(found.standard_error, error, rtol=0, atol=1e-9)
    torch.testing.assert_close(found.matrix, found.matrix.T, rtol=1e-15, atol=0)
    assert bool((found.matrix.diagonal() == 1).all())


def test_similarity_matrix_restores_all_variance_at_low_and_none_at_high_noise(digits):
    restored = similarity_matrix(digits, SIGMAS).restored
    assert restored[0].item() == pytest.approx(1, abs=1e-9)
    assert bool((restored.diff() < 0).all())
    assert restored[-1] < 0.01


def test_similarity_matrix_of_both_data_conventions(digits):
    """Data in [0, 1] at half the noise is the same problem; the threshold is a share of the range."""
    symmetric = similarity_matrix(digits, SIGMAS)
    positive = similarity_matrix(digits, SIGMAS / 2, data_range=(0.0, 1.0))
    floats = similarity_matrix(digits.double() / 255, SIGMAS / 2, data_range=(0.0, 1.0))
    for other in (positive, floats):
        torch.testing.assert_close(other.matrix, symmetric.matrix, rtol=0, atol=1e-9)


def test_similarity_matrix_does_not_depend_on_passes_and_chunks(digits, monkeypatch):
    whole = similarity_matrix(digits, SIGMAS, num_samples=7)
    monkeypatch.setattr(clustering.similarity, "_MAX_QUERIES", 12)
    monkeypatch.setattr(clustering.similarity, "_CHUNK_BYTES", 64 * 33)
    calls = []
    parts = similarity_matrix(digits, SIGMAS, num_samples=7, progress=lambda *call: calls.append(call))
    torch.testing.assert_close(parts.matrix, whole.matrix, rtol=0, atol=1e-9)
    assert calls == [(done, 4 * 7) for done in range(1, 29)], "4 passes over 7 chunks"


def test_similarity_matrix_depends_on_the_seed_only(digits):
    torch.manual_seed(1)
    first = similarity_matrix(digits, SIGMAS, seed=3)
    torch.manual_seed(2)
    second = similarity_matrix(digits, SIGMAS, seed=3)
    other = similarity_matrix(digits, SIGMAS, seed=4)
    assert torch.equal(first.matrix, second.matrix)
    assert not torch.equal(first.matrix, other.matrix)


def test_similarity_matrix_draws_more_samples_than_images():
    data = torch.tensor([[0, 0], [255, 255]], dtype=torch.uint8)
    assert similarity_matrix(data, SIGMAS, num_samples=5).matrix.shape == (6, 6)


DATA = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.5, 0.0]])


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (DATA[:1], {}, "at least two images"),
        (DATA[[1, 1, 1]], {}, "all images are the same"),
        (DATA * torch.tensor([[1.0], [torch.nan], [1.0]]), {}, "image 1 holds a value that is NaN"),
        (DATA, {"sigmas": [1.0, 0.5]}, "ascending"),
        (DATA, {"sigmas": [1.0]}, "at least two"),
        (DATA, {"sigmas": [0.0, 0.5]}, "positive"),
        (DATA, {"num_samples": 0}, "num_samples=0"),
        (DATA, {"form": "v"}, "form must be one of x0, eps, got 'v'"),
        (DATA, {"measure": "psnr"}, "measure must be one of pixels, smooth, got 'psnr'"),
    ],
)
def test_similarity_matrix_rejects(data, options, message):
    with pytest.raises(ValueError, match=message):
        similarity_matrix(data, **{"sigmas": SIGMAS, **options})


# ---------------------------------------------------------------------------- splits


def enumerated(matrix: torch.Tensor, num_stages: int, min_levels: int) -> tuple[float, set[tuple[int, ...]]]:
    """The best objective of all contiguous splits, and the splits that reach it."""
    levels = len(matrix)
    values = {}
    for cuts in itertools.combinations(range(1, levels), num_stages - 1):
        edges = (0, *cuts, levels)
        if min(b - a for a, b in itertools.pairwise(edges)) >= min_levels:
            blocks = (matrix[a:b, a:b].mean() for a, b in itertools.pairwise(edges))
            values[edges[:-1]] = float(sum(blocks))
    best = max(values.values())
    return best, {starts for starts, value in values.items() if value > best - 1e-12}


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("min_levels", [1, 2])
def test_split_equals_enumeration(num_stages, min_levels):
    for seed in range(20):
        matrix = random_matrix(13, seed)
        found = split(matrix, num_stages, min_levels=min_levels)
        best, starts = enumerated(matrix, num_stages, min_levels)
        assert found.objective == pytest.approx(best, abs=1e-12)
        assert found.starts in starts


def test_split_of_the_paper_s_grid_equals_enumeration(digits):
    similarity = similarity_matrix(digits, VP().sigma(VP().grid()), measure="smooth")
    assert math.comb(20, 2) == 190
    for num_stages in (2, 3, 4):
        found = split(similarity, num_stages)
        assert found.objective == pytest.approx(enumerated(similarity.matrix, num_stages, 1)[0], abs=1e-12)


def test_split_finds_blocks():
    matrix = torch.block_diag(torch.ones(4, 4), torch.ones(2, 2), torch.ones(5, 5))
    found = split(known(matrix), 3)
    assert found.starts == (0, 4, 6)
    assert found.objective == pytest.approx(3)
    assert [list(found.levels(k)) for k in range(3)] == [[0, 1, 2, 3], [4, 5], [6, 7, 8, 9, 10]]
    sigmas = known(matrix).sigmas
    between = (sigmas[[3, 5]] * sigmas[[4, 6]]).sqrt()
    assert found.cuts == pytest.approx(between.tolist())


def test_split_takes_a_bare_matrix():
    found = split(torch.eye(4).numpy(), 2)
    assert found.cuts is None
    with pytest.raises(ValueError, match="noise levels of the matrix are not known"):
        found.stages()


def test_sweep_gives_the_best_split_of_each_number():
    similarity = known(random_matrix(9, 0))
    splits = sweep(similarity, 12, min_levels=2)
    assert [found.num_stages for found in splits] == [1, 2, 3, 4]
    assert splits[2] == split(similarity, 3, min_levels=2)
    assert splits[0].mean_similarity == pytest.approx(similarity.matrix.mean().item())


@pytest.mark.parametrize(
    ("matrix", "options", "message"),
    [
        (torch.eye(3)[:2], {}, r"must be square, got shape \[2, 3\]"),
        (torch.eye(3) * torch.nan, {}, "NaN"),
        (torch.eye(3), {"num_stages": 4}, "num_stages=4"),
        (torch.eye(3), {"num_stages": 0}, "num_stages=0"),
        (torch.eye(3), {"num_stages": 2, "min_levels": 2}, "min_levels=2 each do not fit the 3 noise levels"),
    ],
)
def test_split_rejects(matrix, options, message):
    with pytest.raises(ValueError, match=message):
        split(matrix, **options)


def test_split_from_ends_cuts_where_the_curves_cross_the_level():
    sigmas = torch.tensor([0.01, 0.1, 1.0, 10.0, 100.0], dtype=torch.float64)
    matrix = torch.eye(5, dtype=torch.float64)
    matrix[0] = torch.tensor([1.0, 1.0, 0.8, 0.2, 0.0])
    matrix[-1] = torch.tensor([0.0, 0.1, 0.3, 0.7, 1.0])
    found = split_from_ends(known(matrix, sigmas), level=0.85)
    # From 1.0 at 0.1 to 0.8 at 1: three quarters of the decade. From 0.7 at 10 to 1.0 at 100: half of it.
    assert found.cuts == pytest.approx((0.1 * 10**0.75, 10 * 10**0.5), rel=1e-6)  # six digits
    assert found.starts == (0, 2, 4)
    with pytest.raises(ValueError, match=r"level=0\.2 the first stage reaches up to .* try a higher level"):
        split_from_ends(known(matrix, sigmas), level=0.2)
    with pytest.raises(ValueError, match="level=1"):
        split_from_ends(known(matrix, sigmas), level=1)


def test_split_uniformly_has_stages_of_equal_length():
    schedule = VP()
    similarity = known(random_matrix(21, 0), schedule.sigma(schedule.grid()))
    by_t = split_uniformly(similarity, schedule, 3, "t")
    assert schedule.value(list(by_t.cuts)).tolist() == pytest.approx([0.001 + 0.333, 0.001 + 0.666])
    by_snr = split_uniformly(similarity, schedule, 3, "log_snr")
    edges = np.log([similarity.sigmas[0], *by_snr.cuts, similarity.sigmas[-1]])
    assert np.diff(edges) == pytest.approx([np.diff(edges).mean()] * 3)
    with pytest.raises(ValueError, match="by must be 't' or 'log_snr', got 'steps'"):
        split_uniformly(similarity, schedule, 3, "steps")
    with pytest.raises(ValueError, match="leave a stage without a level"):
        split_uniformly(similarity, schedule, 21, "log_snr")


@pytest.mark.parametrize("schedule", [VP(), EDM(), LDM()], ids=lambda schedule: schedule.name)
def test_split_gives_the_same_stages_in_every_variable(schedule):
    found = split(known(random_matrix(21, 5), schedule.sigma(schedule.grid())), 4)
    by_sigma, own = found.stages(), found.stages(schedule)
    values = torch.arange(1000).double() if schedule.name == "ldm" else schedule.grid(500)
    assert torch.equal(by_sigma.assign(schedule.sigma(values)), own.assign(values))
    assert torch.equal(own.assign(values).unique(), torch.arange(4))


# ---------------------------------------------------------------------------- widths


def test_suggest_widths_follows_its_rule():
    similarity = known(torch.eye(6))  # restores 1, 0.8, 0.6, 0.4, 0.2 and 0 of the variance
    found = split_from_starts(similarity, (0, 2, 4))
    widths, difficulty = suggest_widths(similarity, found, 128, multiple=1)
    assert difficulty == pytest.approx((0.9, 0.5, 0.1))
    # 128² on average: (0.9 + 0.5 + 0.1) / 3 = 0.5 of the square of 181.02.
    assert widths == tuple(round(181.0193 * math.sqrt(d)) for d in difficulty)
    assert np.mean(np.square(widths)) == pytest.approx(128**2, rel=0.01)
    frequent, _ = suggest_widths(similarity, found, 128, shares=(0.9, 0.05, 0.05), multiple=1)
    assert np.dot((0.9, 0.05, 0.05), np.square(frequent)) == pytest.approx(128**2, rel=0.01)
    assert suggest_widths(similarity, found, 1, multiple=16)[0] == (16, 16, 16)


def split_from_starts(similarity: Similarity, starts: tuple[int, ...]) -> clustering.Split:
    return clustering.Split(starts, len(similarity.sigmas), 0.0, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0}, "budget=0"),
        ({"budget": 8, "shares": (0.5, 0.5)}, "shares must be 3 numbers"),
        ({"budget": 8, "shares": (0.5, 0.7, -0.2)}, "shares must be 3 numbers"),
    ],
)
def test_suggest_widths_rejects(options, message):
    similarity = known(torch.eye(6))
    with pytest.raises(ValueError, match=message):
        suggest_widths(similarity, split_from_starts(similarity, (0, 2, 4)), **options)


# ---------------------------------------------------------------------------- gradients


def test_gradient_similarity_is_the_cosine_of_the_gradients():
    torch.manual_seed(0)
    images = torch.randn(5, 3)
    weight = torch.randn(3, 3, requires_grad=True)
    found = gradient_similarity(lambda x, sigma: x @ weight, [weight], images, [0.5, 2.0], repeats=2, seed=1)
    generator = torch.Generator().manual_seed(1)
    cosines = []
    for _ in range(2):
        noise = torch.randn(5, 3, generator=generator)
        x = [images + sigma * noise for sigma in (0.5, 2.0)]
        a, b = ((xs.T @ (xs @ weight.detach() - images)).flatten() for xs in x)
        cosines.append(float(a @ b / (a.norm() * b.norm())))
    assert found.matrix[0, 1].item() == pytest.approx(np.mean(cosines), rel=1e-5)
    assert found.standard_error[0, 1].item() == pytest.approx(
        np.std(cosines, ddof=1) / math.sqrt(2), rel=1e-3
    )


def test_gradient_similarity_tells_decoders_apart():
    """A denoiser with other parameters above sigma = 1: two blocks, which the split finds."""
    parameters = [torch.full((4,), 0.5, requires_grad=True) for _ in range(2)]

    def denoiser(x, sigma):
        return torch.where((sigma > 1)[:, None], parameters[1] * x, parameters[0] * x)

    sigmas = torch.logspace(-1, 1, 10, dtype=torch.float64)
    similarity = gradient_similarity(denoiser, parameters, torch.randn(8, 4), sigmas)
    assert bool((similarity.matrix[:5, 5:] == 0).all())
    assert split(similarity, 2).cuts == pytest.approx((1.0,))
    with pytest.raises(ValueError, match="comes from the optimal denoiser"):
        suggest_widths(similarity, split(similarity, 2), 128)
    with pytest.raises(ValueError, match="require a gradient"):
        gradient_similarity(denoiser, [torch.zeros(2)], torch.zeros(1, 4), sigmas)


# ---------------------------------------------------------------------------- the command


def test_msd_cluster_writes_stages_and_pictures(tmp_path, capsys):
    arguments = ["--schedule", "edm", "--measure", "smooth", "--samples", "10", "--image-size", "8"]
    assert main(["cluster", "--data", "digits", *arguments, "--out", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {
        "stages.json",
        "similarity.npz",
        "similarity.png",
        "curves.png",
    }
    stages = Stages.load(tmp_path / "stages.json")
    assert stages.variable == "sigma"
    assert len(stages) == 3
    output = capsys.readouterr().out
    assert all(stages.describe(k) in output for k in range(3))
    assert "difficulty" in output
    numbers = np.load(tmp_path / "similarity.npz")
    assert numbers["matrix"].shape == numbers["standard_error"].shape == (21, 21)


@pytest.mark.parametrize(
    ("arguments", "variable", "stages"),
    [
        (["--schedule", "ldm", "--method", "uniform-t", "--variable", "own"], "step", 3),
        (["--schedule", "vp", "--stages", "4", "--min-levels", "2"], "sigma", 4),
        (["--schedule", "ve", "--method", "uniform-log-snr", "--stages", "2"], "sigma", 2),
    ],
)
def test_msd_cluster_by_other_methods(arguments, variable, stages, tmp_path):
    quick = ["--samples", "4", "--image-size", "8"]
    assert main(["cluster", "--data", "digits", *quick, *arguments, "--out", str(tmp_path)]) == 0
    found = Stages.load(tmp_path / "stages.json")
    assert (found.variable, len(found)) == (variable, stages)


def test_msd_cluster_of_floats_in_the_unit_range(tmp_path):
    """sigma is meant for data in [-1, 1], whatever range the data are stored in."""
    eight_bits = load_images("digits", image_size=8).images[:300]
    np.save(tmp_path / "bytes.npy", eight_bits.numpy())
    np.save(tmp_path / "floats.npy", (eight_bits.float() / 255).numpy())
    cuts = []
    for name in ("bytes", "floats"):
        source, out = tmp_path / f"{name}.npy", tmp_path / name
        assert main(["cluster", "--data", str(source), "--measure", "smooth", "--out", str(out)]) == 0
        cuts.append([stage[0][1] for stage in json.loads((out / "stages.json").read_text())["stages"][:-1]])
    # float32 values of k / 255 are off by 6e-8.
    assert cuts[0] == pytest.approx(cuts[1], rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "ends", "--stages", "4"], "method ends gives three stages, not stages=4"),
        (["--method", "gradient"], "--method gradient and --run go together"),
        (["--method", "ends", "--level", "0.01"], "try a higher level"),
        (["--level", "1"], "level=1 must be below 1"),
        (["--method", "optimal", "--level", "0.3"], "level is for method ends, not optimal"),
        (["--min-levels", "2"], "min_levels is for methods optimal and gradient, not ends"),
        (["--method", "optimal", "--min-levels", "8"], "grid=21 is too small: these stages need 24 levels"),
        (["--budget", "inf"], "argument --budget: inf must be finite"),
        (["--seed", str(2**64)], "18446744073709551616 must be at most 18446744073709551615"),
    ],
)
def test_msd_cluster_says_what_is_wrong(arguments, message, tmp_path, capsys):
    quick = ["--samples", "4", "--image-size", "8", "--measure", "smooth"]
    code = main(["cluster", "--data", "digits", *quick, *arguments, "--out", str(tmp_path)])
    assert code == 2
    assert message in capsys.readouterr().err


def test_msd_cluster_checks_its_outputs_before_the_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("multistage_diffusion.clustering.similarity_matrix", None)
    (tmp_path / "file").touch()
    (tmp_path / "folder" / "curves.png").mkdir(parents=True)
    for name, message in (("file", "is no folder"), ("folder", "curves.png: is a folder")):
        assert main(["cluster", "--data", "digits", "--out", str(tmp_path / name)]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.full
def test_msd_cluster_finds_the_same_cuts_on_one_and_two_processes(tmp_path):
    command = ["cluster", "--data", "digits", "--image-size", "8", "--threads", "1"]
    command += ["--measure", "smooth", "--out"]
    assert main([*command, str(tmp_path / "one")]) == 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = [*launcher, "-m", "multistage_diffusion", *command, str(tmp_path / "two")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    one, two = (np.load(tmp_path / out / "similarity.npz") for out in ("one", "two"))
    # The sums of the two halves are rounded otherwise, by 1e-16 of 1.
    assert one["restored"] == pytest.approx(two["restored"], abs=1e-12)
    assert (tmp_path / "one" / "stages.json").read_text() == (tmp_path / "two" / "stages.json").read_text()

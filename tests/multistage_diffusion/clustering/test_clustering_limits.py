"""What the clustering refuses, and how much memory it takes at a time."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch

from multistage_diffusion import clustering
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
from multistage_diffusion.clustering.pictures import plot_curves
from multistage_diffusion.noise.schedules import LDM, VP

SIGMAS = torch.tensor([0.02, 0.5, 2.0, 60.0], dtype=torch.float64)
DATA = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.5, 0.0]])


def known(levels: int, restored: float = 0.5) -> Similarity:
    sigmas = torch.logspace(-2, 2, levels, dtype=torch.float64)
    matrix = torch.exp(-(sigmas.log()[:, None] - sigmas.log()).square())
    return Similarity(sigmas, matrix, torch.zeros_like(matrix), torch.full_like(sigmas, restored))


# ---------------------------------------------------------------------------- similarity


@pytest.mark.parametrize("capacity", [1, 8 * 4 * 27 * 3, 1 << 30], ids=["one", "three", "all"])
def test_similarity_matrix_is_the_same_however_many_bytes_a_pass_takes(capacity, monkeypatch):
    data = torch.randint(256, (30, 3, 3, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    whole = similarity_matrix(data, SIGMAS, num_samples=7, measure="smooth")
    monkeypatch.setattr(clustering.similarity, "_QUERY_BYTES", capacity)
    calls = []
    parts = similarity_matrix(
        data, SIGMAS, num_samples=7, measure="smooth", progress=lambda *call: calls.append(call)
    )
    for name in ("matrix", "standard_error", "restored"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), rtol=0, atol=1e-12)
    passes = {1: 7, 8 * 4 * 27 * 3: 3, 1 << 30: 1}[capacity]
    assert calls[-1] == (passes, passes), "one chunk of the data in each pass"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 0}, "threshold=0 must be positive and finite"),
        ({"threshold": -1}, "threshold=-1"),
        ({"threshold": math.nan}, "threshold=nan"),
        ({"data_range": (1, -1)}, r"data_range must be .* low < high, got \(1, -1\)"),
        ({"data_range": (0, 1, 2)}, r"data_range must be two .* got \(0, 1, 2\)"),
        ({"data_range": (0, math.inf)}, "data_range must be two finite numbers"),
        ({"data_range": 1}, "data_range must be two finite numbers .* got 1"),
        ({"sigmas": [1.0, math.inf]}, "positive, finite and ascending, got inf"),
        ({"sigmas": [[1.0, 2.0]]}, r"at least two, .* got shape \[1, 2\]"),
    ],
)
def test_similarity_matrix_rejects_options(options, message):
    with pytest.raises(ValueError, match=f"^similarity_matrix: .*{message}"):
        similarity_matrix(DATA, **{"sigmas": SIGMAS, **options})


def test_similarity_matrix_takes_a_whole_number_of_samples():
    with pytest.raises(TypeError, match=r"num_samples must be an integer, got 2\.5"):
        similarity_matrix(DATA, SIGMAS, num_samples=2.5)


def test_similarity_matrix_names_the_first_levels_that_do_not_ascend():
    sigmas = [*torch.linspace(0.1, 1, 500).tolist(), 0.5, 0.5]
    with pytest.raises(ValueError, match=r"ascending, got 1\.0 and then 0\.5 at 499 and 500$"):
        similarity_matrix(DATA, sigmas)


@pytest.mark.parametrize("measure", ["pixels", "smooth"])
def test_similarity_matrix_needs_a_sample_that_is_not_the_mean_of_the_data(measure):
    data = torch.cat([torch.tensor([[0.1, 0.3], [0.5, 0.9]]), torch.tensor([[0.3, 0.6]]).expand(20, 2)])
    data = data.to(torch.bfloat16).double()
    data[0] = 2 * data[2] - data[1]
    with pytest.raises(ValueError, match="the 2 images drawn with seed=0 are all the mean of the data"):
        similarity_matrix(data, SIGMAS, num_samples=2, measure=measure)
    assert bool(similarity_matrix(data, SIGMAS, num_samples=22, measure=measure).matrix.isfinite().all())


def test_a_single_sample_or_repeat_tells_no_standard_error():
    weight = torch.ones(2, 2, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one_sample = similarity_matrix(DATA, SIGMAS, num_samples=1)
        one_repeat = gradient_similarity(lambda x, sigma: x @ weight, [weight], DATA, SIGMAS, repeats=1)
    for found in (one_sample, one_repeat):
        assert bool(found.standard_error.isnan().all())
        assert bool(found.matrix.isfinite().all())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"images": DATA.byte()}, TypeError, r"images must be floating point, got torch\.uint8"),
        ({"sigmas": [2.0, 1.0]}, ValueError, "ascending, got 2.0 and then 1.0 at 0 and 1"),
        ({"sigmas": [-1.0, 1.0]}, ValueError, "positive, finite and ascending, got -1.0"),
        ({"repeats": 0}, ValueError, "repeats=0 must be at least 1"),
        ({"repeats": 1.5}, TypeError, r"repeats must be an integer, got 1\.5"),
    ],
)
def test_gradient_similarity_rejects(options, error, message):
    weight = torch.ones(2, 2, requires_grad=True)
    arguments = {"images": DATA, "sigmas": SIGMAS, **options}
    with pytest.raises(error, match=f"^gradient_similarity: .*{message}"):
        gradient_similarity(lambda x, sigma: x @ weight, [weight], **arguments)


# ---------------------------------------------------------------------------- splits


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda s: split(s, 2.5), TypeError, r"split: num_stages must be an integer, got 2\.5"),
        (lambda s: split(s, 2, min_levels=0), ValueError, "split: min_levels=0 must be at least 1"),
        (lambda s: sweep(s, min_levels=0), ValueError, "sweep: min_levels=0 must be at least 1"),
        (lambda s: sweep(s, 0), ValueError, "sweep: max_stages=0 must be at least 1"),
        (lambda s: split_uniformly(s, VP(), 0), ValueError, "split_uniformly: num_stages=0 must be"),
        (
            lambda s: split_uniformly(s.matrix, VP(), 2),
            TypeError,
            "split_uniformly: needs a Similarity.* Tensor",
        ),
        (
            lambda s: split_from_ends(s.matrix.numpy()),
            TypeError,
            "split_from_ends: needs a Similarity.* ndarray",
        ),
    ],
)
def test_splits_reject(call, error, message):
    with pytest.raises(error, match=f"^{message}"):
        call(known(9))


def test_stages_in_steps_need_steps():
    """Between steps 0 and 1 of latent diffusion there are two cuts, below step 0 there is nothing."""
    sigmas = LDM().sigmas[:2].tolist()
    for cuts, stage, interval in (
        ((sigmas[0] * 1.001, 1.0), 0, r"\(0, 0\]"),
        ((1.0, 1.0001), 1, r"\(254, 254\]"),
    ):
        found = clustering.Split((0, 1, 2), 3, 3.0, cuts)
        assert len(found.stages()) == 3
        message = rf"split: stage {stage} of 3 would be {interval} in step of ldm, .* take fewer stages"
        with pytest.raises(ValueError, match=message):
            found.stages(LDM())


def test_msd_cluster_writes_nothing_where_a_stage_has_no_step(tmp_path, capsys):
    arguments = ["--schedule", "ldm", "--method", "uniform-log-snr", "--stages", "30", "--grid", "900"]
    quick = ["--samples", "1", "--image-size", "8"]
    out = tmp_path / "stages"
    assert main(["cluster", "--data", "digits", *quick, *arguments, "--out", str(out)]) == 2
    assert (
        "stage 0 of 30 would be (0, 0] in step of ldm, which is empty; take fewer" in capsys.readouterr().err
    )
    assert not out.exists()


@pytest.mark.parametrize(("schedule", "code"), [("vp", 0), ("ldm", 2)])
def test_msd_cluster_on_a_grid_of_more_than_a_thousand_levels(schedule, code, tmp_path, capsys):
    data = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 1), dtype=np.uint8)
    np.save(tmp_path / "data.npy", data)
    quick = ["--samples", "1", "--grid", "1001", "--method", "uniform-t", "--stages", "2"]
    options = ["--data", str(tmp_path / "data.npy"), "--schedule", schedule, "--out", str(tmp_path / "out")]
    assert main(["cluster", *options, *quick]) == code
    if code:
        assert "grid: points=1001 must be at most the 1000 steps of ldm" in capsys.readouterr().err


def test_plot_curves_needs_cuts(tmp_path):
    similarity = known(5)
    with pytest.raises(ValueError, match="plot_curves: the split's cuts are not known"):
        plot_curves(similarity, split(similarity.matrix, 2), tmp_path / "new" / "curves.png")
    assert not (tmp_path / "new").exists()


# ---------------------------------------------------------------------------- widths


@pytest.mark.parametrize(
    ("restored", "options", "error", "message"),
    [
        (0.0, {}, ValueError, r"no stage restores any variance, of difficulties \[0\.0, 0\.0\]"),
        (0.5, {"shares": (math.nan, 1.0)}, ValueError, r"shares must be 2 numbers .* got \[nan, 1\.0\]"),
        (0.5, {"shares": (0.5, math.inf)}, ValueError, "shares must be 2 numbers"),
        (0.5, {"budget": 1e308}, ValueError, r"budget=1e\+308 must be positive and below 2147483648"),
        (0.5, {"budget": math.nan}, ValueError, "budget=nan"),
        (0.5, {"multiple": 1.5}, TypeError, r"multiple must be an integer, got 1\.5"),
        (0.5, {"multiple": 0}, ValueError, "multiple=0 must be at least 1"),
    ],
)
def test_suggest_widths_rejects_what_has_no_widths(restored, options, error, message):
    similarity = known(6, restored)
    with pytest.raises(error, match=f"^suggest_widths: {message}"):
        suggest_widths(similarity, split(similarity, 2), **{"budget": 128, **options})


def test_suggest_widths_gives_integers():
    similarity = known(6)
    widths, _ = suggest_widths(similarity, split(similarity, 2), 128, multiple=np.int64(8))
    assert [type(width) for width in widths] == [int, int]

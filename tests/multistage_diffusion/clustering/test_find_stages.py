"""From images to stages in one call, and how sure the cuts are."""

from __future__ import annotations

import json
import math

import pytest
import torch

import multistage_diffusion
from multistage_diffusion.cli import main
from multistage_diffusion.clustering import Rule, find_stages, similarity_matrix, split, split_from_ends
from multistage_diffusion.clustering.find import METHODS, confidence
from multistage_diffusion.clustering.similarity import Similarity, standard_error
from multistage_diffusion.commands import cluster
from multistage_diffusion.data.images import ImageData, load_images
from multistage_diffusion.networks import build
from multistage_diffusion.noise.preconditioning import EDMPreconditioner
from multistage_diffusion.noise.schedules import LDM, SCHEDULES
from multistage_diffusion.noise.stages import Stages
from stand_ins import SMALL_UNET, one_thread  # noqa: F401

QUICK = {"samples": 12, "measure": "smooth"}


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load_images("digits", image_size=8)


def test_it_is_the_papers_three_stages(digits):
    found = multistage_diffusion.find_stages(digits, "edm", 3, **QUICK)
    sigmas = SCHEDULES["edm"]().grid(21)
    similarity = similarity_matrix(digits.images, sigmas, num_samples=12, measure="smooth")
    assert torch.equal(found.similarity.matrix, similarity.matrix)
    assert found.stages == split_from_ends(similarity).stages()
    assert found.split.stages(found.schedule) == found.stages
    assert found.rule == Rule(3, "ends", 0.9)


def test_a_tensor_serves_as_well(digits):
    assert find_stages(digits.images, **QUICK).stages == find_stages(digits, **QUICK).stages


def test_other_numbers_of_stages_are_the_best_split(digits):
    found = find_stages(digits, "vp", 4, min_levels=2, **QUICK)
    assert found.split == split(found.similarity, 4, min_levels=2)
    assert found.split.stages(found.schedule).variable == "t"


def test_a_schedule_of_ones_own(digits):
    schedule = LDM(num_steps=200)
    found = find_stages(digits, schedule, method="optimal", **QUICK)
    assert found.schedule is schedule
    assert found.split.stages(schedule).domain == (0, 200)


def test_by_the_gradients_of_a_model(digits):
    torch.manual_seed(0)
    network = build({**SMALL_UNET, "decoder_widths": (8,), "attn_resolutions": ()})
    denoiser = EDMPreconditioner(network, Stages.single())
    found = find_stages(digits, stages=2, method="gradient", denoiser=denoiser, grid=5, samples=3)
    assert (len(found.stages), found.similarity.scores.shape) == (2, (4, 5, 5))


def test_the_cuts_lie_within_their_confidence(digits):
    found = find_stages(digits, **{**QUICK, "samples": 40})
    assert len(found.confidence) == 2
    for cut, (low, high) in zip(found.split.cuts, found.confidence, strict=True):
        assert low <= cut <= high < math.inf
    few = find_stages(digits, **{**QUICK, "samples": 4})
    widths = [[math.log(high / low) for low, high in each.confidence] for each in (found, few)]
    assert sum(widths[0]) < sum(widths[1])


def scored(*scores: torch.Tensor) -> Similarity:
    stacked = torch.stack(scores)
    sigmas = torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=torch.float64)
    return Similarity(sigmas, stacked.mean(0), standard_error(stacked), scores=stacked)


def blocks(first: int) -> torch.Tensor:
    """Similarity 1 within the first levels and within the others, 0 between them."""
    level = torch.arange(4) < first
    return (level[:, None] == level).double()


def test_the_confidence_is_that_of_the_samples():
    rule, schedule = Rule(2, "optimal", grid=4), SCHEDULES["edm"]()
    agreed = scored(*[blocks(2)] * 5)
    found = rule(agreed, schedule)
    assert confidence(agreed, rule, schedule, found) == ((found.cuts[0],) * 2,)
    divided = scored(*[blocks(1)] * 5, *[blocks(3)] * 5)
    ((low, high),) = confidence(divided, rule, schedule, rule(divided, schedule))
    assert (low, high) == (2**0.5, 32**0.5)  # between the levels 1 and 2, and between 4 and 8
    for unknown in (scored(blocks(2)), Similarity(agreed.sigmas, agreed.matrix, agreed.standard_error)):
        assert all(map(math.isnan, confidence(unknown, rule, schedule, found)[0]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "cosine"}, "schedule must be one of vp, ve, edm, ldm, flow, got 'cosine'"),
        ({"method": "best"}, "method must be one of optimal, ends, .*, got 'best'"),
        ({"stages": 0}, "stages=0 must be at least 1"),
        ({"stages": 2, "method": "ends"}, "method ends gives three stages, not stages=2"),
        ({"method": "gradient"}, "method gradient and denoiser go together"),
        ({"level": 1.0}, "level=1 must be below 1"),
        ({"stages": 8, "grid": 6}, "grid=6 is too small: these stages need 8 levels"),
    ],
)
def test_what_does_not_go_together_is_refused_before_the_work(options, message):
    with pytest.raises(ValueError, match=f"^find_stages: {message}"):
        find_stages(None, **options)


def test_the_command_knows_the_methods_and_prints_how_sure_the_cuts_are(tmp_path, capsys):
    assert cluster.METHODS == METHODS
    command = ["cluster", "--data", "digits", "--image-size", "8", "--measure", "smooth", "--samples", "12"]
    assert main([*command, "--schedule", "edm", "--out", str(tmp_path)]) == 0
    found = find_stages(load_images("digits", image_size=8), **QUICK)
    assert Stages.from_json(json.loads((tmp_path / "stages.json").read_text())) == found.stages
    low, high = found.confidence[0]
    assert f"{low:.4g} to {high:.4g}" in capsys.readouterr().out

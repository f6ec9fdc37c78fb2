"""Networks that are told a schedule's time or step: what the denoiser around them computes, and how it is trained."""

from __future__ import annotations

import math

import pytest
import torch

from multistage_diffusion.noise.losses import denoising_loss, edm_loss
from multistage_diffusion.noise.noise_levels import MixedNoise, StratifiedNoise
from multistage_diffusion.noise.preconditioning import (
    EDMPreconditioner,
    SchedulePreconditioner,
    stages_in_sigma,
)
from multistage_diffusion.noise.schedules import EDM, LDM, SCHEDULES, VE, VP, Uniform
from multistage_diffusion.noise.stages import Stages, StagesError
from stand_ins import RecordingNetwork

SIGMA = torch.tensor([0.05, 1.0, 30.0], dtype=torch.float64)
STAGES = {
    "vp": Stages.from_boundaries((0, 0.4420, 0.6308, 1), "t"),
    "ve": Stages.from_boundaries((0, 0.5, 0.75, 1), "t"),
    "ldm": Stages.from_boundaries((0, 441, 630, 1000), "step"),
}


def perfect(schedule, prediction: str, y: torch.Tensor, sigma: torch.Tensor):
    """A network that predicts exactly what it should for the images y."""
    sigma = sigma[:, None, None, None]
    variance_exploding = schedule.name == "ve"
    s = torch.ones_like(sigma) if variance_exploding else 1 / (1 + sigma**2).sqrt()

    def F(x, noise, stage):
        n = (x.double() / s - y) / sigma
        return {"epsilon": -n if variance_exploding else n, "x0": y, "v": s * (n - sigma * y)}[prediction]

    return RecordingNetwork(F=F)


@pytest.mark.parametrize(
    ("schedule", "prediction"),
    [
        *((VP(), prediction) for prediction in ("epsilon", "x0", "v")),
        *((LDM(), prediction) for prediction in ("epsilon", "x0", "v")),
        (VE(), "epsilon"),
        (VE(), "x0"),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_perfect_prediction_gives_the_clean_image(schedule, prediction):
    y = torch.randn(3, 3, 4, 4, dtype=torch.float64)
    x = y + SIGMA[:, None, None, None] * torch.randn_like(y)
    network = perfect(schedule, prediction, y, SIGMA)
    network.double()
    denoiser = SchedulePreconditioner(network, STAGES[schedule.name], schedule, prediction)
    denoiser._network_dtype = lambda: torch.float64
    torch.testing.assert_close(denoiser(x, SIGMA), y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("schedule", [VP(), LDM()], ids=["VP", "LDM"])
def test_the_network_sees_images_of_unit_variance(schedule):
    network = RecordingNetwork()
    denoiser = SchedulePreconditioner(network, STAGES[schedule.name], schedule)
    x = (
        torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        * (1 + SIGMA**2).sqrt()[:, None, None, None]
    )
    denoiser(x.float(), SIGMA)
    # Of 3072 samples the variance has a standard deviation of 2.6 %.
    assert network.calls[0][0].var(dim=(1, 2, 3)).tolist() == pytest.approx([1, 1, 1], abs=0.11)


def test_c_noise_is_what_each_network_is_told():
    def told(schedule, sigma):
        return (
            SchedulePreconditioner(RecordingNetwork(), STAGES[schedule.name], schedule)
            .coefficients(sigma)
            .c_noise
        )

    t = torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64)
    torch.testing.assert_close(told(VP(), VP().sigma(t)), 999 * t, rtol=1e-12, atol=0)
    steps = torch.tensor([0.0, 441, 442, 999], dtype=torch.float64)
    assert torch.equal(told(LDM(), LDM().sigma(steps)), steps)
    torch.testing.assert_close(told(VE(), SIGMA), (SIGMA / 2).log(), rtol=0, atol=0)


def test_every_step_of_latent_diffusion_goes_to_its_stage():
    """The recorded networks run steps 441, 442, 630 and 631 in stages 0, 1, 1 and 2."""
    stages = stages_in_sigma(STAGES["ldm"], LDM())
    steps = torch.arange(1000, dtype=torch.float64)
    assert torch.equal(stages.assign(LDM().sigma(steps)), (steps > 441).long() + (steps > 630).long())


def test_stages_in_sigma_cover_everything_and_need_the_schedules_variable():
    stages = stages_in_sigma(STAGES["vp"], VP())
    assert stages.intervals[0][0][0] == 0
    assert stages.intervals[-1][-1][1] == math.inf
    assert stages.intervals[0][0][1] == pytest.approx(2.5103, abs=1e-4)  # the paper's boundary of EDM
    with pytest.raises(StagesError, match=r"needs stages of 'step', got stages of 't'"):
        stages_in_sigma(STAGES["vp"], LDM())


def test_the_default_weight_makes_the_loss_that_of_the_prediction():
    y, noise = torch.randn(3, 3, 4, 4), torch.randn(3, 3, 4, 4)
    denoiser = SchedulePreconditioner(
        RecordingNetwork(F=lambda x, *_: torch.zeros_like(x)), STAGES["vp"], VP()
    )
    loss = denoising_loss(denoiser, y, SIGMA, noise=noise)
    # Nothing was predicted, so what is left is the noise; float32 rounding of y + 30 n.
    torch.testing.assert_close(loss, noise.square().sum(dim=(1, 2, 3)), rtol=1e-4, atol=0)


def test_edm_loss_is_the_same_loss_with_its_own_preconditioning():
    y, noise = torch.randn(3, 3, 4, 4), torch.randn(3, 3, 4, 4)
    denoiser = EDMPreconditioner(RecordingNetwork(), Stages.edm())
    torch.testing.assert_close(
        denoising_loss(denoiser, y, SIGMA, noise=noise),
        edm_loss(denoiser, y, SIGMA, noise=noise),
        rtol=1e-6,
        atol=0,
    )


@pytest.mark.parametrize("schedule", [VP(), VE(), LDM()], ids=["VP", "VE", "LDM"])
def test_uniform_noise_levels_have_the_mass_and_the_range_of_each_stage(schedule):
    stages = stages_in_sigma(STAGES[schedule.name], schedule)
    distribution = Uniform(schedule)
    masses = stages.probabilities(distribution)
    assert math.fsum(masses) == pytest.approx(1, abs=1e-12)
    drawn = MixedNoise(stages, distribution).draw(20_000, torch.Generator().manual_seed(0))
    rates = [n / 20_000 for n in drawn.counts]
    assert rates == pytest.approx(masses, abs=4 * 0.5 / 20_000**0.5)
    stratified = StratifiedNoise(stages, [1 / 3] * 3, distribution).draw(
        300, torch.Generator().manual_seed(1)
    )
    assert stratified.counts == (100, 100, 100)
    assert torch.equal(stages.assign(stratified.sigma), stratified.stage)


def test_uniform_steps_are_whole_steps_and_all_of_them():
    sigma = Uniform(LDM()).sample(20_000, torch.Generator().manual_seed(0))
    steps = LDM().value(sigma)
    assert torch.equal(steps, steps.round())
    assert len(set(steps.tolist())) == 1000


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: SchedulePreconditioner(RecordingNetwork(), STAGES["vp"], EDM()),
            r"schedule must be VP, VE, LDM or FlowMatching",
        ),
        (
            lambda: SchedulePreconditioner(RecordingNetwork(), STAGES["vp"], VP(), "y"),
            r"prediction must be one of",
        ),
        (
            lambda: SchedulePreconditioner(RecordingNetwork(), STAGES["ve"], VE(), "v"),
            r"of ve: prediction must be one of epsilon, x0, got 'v'",
        ),
        (lambda: Uniform(EDM()), r"needs a schedule in t or step, got one in sigma"),
        (lambda: Uniform(VP(), t_min=1), r"t_min=1 must be at least 0 and below 1"),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_schedules_by_name():
    assert SCHEDULES.keys() == {"vp", "ve", "edm", "ldm", "flow"}

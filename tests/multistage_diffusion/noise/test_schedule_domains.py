"""A schedule and the stages that are cut in its variable agree on what there is to cut."""

from __future__ import annotations

import json
import math

import pytest
import torch

from multistage_diffusion.clustering.splits import Split
from multistage_diffusion.noise import schedules
from multistage_diffusion.noise.noise_levels import StratifiedNoise, SystematicNoise
from multistage_diffusion.noise.preconditioning import SchedulePreconditioner, stages_in_sigma
from multistage_diffusion.noise.schedules import EDM, LDM, SCHEDULES, VE, VP, FlowMatching, Uniform
from multistage_diffusion.noise.stages import Stages, StagesError
from multistage_diffusion.presets import LDM_STAGES, PRESETS
from stand_ins import RecordingNetwork

KINDS = [
    EDM(),
    EDM(0.1, 3.0),
    VP(),
    VP(beta_d=0.0),
    VP(beta_d=1400.0),
    VP(beta_d=1e-3, beta_min=1e-6),
    VE(),
    VE(1e-4, 1e4),
    FlowMatching(),
    FlowMatching(shift=3.0),
    LDM(),
    LDM(num_steps=2),
    LDM(num_steps=500),
    LDM(num_steps=4000),
    LDM(0.0001, 0.02),
    LDM(0.01, 0.01, 100),
]
each_schedule = pytest.mark.parametrize("schedule", KINDS, ids=str)
each_discrete = pytest.mark.parametrize("schedule", [s for s in KINDS if s.variable == "step"], ids=str)


def thirds(schedule: schedules.Schedule) -> Stages:
    """Stages cut at the edges of the thirds of all values that there are; of two steps there are two stages."""
    values = schedule.grid(min(22, int(schedule.domain[1])) if schedule.variable == "step" else 22)
    cuts = {float(values[len(values) * part // 3]) for part in (1, 2)} - {
        float(values[-1]),
        schedule.domain[0],
    }
    low, high = schedule.domain
    return Stages.from_boundaries([low, *sorted(cuts or {0.5}), high], schedule.variable, schedule.domain)


@each_schedule
def test_stages_become_stages_in_sigma_of_the_same_values(schedule):
    stages = thirds(schedule)
    in_sigma = stages_in_sigma(stages, schedule)
    assert in_sigma.variable == "sigma"
    assert in_sigma.domain == (0.0, math.inf)
    assert len(in_sigma) == len(stages) >= 2
    for ((low, high),) in in_sigma.intervals:
        assert low < high
    last = schedule.domain[1] - 1 if schedule.variable == "step" else schedule.domain[1]
    inside = schedule.grid(2) if math.isinf(last) else torch.linspace(schedule.domain[0], last, 2)
    values = torch.cat([schedule.grid(2), inside.double()])
    if schedule.variable == "step":
        values = torch.arange(last + 1, dtype=torch.float64)
    assert torch.equal(in_sigma.assign(schedule.sigma(values)), stages.assign(values))


@each_schedule
def test_values_and_noise_levels_are_each_others_inverse(schedule):
    values = schedule.grid(2 if schedule.variable == "step" else 40)
    if schedule.variable == "step":
        values = torch.linspace(0, schedule.domain[1] - 1, 57, dtype=torch.float64)
    sigma = schedule.sigma(values)
    assert bool((sigma.diff() > 0).all())
    assert bool((sigma.isfinite() & (sigma > 0)).all())
    torch.testing.assert_close(schedule.value(sigma), values, rtol=1e-9, atol=1e-9)


@each_schedule
def test_stages_keep_their_domain_in_files(schedule, tmp_path):
    stages = thirds(schedule)
    stages.save(tmp_path / "stages.json")
    assert Stages.load(tmp_path / "stages.json") == stages
    assert Stages.from_json(json.loads(json.dumps(stages.to_json()))).domain == schedule.domain
    assert ("domain" in stages.to_json()) == (schedule.domain != SCHEDULES[schedule.name]().domain)


@each_schedule
def test_a_single_stage_of_a_schedule_is_all_of_sigma(schedule):
    single = Stages.single(schedule.variable, schedule.domain)
    assert single.domain == schedule.domain
    assert stages_in_sigma(single, schedule) == Stages.single()


@pytest.mark.parametrize("num_steps", [2, 500, 999, 1001, 2000])
def test_cuts_of_another_number_of_steps_are_refused(num_steps):
    """500 gave an empty interval (inf, inf]; 700 would give other noise levels than those that were published."""
    published = Stages.from_boundaries(LDM_STAGES, "step")
    with pytest.raises(StagesError, match=rf"cut step from 0 to 1000, but this LDM has 0 to {num_steps}"):
        stages_in_sigma(published, LDM(num_steps=num_steps))
    with pytest.raises(
        StagesError, match=f"must cover 0 to {num_steps}, but stage 0 begins at 0 and stage 2 ends at 1000"
    ):
        Stages.from_boundaries(LDM_STAGES, "step", LDM(num_steps=num_steps).domain)
    own = Stages.from_boundaries([0, 1, num_steps], "step", (0, num_steps))
    with pytest.raises(StagesError, match=f"cut step from 0 to {num_steps}, but this LDM"):
        SchedulePreconditioner(RecordingNetwork(2), own, LDM())


@pytest.mark.parametrize(
    ("boundaries", "stage"),
    [
        ((0, 441, 999, 1000), r"stage 2, \(999, 1000\]"),
        ((0, 441, 999.5, 1000), r"stage 2, \(999.5, 1000\]"),
        ((0, 441.2, 441.8, 1000), r"stage 1, \(441.2, 441.8\]"),
    ],
    ids=str,
)
def test_a_stage_without_a_step_is_refused(boundaries, stage):
    with pytest.raises(StagesError, match=rf"stages_in_sigma: {stage}, has no step of this LDM"):
        stages_in_sigma(Stages.from_boundaries(boundaries, "step"), LDM())


@each_discrete
def test_the_first_and_the_last_step_can_have_a_stage_of_their_own(schedule):
    last = schedule.num_steps - 1
    edges = sorted({0.0, 0.5, last - 0.5, float(schedule.num_steps)})
    stages = Stages.from_boundaries(edges, "step", schedule.domain)
    noise = SystematicNoise(stages_in_sigma(stages, schedule), Uniform(schedule))
    masses = noise.stages.probabilities(noise.distribution)
    assert masses[0] == pytest.approx(1 / schedule.num_steps)
    assert masses[-1] == pytest.approx(1 / schedule.num_steps)
    assert sum(masses) == pytest.approx(1)


@each_schedule
def test_every_stage_can_be_drawn(schedule):
    distribution = None if schedule.variable == "sigma" else Uniform(schedule)
    noise = StratifiedNoise(stages_in_sigma(thirds(schedule), schedule), distribution=distribution)
    levels = noise.draw(30, torch.Generator().manual_seed(0))
    assert min(levels.counts) > 0
    assert torch.equal(noise.stages.assign(levels.sigma), levels.stage)


@pytest.mark.parametrize("schedule", [s for s in KINDS if s.variable == "step" and s.num_steps > 2], ids=str)
def test_splits_of_a_schedule_cover_its_steps(schedule):
    middle = schedule.num_steps // 2
    cut = float(schedule.sigmas[[middle - 1, middle]].log().mean().exp())
    halves = Split((0, 1), 2, 1.0, (cut,)).stages(schedule)
    assert halves.intervals == (((0.0, middle - 1.0),), ((middle - 1.0, float(schedule.num_steps)),))
    assert len(stages_in_sigma(halves, schedule)) == 2
    beyond = 2 * float(schedule.sigmas[-1])
    with pytest.raises(ValueError, match=rf"split: stage 1 of 2 would be \({schedule.num_steps - 1}, "):
        Split((0, 1), 2, 1.0, (beyond,)).stages(schedule)


@pytest.mark.parametrize("make", [lambda: VP(beta_d=1500.0), lambda: LDM(0.5, 0.99).sigmas])
def test_noise_levels_beyond_float64_are_refused(make):
    with pytest.raises(ValueError, match="has noise levels that float64 cannot hold"):
        make()


@pytest.mark.parametrize("domain", [(0,), 5, "ab", (0, "x")], ids=str)
def test_a_domain_that_is_none_is_refused(domain):
    with pytest.raises(StagesError, match=r"stages: (domain must be a pair|'.' is not a number)"):
        Stages.from_boundaries([0, 1], "step", domain)


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS.keys())
def test_published_stages_cover_their_schedule(preset):
    schedule = SCHEDULES[preset.schedule]()
    assert preset.stages().domain == schedule.domain
    assert len(stages_in_sigma(preset.stages(), schedule)) == 3

import itertools
import math

import pytest
import torch

from multistage_diffusion import cli
from multistage_diffusion.commands import train
from multistage_diffusion.noise.noise_levels import MixedNoise, StratifiedNoise, SystematicNoise
from multistage_diffusion.noise.preconditioning import stages_in_sigma
from multistage_diffusion.noise.schedules import LDM, VE, VP, LogNormal, Uniform
from multistage_diffusion.noise.stages import Stages
from multistage_diffusion.training.config import TrainingConfig
from multistage_diffusion.training.trainer import Trainer
from stand_ins import assert_same_run, build, one_thread, tiny_images  # noqa: F401

EDM = Stages.edm()
UNION = Stages([[(0, 0.2), (2, math.inf)], [(0.2, 0.5), (1, 2)], [(0.5, 1)]])


STEPS = [[(0, 100), (500, 1000)], [(100, 200)], [(200, 500)]]
SYSTEMATIC = {
    "edm": SystematicNoise(EDM),
    "union": SystematicNoise(UNION),
    "narrow": SystematicNoise(EDM, LogNormal(-1.2, 0.1)),  # the upper stages hardly have a probability
    "vp": SystematicNoise(UNION, Uniform(VP())),
    "ve": SystematicNoise(UNION, Uniform(VE())),
    "ldm": SystematicNoise(stages_in_sigma(Stages(STEPS, "step"), LDM()), Uniform(LDM())),
}
LARGEST_UNIFORM = 1 - 2.0**-53


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def offset_of(seed):
    """The u of a systematic draw with ``generator(seed)``."""
    return torch.rand(1, dtype=torch.float64, generator=generator(seed))


@pytest.fixture
def draw_at(monkeypatch):
    """Draws with a given u."""

    def draw(noise, batch_size, u):
        with monkeypatch.context() as patch:
            patch.setattr(torch, "rand", lambda *size, dtype, generator: torch.full(size, u, dtype=dtype))
            return noise.draw(batch_size, None)

    return draw


def test_mixed_noise_has_the_right_distribution():
    levels = MixedNoise(EDM, LogNormal(-1.2, 1.2)).draw(200_000, generator())
    z = (levels.sigma.log() + 1.2) / 1.2
    # Five standard errors of mean (1/sqrt n) and standard deviation (1/sqrt 2n) of a unit normal.
    assert float(z.mean()) == pytest.approx(0, abs=5 / math.sqrt(2e5))
    assert float(z.std()) == pytest.approx(1, abs=5 / math.sqrt(4e5))
    assert levels.sigma.dtype == torch.float64
    torch.testing.assert_close(levels.stage, EDM.assign(levels.sigma))
    assert levels.counts == tuple(torch.bincount(levels.stage, minlength=3).tolist())
    assert bool((levels.weight == 1).all())


def test_noise_levels_are_a_function_of_the_seed():
    for noise in (MixedNoise(EDM), StratifiedNoise(EDM), SystematicNoise(EDM)):
        first, again, other = (noise.draw(16, generator(s)) for s in (3, 3, 4))
        assert torch.equal(first.sigma, again.sigma)
        assert not torch.equal(first.sigma, other.sigma)


@pytest.mark.parametrize("stages", [EDM, UNION])
def test_stratified_noise_follows_the_truncated_distribution_in_every_stage(stages):
    distribution = LogNormal()
    levels = StratifiedNoise(stages, distribution=distribution).draw(60_000, generator())
    torch.testing.assert_close(levels.stage, stages.assign(levels.sigma))
    for k, intervals in enumerate(stages.intervals):
        sigma = levels.sigma[levels.stage == k].sort().values
        whole = sum(distribution.mass(low, high) for low, high in intervals)

        def cdf(s, intervals=intervals, whole=whole):
            return sum(distribution.mass(low, min(s, high)) for low, high in intervals if s > low) / whole

        ranks = torch.arange(len(sigma)) / len(sigma)
        distance = max(
            abs(cdf(s) - r) for s, r in zip(sigma[::50].tolist(), ranks[::50].tolist(), strict=True)
        )
        # Kolmogorov-Smirnov: P(distance > 2.2 / sqrt n) < 2 exp(−2 · 2.2²) = 1e-4.
        assert distance < 2.2 / math.sqrt(len(sigma))


def test_stratified_noise_counts_are_systematic():
    levels = StratifiedNoise(EDM).draw(96, generator())
    assert levels.counts == (32, 32, 32)
    q = (0.5, 0.3, 0.2)
    noise = StratifiedNoise(EDM, q)
    counts = torch.tensor([noise.draw(7, generator(s)).counts for s in range(4000)], dtype=torch.float64)
    for k in range(3):
        assert set(counts[:, k].tolist()) <= {math.floor(7 * q[k]), math.ceil(7 * q[k])}
    # No bias: a rounding up or down has a standard deviation below 0.5; five standard errors.
    expected = 7 * torch.tensor(q, dtype=torch.float64)
    torch.testing.assert_close(counts.mean(0), expected, rtol=0, atol=2.5 / math.sqrt(4000))


def test_stratified_noise_can_leave_a_stage_out():
    counts = StratifiedNoise(EDM, (0.5, 0.5, 0)).draw(1000, generator()).counts
    assert counts == (500, 500, 0)


def test_importance_weights_keep_the_expected_loss():
    def loss(sigma):
        return torch.log1p(sigma)

    mixed = MixedNoise(EDM).draw(400_000, generator(1))
    weighted = StratifiedNoise(EDM, importance_weights=True).draw(400_000, generator(2))
    plain = StratifiedNoise(EDM).draw(400_000, generator(2))
    expected = float(loss(mixed.sigma).mean())
    # Five standard errors of the mixed mean (the weighted one varies less).
    tolerance = 5 * float(loss(mixed.sigma).std()) / math.sqrt(400_000)
    assert float((weighted.weight * loss(weighted.sigma)).mean()) == pytest.approx(expected, abs=tolerance)
    assert abs(float(loss(plain.sigma).mean()) - expected) > 100 * tolerance  # without weights it is another
    p = EDM.probabilities(LogNormal())
    for k in range(3):
        assert weighted.weight[weighted.stage == k].unique().tolist() == pytest.approx([3 * p[k]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"probabilities": (0.5, 0.5)}, "2 probabilities .* for 3 stage"),
        ({"probabilities": (0.5, 0.6, -0.1)}, "at least 0"),
        ({"probabilities": (0.5, 0.6, 0.1)}, "sum to 1"),
        ({"probabilities": (math.nan, 0.5, 0.5)}, "at least 0"),
        ({"probabilities": (0.5, 0.5, 0), "importance_weights": True}, "stage 2 has share 0"),
        ({"distribution": LogNormal(-100, 0.1)}, r"stage 1 \(2.5103, 7.6577\] has probability 0"),
    ],
)
def test_stratified_noise_rejects(arguments, message):
    with pytest.raises(ValueError, match=message):
        StratifiedNoise(EDM, **arguments)


# ---------------------------------------------------------------------------------------- systematic


@pytest.mark.parametrize("name", SYSTEMATIC)
@pytest.mark.parametrize("batch_size", [1, 7, 512])
def test_systematic_noise_is_evenly_spaced_in_probability(name, batch_size):
    noise = SYSTEMATIC[name]
    levels = noise.draw(batch_size, generator(3))
    place = (torch.arange(batch_size) + offset_of(3)) / batch_size
    if name == "ldm":  # F is a staircase: the step whose stair the place is on
        torch.testing.assert_close(levels.sigma, LDM().sigmas[(1000 * place).long()], rtol=0, atol=0)
    else:
        below, above = (
            torch.tensor(
                [noise.distribution.mass(*ends(s)) for s in levels.sigma.tolist()], dtype=torch.float64
            )
            for ends in (lambda s: (0, s), lambda s: (s, math.inf))
        )
        # Ends of segments are rounded to 2^-40 of a sample.
        torch.testing.assert_close(below, place, rtol=0, atol=2.0**-40)
        torch.testing.assert_close(above, 1 - place, rtol=0, atol=2.0**-40)
    torch.testing.assert_close(levels.stage, noise.stages.assign(levels.sigma))
    assert levels.counts == tuple(torch.bincount(levels.stage, minlength=3).tolist())
    assert bool((levels.sigma.diff() >= 0).all())
    assert levels.sigma.dtype == torch.float64
    assert bool((levels.weight == 1).all())


@pytest.mark.parametrize("name", SYSTEMATIC)
def test_systematic_noise_is_usable_at_the_extreme_offsets(name, draw_at):
    noise = SYSTEMATIC[name]
    for u, batch_size in itertools.product((0.0, 2.0**-53, LARGEST_UNIFORM), (1, 3, 1000)):
        levels = draw_at(noise, batch_size, u)
        assert bool(((levels.sigma > 0) & (levels.sigma < math.inf)).all())
        torch.testing.assert_close(levels.stage, noise.stages.assign(levels.sigma))
        assert levels.counts in noise.mixes(batch_size)


def test_systematic_counts_have_few_mixes_and_mixed_ones_many():
    for batch_size, many in ((64, 20), (128, 35), (512, 100)):
        systematic, mixed = (
            {noise.draw(batch_size, generator(s)).counts for s in range(1000)}
            for noise in (SystematicNoise(EDM), MixedNoise(EDM))
        )
        assert len(systematic) <= 3
        assert len(mixed) > many
        expected = [batch_size * p for p in EDM.probabilities(LogNormal())]
        for counts in systematic:
            assert all(abs(n - e) < 1 for n, e in zip(counts, expected, strict=True))


@pytest.mark.parametrize(
    "noise", [*SYSTEMATIC.values(), StratifiedNoise(EDM, (0.5, 0.3, 0.2))], ids=[*SYSTEMATIC, "stratified"]
)
@pytest.mark.parametrize("batch_size", [1, 10, 64, 512])
def test_mixes_are_those_that_are_drawn(noise, batch_size):
    draws = 500
    seen = [noise.draw(batch_size, generator(s)).counts for s in range(draws)]
    mixes = noise.mixes(batch_size)
    assert len(mixes) <= sum(len(intervals) for intervals in noise.stages.intervals)
    assert set(seen) <= set(mixes)
    assert math.fsum(mixes.values()) == pytest.approx(1, abs=1e-12)
    for counts, probability in mixes.items():
        assert sum(counts) == batch_size
        # Five standard errors, and one draw, of a number of draws.
        tolerance = 5 * math.sqrt(draws * probability * (1 - probability)) + 1
        assert seen.count(counts) == pytest.approx(draws * probability, abs=tolerance)


@pytest.mark.parametrize("name", SYSTEMATIC)
def test_the_mean_of_the_mixes_is_the_probability_of_each_stage(name):
    noise = SYSTEMATIC[name]
    for batch_size in (1, 31, 64, 4096):
        mixes = noise.mixes(batch_size)
        mean = [math.fsum(p * counts[k] for counts, p in mixes.items()) for k in range(3)]
        expected = [batch_size * p for p in noise.stages.probabilities(noise.distribution)]
        # Two ends of each of at most two intervals, rounded to 2^-40.
        assert mean == pytest.approx(expected, rel=1e-14, abs=4 * 2.0**-41)


@pytest.mark.parametrize("distribution", [LogNormal(), Uniform(VP()), Uniform(VE())], ids=["edm", "vp", "ve"])
def test_mixes_are_exact_where_they_change(distribution, draw_at):
    noise = SystematicNoise(EDM, distribution)
    for batch_size in (7, 64, 512):
        u = 0.0
        mixes = noise.mixes(batch_size)
        assert len(mixes) == 3
        for (before, probability), (after, _) in itertools.pairwise(mixes.items()):
            u += probability  # a multiple of 2^-40, so the sum is exact
            assert draw_at(noise, batch_size, math.nextafter(u, 0)).counts == before
            assert draw_at(noise, batch_size, u).counts == after


def test_what_should_be_a_whole_number_makes_no_mix_of_its_own(draw_at):
    steps = stages_in_sigma(Stages.from_boundaries([0, 289, 1000], "step"), LDM())
    for noise, counts in (
        (SystematicNoise(steps, Uniform(LDM())), (29, 71)),  # 100 · 0.29 is below 29 in floating point
        (StratifiedNoise(EDM, (0.3, 0.6, 0.1)), (30, 60, 10)),  # 0.3 + 0.6 is below 0.9
    ):
        assert noise.mixes(100) == {counts: 1.0}
        for u in (0.0, 0.5, LARGEST_UNIFORM):
            assert draw_at(noise, 100, u).counts == counts


def test_micro_batches_have_the_mixes_of_their_size():
    for noise in (SYSTEMATIC["edm"], SYSTEMATIC["union"], SYSTEMATIC["ldm"], StratifiedNoise(EDM)):
        allowed = noise.mixes(16)
        for seed in range(100):
            levels = noise.draw(64, generator(seed))
            for m in range(4):
                counts = torch.bincount(levels.stage[m::4], minlength=3).tolist()
                assert tuple(counts) in allowed


@pytest.mark.parametrize("batch_size", [64, 512])
def test_systematic_sampling_keeps_the_expected_loss_and_lowers_its_variance(batch_size):
    def loss(sigma):
        return 1 / (1 + sigma.square())

    draws = 1000
    systematic, mixed = (
        torch.stack([loss(noise.draw(batch_size, generator(s)).sigma).mean() for s in range(draws)])
        for noise in (SystematicNoise(EDM), MixedNoise(EDM))
    )
    quantiles = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    expected = float(loss(LogNormal().inverse_cdf(quantiles, 0.0, math.inf)).mean())
    for means in (systematic, mixed):
        # Five standard errors.
        assert float(means.mean()) == pytest.approx(expected, abs=5 * float(means.std()) / math.sqrt(draws))
    # Of B samples on their own: var/B, here 0.069/B. Evenly spaced, of what falls from 1 to 0: 1/(12 B²).
    assert 0.5 < float(mixed.var() / systematic.var()) / (12 * 0.069 * batch_size) < 2


@pytest.mark.parametrize(
    "arguments",
    [{"stage_probabilities": (0.2, 0.3, 0.5)}, {"importance_weights": True}],
)
@pytest.mark.parametrize("sampling", ["mixed", "systematic"])
def test_shares_need_stratified_sampling(sampling, arguments):
    with pytest.raises(ValueError, match=f"need stage_sampling=\"stratified\", got '{sampling}'"):
        TrainingConfig({}, stage_sampling=sampling, **arguments)


def test_systematic_noise_rejects():
    with pytest.raises(ValueError, match="SystematicNoise: needs stages of 'sigma', got stages of 'step'"):
        SystematicNoise(Stages.single("step"))
    for call in (SystematicNoise(EDM).mixes, lambda size: SystematicNoise(EDM).draw(size, generator())):
        with pytest.raises(ValueError, match="SystematicNoise: batch_size=0 must be at least 1"):
            call(0)


# ---------------------------------------------------------------------------------------- in training


@pytest.mark.parametrize("schedule", ["edm", "vp", "ve", "ldm"])
def test_training_draws_systematically_under_every_schedule(schedule):
    stages = Stages(STEPS, "step") if schedule == "ldm" else UNION
    config = TrainingConfig({}, stages=stages, schedule=schedule, stage_sampling="systematic")
    noise = config.noise_levels()
    assert isinstance(noise, SystematicNoise)
    assert isinstance(noise.distribution, LogNormal if schedule == "edm" else Uniform)
    assert noise.draw(64, generator()).counts in noise.mixes(64)


def test_the_command_line_draws_systematically_whatever_the_preset():
    class Images:
        channels, image_size, labels = 3, 32, None

    for preset in ("edm-cifar10", "ncsnpp-cifar10"):  # mixed and stratified
        options = ["--out", "x", "--preset", preset, "--stage-sampling", "systematic"]
        args = cli.build_parser().parse_args(["train", *options])
        config = train.make_config(args, None, "images", Images())
        assert (config.stage_sampling, config.stage_probabilities) == ("systematic", None)


def test_a_systematic_run_resumes_to_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "_plot", lambda self: None)
    network = {"family": "tiny", "image_size": 8}

    def train_to(steps, directory, resume=False):
        config = TrainingConfig(
            network, data="tiny", steps=steps, batch_size=8, accumulate=2, stage_sampling="systematic"
        )
        torch.manual_seed(1)
        Trainer(config, directory, data=tiny_images(), network=build(network), quiet=True).run(resume)

    train_to(9, tmp_path / "whole")
    train_to(4, tmp_path / "parts")
    train_to(9, tmp_path / "parts", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts", 9)

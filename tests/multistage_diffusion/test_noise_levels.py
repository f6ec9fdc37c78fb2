import math

import pytest
import torch

from multistage_diffusion.noise_levels import MixedNoise, StratifiedNoise
from multistage_diffusion.schedules import LogNormal
from multistage_diffusion.stages import Stages

EDM = Stages.edm()
UNION = Stages([[(0, 0.2), (2, math.inf)], [(0.2, 0.5), (1, 2)], [(0.5, 1)]])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


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
    for noise in (MixedNoise(EDM), StratifiedNoise(EDM)):
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

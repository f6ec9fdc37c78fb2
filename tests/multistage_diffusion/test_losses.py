import math

import pytest
import torch

from multistage_diffusion.losses import MixedNoise, StratifiedNoise, edm_loss, edm_weight
from multistage_diffusion.preconditioning import EDMPreconditioner
from multistage_diffusion.schedules import LogNormal
from multistage_diffusion.stages import Stages
from stand_ins import RecordingNetwork, TinyNetwork

EDM = Stages.edm()
UNION = Stages([[(0, 0.2), (2, math.inf)], [(0.2, 0.5), (1, 2)], [(0.5, 1)]])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------------------------------- the loss


def test_edm_loss_is_the_formula_per_sample():
    denoiser = EDMPreconditioner(TinyNetwork(dropout=0), EDM, sigma_data=0.5)
    y, noise = torch.randn(2, 3, 1, 8, 8, generator=generator())
    sigma = torch.tensor([0.1, 3.0, 50.0], dtype=torch.float64)
    losses = edm_loss(denoiser, y, sigma, noise=noise)
    for i, s in enumerate(sigma.tolist()):
        D = denoiser(y[i : i + 1] + s * noise[i : i + 1], s)
        weight = (s * s + 0.25) / (s * 0.5) ** 2
        # Sums of 64 float32 squares; batched and single convolutions may add up in another order.
        torch.testing.assert_close(losses[i], weight * (D[0] - y[i]).square().sum(), rtol=2e-5, atol=0)


def test_edm_loss_of_a_silent_network_is_one_per_pixel_at_every_sigma():
    network = RecordingNetwork(F=lambda x, noise, stage: torch.zeros_like(x))
    denoiser = EDMPreconditioner(network, EDM, sigma_data=0.5)
    y = 0.5 * torch.randn(6, 1, 300, 300, generator=generator(1))
    noise = torch.randn(y.shape, generator=generator(2))
    losses = edm_loss(denoiser, y, torch.tensor([0.002, 0.1, 0.5, 3, 8, 80]).double(), noise=noise)
    # Mean of 90,000 chi-square variables: standard deviation sqrt(2 / 90000) = 0.0047; five of them.
    torch.testing.assert_close(losses / 90_000, torch.ones(6), rtol=0, atol=0.024)


def test_edm_loss_reaches_the_weights_of_the_stage_only():
    network = TinyNetwork(dropout=0)
    denoiser = EDMPreconditioner(network, EDM)
    y = torch.randn(2, 1, 8, 8)
    edm_loss(denoiser, y, torch.tensor([0.1, 0.2]), noise=torch.randn_like(y)).sum().backward()
    assert bool(network.decoders[0].weight.grad.any())
    assert not bool(network.decoders[1].weight.grad.any())


def test_edm_weight():
    assert edm_weight(torch.tensor(2.0), 0.5).item() == pytest.approx(4.25 / 1.0)


# ---------------------------------------------------------------------------------------- noise levels


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

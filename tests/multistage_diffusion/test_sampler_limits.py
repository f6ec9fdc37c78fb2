"""Settings and seeds that no sampler can use are refused when they are given, not in the middle of a run."""

import math

import pytest
import torch

from multistage_diffusion.samplers import SamplerConfig, SeededNoise, generate, require_seeds


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"S_noise": math.inf}, r"S_noise=inf must be at least 0 and finite"),
        ({"S_noise": math.nan}, r"S_noise=nan must be at least 0 and finite"),
        ({"rho": 1e-9}, r"rho=1e-09 must be finite, and large enough that sigma_max\^\(1/rho\) = 80\.0\^"),
        ({"rho": 1e-320}, "rho=.* must be finite, and large enough"),
        ({"rho": math.inf}, "rho=inf must be finite"),
        ({"rho": math.nan}, "rho=nan must be finite"),
        ({"rho": 0.01, "sigma_max": 1e4}, r"= 10000\.0\^\(1/0\.01\) is; 7 is usual"),
    ],
)
def test_settings_without_finite_noise_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SamplerConfig(**settings)


def test_small_and_large_rho_that_can_be_computed_are_allowed():
    for rho in (0.01, 1, 1e6):
        sigmas = SamplerConfig(rho=rho).sigmas()
        assert bool((sigmas.diff() <= 0).all())
        assert (float(sigmas[0]), float(sigmas[-2])) == (80.0, 0.002)


def test_infinite_churn_is_the_most_that_there_is():
    assert SamplerConfig(S_churn=math.inf).gamma(1.0) == pytest.approx(math.sqrt(2) - 1)


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1])
def test_seeds_beyond_64_bits_are_refused_before_anything_is_sampled(seed):
    def denoiser(*arguments):
        pytest.fail("sampled")

    message = f"seed {seed} does not fit into 64 bits; allowed: -2\\^63 to 2\\^64 - 1"
    with pytest.raises(ValueError, match=f"^SeededNoise: {message}"):
        SeededNoise([0, seed], (1, 2, 2))
    with pytest.raises(ValueError, match=f"^generate: {message}"):
        generate(denoiser, [0, 1, seed], (1, 2, 2), batch_size=1, device="cpu")


def test_the_outermost_seeds_are_allowed():
    require_seeds([-(2**63), 2**64 - 1], "test")
    noise = SeededNoise([-(2**63), 2**64 - 1], (1, 2, 2)).draw()
    assert len(torch.unique(noise)) == 8

"""Settings and seeds that no sampler can use are refused when they are given, not in the middle of a run."""

import math

import numpy as np
import pytest
import torch

from multistage_diffusion.networks import Takes
from multistage_diffusion.noise.preconditioning import EDMPreconditioner
from multistage_diffusion.noise.stages import Stages
from multistage_diffusion.presets import PRESETS, SAMPLERS
from multistage_diffusion.sampling.samplers import (
    SamplerConfig,
    SeededNoise,
    class_labels,
    generate,
    require_seeds,
    sampler_config,
)
from stand_ins import RecordingNetwork


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"S_noise": math.inf}, r"S_noise=inf must be at least 0 and finite"),
        ({"S_noise": math.nan}, r"S_noise=nan must be at least 0 and finite"),
        (
            {"rho": 1e-9},
            "rho=1e-09 the 18 noise levels from sigma_max=80.* do not fall in float64; 7 is usual",
        ),
        ({"rho": 1e-320}, "rho=.* do not fall"),
        ({"rho": 1e-9, "sigma_min": 80.0}, "rho=1e-09 .* do not fall"),
        ({"rho": 1e17}, r"rho=1e\+17 .* do not fall"),
        ({"rho": math.inf}, "rho=inf must be positive and finite"),
        ({"rho": math.nan}, "rho=nan must be positive and finite"),
        ({"rho": 0.01, "sigma_max": 1e4}, r"rho=0\.01 .* sigma_max=10000\.0 .* do not fall"),
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


def test_equal_ends_are_allowed():
    assert SamplerConfig(3, sigma_min=80.0, rho=1e17).sigmas().tolist() == [80, 80, 80, 0]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_steps_are_integers(sampler):
    kind = type(sampler_config(sampler)).__name__
    with pytest.raises(TypeError, match=rf"^{kind}: (num_)?steps must be an integer, got 2\.5"):
        sampler_config(sampler, steps=2.5)
    assert sampler_config(sampler, steps=np.int64(4)) == sampler_config(sampler, steps=4)
    assert type(sampler_config("heun", steps=np.int64(4)).to_json()["num_steps"]) is int


def test_no_steps_are_not_the_presets_own():
    with pytest.raises(ValueError, match="num_steps=0"):
        PRESETS["edm-cifar10"].evaluations("heun", 0)
    assert sum(PRESETS["edm-cifar10"].evaluations(steps=2)) == 3


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


@pytest.mark.parametrize("seeds", [torch.arange(3), np.arange(3), range(3), torch.arange(3).to(torch.int8)])
def test_whatever_stands_for_integers_is_a_seed(seeds):
    denoiser = EDMPreconditioner(RecordingNetwork(), Stages.edm())
    found = generate(denoiser, seeds, (1, 2, 2), SamplerConfig(1)).images
    assert torch.equal(found, generate(denoiser, [0, 1, 2], (1, 2, 2), SamplerConfig(1)).images)
    assert all(type(seed) is int for seed in require_seeds(seeds, "test"))


@pytest.mark.parametrize("seeds", [[0, 1.5], torch.tensor([0.0, 1.5]), ["7"], [None]])
def test_seeds_that_are_no_integers_are_refused(seeds):
    network = RecordingNetwork()
    network.takes = Takes(class_labels=3)
    for user, call in {
        "SeededNoise": lambda: SeededNoise(seeds, (1, 2, 2)),
        "generate": lambda: generate(network, seeds, (1, 2, 2)),
        "class_labels": lambda: class_labels(network, seeds),
    }.items():
        with pytest.raises(TypeError, match=f"^{user}: seeds must be integers, got "):
            call()


def test_the_size_of_a_batch_is_an_integer():
    with pytest.raises(TypeError, match=r"generate: batch_size must be an integer, got 2\.5"):
        generate(RecordingNetwork(), [0], (1, 2, 2), batch_size=2.5)

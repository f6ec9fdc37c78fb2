import itertools
import math

import pytest
import torch

from multistage_diffusion.preconditioning import EDMPreconditioner
from multistage_diffusion.samplers import SamplerConfig, SeededNoise, class_labels, generate, heun
from multistage_diffusion.stages import Stages
from stand_ins import RecordingNetwork, TinyNetwork, one_thread  # noqa: F401

SHAPE = (1, 4, 4)


class GaussianDenoiser:
    """The optimal denoiser of data ~ N(mean, scale²): the sampler's equation has a closed solution."""

    def __init__(self, mean=0.3, scale=0.5):
        self.mean, self.scale, self.stages, self.calls = mean, scale, Stages.edm(), []

    def __call__(self, x, sigma, stage, **conditioning):
        self.calls.append((sigma, stage, conditioning))
        gain = self.scale**2 / (self.scale**2 + sigma**2)
        return self.mean + gain * (x - self.mean)

    def solution(self, x, sigma):
        """Where the trajectory through x at sigma ends at noise level 0."""
        return self.mean + (x - self.mean) * self.scale / math.sqrt(self.scale**2 + sigma**2)

    def parameters(self):
        return iter(())


def error_of(num_steps):
    D, config = GaussianDenoiser(), SamplerConfig(num_steps)
    noise = SeededNoise(range(4), SHAPE)
    start = 80 * SeededNoise(range(4), SHAPE).draw()
    return float((heun(D, noise, config).images - D.solution(start, 80)).abs().max())


def test_heun_converges_to_the_exact_solution_with_second_order():
    errors = [error_of(n) for n in (32, 64, 128, 256)]
    ratios = [a / b for a, b in itertools.pairwise(errors)]
    assert errors[-1] < 5e-4
    assert all(3.3 < r < 4.7 for r in ratios), ratios  # second order: 4; first order would be 2


def test_heun_evaluations_per_stage_of_the_published_sampler():
    D = GaussianDenoiser()
    result = heun(D, SeededNoise([0], SHAPE), SamplerConfig(18))
    assert result.evaluations == 35
    assert result.evaluations_per_stage == (18, 4, 13)
    assert [stage for _, stage, _ in D.calls] == [Stages.edm().assign(sigma) for sigma, _, _ in D.calls]
    assert all(isinstance(sigma, float) for sigma, _, _ in D.calls)  # known on the host


def test_heun_evaluates_at_the_scheduled_noise_levels():
    D = GaussianDenoiser()
    heun(D, SeededNoise([0], SHAPE), SamplerConfig(3))
    a, b, c, _ = SamplerConfig(3).sigmas().tolist()
    assert [sigma for sigma, _, _ in D.calls] == [a, b, b, c, c]


def test_stochastic_steps_raise_the_noise_level_inside_of_the_window():
    D = GaussianDenoiser()
    config = SamplerConfig(18, S_churn=40, S_min=0.05, S_max=50, S_noise=1.003)
    heun(D, SeededNoise([0], SHAPE), config)
    first = [D.calls[2 * i][0] for i in range(18)]
    for scheduled, evaluated in zip(config.sigmas().tolist(), first, strict=False):
        factor = math.sqrt(2) if 0.05 <= scheduled <= 50 else 1.0  # 40 / 18 is above the limit sqrt(2) − 1
        assert evaluated == pytest.approx(scheduled * factor, rel=1e-12)


def test_stochastic_samples_have_the_right_variance():
    D = GaussianDenoiser(mean=0.3, scale=0.5)
    noise = SeededNoise([7], (1, 100, 100))
    images = heun(D, noise, SamplerConfig(64, S_churn=20)).images
    # 10,000 pixels: standard errors 0.005 and 0.0035; five of them, plus the steps' discretisation (0.002).
    assert float(images.mean()) == pytest.approx(0.3, abs=0.027)
    assert float(images.std()) == pytest.approx(0.5, abs=0.0195)


@pytest.mark.parametrize("S_churn", [0.0, 10.0])
def test_a_sample_depends_on_its_seed_only(S_churn):
    # A network that works pixel by pixel: its results cannot depend on the batch, so equality is exact.
    network = RecordingNetwork(F=lambda x, noise, stage: torch.sin(x + noise[:, None, None, None]))
    denoiser = EDMPreconditioner(network, Stages.edm())
    config = SamplerConfig(6, S_churn=S_churn)
    together = generate(denoiser, [3, 4, 5, 6, 7], SHAPE, config, batch_size=5).images
    split = generate(denoiser, [3, 4, 5, 6, 7], SHAPE, config, batch_size=2).images
    alone = generate(denoiser, [6], SHAPE, config).images
    assert torch.equal(together, split)
    assert torch.equal(together[3:4], alone)
    assert not torch.equal(together[0], together[1])


def test_generate_reports_progress_and_evaluations_of_each_sample():
    seen = []
    result = generate(
        EDMPreconditioner(TinyNetwork(image_size=4).eval(), Stages.edm()),
        range(5),
        SHAPE,
        SamplerConfig(4),
        batch_size=2,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert result.images.shape == (5, 1, 4, 4)
    assert result.images.dtype == torch.float64
    assert result.evaluations == 7
    assert seen == [(i + 1, 12) for i in range(12)]


def test_generate_cuts_the_conditioning_with_the_batch():
    network = RecordingNetwork()
    labels = torch.arange(3)
    denoiser = EDMPreconditioner(network, Stages.edm())
    generate(denoiser, range(3), SHAPE, SamplerConfig(1), batch_size=2, class_labels=labels)
    assert [c[3]["class_labels"].tolist() for c in network.calls] == [[0, 1], [2]]


def test_class_labels_take_turns_by_seed():
    network = RecordingNetwork()
    assert class_labels(network, [0, 1]) == {}
    network.label_dim = 3
    labels = class_labels(network, [4, 2, 0])["class_labels"]
    assert labels.tolist() == [[0, 1, 0], [0, 0, 1], [1, 0, 0]]
    assert class_labels(network, [4], 2)["class_labels"].tolist() == [[0, 0, 1]]
    with pytest.raises(ValueError, match="class 3: this model has classes 0 to 2"):
        class_labels(network, [0], 3)


def test_generate_leaves_the_global_generator_alone():
    denoiser = EDMPreconditioner(TinyNetwork(image_size=4).eval(), Stages.edm())
    before = torch.get_rng_state()
    generate(denoiser, [0], SHAPE, SamplerConfig(2, S_churn=1))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_steps": 0}, "num_steps=0"),
        ({"S_churn": -1}, "S_churn=-1"),
        ({"S_min": 2, "S_max": 1}, "S_min=2, S_max=1"),
        ({"S_noise": -1}, "S_noise=-1"),
    ],
)
def test_sampler_config_rejects(arguments, message):
    with pytest.raises(ValueError, match=message):
        SamplerConfig(**arguments)


def test_generate_rejects():
    denoiser = EDMPreconditioner(RecordingNetwork(), Stages.edm())
    with pytest.raises(ValueError, match="at least one seed"):
        generate(denoiser, [], SHAPE)
    with pytest.raises(ValueError, match="batch_size=0"):
        generate(denoiser, [1], SHAPE, batch_size=0)

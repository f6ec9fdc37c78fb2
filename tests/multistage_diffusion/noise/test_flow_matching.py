"""Flow matching: its noise levels in sigma, its denoiser, its losses, and its samplers."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from multistage_diffusion.cli import main
from multistage_diffusion.noise.distributions import LogLogistic, LogNormal
from multistage_diffusion.noise.losses import denoising_loss
from multistage_diffusion.noise.noise_levels import MixedNoise, StratifiedNoise, SystematicNoise
from multistage_diffusion.noise.preconditioning import SchedulePreconditioner, from_json, precondition
from multistage_diffusion.noise.schedules import FlowMatching
from multistage_diffusion.noise.stages import Stages
from multistage_diffusion.sampling.samplers import SeededNoise, default_sampler, sample, sampler_config
from multistage_diffusion.training import checkpoints
from multistage_diffusion.training.config import TrainingConfig
from stand_ins import TINY, RecordingNetwork, one_thread  # noqa: F401

TIMES = torch.tensor([1e-6, 0.1, 0.5, 0.9, 0.999999], dtype=torch.float64)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_sigma_is_the_noise_in_units_of_the_data():
    """x_t = (1 − t) y + t n = (1 − t) (y + sigma n)."""
    flow = FlowMatching()
    torch.testing.assert_close(flow.sigma(TIMES), TIMES / (1 - TIMES), rtol=1e-15, atol=0)
    torch.testing.assert_close(flow.value(flow.sigma(TIMES)), TIMES, rtol=1e-12, atol=0)
    assert flow.value([0.0, math.inf]).tolist() == [0.0, 1.0]
    assert flow.levels() == (0.0, math.inf)
    torch.testing.assert_close(flow.scale(flow.sigma(TIMES)), 1 - TIMES, rtol=1e-10, atol=0)
    torch.testing.assert_close(flow.c_noise(flow.sigma(TIMES)), 1000 * TIMES, rtol=1e-12, atol=0)


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_a_shift_multiplies_sigma(shift):
    flow = FlowMatching(shift)
    torch.testing.assert_close(flow.sigma(flow.shifted(TIMES)), shift * flow.sigma(TIMES), rtol=1e-9, atol=0)


def settings(**changes):
    return {"time_sampling": "logit-normal", "P_mean": 0.0, "P_std": 1.0} | changes


@pytest.mark.parametrize(
    ("shift", "given"),
    [
        (1.0, {}),
        (3.0, {"P_mean": -0.5, "P_std": 1.5}),
        (0.25, {"time_sampling": "uniform"}),
        (3.0, {"time_sampling": "uniform"}),
    ],
)
def test_the_distribution_of_sigma_is_that_of_drawn_and_shifted_times(shift, given):
    """Draws as flow matching makes them against the exact shares of three stages: 4 standard deviations."""
    given = settings(**given)
    distribution = FlowMatching(shift).training_distribution(given)
    count = 200_000
    if given["time_sampling"] == "uniform":
        t = torch.rand(count, dtype=torch.float64, generator=generator())
    else:
        z = torch.randn(count, dtype=torch.float64, generator=generator())
        t = (given["P_mean"] + given["P_std"] * z).sigmoid()
    flow = FlowMatching(shift)
    sigma = flow.sigma(flow.shifted(t))
    stages = Stages.from_boundaries([0, 0.5, 2.0, math.inf])
    shares = stages.probabilities(distribution)
    assert math.fsum(shares) == pytest.approx(1, abs=1e-12)
    for stage, share in enumerate(shares):
        found = float((stages.assign(sigma) == stage).double().mean())
        assert abs(found - share) < 4 * math.sqrt(share * (1 - share) / count)


def test_logit_normal_times_are_log_normal_in_sigma():
    flow = FlowMatching(3.0)
    assert flow.training_distribution(settings(P_mean=0.2, P_std=1.1)) == LogNormal(math.log(3) + 0.2, 1.1)
    assert flow.training_distribution(settings(time_sampling="uniform")) == LogLogistic(3.0)


@pytest.mark.parametrize("scale", [0.3, 1.0, 7.0])
@pytest.mark.parametrize(
    ("low", "high"), [(0.0, math.inf), (0.0, 1e-9), (0.4, 0.6), (5.0, math.inf), (1e9, math.inf)]
)
def test_log_logistic_quantiles_invert_the_cdf(scale, low, high):
    distribution = LogLogistic(scale)
    u = torch.tensor([0.0, 1e-12, 0.25, 0.5, 0.75, 1 - 1e-12, 1.0], dtype=torch.float64)
    sigma = distribution.inverse_cdf(u, low, high)
    assert bool(((sigma > low) & (sigma <= high) & sigma.isfinite()).all())
    assert bool((sigma.diff() >= 0).all())
    shares = [distribution.mass(low, float(s)) / distribution.mass(low, high) for s in sigma[2:5]]
    assert shares == pytest.approx([0.25, 0.5, 0.75], rel=1e-12)


def test_log_logistic_masses_are_accurate_in_both_tails():
    distribution = LogLogistic(2.0)
    assert distribution.mass(0.0, 1e-20) == pytest.approx(5e-21, rel=1e-14)
    assert distribution.mass(1e20, math.inf) == pytest.approx(2e-20, rel=1e-14)
    assert distribution.mass(3.0, 3.0) == 0
    with pytest.raises(ValueError, match="scale=0 must be positive and finite"):
        LogLogistic(0)


@pytest.mark.parametrize("kind", [MixedNoise, SystematicNoise, StratifiedNoise])
@pytest.mark.parametrize("time_sampling", ["logit-normal", "uniform"])
def test_every_draw_of_noise_levels_takes_the_distribution(kind, time_sampling):
    distribution = FlowMatching(2.0).training_distribution(settings(time_sampling=time_sampling))
    stages = Stages.from_boundaries([0, 1.0, 4.0, math.inf])
    levels = kind(stages, distribution=distribution).draw(3000, generator())
    shares = [1 / 3] * 3 if kind is StratifiedNoise else stages.probabilities(distribution)
    assert [count / 3000 for count in levels.counts] == pytest.approx(shares, abs=0.04)
    assert torch.equal(stages.assign(levels.sigma), levels.stage)


@pytest.mark.parametrize("prediction", ["v", "epsilon", "x0"])
def test_a_network_that_predicts_exactly_denoises_exactly(prediction):
    y = torch.randn(5, 1, 4, 4, generator=generator(), dtype=torch.float64)
    n = torch.randn(5, 1, 4, 4, generator=generator(1), dtype=torch.float64)
    right = {"v": n - y, "epsilon": n, "x0": y}[prediction]
    network = RecordingNetwork(1, F=lambda x, noise, stage: right).double()
    denoiser = precondition(network, Stages.single(), "flow", prediction=prediction)
    flow = FlowMatching()
    sigma = flow.sigma(TIMES.clamp(0.01, 0.99))
    t = flow.value(sigma)[:, None, None, None]
    torch.testing.assert_close(denoiser(y + sigma[:, None, None, None] * n, sigma), y, rtol=1e-9, atol=1e-9)
    x, noise, _, _ = network.calls[0]
    # The network computes in float32.
    torch.testing.assert_close(x.double(), (1 - t) * y + t * n, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(noise.double(), 1000 * t.flatten(), rtol=1e-6, atol=0)


def test_the_loss_is_the_squared_error_of_the_velocity():
    """A constant c in the place of the velocity n − y costs ‖c − (n − y)‖², whatever the noise level."""
    y = torch.randn(4, 1, 4, 4, generator=generator(), dtype=torch.float64)
    n = torch.randn(4, 1, 4, 4, generator=generator(1), dtype=torch.float64)
    network = RecordingNetwork(1, F=lambda x, noise, stage: torch.full_like(x, 0.3))
    denoiser = precondition(network, Stages.single(), "flow")
    sigma = torch.tensor([0.05, 0.5, 2.0, 30.0], dtype=torch.float64)
    loss = denoising_loss(denoiser, y, sigma, noise=n)
    expected = (0.3 - (n - y)).square().sum(dim=(1, 2, 3))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


class Gaussian:
    """The optimal denoiser of data ~ N(0.3, 0.5²): the deterministic sampler's paths are known."""

    mean, scale = 0.3, 0.5

    def __init__(self, shift: float = 1.0):
        self.stages, self.schedule = Stages.single(), FlowMatching(shift)

    def parameters(self):
        return iter(())

    def __call__(self, x, sigma, stage, **conditioning):
        gain = self.scale**2 / (self.scale**2 + sigma**2)
        return self.mean + gain * (x - self.mean)

    def exact(self, start: torch.Tensor, sigma: float) -> torch.Tensor:
        return self.mean + (start - self.mean) * self.scale / math.sqrt(self.scale**2 + sigma**2)


def test_the_default_sampler_is_eulers_method_in_time():
    flow, steps = FlowMatching(3.0), 5
    denoiser = Gaussian(3.0)
    assert default_sampler(denoiser) == "ddim"
    config = sampler_config("ddim", flow, steps)
    assert config.levels[-1] == 0
    assert config.num_steps == len(config.evaluated_levels()) == steps
    noise = SeededNoise([4], (1, 2, 2))
    x = config.start * noise.draw()
    found = sample(denoiser, SeededNoise([4], (1, 2, 2)), config).images
    times = [float(t) for t in flow.value(torch.tensor(config.levels, dtype=torch.float64))]
    x_t = (1 - times[0]) * x
    for t, t_next in itertools.pairwise(times):
        denoised = denoiser(x_t / (1 - t), t / (1 - t), None)
        velocity = (x_t - denoised) / t
        x_t = x_t + (t_next - t) * velocity
    torch.testing.assert_close(found, x_t, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("sampler", ["heun", "dpm-singlestep", "dpm-multistep", "ddim"])
def test_every_sampler_reaches_the_data(sampler, shift):
    denoiser = Gaussian(shift)
    given = {} if sampler == "heun" else {"denoise_to_zero": True}
    config = sampler_config(sampler, FlowMatching(shift), 200, **given)
    result = sample(denoiser, SeededNoise([1, 2], (1, 3, 3)), config)
    start = config.start * SeededNoise([1, 2], (1, 3, 3)).draw()
    expected = denoiser.exact(start, config.start)
    # First order with 200 steps errs by 2 % at most; the others by much less.
    assert (result.images - expected).abs().max() < (0.03 if sampler == "ddim" else 0.01)


@pytest.mark.parametrize("spacing", ["own", "karras", "log-snr"])
@pytest.mark.parametrize("sampler", ["dpm-multistep", "ddim"])
@pytest.mark.parametrize("steps", [1, 2, 20])
def test_steps_are_spaced_as_asked(sampler, spacing, steps):
    flow = FlowMatching(2.0)
    config = sampler_config(sampler, flow, steps, spacing=spacing)
    levels = torch.tensor(config.levels, dtype=torch.float64)
    measured = {
        "own": lambda s: 1 / (1 + flow.shift / s),  # the time before the shift
        "karras": lambda s: s ** (1 / 7),
        "log-snr": lambda s: s.log(),
    }[spacing](levels)
    assert len(levels) == steps + 1
    torch.testing.assert_close(measured.diff(), measured.diff()[:1].expand(steps), rtol=1e-6, atol=1e-9)
    with pytest.raises(ValueError, match="spacing must be one of own, karras, log-snr, got 'linear'"):
        sampler_config(sampler, flow, steps, spacing="linear")


def test_the_denoiser_is_described_by_its_shift_and_prediction():
    denoiser = SchedulePreconditioner(RecordingNetwork(1), Stages.single(), FlowMatching(3.0))
    described = denoiser.to_json()
    assert {k: described[k] for k in ("schedule", "shift", "prediction")} == {
        "schedule": "flow",
        "shift": 3.0,
        "prediction": "v",
    }
    again = from_json(RecordingNetwork(1), described)
    assert (again.schedule, again.prediction) == (FlowMatching(3.0), "v")


def test_a_configuration_leaves_to_the_schedule_what_is_not_given():
    flow = TrainingConfig(TINY, schedule="flow", shift=2.0)
    assert (flow.prediction, flow.P_mean, flow.P_std) == ("v", 0.0, 1.0)
    assert flow.noise_levels().distribution == LogNormal(math.log(2), 1.0)
    assert flow.noise_schedule() == FlowMatching(2.0)
    assert TrainingConfig.from_json(flow.to_json()) == flow
    edm = TrainingConfig(TINY)
    assert (edm.prediction, edm.P_mean, edm.P_std) == ("epsilon", -1.2, 1.2)
    old = {k: v for k, v in edm.to_json().items() if k not in ("prediction", "shift", "time_sampling")}
    assert edm.differences(old) == []
    with pytest.raises(ValueError, match="shift=0 must be above 0"):
        TrainingConfig(TINY, schedule="flow", shift=0)


def test_a_flow_is_trained_and_sampled_from_the_command_line(tmp_path, capsys):
    run = tmp_path / "run"
    train = [
        "train",
        "--data",
        "digits",
        "--out",
        str(run),
        "--schedule",
        "flow",
        "--shift",
        "2",
        "--stages",
        "single",
    ]
    network = ["--encoder-widths", "16", "--decoder-widths", "16", "--steps", "2", "--batch", "4"]
    assert main([*train, *network, "--p-mean", "0.5", "--device", "cpu"]) == 0
    model = checkpoints.load_model(run)
    assert model.denoiser.schedule == FlowMatching(2.0)
    saved = model.metadata["config"]
    assert (saved["prediction"], saved["P_mean"], saved["P_std"]) == ("v", 0.5, 1.0)
    out = tmp_path / "samples.npz"
    command = ["sample", "--run", str(run), "--num", "2", "--steps", "3", "--out", str(out)]
    assert main([*command, "--device", "cpu"]) == 0
    assert "ddim, 3 network evaluations each" in capsys.readouterr().out
    assert main([*command, "--sampler", "dpm-multistep", "--spacing", "log-snr", "--device", "cpu"]) == 0
    assert main([*command, "--sampler", "heun", "--spacing", "own"]) == 2
    assert "--spacing is for --sampler dpm-multistep or ddim, not for heun" in capsys.readouterr().err

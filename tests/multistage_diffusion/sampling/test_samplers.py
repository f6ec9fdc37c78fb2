import itertools
import math
from functools import partial

import pytest
import torch

from multistage_diffusion.networks import Takes
from multistage_diffusion.noise.preconditioning import EDMPreconditioner, SchedulePreconditioner
from multistage_diffusion.noise.schedules import EDM, LDM, VE, VP
from multistage_diffusion.noise.stages import Stages
from multistage_diffusion.presets import PRESETS, SAMPLERS
from multistage_diffusion.sampling.dpm_solver import DDIMConfig, DPMMultistepConfig, DPMSinglestepConfig
from multistage_diffusion.sampling.samplers import (
    SamplerConfig,
    SeededNoise,
    class_labels,
    default_sampler,
    generate,
    heun,
    sample,
    sampler_config,
    schedule_of,
)
from multistage_diffusion.sampling.trajectory import Trajectory
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

    def solution(self, x, sigma, sigma_end=0.0):
        """Where the trajectory through x at sigma ends at noise level sigma_end."""
        spread, spread_end = (math.hypot(self.scale, level) for level in (sigma, sigma_end))
        return self.mean + (x - self.mean) * spread_end / spread

    def parameters(self):
        return iter(())


class MixtureDenoiser(GaussianDenoiser):
    """The optimal denoiser of pixels ~ N(-1, scale²) or N(1, scale²), half of them each: not linear in x."""

    def __call__(self, x, sigma, stage, **conditioning):
        variance = self.scale**2 + sigma**2
        return self.scale**2 / variance * x + sigma**2 / variance * torch.tanh(x / variance)


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
    network.takes = Takes(class_labels=3)
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


# ------------------------------------------------------------------ DPM-Solver, DPM-Solver++, DDIM


def log_levels(steps, sigma_max=20.0, sigma_min=0.02):
    return [sigma_max * (sigma_min / sigma_max) ** (i / steps) for i in range(steps + 1)]


SOLVERS = {
    "ddim": (1, lambda n: DDIMConfig(log_levels(n))),
    "singlestep-1": (1, lambda n: DPMSinglestepConfig(log_levels(n), (1,) * n)),
    "singlestep-2": (2, lambda n: DPMSinglestepConfig(log_levels(n), (2,) * n)),
    "singlestep-3": (3, lambda n: DPMSinglestepConfig(log_levels(n), (3,) * n)),
    "multistep": (2, lambda n: DPMMultistepConfig(log_levels(n), (1,) + (2,) * (n - 1))),
    "multistep-in-time": (2, lambda n: sampler_config("dpm-multistep", VP(), 8 * n)),
    "multistep-lower-at-the-end": (2, lambda n: DPMMultistepConfig(log_levels(n), (1, *(2,) * (n - 2), 1))),
}


def final(D, config):
    return sample(D, SeededNoise(range(4), SHAPE), config).images


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_solver_converges_to_the_exact_solution_with_its_order(solver):
    order, config_of = SOLVERS[solver]
    D = GaussianDenoiser()
    errors = []
    for config in map(config_of, (32, 64, 128)):
        x = config.start * SeededNoise(range(4), SHAPE).draw()
        exact = D.solution(x, config.start, config.levels[-1])
        errors.append(float((final(D, config) - exact).abs().max()))
    measured = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert measured == pytest.approx([order] * 2, abs=0.15), errors
    assert errors[-1] < {1: 2e-2, 2: 4e-4, 3: 4e-7}[order]


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_solver_keeps_its_order_where_the_denoiser_is_not_linear(solver):
    order, config_of = SOLVERS[solver]
    D = MixtureDenoiser()
    runs = [final(D, config_of(n)) for n in (64, 128, 256, 512)]
    changes = [float((a - b).abs().max()) for a, b in itertools.pairwise(runs)]
    measured = [math.log2(a / b) for a, b in itertools.pairwise(changes)]
    assert measured == pytest.approx([order] * 2, abs=0.15), changes


class Textbook:
    """The papers' updates as printed, for x_t = alpha_t y + sigma_t n of the VP SDE at time t."""

    def __init__(self, D):
        self.D = D

    def alpha(self, t):
        return math.exp(-19.9 / 4 * t**2 - 0.1 / 2 * t)

    def sigma(self, t):
        return math.sqrt(1 - self.alpha(t) ** 2)

    def lambda_(self, t):
        return math.log(self.alpha(t) / self.sigma(t))

    def t(self, lambda_):
        """The inverse of lambda_, arXiv 2206.00927, appendix D.4."""
        log = math.log(math.exp(-2 * lambda_) + 1)
        return 2 * log / (math.sqrt(0.1**2 + 2 * 19.9 * log) + 0.1)

    def x0(self, x, t):
        return self.D(x / self.alpha(t), self.sigma(t) / self.alpha(t), 0)

    def eps(self, x, t):
        return (x - self.alpha(t) * self.x0(x, t)) / self.sigma(t)

    def first_order(self, x, s, t, eps):
        h = self.lambda_(t) - self.lambda_(s)
        return self.alpha(t) / self.alpha(s) * x - self.sigma(t) * math.expm1(h) * eps

    def second_order(self, x, s, t):
        middle = self.t((self.lambda_(s) + self.lambda_(t)) / 2)
        u = self.first_order(x, s, middle, self.eps(x, s))
        return self.first_order(x, s, t, self.eps(u, middle))

    def third_order(self, x, s, t, r1=1 / 3, r2=2 / 3):
        h = self.lambda_(t) - self.lambda_(s)
        s1, s2 = self.t(self.lambda_(s) + r1 * h), self.t(self.lambda_(s) + r2 * h)
        eps = self.eps(x, s)
        D1 = self.eps(self.first_order(x, s, s1, eps), s1) - eps
        u2 = self.first_order(x, s, s2, eps)
        u2 = u2 - self.sigma(s2) * r2 / r1 * (math.expm1(r2 * h) / (r2 * h) - 1) * D1
        D2 = self.eps(u2, s2) - eps
        return self.first_order(x, s, t, eps) - self.sigma(t) / r2 * (math.expm1(h) / h - 1) * D2

    def singlestep(self, x, orders):
        ends = torch.linspace(self.lambda_(1.0), self.lambda_(1e-3), len(orders) + 1, dtype=torch.float64)
        for (s, t), order in zip(itertools.pairwise(map(self.t, ends.tolist())), orders, strict=True):
            if order == 1:
                x = self.first_order(x, s, t, self.eps(x, s))
            else:
                x = self.second_order(x, s, t) if order == 2 else self.third_order(x, s, t)
        return x

    def multistep(self, x, steps, last_order):
        t = torch.linspace(1, 1e-3, steps + 1, dtype=torch.float64).tolist()
        h = [None] + [self.lambda_(b) - self.lambda_(a) for a, b in itertools.pairwise(t)]
        x0 = []
        for i in range(1, steps + 1):
            x0.append(self.x0(x, t[i - 1]))
            D = x0[-1]
            if i > 1 and not (i == steps and last_order == 1):
                r = h[i - 1] / h[i]
                D = (1 + 1 / (2 * r)) * x0[-1] - 1 / (2 * r) * x0[-2]
            x = self.sigma(t[i]) / self.sigma(t[i - 1]) * x - self.alpha(t[i]) * math.expm1(-h[i]) * D
        return x

    def ddim(self, x, steps, eta, noise):
        """alpha_bar is alpha² here."""
        times = torch.linspace(1, 1e-3, steps + 1, dtype=torch.float64).tolist()
        for t, t_next in itertools.pairwise(times):
            bar, bar_next = self.alpha(t) ** 2, self.alpha(t_next) ** 2
            eps = self.eps(x, t)
            x0 = (x - math.sqrt(1 - bar) * eps) / math.sqrt(bar)
            deviation = eta * math.sqrt((1 - bar_next) / (1 - bar)) * math.sqrt(1 - bar / bar_next)
            x = math.sqrt(bar_next) * x0 + math.sqrt(1 - bar_next - deviation**2) * eps
            x = x + deviation * noise.draw() if eta else x
        return x

    def start(self, noise):
        """The sampler's own start, in the scale of t = 1."""
        return self.sigma(1.0) * noise.draw()


def textbook(run):
    """The paper's result, divided by alpha, from the noise of the sampler under test."""
    book, noise = Textbook(MixtureDenoiser()), SeededNoise(range(4), SHAPE)
    return run(book, book.start(noise), noise) / book.alpha(1e-3)


@pytest.mark.parametrize(
    ("steps", "orders"),
    [(1, [1]), (2, [2]), (3, [2, 1]), (4, [3, 1]), (5, [3, 2]), (6, [3, 2, 1]), (20, [3, 3, 3, 3, 3, 3, 2])],
)
def test_dpm_singlestep_is_that_of_the_paper(steps, orders):
    expected = textbook(lambda book, x, noise: book.singlestep(x, orders))
    config = sampler_config("dpm-singlestep", VP(), steps)
    assert list(config.orders) == orders
    torch.testing.assert_close(final(MixtureDenoiser(), config), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("steps", "last_order"), [(1, 1), (2, 1), (14, 1), (15, 2), (20, 2)])
def test_dpm_multistep_is_that_of_the_paper(steps, last_order):
    expected = textbook(lambda book, x, noise: book.multistep(x, steps, last_order))
    found = final(MixtureDenoiser(), sampler_config("dpm-multistep", VP(), steps))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_is_that_of_the_paper(eta):
    expected = textbook(lambda book, x, noise: book.ddim(x, 20, eta, noise))
    found = final(MixtureDenoiser(), sampler_config("ddim", VP(), 20, eta=eta))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_the_solvers_of_order_one_are_ddim():
    levels, D = log_levels(9), MixtureDenoiser()
    ddim = final(D, DDIMConfig(levels))
    for config in (DPMSinglestepConfig(levels, (1,) * 9), DPMMultistepConfig(levels, (1,) * 9)):
        torch.testing.assert_close(final(D, config), ddim, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_stochastic_ddim_has_the_right_variance_on_gaussian_data(eta):
    config = sampler_config("ddim", VP(), 400, eta=eta)
    images = sample(GaussianDenoiser(0.3, 0.5), SeededNoise([7], (1, 100, 100)), config).images
    # 10,000 pixels: standard errors 0.005 and 0.0035; four of them, plus the steps' discretisation (0.002).
    assert float(images.mean()) == pytest.approx(0.3, abs=0.022)
    assert float(images.std()) == pytest.approx(math.hypot(0.5, config.levels[-1]), abs=0.016)


@pytest.mark.parametrize("name", ["dpm-singlestep", "dpm-multistep", "ddim"])
@pytest.mark.parametrize("schedule", [VP(), LDM()], ids=["vp", "ldm"])
def test_denoising_to_zero_is_one_more_evaluation_at_the_last_level(name, schedule):
    noisy, clean = (sampler_config(name, schedule, 7, denoise_to_zero=zero) for zero in (False, True))
    D = GaussianDenoiser()
    expected = D(final(D, noisy), noisy.levels[-1], 0)
    torch.testing.assert_close(final(D, clean), expected, rtol=1e-12, atol=1e-12)
    assert clean.evaluated_levels() == [*noisy.evaluated_levels(), noisy.levels[-1]]


EVERY = [(name, schedule) for name in SAMPLERS for schedule in (VP(), LDM(), EDM())]

# How far the standard deviation is off at the default number of steps. DDIM is of first order; steps that are even in
# the time of VP, as published, are long at low noise.
DEFAULT_ERROR = {"heun": 0.06, "dpm-singlestep": 0.02, "dpm-multistep": 0.06, "ddim": 0.17}
LONG_STEPS = {("dpm-multistep", "vp"): 0.24, ("dpm-multistep", "ldm"): 0.17}


@pytest.mark.parametrize("schedule", [VP(), VE(), LDM(), EDM()], ids=lambda schedule: schedule.name)
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_finds_mean_and_deviation_of_gaussian_data_on_every_schedule(name, schedule):
    """The denoiser is affine, and so are the samples in the noise: 0 ends at their mean, 1 one deviation above."""
    D, noise = GaussianDenoiser(0.3, 0.5), torch.tensor([0.0, 1.0], dtype=torch.float64)
    for steps, error in ((None, LONG_STEPS.get((name, schedule.name), DEFAULT_ERROR[name])), (400, 0.02)):
        config = sampler_config(name, schedule, steps)
        draws = iter([noise])  # that of the start alone
        trajectory = Trajectory(config, partial(next, draws))
        while trajectory.wanted is not None:
            x, sigma, _ = trajectory.wanted
            trajectory.advance(D(x, sigma, 0))
        x = trajectory.images
        mean, deviation = x[0].item(), (x[1] - x[0]).item()
        last = 0.0 if name == "heun" else config.levels[-1]
        assert mean == pytest.approx(0.3, rel=0.02)
        assert deviation == pytest.approx(math.hypot(0.5, last), rel=error)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 18, 20])
@pytest.mark.parametrize(("name", "schedule"), EVERY, ids=[f"{n}-{s.name}" for n, s in EVERY])
def test_the_network_is_evaluated_where_the_sampler_says(name, schedule, steps):
    D, config = GaussianDenoiser(), sampler_config(name, schedule, steps)
    result = sample(D, SeededNoise([0], SHAPE), config)
    evaluated = [sigma for sigma, _, _ in D.calls]
    assert all(isinstance(sigma, float) for sigma in evaluated)  # known on the host
    assert evaluated == config.evaluated_levels()
    assert result.evaluations == len(evaluated)
    lowest, highest = {"vp": (0.0, 1.0), "ldm": (0, 999), "edm": (0.002, 80)}[schedule.name]
    assert float(schedule.sigma(lowest)) <= min(evaluated) <= max(evaluated) <= float(schedule.sigma(highest))


def test_heun_says_where_it_evaluates_between_added_noise():
    D, config = GaussianDenoiser(), SamplerConfig(9, S_churn=4, S_min=0.1, S_max=40)
    heun(D, SeededNoise([0], SHAPE), config)
    assert [sigma for sigma, _, _ in D.calls] == config.evaluated_levels()


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_presets_tell_the_evaluations_of_each_stage(preset):
    network = RecordingNetwork(F=lambda x, noise, stage: 0 * x)
    denoiser = preset.denoiser(network)
    schedule = schedule_of(denoiser)
    assert default_sampler(denoiser) == preset.sampler
    config = sampler_config(preset.sampler, schedule, preset.sampler_steps)
    result = generate(denoiser, [0], SHAPE, config)
    assert result.evaluations_per_stage == preset.evaluations()
    assert [int(stage[0]) for _, _, stage, _ in network.calls] == sorted(
        (stage for stage, count in enumerate(result.evaluations_per_stage) for _ in range(count)),
        reverse=True,
    )


def test_a_denoiser_has_its_own_schedule_or_edms():
    network = RecordingNetwork(num_stages=1)
    ve = SchedulePreconditioner(network, Stages.single(), VE())
    assert (schedule_of(ve), default_sampler(ve)) == (VE(), "dpm-singlestep")
    edm = EDMPreconditioner(network, Stages.single())
    assert (schedule_of(edm), default_sampler(edm)) == (EDM(), "heun")


def test_sampler_config_knows_every_sampler_and_its_defaults():
    for name, evaluations in zip(SAMPLERS, (35, 20, 20, 20), strict=True):
        assert len(sampler_config(name).evaluated_levels()) == evaluations
    assert sampler_config("heun") == SamplerConfig()
    assert sampler_config("ddim", eta=0.25).eta == 0.25
    low = sampler_config("heun", LDM())
    assert (low.sigma_min, low.sigma_max) == (float(LDM().sigmas[0]), 80.0)
    assert sampler_config("heun", VP(), 9, sigma_min=0.1, S_churn=1) == SamplerConfig(9, 0.1, S_churn=1)


@pytest.mark.parametrize(
    ("name", "schedule", "steps", "settings", "message"),
    [
        ("euler", EDM(), 3, {}, "sampler must be one of heun, dpm-single.*, ddim, got 'euler'"),
        ("heun", EDM(), 0, {}, "num_steps=0"),
        ("dpm-singlestep", VP(), 0, {}, "DPMSinglestepConfig: steps=0 must be at least 1"),
        ("dpm-multistep", LDM(), 0, {}, "DPMMultistepConfig: steps=0 must be at least 1"),
        ("ddim", VP(), -1, {}, "DDIMConfig: steps=-1 must be at least 1"),
        ("ddim", VP(), 3, {"eta": 1.5}, "eta=1.5 must lie within 0 and 1"),
        ("ddim", VP(), 3, {"eta": math.nan}, "eta=nan"),
        (
            "heun",
            LDM(),
            3,
            {"sigma_min": 0.01},
            r"sigma=0.01 to 80, but the ldm schedule has 0.0387589 to 83.8",
        ),
        ("heun", VP(), 3, {"sigma_max": 160}, r"sigma=0.002 to 160, but the vp schedule has 0 to 152.16"),
        (
            "heun",
            LDM(),
            18,
            {"S_churn": 40},
            r"to 113.137, but the ldm schedule .* change sigma_min, .* or S_max",
        ),
    ],
)
def test_sampler_config_by_name_rejects(name, schedule, steps, settings, message):
    with pytest.raises(ValueError, match=message):
        sampler_config(name, schedule, steps, **settings)


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (DDIMConfig, ([1.0],), r"at least two noise levels .* got \(1.0,\)"),
        (DDIMConfig, ([1.0, 1.0],), "that fall"),
        (DDIMConfig, ([1.0, -1.0],), "to 0 or above"),
        (DDIMConfig, ([math.inf, 1.0],), "from a finite one"),
        (DDIMConfig, ([math.nan, 1.0],), "nan"),
        (DPMSinglestepConfig, ([2.0, 1.0], (4,)), r"DPMSinglestepConfig: orders .* of 1, 2, 3, got \(4,\)"),
        (DPMSinglestepConfig, ([2.0, 1.0], (1, 1)), "must be 1 numbers, one per step"),
        (DPMSinglestepConfig, ([2.0, 0.0], (2,)), "a step to sigma = 0 must be of order 1, got 2"),
        (DPMMultistepConfig, ([2.0, 1.0, 0.5], (1, 3)), r"of 1, 2, got \(1, 3\)"),
        (DPMMultistepConfig, ([2.0, 1.0, 0.5], (2, 2)), "the first step must be of order 1, got 2"),
    ],
)
def test_solver_configs_reject(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        kind(*arguments)


def test_sample_takes_the_configs_of_samplers_only():
    with pytest.raises(TypeError, match=r"config must be one of SamplerConfig, DPMSinglestep.*, got str"):
        generate(EDMPreconditioner(RecordingNetwork(), Stages.edm()), [1], SHAPE, "heun")

import math

import numpy as np
import pytest
import torch

from multistage_diffusion.noise import schedules
from multistage_diffusion.noise.levels import log_snr
from multistage_diffusion.noise.schedules import LogNormal


def test_edm_sigmas_ends_and_order():
    sigmas = schedules.edm_sigmas()
    assert sigmas.dtype == torch.float64
    assert sigmas.shape == (19,)
    assert sigmas[0] == 80
    assert sigmas[-2] == 0.002
    assert sigmas[-1] == 0
    assert bool((sigmas[:-1] > sigmas[1:]).all())


def test_edm_sigmas_are_equidistant_in_the_rho_th_root():
    steps = schedules.edm_sigmas(7, 0.01, 50, rho=3)[:-1].pow(1 / 3).diff()
    # The cube root of float64 numbers of order 1: a few units in the last place.
    torch.testing.assert_close(steps, steps[:1].expand(6), rtol=1e-13, atol=0)


def test_edm_sigmas_single_step():
    assert schedules.edm_sigmas(1).tolist() == [80, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_steps": 0}, "num_steps=0"),
        ({"sigma_min": 0}, "sigma_min=0"),
        ({"sigma_min": 90}, "sigma_min=90"),
        ({"sigma_max": math.inf}, "sigma_max=inf"),
        ({"rho": 0}, "rho=0"),
        ({"rho": math.nan}, "rho=nan must be positive and finite"),
        ({"rho": 1e17}, r"rho=1e\+17 the 18 noise levels from .* do not fall"),
    ],
)
def test_edm_sigmas_rejects(arguments, message):
    with pytest.raises(ValueError, match=message):
        schedules.edm_sigmas(**arguments)


def test_vp_reproduces_the_published_boundaries():
    # EDM's stages come from VP times: 2.5103 = sigma_VP(0.442), 7.6577 = sigma_VP(0.636); four decimals.
    assert schedules.vp_sigma([0.442, 0.636]).tolist() == pytest.approx([2.5103, 7.6577], abs=5e-5)


def test_vp_t_inverts_vp_sigma():
    t = torch.tensor([0.0, 1e-12, 1e-5, 0.001, 0.442, 1.0], dtype=torch.float64)
    # sqrt halves the relative accuracy lost in log1p(expm1(.)); float64.
    torch.testing.assert_close(schedules.vp_t(schedules.vp_sigma(t)), t, rtol=1e-14, atol=0)
    with pytest.raises(ValueError, match="-1"):
        schedules.vp_t(-1.0)
    with pytest.raises(ValueError, match=r"-0\.5"):
        schedules.vp_sigma(-0.5)


def test_log_snr_is_that_of_powers():
    assert log_snr(np.array([10.0])).item() == pytest.approx(-math.log(100), rel=1e-15)


def test_lognormal_inverse_cdf_inverts_the_cdf():
    distribution = LogNormal(-1.2, 1.2)
    u = torch.tensor([0.01, 0.3, 0.5, 0.9, 0.999], dtype=torch.float64)
    for low, high in ((0, math.inf), (0, 2.5103), (2.5103, 7.6577), (7.6577, math.inf), (50, 60)):
        sigma = distribution.inverse_cdf(u, low, high)
        whole = distribution.mass(low, high)
        back = [distribution.mass(low, s) / whole for s in sigma.tolist()]
        # float64 rounding of ln(sigma), amplified by the cancellation in mass(50, s): measured worst 4e-13.
        assert back == pytest.approx(u.tolist(), rel=1e-11)


def test_lognormal_inverse_cdf_stays_inside_of_the_interval():
    distribution = LogNormal()
    u = torch.tensor([0.0, 1.0], dtype=torch.float64)
    for low, high in ((0.0, 0.1), (0.1, 0.1 + 1e-15), (7.6577, math.inf), (1e6, 1e7)):
        sigma = distribution.inverse_cdf(u, low, high)
        assert bool((sigma > low).all())
        assert bool((sigma <= high).all())
        assert bool(torch.isfinite(sigma).all())


def test_lognormal_rejects():
    with pytest.raises(ValueError, match="P_std=0"):
        LogNormal(0, 0)
    with pytest.raises(ValueError, match="P_mean=nan"):
        LogNormal(math.nan, 1)


@pytest.mark.parametrize("kind", schedules.SCHEDULES.values(), ids=lambda kind: kind.name)
def test_schedules_convert_both_ways_on_their_grid(kind):
    schedule = kind()
    for points in (2, 21):
        grid = schedule.grid(points)
        sigma = schedule.sigma(grid)
        assert grid.shape == (points,)
        assert bool((sigma.diff() > 0).all())
        # vp_t and vp_sigma are inverse to 1e-14, the others to a few units in the last place.
        torch.testing.assert_close(schedule.value(sigma), grid, rtol=1e-14, atol=1e-15)
    with pytest.raises(ValueError, match="points=1"):
        schedule.grid(1)
    with pytest.raises(TypeError, match=r"points must be an integer, got 2\.5"):
        schedule.grid(2.5)


def test_vp_grid_is_the_published_one():
    expected = [0.001 + 0.05 * k for k in range(20)] + [1.0]
    assert schedules.VP().grid().tolist() == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize("points", [999, 1000, 1001, 1500, 10_000])
def test_vp_grid_ascends_with_any_number_of_points(points):
    grid = schedules.VP().grid(points)
    assert (grid[0].item(), grid[-1].item(), len(grid)) == (0.001, 1, points)
    assert bool((grid.diff() > 0).all())
    assert grid[1].item() == pytest.approx(0.001 + (1 if points <= 1000 else 0.999) / (points - 1), rel=1e-12)


def test_ldm_grid_has_each_step_once_at_most():
    ldm = schedules.LDM()
    for points in (2, 21, 700, 998, 999, 1000):
        assert bool((ldm.grid(points).diff() >= 1).all())
    with pytest.raises(ValueError, match="points=1001 must be at most the 1000 steps of ldm"):
        ldm.grid(1001)


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (schedules.VE, (5, 1), "VE: sigma_min=5 and sigma_max=1 must satisfy 0 < min < max < inf"),
        (schedules.VE, (-1,), "VE: sigma_min=-1"),
        (schedules.EDM, (0, 80), "EDM: sigma_min=0"),
        (schedules.EDM, (0.002, math.nan), "EDM: sigma_min=0.002 and sigma_max=nan"),
        (schedules.VP, (-5, 0.1), "VP: beta_d=-5 must be at least 0"),
        (schedules.VP, (19.9, 0), "beta_min=0 above 0"),
        (schedules.LDM, (0.0015, 2), "LDM: linear_start=0.0015 and linear_end=2 must satisfy"),
        (schedules.LDM, (0.0015, 0.0195, 1), "LDM: num_steps=1 must be at least 2"),
        (schedules.LDM, (0.0015, 0.0195, 10**12), "LDM: num_steps=1000000000000 must be at most 1000000"),
        (
            schedules.LDM,
            (0.0015, 0.0195, 1000, (0.1, 1.0)),
            "LDM: every one of betas must lie between 0 and 1",
        ),
        (schedules.LDM, (0.0015, 0.0195, 1000, (0.1,)), "LDM: num_steps=1 must be at least 2"),
        (schedules.VP, (19.9, 0.1, 1), "VP: M=1 must be at least 2"),
        (schedules.VP, (19.9, 0.1, 1000, 1.0), r"VP: epsilon_t=1\.0 must be at least 0 and below 1"),
        (schedules.IDDPM, (0.0,), "IDDPM: 0 < C_1 < 1"),
        (schedules.IDDPM, (0.001, -1), "IDDPM: 0 < C_1 < 1 and 0 <= C_2 < inf are needed, got 0.001 and -1"),
        (schedules.IDDPM, (0.001, 0.008, 10**12), "IDDPM: M=1000000000000 must be at most"),
    ],
)
def test_schedules_reject(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        kind(*arguments)


def test_ldm_steps_are_the_published_ones():
    ldm = schedules.LDM()
    assert ldm.sigma([442.0, 631.0]).tolist() == pytest.approx([2.153, 5.315], abs=5e-4)
    steps = torch.arange(1000, dtype=torch.float64)
    assert torch.equal(ldm.sigma(steps), ldm.sigmas)
    assert torch.equal(ldm.value(ldm.sigmas), steps)
    # The product of float32 tables in the reference model differs by 1e-7; this one is float64 all through.
    alpha_bar = (1 - torch.linspace(0.0015**0.5, 0.0195**0.5, 1000).double().square()).cumprod(0)
    torch.testing.assert_close(ldm.sigmas, ((1 - alpha_bar) / alpha_bar).sqrt(), rtol=1e-5, atol=0)


def test_ldm_cuts_are_the_steps_at_or_below_a_noise_level():
    ldm = schedules.LDM()
    assert torch.equal(ldm.cut(ldm.sigmas), torch.arange(1000, dtype=torch.float64))
    between = (ldm.sigmas[1:] * ldm.sigmas[:-1]).sqrt()
    assert torch.equal(ldm.cut(between), torch.arange(999, dtype=torch.float64))
    assert ldm.cut([1e-3, 1e3]).tolist() == [0, 999]


def test_ldm_interpolates_between_its_steps():
    ldm = schedules.LDM()
    half = ldm.sigma(0.5)
    assert half.item() == pytest.approx(math.sqrt(ldm.sigmas[0] * ldm.sigmas[1]), rel=1e-14)
    assert ldm.value(half).item() == pytest.approx(0.5, rel=1e-9)
    assert ldm.value([1e-3, 1e3]).tolist() == [0, 999]
    with pytest.raises(ValueError, match="steps must lie within 0 and 999, got 1000"):
        ldm.sigma(1000)


def test_betas_that_are_given_count():
    even = schedules.LDM()
    betas = torch.linspace(0.0015**0.5, 0.0195**0.5, 1000, dtype=torch.float64).square().tolist()
    given = schedules.LDM(betas=betas)
    torch.testing.assert_close(given.sigmas, even.sigmas, rtol=1e-12, atol=0)
    two = schedules.LDM(betas=(0.1, 0.5))
    assert (two.num_steps, two.domain) == (2, (0.0, 2.0))
    assert two.sigmas.tolist() == pytest.approx([math.sqrt(0.1 / 0.9), math.sqrt(0.55 / 0.45)], rel=1e-14)


@pytest.mark.parametrize("arguments", [(), (0.01, 0.1, 50)])
def test_iddpm_steps_rise_and_have_an_inverse(arguments):
    """The recurrence itself is tested with the denoiser (``test_network_files``)."""
    iddpm = schedules.IDDPM(*arguments)
    assert (len(iddpm.sigmas), iddpm.domain) == (iddpm.M, (0.0, float(iddpm.M)))
    assert bool((iddpm.sigmas.diff() > 0).all())
    steps = torch.arange(iddpm.M, dtype=torch.float64)
    assert torch.equal(iddpm.value(iddpm.sigmas), steps)
    assert torch.equal(iddpm.c_noise(iddpm.sigmas), steps)
    assert iddpm.c_noise([0.0, float(iddpm.sigmas[0]) * 0.4, 1e9]).tolist() == [-1, -1, iddpm.M - 1]
    middle = (iddpm.sigmas[3] + iddpm.sigmas[4]) / 2
    assert iddpm.c_noise([middle * (1 - 1e-12), middle * (1 + 1e-12)]).tolist() == [3, 4]


def test_schedules_reach_their_ends_exactly():
    assert schedules.VE().sigma([0.0, 1.0]).tolist() == [0.01, 50.0]
    assert schedules.EDM().grid()[[0, -1]].tolist() == [0.002, 80.0]

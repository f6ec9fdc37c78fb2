"""Noise levels: EDM's steps, the VP SDE's times, and the logarithm of the signal-to-noise ratio.

sigma is the standard deviation of the noise in units of the data (data in [-1, 1]), as in EDM (arXiv 2206.00364).
"""

from __future__ import annotations

import math

import torch

from multistage_diffusion.common.checks import integer
from multistage_diffusion.noise.distributions import host64


def edm_sigmas(
    num_steps: int = 18, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> torch.Tensor:
    """The noise levels of EDM's samplers (arXiv 2206.00364, eq. 5).

    sigma_i = (sigma_max^(1/rho) + i/(N−1) (sigma_min^(1/rho) − sigma_max^(1/rho)))^rho for i < N, and
    sigma_N = 0.

    Returns:
        float64 CPU tensor ``[num_steps + 1]``, decreasing from sigma_max through sigma_min to 0.

    Raises:
        TypeError: steps that are no integer.
        ValueError: no step, ends that are no noise levels or fall the wrong way, or a rho with which float64 does not
            tell the levels between apart.
    """
    num_steps = integer("edm_sigmas", "num_steps", num_steps, 1)
    if not 0 < sigma_min <= sigma_max < math.inf:
        raise ValueError(
            f"edm_sigmas: sigma_min={sigma_min} and sigma_max={sigma_max} must satisfy 0 < min <= max < inf"
        )
    if not 0 < rho < math.inf:
        raise ValueError(f"edm_sigmas: rho={rho} must be positive and finite")
    try:
        start, end = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    except OverflowError:
        start, end = math.inf, 0.0
    i = torch.arange(num_steps, dtype=torch.float64)
    sigmas = ((start + i / max(num_steps - 1, 1) * (end - start)) ** rho).clamp(sigma_min, sigma_max)
    sigmas[0] = sigma_max
    if num_steps > 1:
        sigmas[-1] = sigma_min
    falling = sigma_min == sigma_max or bool((sigmas.diff() < 0).all())
    if not (falling and bool(sigmas.isfinite().all())):
        raise ValueError(
            f"edm_sigmas: with rho={rho} the {num_steps} noise levels from sigma_max={sigma_max} to "
            f"sigma_min={sigma_min} do not fall in float64; 7 is usual"
        )
    return torch.cat([sigmas, torch.zeros(1, dtype=torch.float64)])


def between(sigma: float, sigma_next: float, share: float) -> float:
    """The level that is ``share`` of the way from sigma to sigma_next, in log-SNR."""
    return sigma ** (1 - share) * sigma_next**share


def log_snr(sigma) -> torch.Tensor:
    """ln of the signal-to-noise ratio of powers, alpha²/(alpha sigma)² = 1/sigma²: −2 ln sigma."""
    return -2 * host64(sigma).log()


def vp_sigma(t, beta_d: float = 19.9, beta_min: float = 0.1) -> torch.Tensor:
    """Noise level of the VP SDE: sigma(t)² = exp(beta_d t²/2 + beta_min t) − 1, t in [0, 1]."""
    t = host64(t)
    if bool((t.isnan() | (t < 0)).any()):
        raise ValueError(f"vp_sigma: times must be at least 0; got {float(t.min())}")
    return torch.expm1(beta_d * t * t / 2 + beta_min * t).sqrt()


def vp_t(sigma, beta_d: float = 19.9, beta_min: float = 0.1) -> torch.Tensor:
    """Time of the VP SDE at which the noise level is sigma; the inverse of ``vp_sigma``."""
    sigma = host64(sigma)
    if bool((sigma.isnan() | (sigma < 0)).any()):
        raise ValueError(f"vp_t: noise levels must be at least 0; got {float(sigma.min())}")
    L = torch.log1p(sigma * sigma)
    return 2 * L / (beta_min + (beta_min * beta_min + 2 * beta_d * L).sqrt())

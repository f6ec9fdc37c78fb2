"""The training loss of a batch at given noise levels."""

from __future__ import annotations

import torch

from multistage_diffusion.common.transfer import host_to_device
from multistage_diffusion.networks.stage_order import StageOrder
from multistage_diffusion.noise.preconditioning import Preconditioner


def edm_weight(sigma: torch.Tensor, sigma_data: float = 0.5) -> torch.Tensor:
    """lambda(sigma) = (sigma² + sigma_data²) / (sigma sigma_data)², EDM's loss weight (table 1)."""
    return (sigma * sigma + sigma_data * sigma_data) / (sigma * sigma_data) ** 2


def edm_loss(
    denoiser: Preconditioner,
    y: torch.Tensor,
    sigma: torch.Tensor,
    stage: torch.Tensor | None = None,
    *,
    noise: torch.Tensor,
    **conditioning,
) -> torch.Tensor:
    """lambda(sigma) ‖D(y + sigma n; sigma) − y‖² of every sample (EDM, arXiv 2206.00364, eq. 2 with its
    weight).

    The squared norm is a SUM over channels and pixels, as in the paper. A network that predicts nothing (F
    = 0) has an expected loss of 1 per channel and pixel at every sigma.

    Args:
        denoiser: D, with ``sigma_data``: an ``EDMPreconditioner``.
        y: clean images ``[B, C, H, W]``.
        sigma: noise levels ``[B]``, or one for all, on the host.
        stage: stage ids ``[B]``, on the host; default: found from sigma.
        noise: n, unit normal, of y's shape.

    Returns:
        ``[B]``, in float32 at least, differentiable.

    Raises:
        TypeError: a denoiser without ``sigma_data``.
        ValueError: noise of another shape than y's; sigmas and stages as a call of the denoiser.
    """
    if not hasattr(denoiser, "sigma_data"):
        raise TypeError(
            f"edm_loss: denoiser must have sigma_data, as EDMPreconditioner has, got {type(denoiser).__name__}; "
            "denoising_loss takes any"
        )
    sigma = denoiser.batched_sigma(sigma, len(y)).to("cpu", torch.float64)
    weight = edm_weight(sigma, denoiser.sigma_data)
    return denoising_loss(denoiser, y, sigma, stage, noise=noise, weight=weight, **conditioning)


def denoising_loss(
    denoiser: Preconditioner,
    y: torch.Tensor,
    sigma: torch.Tensor,
    stage: torch.Tensor | None = None,
    *,
    noise: torch.Tensor,
    weight: torch.Tensor | None = None,
    **conditioning,
) -> torch.Tensor:
    """``weight`` ‖D(y + sigma n; sigma) − y‖² of every sample, for any preconditioning.

    The default weight, 1 / c_out², makes it the squared error of the network's own prediction: of the noise for
    ε-prediction (``SchedulePreconditioner``: VP, VE and LDM train on that), of y or v, or EDM's loss.

    Args and returns as ``edm_loss``; ``weight``: ``[B]``, on the host.
    """
    dtype = torch.promote_types(y.dtype, torch.float32)
    sigma = denoiser.batched_sigma(sigma, len(y))
    stage = denoiser.batched_stage(stage, sigma, len(y))
    scalars = host_to_device(loss_scalars(denoiser, sigma, weight), y.device, dtype)
    return loss_at(denoiser, y, scalars, stage, noise=noise, **conditioning)


def loss_scalars(
    denoiser: Preconditioner, sigma: torch.Tensor, weight: torch.Tensor | None = None
) -> torch.Tensor:
    """What ``loss_at`` takes of the noise levels, on the host: float64 ``[6, B]``.

    The rows are the denoiser's c_skip, c_out, c_in and c_noise, then sigma and the weight.
    """
    sigma = sigma.to("cpu", torch.float64)
    coefficients = denoiser.coefficients(sigma)
    weight = coefficients.c_out.square().reciprocal() if weight is None else weight
    return torch.stack([*coefficients, sigma, weight.to(sigma)])


def loss_at(
    denoiser: Preconditioner,
    y: torch.Tensor,
    scalars: torch.Tensor,
    stage: torch.Tensor | StageOrder,
    *,
    noise: torch.Tensor,
    **conditioning,
) -> torch.Tensor:
    """``denoising_loss``, with ``scalars`` of ``loss_scalars`` where y is: nothing is copied from the host."""
    if noise.shape != y.shape:
        raise ValueError(
            f"denoising_loss: noise must be of y's shape {tuple(y.shape)}, got {tuple(noise.shape)}"
        )
    sigma, weight = scalars[4:]
    y = y.to(torch.promote_types(y.dtype, torch.float32))
    D = denoiser.denoise(y + sigma[:, None, None, None] * noise, scalars[:4], stage, **conditioning)
    return weight * (D - y).square().sum(dim=(1, 2, 3))

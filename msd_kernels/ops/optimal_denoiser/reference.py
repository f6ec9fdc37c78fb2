"""The optimal denoiser by direct differences to every sample, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK_VALUES = 1 << 22


def optimal_denoiser(
    x: Tensor, sigma: Tensor, data: Tensor, center: Tensor, low: float, step: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiable in plain autograd; arguments and results as the dispatcher op
    ``msd_kernels::optimal_denoiser``."""
    x, y = x.double(), data.double() * step + low
    scores = _scores(x, sigma, y)
    relative = (x - center).square().sum(1) / (2 * sigma.square())
    log_sum = torch.logsumexp(scores, dim=1)
    log_sum_squares = torch.logsumexp(2 * scores, dim=1)
    return torch.softmax(scores, dim=1) @ y, log_sum + relative, log_sum_squares + 2 * relative


def optimal_denoiser_backward(
    dmean: Tensor,
    dlog_sum: Tensor,
    x: Tensor,
    sigma: Tensor,
    data: Tensor,
    center: Tensor,
    mean: Tensor,
    log_sum: Tensor,
    low: float,
    step: float,
) -> tuple[Tensor, Tensor]:
    """Gradients for ``(x, sigma)``."""
    wide_x, y = x.double(), data.double() * step + low
    scores = _scores(wide_x, sigma, y)
    weights = torch.softmax(scores, dim=1)
    projected = dmean @ y.T
    deviation = projected - (weights * projected).sum(1, keepdim=True)
    variance = sigma.square()
    dx = (weights * deviation) @ y + dlog_sum[:, None] * (weights @ y - center)
    distance = (wide_x - center).square().sum(1, keepdim=True) + 2 * variance[:, None] * scores
    dsigma = -(weights * (deviation + dlog_sum[:, None]) * distance).sum(1) / sigma**3
    return (dx / variance[:, None]).to(x.dtype), dsigma


def _scores(x: Tensor, sigma: Tensor, y: Tensor) -> Tensor:
    """-|x - y_i|² / (2 sigma²) as ``[B, N]``, a block of samples at a time."""
    rows = max(1, _BLOCK_VALUES // x.numel()) if x.numel() else y.shape[0]
    distances = [(x[:, None] - block).square().sum(2) for block in y.split(rows)]
    return torch.cat(distances, dim=1) / (-2 * sigma.square()[:, None])

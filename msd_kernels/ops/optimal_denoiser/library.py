"""The optimal denoiser through the products of BLAS and cuBLAS: an online softmax over blocks of the data.

Everything is float64: at sigma = 0.002 a score needs 13 digits, which float32 products do not have. A float64
product costs two of float32 on processors and on data-centre GPUs, and, unlike those, does not depend on
``torch.set_float32_matmul_precision``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

# What a block of the data and its products may take.
_BLOCK_BYTES = 48 << 20
_CUDA_BLOCK_BYTES = 512 << 20
_MIN_ROWS = 16

# (data [n, D], shift [D], step, centred [n, D], half_norms [n]); see `centre`
Centre = Callable[[Tensor, Tensor, float, Tensor, Tensor], None]
# (products [B, n], half_norms [n], precision [B], peak [B], sums [2, B]) -> rescale; see `update_softmax`
UpdateSoftmax = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


class Block(Protocol):
    """Some of the data, less the centre."""

    half_norms: Tensor  # [n] half the squared norms
    products: Tensor  # [B, n] with the queries; the softmax overwrites them with weights

    def accumulate(self, mean: Tensor, rescale: Tensor) -> None:
        """mean [B, D] = rescale [B] * mean + products @ data."""


@dataclass(frozen=True)
class CentredBlock:
    """A block that is kept in float64."""

    centred: Tensor  # [n, D]
    half_norms: Tensor
    products: Tensor

    def accumulate(self, mean: Tensor, rescale: Tensor) -> None:
        mean.mul_(rescale[:, None]).addmm_(self.products, self.centred)


def optimal_denoiser(
    x: Tensor, sigma: Tensor, data: Tensor, center: Tensor, low: float, step: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As the dispatcher op ``msd_kernels::optimal_denoiser``."""
    queries = x.double() - center
    blocks = centred_blocks(queries, data, low - center, step, centre)
    return stream_posterior(queries, sigma, center, blocks, update_softmax)


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
    return stream_gradients(dmean, dlog_sum, x, sigma, data, center, mean, log_sum, low, step, centre)


def stream_posterior(
    queries: Tensor, sigma: Tensor, center: Tensor, blocks: Iterable[Block], update_softmax: UpdateSoftmax
) -> tuple[Tensor, Tensor, Tensor]:
    """One pass over the data. Per query: the peak of the scores so far, and relative to it the sums of the
    weights, of their squares, and of weights times data."""
    precision = sigma.reciprocal().square()
    peak = torch.full_like(precision, -torch.inf)
    sums = precision.new_zeros(2, queries.shape[0])
    mean = torch.zeros_like(queries)
    for block in blocks:
        rescale = update_softmax(block.products, block.half_norms, precision, peak, sums)
        block.accumulate(mean, rescale)
    mean.div_(sums[0][:, None]).add_(center)
    return mean, peak + sums[0].log(), 2 * peak + sums[1].log()


def stream_gradients(
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
    centre: Centre,
) -> tuple[Tensor, Tensor]:
    """With the weights w_i and a_i = dmean·(y_i - mean) + dlog_sum: dx = sum_i w_i a_i (y_i - center) /
    sigma² and dsigma = -2 sum_i w_i a_i score_i / sigma."""
    queries = x.double() - center
    precision = sigma.reciprocal().square()[:, None]
    offset = dlog_sum - (dmean * (mean - center)).sum(1)
    dx, dsigma = torch.zeros_like(queries), torch.zeros_like(sigma)
    for block in centred_blocks(queries, data, low - center, step, centre):
        scores = block.products.sub_(block.half_norms).mul_(precision)
        amounts = (scores - log_sum[:, None]).exp_()
        amounts *= torch.addmm(offset[:, None], dmean, block.centred.T)
        dx.addmm_(amounts, block.centred)
        dsigma += scores.mul_(amounts).sum(1)
    return dx.mul_(precision).to(x.dtype), dsigma.mul_(-2).div_(sigma)


def centred_blocks(
    queries: Tensor, data: Tensor, shift: Tensor, step: float, centre: Centre
) -> Iterator[CentredBlock]:
    """The data block by block, as step * data + shift; each block overwrites the one before."""
    batch, dim = queries.shape
    size = min(rows_per_block(batch, dim, queries.device), data.shape[0])
    centred, half_norms = queries.new_empty(size, dim), queries.new_empty(size)
    products = queries.new_empty(batch * size)
    for rows in data.split(size):
        n = rows.shape[0]
        block = CentredBlock(centred[:n], half_norms[:n], products[: batch * n].view(batch, n))
        centre(rows, shift, step, block.centred, block.half_norms)
        torch.mm(queries, block.centred.T, out=block.products)
        yield block


def rows_per_block(batch: int, dim: int, device: torch.device) -> int:
    """How many samples a block holds."""
    available = _CUDA_BLOCK_BYTES if device.type == "cuda" else _BLOCK_BYTES
    return max(_MIN_ROWS, available // (8 * (batch + dim)))


def centre(data: Tensor, shift: Tensor, step: float, centred: Tensor, half_norms: Tensor) -> None:
    """Writes step * data + shift, and half its squared norms."""
    centred.copy_(data)
    torch.add(shift, centred, alpha=step, out=centred)
    torch.linalg.vecdot(centred, centred, out=half_norms).mul_(0.5)


def update_softmax(
    products: Tensor, half_norms: Tensor, precision: Tensor, peak: Tensor, sums: Tensor
) -> Tensor:
    """One step of the online softmax.

    Overwrites the products with the weights exp((product - half_norm) * precision - peak), after the peak has
    risen to the largest score so far; adds the weights and their squares to the sums.

    Returns:
        ``[B]``: what sums made with the peak before must be multiplied with.
    """
    scores = products.sub_(half_norms).mul_(precision[:, None])
    new_peak = torch.maximum(peak, scores.amax(1))
    rescale = (peak - new_peak).exp_()
    weights = scores.sub_(new_peak[:, None]).exp_()
    sums[0].mul_(rescale).add_(weights.sum(1))
    sums[1].mul_(rescale.square()).add_(torch.linalg.vecdot(weights, weights))
    peak.copy_(new_peak)
    return rescale

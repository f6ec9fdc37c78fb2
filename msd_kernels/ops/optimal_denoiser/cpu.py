"""The optimal denoiser with BLAS for the products and compiled passes for all else
(csrc/cpu/optimal_denoiser.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from msd_kernels.dispatch.backends import Call
from msd_kernels.ops.optimal_denoiser.library import centred_blocks, stream_gradients, stream_posterior
from msd_kernels.runtime.extension import TYPE_CODES, addresses, load

CPU_DTYPES = (torch.uint8, torch.float32, torch.bfloat16, torch.float16, torch.float64)


def cannot(call: Call) -> str | None:
    """Why the CPU kernel cannot serve a call, or None."""
    if call.dtype not in CPU_DTYPES:
        return f"takes uint8, float32, bfloat16, float16 and float64 data, got {call.dtype}"
    return load("cpu").reason or None


def optimal_denoiser(
    x: Tensor, sigma: Tensor, data: Tensor, center: Tensor, low: float, step: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As the dispatcher op ``msd_kernels::optimal_denoiser``."""
    queries = x.double() - center
    blocks = centred_blocks(queries, data, low - center, step, _centre)
    return stream_posterior(queries, sigma, center, blocks, _update_softmax)


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
    return stream_gradients(dmean, dlog_sum, x, sigma, data, center, mean, log_sum, low, step, _centre)


def _centre(data: Tensor, shift: Tensor, step: float, centred: Tensor, half_norms: Tensor) -> None:
    data = data.contiguous()
    load("cpu").module.optimal_denoiser_centre(
        *data.shape, TYPE_CODES[data.dtype], step, addresses(data, shift), addresses(centred, half_norms)
    )


def _update_softmax(
    products: Tensor, half_norms: Tensor, precision: Tensor, peak: Tensor, sums: Tensor
) -> Tensor:
    rescale = torch.empty_like(peak)
    load("cpu").module.optimal_denoiser_update_softmax(
        *products.shape, addresses(half_norms, precision), addresses(products, peak, sums, rescale)
    )
    return rescale

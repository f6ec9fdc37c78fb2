"""The optimal denoiser by two Triton products on float64 tensor cores, which read the data as they are
stored.

The backward goes through cuBLAS, as that of the ``library`` backend.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version

import torch
from torch import Tensor

from msd_kernels.dispatch.backends import Call
from msd_kernels.ops.optimal_denoiser.library import (
    optimal_denoiser_backward,
    stream_posterior,
    update_softmax,
)
from msd_kernels.runtime import tuned
from msd_kernels.runtime.launch import OLDEST_ARCHITECTURE, interpreted, launch, unavailable
from msd_kernels.runtime.tuned import DenoiserParameters, DenoiserTile

__all__ = ["cannot", "optimal_denoiser", "optimal_denoiser_backward"]

DTYPES = (torch.uint8, torch.float32, torch.bfloat16, torch.float16, torch.float64)
# The scores of a block of the data may take this much.
_BLOCK_BYTES = 256 << 20


INTERPRETED = DenoiserParameters(DenoiserTile(16, 16, 16, 4), DenoiserTile(16, 16, 16, 4))


@cache
def has_tensor_cores(architecture: int) -> bool:
    """Whether Triton multiplies float64 on tensor cores: on sm_80, on sm_90, and from 3.9 on on sm_100."""
    release = tuple(map(int, version("triton").split(".")[:2]))
    return architecture in (80, 90) or (architecture // 10 == 10 and release >= (3, 9))


def parameters(architecture: int) -> DenoiserParameters:
    """The launch parameters of a compute capability without its point: 90 for 9.0."""
    return tuned.optimal_denoiser(
        architecture, "tensor_cores" if has_tensor_cores(architecture) else "threads"
    )


def cannot(call: Call) -> str | None:
    """Why the kernels cannot serve a call, or None."""
    if unavailable():
        return unavailable()
    if call.dtype not in DTYPES:
        return f"takes uint8, float32, bfloat16, float16 and float64 data, got {call.dtype}"
    if not interpreted() and torch.cuda.get_device_capability() < divmod(OLDEST_ARCHITECTURE, 10):
        return f"needs compute capability 8.0, got {torch.cuda.get_device_capability()}"
    return None


def optimal_denoiser(
    x: Tensor, sigma: Tensor, data: Tensor, center: Tensor, low: float, step: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As the dispatcher op ``msd_kernels::optimal_denoiser``."""
    queries = x.double() - center
    scale = torch.full((1,), step, dtype=torch.float64, device=x.device)
    blocks = _blocks(queries, data.contiguous(), low - center, scale)
    return stream_posterior(queries, sigma, center, blocks, update_softmax)


@dataclass(frozen=True)
class StoredBlock:
    """A block of the data as it is stored."""

    rows: Tensor  # [n, D]
    shift: Tensor  # [D]
    scale: Tensor  # [1]
    half_norms: Tensor
    products: Tensor

    def accumulate(self, mean: Tensor, rescale: Tensor) -> None:
        optimal_denoiser_mean(self.products, self.rows, self.shift, self.scale, rescale, mean)


def _blocks(queries: Tensor, data: Tensor, shift: Tensor, scale: Tensor) -> Iterator[StoredBlock]:
    for rows in data.split(max(16, _BLOCK_BYTES // (8 * max(1, queries.shape[0])))):
        n = rows.shape[0]
        products, half_norms = queries.new_empty(queries.shape[0], n), queries.new_empty(n)
        optimal_denoiser_products(queries, rows, shift, scale, products, half_norms)
        yield StoredBlock(rows, shift, scale, half_norms, products)


def optimal_denoiser_products(
    queries: Tensor, rows: Tensor, shift: Tensor, scale: Tensor, products: Tensor, half_norms: Tensor
) -> None:
    """Writes the products ``[B, n]`` of queries with scale * rows + shift, and half the squared norms of
    those."""
    from msd_kernels.ops.optimal_denoiser.kernels import _optimal_denoiser_products_kernel

    (batch, dim), n = queries.shape, rows.shape[0]
    tile = _parameters_for(rows).products
    arguments = (queries, rows, shift, scale, products, half_norms, batch, n, dim)
    options = {"BLOCK_B": tile.b, "BLOCK_N": tile.n, "BLOCK_D": tile.d, "num_warps": tile.warps}
    if batch:
        grid = -(-batch // tile.b) * -(-n // tile.n)
        launch(_optimal_denoiser_products_kernel, grid, queries, *arguments, **options)


def optimal_denoiser_mean(
    weights: Tensor, rows: Tensor, shift: Tensor, scale: Tensor, rescale: Tensor, mean: Tensor
) -> None:
    """mean = rescale * mean + weights @ (scale * rows + shift), in place."""
    from msd_kernels.ops.optimal_denoiser.kernels import _optimal_denoiser_mean_kernel

    (batch, dim), n = mean.shape, rows.shape[0]
    tile = _parameters_for(rows).mean
    arguments = (weights, rows, shift, scale, rescale, mean, batch, n, dim)
    options = {"BLOCK_B": tile.b, "BLOCK_N": tile.n, "BLOCK_D": tile.d, "num_warps": tile.warps}
    if batch:
        grid = -(-batch // tile.b) * -(-dim // tile.d)
        launch(_optimal_denoiser_mean_kernel, grid, mean, *arguments, **options)


def _parameters_for(data: Tensor) -> DenoiserParameters:
    return INTERPRETED if interpreted() else parameters(tuned.architecture_of(data.device))

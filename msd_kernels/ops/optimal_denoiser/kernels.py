"""Optimal denoiser: the two float64 products with data that are converted and centred as they are read."""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl

from msd_kernels.ops.optimal_denoiser.triton import has_tensor_cores, parameters
from msd_kernels.runtime.compilation import Compilation


@triton.jit
def _stored(data, n, d, rows, dim):
    """The data as they are stored, as ``[D, N]``, zero outside of them.

    Both kernels load a slice while they multiply the one before it. Triton 3.6 compiles a product of float64 only where
    a loop stands between it and the load of a narrower type.
    """
    offsets = n[None, :].to(tl.int64) * dim + d[:, None]
    return tl.load(data + offsets, mask=(d < dim)[:, None] & (n < rows)[None, :], other=0)


@triton.jit
def _samples(stored, shift, scale, n, d, rows, dim):
    """scale * stored + shift, zero outside of the data."""
    values = stored.to(tl.float64) * scale + tl.load(shift + d, mask=d < dim, other=0.0)[:, None]
    return tl.where((d < dim)[:, None] & (n < rows)[None, :], values, 0.0)


@triton.jit(do_not_specialize=["batch", "rows"])
def _optimal_denoiser_products_kernel(
    queries,  # [batch, dim] float64
    data,  # [rows, dim]
    shift,  # [dim] float64
    step,  # [1] float64
    products,  # [batch, rows] float64
    half_norms,  # [rows] float64
    batch,
    rows,
    dim: tl.int32,  # the type keeps it a number where it is 1: the loop is needed, see _stored
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A program owns BLOCK_B x BLOCK_N products. It reads its queries and its samples once, a slice of
    BLOCK_D values at a time, and the programs of the first queries write |sample|² / 2 as well."""
    tiles = tl.cdiv(batch, BLOCK_B)
    b = tl.program_id(0) % tiles * BLOCK_B + tl.arange(0, BLOCK_B)
    n = tl.program_id(0) // tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    scale = tl.load(step)
    product = tl.zeros((BLOCK_B, BLOCK_N), tl.float64)
    squares = tl.zeros((BLOCK_N,), tl.float64)
    stored = _stored(data, n, tl.arange(0, BLOCK_D), rows, dim)
    for first in range(0, dim, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        inside = (b < batch)[:, None] & (d < dim)[None, :]
        x = tl.load(queries + b[:, None].to(tl.int64) * dim + d[None, :], mask=inside, other=0.0)
        y = _samples(stored, shift, scale, n, d, rows, dim)
        stored = _stored(data, n, d + BLOCK_D, rows, dim)
        product = tl.dot(x, y, product, out_dtype=tl.float64)
        squares += tl.sum(y * y, axis=0)
    inside = (b < batch)[:, None] & (n < rows)[None, :]
    tl.store(products + b[:, None].to(tl.int64) * rows + n[None, :], product, mask=inside)
    if tl.program_id(0) % tiles == 0:
        tl.store(half_norms + n, 0.5 * squares, mask=n < rows)


@triton.jit(do_not_specialize=["batch", "rows"])
def _optimal_denoiser_mean_kernel(
    weights,  # [batch, rows] float64
    data,  # [rows, dim]
    shift,  # [dim] float64
    step,  # [1] float64
    rescale,  # [batch] float64
    mean,  # [batch, dim] float64, in and out
    batch,
    rows,
    dim: tl.int32,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """mean = rescale * mean + weights @ samples. A program owns BLOCK_B x BLOCK_D values of the mean, which
    it reads and writes once, and walks over all samples in slices of BLOCK_N."""
    tiles = tl.cdiv(batch, BLOCK_B)
    b = tl.program_id(0) % tiles * BLOCK_B + tl.arange(0, BLOCK_B)
    d = tl.program_id(0) // tiles * BLOCK_D + tl.arange(0, BLOCK_D)
    scale = tl.load(step)
    total = tl.zeros((BLOCK_B, BLOCK_D), tl.float64)
    stored = _stored(data, tl.arange(0, BLOCK_N), d, rows, dim)
    for first in range(0, rows, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        inside = (b < batch)[:, None] & (n < rows)[None, :]
        w = tl.load(weights + b[:, None].to(tl.int64) * rows + n[None, :], mask=inside, other=0.0)
        y = _samples(stored, shift, scale, n, d, rows, dim)
        stored = _stored(data, n + BLOCK_N, d, rows, dim)
        total = tl.dot(w, tl.trans(y), total, out_dtype=tl.float64)
    inside = (b < batch)[:, None] & (d < dim)[None, :]
    target = mean + b[:, None].to(tl.int64) * dim + d[None, :]
    before = tl.load(target, mask=inside, other=0.0)
    before *= tl.load(rescale + b, mask=b < batch, other=0.0)[:, None]
    tl.store(target, before + total, mask=inside)


def compilations(architecture: int) -> Iterator[Compilation]:
    """Both kernels for all types of data."""
    for data in ("u8", "fp16", "bf16", "fp32", "fp64"):
        for kernel, tile in (
            (_optimal_denoiser_products_kernel, parameters(architecture).products),
            (_optimal_denoiser_mean_kernel, parameters(architecture).mean),
        ):
            sizes = dict.fromkeys(("batch", "rows", "dim"), "scalar i32")
            constants = {"BLOCK_B": tile.b, "BLOCK_N": tile.n, "BLOCK_D": tile.d}
            tensors = dict.fromkeys(set(kernel.arg_names) - {*sizes, *constants}, "fp64")
            yield Compilation(
                kernel,
                data,
                {**tensors, "data": data, **sizes},
                constants,
                {"num_warps": tile.warps},
                tensor_cores=has_tensor_cores(architecture),
            )

"""The optimal denoiser of a data set: the mean of the data given a noisy observation of one of its
samples."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from msd_kernels.dispatch import allocate, arguments, autodiff, checks, tracing
from msd_kernels.dispatch.backends import Candidate, Explanation, OpBackends
from msd_kernels.dispatch.operator import operator
from msd_kernels.dispatch.samples import sample_by_sample
from msd_kernels.ops.optimal_denoiser import cpu, library, reference, triton

__all__ = ["DenoiserPosterior", "optimal_denoiser"]

OP = "optimal_denoiser"

# 1 / sigma² and its product with squared distances stay finite in float64 between these.
SIGMA_RANGE = (1e-100, 1e100)
_CENTER_ROWS = 1024
NO_CHUNKS = f"{OP}: data must hold at least one chunk, got an empty iterable"

BACKENDS = OpBackends(
    OP,
    [
        Candidate("cpu", cpu, ("cpu",), cannot=cpu.cannot),
        Candidate("library", library),
        Candidate("triton", triton, ("cuda",), cannot=triton.cannot),
        Candidate("reference", reference),
    ],
)


class DenoiserPosterior(NamedTuple):
    """The posterior over the data given each noisy ``x``.

    Attributes:
        denoised: D*(x; sigma), the posterior mean, like ``x``.
        log_partition: ``[B]`` float64, ln sum_i exp(-|x - y_i|² / 2 sigma²). The log density of the noisy
            data is ``log_partition - ln N - dim/2 ln(2 pi sigma²)``. Its gradient in ``x`` is the score,
            (D* - x) / sigma².
        effective_samples: ``[B]`` float64, 1 / sum_i w_i² of the posterior weights w_i: from 1, where one
            sample explains ``x``, to N, where all do alike. Not differentiable. Its relative error is about
            1e-16 |y - c|² / sigma², with a centre c of the data: 1e-7 for images at sigma = 0.002, all of it at 1e-7.
    """

    denoised: Tensor
    log_partition: Tensor
    effective_samples: Tensor


@sample_by_sample(("x", "sigma"))
def optimal_denoiser(
    x: Tensor,
    sigma: float | Tensor,
    data: Tensor | np.ndarray | Iterable[Tensor | np.ndarray],
    *,
    data_range: tuple[float, float] = (-1.0, 1.0),
    statistics: bool = False,
    group: dist.ProcessGroup | None = None,
) -> Tensor | DenoiserPosterior:
    """The best possible denoiser of a data set {y_i}, by one streaming pass over it.

    For each noisy sample ``x`` at its own noise level::

        D*(x; sigma) = sum_i w_i y_i,    w = softmax_i(-|x - y_i|² / (2 sigma²))

    Source: Karras et al. (arXiv 2206.00364), appendix B.3; Zhang et al. (arXiv 2312.09181).

    All arithmetic is float64. With a centre c of the data, the weights follow from the scores

        ((x - c)·(y_i - c) - |y_i - c|²/2) / sigma²  =  (|x - c|² - |x - y_i|²) / (2 sigma²)

    which lack the part of the squared distance that all samples share, and with it the rounding error of that
    part. What is left, about 1e-16 |x - c| |y_i - c| / sigma², is 1e-7 for images at sigma = 0.002.

    Memory: the data, plus about 100 MiB and 32 bytes per value of ``x``.

    Args:
        x: ``[B, ...]``, float32, bfloat16, float16 or float64.
        sigma: noise levels, in the units of ``x``: one number, or ``[B]``; within 1e-100 and 1e100.
        data: the samples as ``[N, ...]``, a tensor or an array (also a memory-mapped one), or an iterable of
            such chunks, read once, for what does not fit the memory. Floating point, or uint8. Data elsewhere
            are moved to the device of ``x``, an iterable chunk by chunk.
        data_range: what the uint8 values 0 and 255 stand for. Floating-point data are taken as they are.
        statistics: also return the log-partition and the effective number of samples.
        group: a process group whose ranks hold one shard of the data each, and all the same ``x`` and
            ``sigma``; every rank gets the result for the whole data.

    Returns:
        D*, of the shape and dtype of ``x``, or a :class:`DenoiserPosterior` with it.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: shapes that do not fit, no data, values that are not finite, a sigma out of range.

    Differentiable in ``x`` and ``sigma``, where ``data`` is one tensor or array and there is no ``group``:
    the derivative in ``x`` is the posterior covariance over sigma². Data that require a gradient are an
    error.
    """
    if isinstance(x, tracing.Proxy):
        return tracing.symbolic(
            optimal_denoiser, x, sigma, data, data_range=data_range, statistics=statistics, group=group
        )
    queries, sigma = _prepare_queries(x, sigma)
    chunks = (_rows(chunk, x) for chunk in _chunks(data))
    if group is None and isinstance(data, (Tensor, np.ndarray)):
        posterior, center = _whole_posterior(queries, sigma, next(chunks), data_range)
    else:
        posterior, center = _merged_posterior(queries, sigma, chunks, data_range, group)
    mean, log_sum, log_sum_squares = posterior
    denoised = mean.to(x.dtype).view(x.shape)
    if not statistics:
        return denoised
    log_partition = log_sum - (queries.double() - center).square().sum(1) / (2 * sigma.square())
    effective = (2 * log_sum.detach() - log_sum_squares).exp()
    return DenoiserPosterior(denoised, log_partition, effective)


def explain(x, sigma, data, *, data_range=(-1.0, 1.0), statistics=False, group=None) -> Explanation:
    """Which backend serves ``optimal_denoiser(x, sigma, data)``, by the first chunk, and why the others do not.

    An iterator, of which the call would then miss that chunk, is an error.
    """
    _prepare_queries(x, sigma)
    if isinstance(data, Iterator):
        raise TypeError(f"{OP}: explain would use up the first chunk of an iterator, pass that chunk alone")
    chunk = next(_chunks(data), None)
    if chunk is None:
        raise ValueError(NO_CHUNKS)
    rows = _rows(chunk, x)
    _scale(rows, data_range)
    return BACKENDS.explain(rows)


def _prepare_queries(x: Tensor, sigma: float | Tensor) -> tuple[Tensor, Tensor]:
    """``x`` as ``[B, D]`` and ``sigma`` as ``[B]`` in float64."""
    checks.require_floating(OP, "x", x)
    dim = math.prod(x.shape[1:])
    if x.dim() < 1 or dim == 0:
        raise ValueError(
            f"{OP}: x must be [B, ...] with at least one value per sample, got shape {tuple(x.shape)}"
        )
    batch = x.shape[0]
    if not isinstance(sigma, Tensor):
        sigma = checks.number(OP, "sigma", sigma)
        sigma = torch.full((batch,), sigma, dtype=torch.float64, device=x.device)
    checks.require_floating(OP, "sigma", sigma)
    if sigma.device != x.device:
        raise ValueError(f"{OP}: sigma is on {sigma.device}, but x is on {x.device}")
    if sigma.shape not in ((), (batch,)):
        raise ValueError(
            f"{OP}: sigma must be one number or [{batch}] for x of {list(x.shape)}, got {list(sigma.shape)}"
        )
    return x.reshape(batch, dim).contiguous(), sigma.to(torch.float64).expand(batch).contiguous()


def _chunks(data) -> Iterator[Tensor | np.ndarray]:
    if isinstance(data, (Tensor, np.ndarray)):
        return iter((data,))
    if not isinstance(data, Iterable):
        raise TypeError(
            f"{OP}: data must be a tensor, an array or an iterable of those, got {type(data).__name__}"
        )
    return iter(data)


def _rows(chunk: Tensor | np.ndarray, x: Tensor) -> Tensor:
    """The samples of one chunk as ``[N, D]`` on the device of ``x``."""
    if isinstance(chunk, np.ndarray):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            try:
                chunk = torch.from_numpy(chunk)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{OP}: data is an array that PyTorch does not take: {error}") from None
    if not isinstance(chunk, Tensor):
        raise TypeError(f"{OP}: data must hold tensors or arrays, got {type(chunk).__name__}")
    if chunk.dtype not in (*checks.FLOATING, torch.uint8):
        raise TypeError(f"{OP}: data must be uint8, float32, bfloat16, float16 or float64, got {chunk.dtype}")
    if chunk.dim() != x.dim() or chunk.shape[1:] != x.shape[1:] or chunk.shape[0] < 1:
        raise ValueError(
            f"{OP}: data must be {['N', *x.shape[1:]]} with N >= 1 for x of {list(x.shape)}, "
            f"got {list(chunk.shape)}"
        )
    if chunk.requires_grad:
        raise ValueError(f"{OP}: there is no gradient for data; detach it")
    return chunk.reshape(chunk.shape[0], -1).to(x.device)


def _scale(data: Tensor, data_range: tuple[float, float]) -> tuple[float, float]:
    """``(low, step)`` with y = low + step * data."""
    if data.dtype != torch.uint8:
        return 0.0, 1.0
    try:
        low, high = data_range
    except (TypeError, ValueError):
        raise TypeError(f"{OP}: data_range must be two numbers, (low, high), got {data_range!r}") from None
    low, high = (checks.number(OP, "data_range", end) for end in (low, high))
    if low >= high:
        raise ValueError(f"{OP}: data_range must be (low, high) with low < high, got {data_range}")
    return low, (high - low) / 255


def _center(data: Tensor, low: float, step: float) -> Tensor:
    """``[D]`` float64: about the mean of the data, by some of its rows."""
    some = data[:: -(-data.shape[0] // _CENTER_ROWS)]
    return some.mean(0, dtype=torch.float64) * step + low


def _whole_posterior(queries, sigma, rows, data_range):
    """The posterior given all data at once, and the centre that its log sums are relative to."""
    scale = _scale(rows, data_range)
    center = _center(rows, *scale)
    return _forward(queries, sigma, rows, center, *scale), center


def _merged_posterior(queries, sigma, chunks, data_range, group):
    """The posterior given the chunks of all ranks, and the centre that its log sums are relative to."""
    if torch.is_grad_enabled() and (queries.requires_grad or sigma.requires_grad):
        raise ValueError(
            f"{OP}: gradients need the data as one tensor, not as an iterable or shared among ranks"
        )
    merged = center = None
    for rows in chunks:
        scale = _scale(rows, data_range)
        if center is None:
            center = _shared_center(_center(rows, *scale), group)
        posterior = _forward(queries, sigma, rows, center, *scale)
        merged = posterior if merged is None else _merge(merged, posterior)
    if merged is None:
        raise ValueError(NO_CHUNKS)
    return (merged if group is None else _merge_ranks(merged, group)), center


def _merge(first, second):
    """Two posteriors over different data, with log sums relative to the same centre, into one."""
    log_sum = torch.logaddexp(first[1], second[1])
    share = (second[1] - log_sum).exp()
    return torch.lerp(first[0], second[0], share[:, None]), log_sum, torch.logaddexp(first[2], second[2])


def _merge_ranks(posterior, group: dist.ProcessGroup):
    mean, *log_sums = posterior
    mean, log_sums = mean.clone(), torch.stack(log_sums)
    peak = log_sums.clone()
    dist.all_reduce(peak, dist.ReduceOp.MAX, group)
    total = (log_sums - peak).exp()
    dist.all_reduce(total, dist.ReduceOp.SUM, group)
    merged = peak + total.log()
    mean *= (log_sums[0] - merged[0]).exp()[:, None]
    dist.all_reduce(mean, dist.ReduceOp.SUM, group)
    return mean, merged[0], merged[1]


def _shared_center(center: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    if group is not None:
        dist.broadcast(center, dist.get_global_rank(group, 0), group)
    return center


def _require(x, sigma, data, center, low=0.0, step=1.0) -> None:
    checks.require_floating(OP, "x", x)
    arguments.require_shape(OP, "x", x, x.shape[0] if x.dim() else None, None)
    batch, dim = x.shape
    arguments.require_like(OP, "data", data, x, torch.uint8, *checks.FLOATING)
    arguments.require_shape(OP, "data", data, None, dim)
    arguments.require_dense(OP, "x", x)
    _require_float64(x, {"sigma": (sigma, (batch,)), "center": (center, (dim,))})


def _require_backward(dmean, dlog_sum, x, sigma, data, center, mean, log_sum, low, step) -> None:
    _require(x, sigma, data, center)
    means = {"dmean": (dmean, x.shape), "mean": (mean, x.shape)}
    _require_float64(x, means | {"dlog_sum": (dlog_sum, x.shape[:1]), "log_sum": (log_sum, x.shape[:1])})


def _require_float64(x: Tensor, shapes: dict[str, tuple[Tensor, Sequence[int]]]) -> None:
    for name, (tensor, shape) in shapes.items():
        arguments.require_like(OP, name, tensor, x, torch.float64)
        arguments.require_shape(OP, name, tensor, *shape)
        arguments.require_dense(OP, name, tensor)


@operator("optimal_denoiser", _require)
def _forward(
    x: Tensor, sigma: Tensor, data: Tensor, center: Tensor, low: float, step: float
) -> tuple[Tensor, Tensor, Tensor]:
    """x [B, D], sigma [B] float64, data [N, D], center [D] float64; y = low + step * data.

    Returns the posterior mean [B, D] and the log sums [B] of exp(score) and of exp(2 score), float64, with
    score_i = (|x - center|² - |x - y_i|²) / (2 sigma²).
    """
    _require_values(x, sigma)
    implementation = BACKENDS.choose(data)
    outputs = implementation.optimal_denoiser(x, sigma, data, center, low, step)
    # A row infinitely far away has no weight in the log sum, but NaN times its values in the mean.
    mean, log_sum, _ = outputs
    if not bool(mean.isfinite().all() & log_sum.isfinite().all()):
        _require_finite(data)
    return outputs


@_forward.register_fake
def _(x, sigma, data, center, low, step):
    return allocate.optimal_denoiser_outputs(x)


@_forward.register_flops
def _(x, sigma, data, *_):
    """Scores, and the mean of the data by them."""
    return 2 * 2 * math.prod(x) * data[0]


@operator("optimal_denoiser_backward", _require_backward)
def _backward(
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
    implementation = BACKENDS.choose(data)
    return implementation.optimal_denoiser_backward(
        dmean, dlog_sum, x, sigma, data, center, mean, log_sum, low, step
    )


@_backward.register_fake
def _(dmean, dlog_sum, x, sigma, data, center, mean, log_sum, low, step):
    return tuple(allocate.gradients_like((x, sigma), (True, True)))


@_backward.register_flops
def _(dmean, dlog_sum, x, sigma, data, *_):
    """The scores again, their gradients, and the gradient of ``x`` from those."""
    return 3 * 2 * math.prod(x) * data[0]


def _require_values(x: Tensor, sigma: Tensor) -> None:
    if not bool(x.isfinite().all()):
        bad = int((~x.isfinite()).any(1).nonzero()[0])
        raise ValueError(f"{OP}: x must be finite, sample {bad} holds a value that is NaN or infinite")
    low, high = SIGMA_RANGE
    inside = (sigma >= low) & (sigma <= high)
    if not bool(inside.all()):
        raise ValueError(f"{OP}: sigma must lie within {low:g} and {high:g}, got {float(sigma[~inside][0])}")


def _require_finite(data: Tensor) -> None:
    """Names the row to blame for a sum that is not finite."""
    rows = library.rows_per_block(1, data.shape[1], data.device)
    for start in range(0, data.shape[0], rows):
        bad = (~data[start : start + rows].isfinite()).any(1).nonzero()
        if bad.numel():
            row = start + int(bad[0])
            raise ValueError(f"{OP}: data must be finite, row {row} holds a value that is NaN or infinite")
    raise ValueError(f"{OP}: data and x are too large for float64: squared distances overflow")


def _save_for_backward(ctx, inputs, output):
    x, sigma, data, center, *ctx.scale = inputs
    mean, log_sum, log_sum_squares = output
    ctx.mark_non_differentiable(log_sum_squares)
    ctx.save_for_backward(x, sigma, data, center, mean, log_sum)


def _differentiate(ctx, dmean, dlog_sum, _dlog_sum_squares):
    return _backward(dmean.contiguous(), dlog_sum.contiguous(), *ctx.saved_tensors, *ctx.scale)


def _save_for_double_backward(ctx, inputs, output):
    dmean, dlog_sum, x, sigma, data, center, _, _, *ctx.scale = inputs
    ctx.save_for_backward(dmean, dlog_sum, x, sigma, data, center)
    ctx.set_materialize_grads(False)


def _differentiate_twice(ctx, ddx, ddsigma):
    dmean, dlog_sum, x, sigma, data, center = ctx.saved_tensors

    def joined(x: Tensor, sigma: Tensor) -> Tensor:
        mean, log_sum, _ = reference.optimal_denoiser(x, sigma, data, center, *ctx.scale)
        return torch.cat([mean, log_sum[:, None]], dim=1)

    cotangent = torch.cat([dmean, dlog_sum[:, None]], dim=1)
    d_cotangent, d_x, d_sigma = autodiff.second_vjp(
        joined, cotangent, (x, sigma), (True, True), (ddx, ddsigma)
    )
    # The mean and the log sum are inputs too, but as functions of the others: their part is in d_x and
    # d_sigma.
    return d_cotangent[:, :-1], d_cotangent[:, -1], d_x, d_sigma


_forward.register_autograd(_differentiate, setup_context=_save_for_backward)
_backward.register_autograd(_differentiate_twice, setup_context=_save_for_double_backward)

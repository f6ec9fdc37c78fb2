"""Attention per stage through the kernels behind ``torch.nn.functional.scaled_dot_product_attention``.

They are called by their own names because they return the log-sum-exp of the scores, which the public
function drops.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from msd_kernels.dispatch import allocate
from msd_kernels.dispatch.segments import gather
from msd_kernels.layouts import AttentionLayout, flatten_heads
from msd_kernels.runtime import processor
from msd_kernels.runtime.cpu_types import attention_wants_float32, float32

aten = torch.ops.aten

# Scores that the formulation through matrix products holds at once; the CPU's about fill its second-level cache.
SCORES_AT_ONCE = {"cpu": 1 << 19, "cuda": 1 << 26}
# Up to this many scores per head, matrix products beat the CPU's fused backward in bfloat16. They also are
# more exact: the fused one takes sum(p * dp) as sum(dy * y), from the rounded output.
FEW_SCORES = 256 * 256
# Up to this inner dimension, one float32 product is faster than two in half precision.
SHORT_PRODUCT = 64
HALF = (torch.bfloat16, torch.float16)


def attention(
    q: Tensor, k: Tensor | None, v: Tensor | None, layout: AttentionLayout
) -> tuple[Tensor, Tensor]:
    """The output of :func:`msd_kernels.attention` and the log-sum-exp of each row of scores, flat."""
    dtype = q.dtype
    if attention_wants_float32(q):
        q, k, v = float32(q, k, v)
    stages = layout.inputs(q, k, v)
    log_sums: dict[int, Tensor] = {}

    def stage_output(s: int) -> Tensor:
        inputs = [_with_dense_rows(part) for part in stages[s]]
        factor = layout.scale_of(s)
        y, log_sum = _fused_forward(*inputs, factor) or _forward_by_products(*inputs, factor)
        log_sums[s] = log_sum.reshape(-1)
        return flatten_heads(y, layout.out_order)

    y = gather(q, layout.counts, stage_output)
    if not log_sums:
        return allocate.attention_outputs(q.to(dtype), layout)
    return y.to(dtype), gather(q, layout.counts, lambda s: log_sums[s])


def attention_backward(
    dy: Tensor,
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    y: Tensor,
    log_sum: Tensor,
    layout: AttentionLayout,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients for ``(q, k, v)``, None where not wanted; for a packed ``q`` one gradient in its layout."""
    dtype = q.dtype
    if attention_wants_float32(q):
        dy, q, k, v, y = float32(dy, q, k, v, y)
    inputs, cotangents, outputs = layout.inputs(q, k, v), layout.outputs(dy), layout.outputs(y)
    log_sums = log_sum.split(layout.log_sum_sizes)
    gradients = allocate.gradients_like((q, k, v), wanted)
    targets = layout.inputs(*gradients)
    for s in layout.stages:
        saved = (outputs[s], log_sums[s].view(layout.counts[s], layout.heads[s], layout.tokens))
        _write_gradients(cotangents[s], *inputs[s], *saved, layout.scale_of(s), targets[s])
    return [None if gradient is None else gradient.to(dtype) for gradient in gradients]


def _write_gradients(dy, q, k, v, y, log_sum, scale, targets) -> None:
    """Writes the gradients of one stage into ``targets``, views for q, k and v; None where not wanted."""
    if not (_takes_fused_backward(q, k) and _is_regular(log_sum)):
        _write_gradients_by_products(dy, q, k, v, scale, targets)
        return
    inputs = [_with_dense_rows(part) for part in (dy, q, k, v, y)]
    found = _kernel("flash_attention_for_cpu_backward")(*inputs, log_sum, 0.0, False, scale=scale)
    for target, gradient in zip(targets, found, strict=True):
        if target is not None:
            target.copy_(gradient)


def _takes_fused_backward(q: Tensor, k: Tensor) -> bool:
    """Only the CPU's: those of CUDA add up with atomics, so their results differ from run to run."""
    if not q.is_cpu or _kernel("flash_attention_for_cpu_backward") is None:
        return False
    products_are_better = (
        q.dtype == torch.bfloat16
        and q.shape[-2] * k.shape[-2] <= FEW_SCORES
        and processor.computes_in(q.dtype)
    )
    return not products_are_better


def _fused_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor] | None:
    """Output and log-sum-exp from the kernel that SDPA would take, or None where none takes this call."""
    if q.is_cpu:
        fused = _kernel("flash_attention_for_cpu")
        if fused is None:
            return None
        y, log_sum = fused(q, k, v, scale=scale)
        return (y, log_sum) if _is_regular(log_sum) else None
    head_dim = q.shape[-1]
    if q.dtype == torch.float64 or head_dim * q.element_size() % 16:
        return None
    if q.dtype in HALF and head_dim <= 256:
        fused = _kernel("flash_attention")
        return fused and fused(q, k, v, scale=scale)[:2]
    fused = _kernel("efficient_attention")
    if fused is None:
        return None
    y, log_sum, *_ = fused(q, k, v, None, True, scale=scale)
    return y, log_sum[..., : q.shape[-2]]


def _is_regular(log_sum: Tensor) -> bool:
    """Whether the CPU's fused kernels serve these scores.

    They take a row of NaN for a masked one, which gets zeros and the log-sum 0, and infinite scores of half precision
    for none. From 2^24 on float32 has no fractions, so that exp(score - log_sum) would be any number. A log-sum that is
    0 for good is so rare that its products may be taken again.
    """
    least, most = log_sum.abs().aminmax()
    return least.item() > 0 and most.item() < 1 << 24


def _kernel(name: str) -> Callable | None:
    """One of the kernels behind SDPA, which have private names: None where this PyTorch has no such thing."""
    return getattr(aten, f"_scaled_dot_product_{name}", None)


def _forward_by_products(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    ys, log_sums = [], []
    for samples in _chunks(q, k):
        queries, keys, values = (_as_matrices(part[samples]) for part in (q, k, v))
        scores = _product(queries, keys.mT).mul_(scale)
        log_sum = scores.logsumexp(dim=-1, keepdim=True)
        ys.append(scores.sub_(log_sum).exp_().to(q.dtype) @ values)
        log_sums.append(log_sum)
    return torch.cat(ys).view(q.shape), torch.cat(log_sums).view(q.shape[:-1])


def _write_gradients_by_products(dy, q, k, v, scale, targets) -> None:
    """Takes the softmax again, and ``ds = p * (dp - sum(p * dp))``."""
    for samples in _chunks(q, k):
        cotangents, queries, keys, values = (_as_matrices(part[samples]) for part in (dy, q, k, v))
        p = _product(queries, keys.mT).mul_(scale).softmax(dim=-1)
        dp = _value_products(cotangents, values)
        ds = _softmax_backward(dp, p).mul_(scale).to(q.dtype)
        factors = ((ds, keys), (ds.mT, queries), (p.to(q.dtype).mT, cotangents))
        for target, (left, right) in zip(targets, factors, strict=True):
            if target is not None:
                part = target[samples]
                part.copy_(torch.bmm(left, right).view(part.shape))


def _softmax_backward(dp: Tensor, p: Tensor) -> Tensor:
    fused = getattr(aten, "_softmax_backward_data", None)
    if fused is not None:
        return fused(dp, p, -1, p.dtype)
    products = dp * p
    return products - p * products.sum(dim=-1, keepdim=True)


def _chunks(q: Tensor, k: Tensor) -> Iterator[slice]:
    """Samples to treat at once, so that few scores exist at any time."""
    n, heads, tokens, _ = q.shape
    step = max(1, SCORES_AT_ONCE[q.device.type] // (heads * tokens * k.shape[-2]))
    return (slice(start, start + step) for start in range(0, n, step))


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` of half-precision matrices in float32; other dtypes in their own.

    The CPU's product rounds its result to the dtype of its inputs. A second product, from which the rounded
    result is subtracted before it is rounded in turn, gives what the first rounding lost.
    """
    if a.dtype not in HALF:
        return torch.bmm(a, b)
    if not a.is_cpu:
        return torch.bmm(a, b, out_dtype=torch.float32)
    if a.shape[-1] <= SHORT_PRODUCT:
        return torch.bmm(a.float(), b.float())
    rounded = torch.bmm(a, b)
    lost = torch.baddbmm(rounded, a, b, beta=-1)
    return rounded.float().add_(lost)


def _value_products(dy: Tensor, v: Tensor) -> Tensor:
    """``dy @ v.T`` in float32, up to a number per row that the backward of the softmax takes out again.

    So ``v`` may lose its mean, after which the CPU's rounding of the product is no larger than that of ``ds``.
    """
    if not v.is_cpu or v.dtype not in HALF or v.shape[-1] <= SHORT_PRODUCT:
        return _product(dy, v.mT)
    return torch.bmm(dy, (v - v.mean(dim=-2, keepdim=True)).mT).float()


def _as_matrices(heads: Tensor) -> Tensor:
    """``[n, h, t, d]`` as ``[n * h, t, d]``, dense on the CPU, whose product would copy it at every use."""
    return (heads.contiguous() if heads.is_cpu else _with_dense_rows(heads)).flatten(0, 1)


def _with_dense_rows(heads: Tensor) -> Tensor:
    """``heads``, or a copy whose head dimension is contiguous, which every kernel of SDPA asks for."""
    return heads if heads.stride(-1) == 1 else heads.contiguous()

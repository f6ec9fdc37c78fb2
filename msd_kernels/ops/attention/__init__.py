"""Scaled dot-product attention on dense tensors, stage batches and the packed output of a qkv convolution."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from msd_kernels.dispatch import allocate, arguments, autocast, autodiff, checks, sharding, tracing
from msd_kernels.dispatch.backends import Candidate, Explanation, OpBackends
from msd_kernels.dispatch.dtypes import wide
from msd_kernels.dispatch.layout_cache import LAYOUTS
from msd_kernels.dispatch.operator import operator
from msd_kernels.dispatch.samples import sample_by_sample
from msd_kernels.layouts import AttentionLayout, flatten_heads, view_heads
from msd_kernels.ops.attention import library, reference, triton
from msd_kernels.runtime.launch import devices
from msd_kernels.stage_batch import StageBatch

__all__ = ["attention"]

OP = "attention"

# How a 1×1 qkv convolution orders its 3C channels, as memory orders (see reference/attention.py) of its flat
# output: channels_last, and NCHW.
PACKED_ORDERS = {
    "interleaved": ("nthdp", "nhdpt"),
    "per_head": ("nthpd", "nhpdt"),
    "blocked": ("ntphd", "nphdt"),
}
TOKENS_FIRST, HEADS_FIRST = "nthd", "nhtd"
ORDERS = (TOKENS_FIRST, HEADS_FIRST, *(order for pair in PACKED_ORDERS.values() for order in pair))

BACKENDS = OpBackends(
    OP,
    [
        Candidate("triton", triton, devices(), cannot=triton.cannot, slower=triton.slower),
        Candidate("library", library),
        Candidate("reference", reference),
    ],
)


@sample_by_sample(("q", "k", "v"), ("num_heads",))
def attention(
    q: Tensor | StageBatch,
    k: Tensor | StageBatch | None = None,
    v: Tensor | StageBatch | None = None,
    *,
    num_heads: int | Sequence[int] = 1,
    scale: float | None = None,
    layout: str | None = None,
) -> Tensor | StageBatch:
    """Scaled dot-product attention, without mask and dropout.

    For each sample and head, with N query tokens and M context tokens of dimension d::

        y = softmax(scale * q @ k.T) @ v          # softmax over the M context tokens

    Softmax and sums are float32 at least (float64 for float64), and a second run gives the same bits.
    Source: Vaswani et al., "Attention Is All You Need" (arXiv 1706.03762).

    There are three ways to call it:

    - Dense: q ``[B, heads, N, d]``, k and v ``[B, heads, M, d]``, any strides. Returns ``[B, heads, N, d]``,
      which lies in memory as ``[B, N, heads, d]`` where q does. What lies otherwise, or with gaps, is copied.
    - StageBatch q, k, v: the tokens are the pixels; stage s has ``heads_s * d_s`` channels, in that order.
      k and v may have another height and width than q. Returns a StageBatch like q.
    - Packed: q alone, the output of a 1×1 qkv convolution: a StageBatch with ``3 * C_s`` channels or a dense
      ``[B, 3C, H, W]``, NCHW or channels_last. It is read through strided views, and its gradient is one
      tensor of the same layout. Returns a StageBatch with ``C_s`` channels, or ``[B, C, H, W]`` as q lies.

    Args:
        q, k, v: as above, of one dtype: float32, bfloat16, float16 or float64. k and v both or neither.
        num_heads: heads; for a StageBatch also one per stage. Must divide the channels. Dense q, k, v have
            theirs in their shape.
        scale: factor on the scores of all stages; None stands for 1 / sqrt(d), each stage its own.
        layout: order of the channels of a packed q: ``"interleaved"`` is [heads, d, 3] (Karras et al., EDM),
            ``"per_head"`` [heads, 3, d] (Dhariwal & Nichol; latent diffusion), ``"blocked"`` [3, heads, d].
            None unless q is packed.

    Raises:
        TypeError: a wrong type or dtype, or kinds or dtypes that differ.
        ValueError: shapes, counts, heads, layout or devices that do not fit, with the stage named.

    Under autocast: the autocast dtype, as ``torch.nn.functional.scaled_dot_product_attention``.

    Dense DTensors that are sharded along their samples stay so: every rank computes its own.
    """
    if isinstance(q, tracing.Proxy):
        return tracing.symbolic(attention, q, k, v, num_heads=num_heads, scale=scale, layout=layout)
    if tracing.is_traced(q):
        return tracing.attention(_prepare, q, k, v, num_heads, scale, layout)
    if sharding.is_distributed(q):
        settings = {"num_heads": num_heads, "scale": scale, "layout": layout}
        return sharding.on_shards(attention, {"q": q, "k": k, "v": v}, {}, **settings)
    tensors, call = _prepare(q, k, v, num_heads=num_heads, scale=scale, layout=layout)
    y, _ = _forward(*tensors, call)
    if isinstance(q, StageBatch):
        return StageBatch(y, q.counts, call.channels, q.height, q.width)
    if k is not None:
        batch, heads, tokens, head_dim = q.shape
        return view_heads(y, batch, tokens, heads, head_dim, call.out_order)
    batch, channels, height, width = q.shape
    if call.out_order == TOKENS_FIRST:
        return y.view(batch, height, width, channels // 3).permute(0, 3, 1, 2)
    return y.view(batch, channels // 3, height, width)


def explain(*args, **kwargs) -> Explanation:
    """Which backend serves ``attention(*args, **kwargs)``, and why the others do not."""
    (q, *_), layout = _prepare(*args, **kwargs)
    return BACKENDS.explain(q, layout)


def _prepare(q, k=None, v=None, *, num_heads=1, scale=None, layout=None):
    """Checks a call; returns its tensors as they lie, and the layout."""
    if (k is None) != (v is None):
        raise ValueError(
            f"{OP}: k and v must be given both or neither, got {'v' if k is None else 'k'} alone"
        )
    scale = None if scale is None else checks.number(OP, "scale", scale)
    num_heads = checks.integers(OP, "num_heads", num_heads)
    if k is None:
        tensors, shape, order = _prepare_packed(q, num_heads, layout)
    else:
        if layout is not None:
            raise ValueError(
                f"{OP}: layout is for a packed q alone, got layout={layout!r} together with k and v"
            )
        prepare = _prepare_stage_batches if isinstance(q, StageBatch) else _prepare_dense
        tensors, shape, order = prepare(q, k, v, num_heads)
    q, k, v = autocast.to_lower_precision(tensors[0].device.type, *tensors)
    for name, tensor in (("k", k), ("v", v)):
        if tensor is not None:
            checks.require_like(OP, name, tensor, q)
    return (q, k, v), LAYOUTS.same(AttentionLayout(*shape, order, scale))


def _prepare_packed(q, num_heads, layout):
    if not isinstance(layout, str) or layout not in PACKED_ORDERS:
        raise ValueError(
            f"{OP}: layout must be one of {', '.join(PACKED_ORDERS)} for a packed q, got {layout!r}"
        )
    channels_last, planar = PACKED_ORDERS[layout]
    if isinstance(q, StageBatch):
        checks.require_floating(OP, "q", q.values)
        checks.require_size(OP, "q", q)
        heads, head_dims = _split_channels(q.channels, num_heads, 3)
        tokens = q.height * q.width
        return (q.values, None, None), (q.counts, heads, head_dims, tokens, tokens), channels_last
    checks.require_floating(OP, "q", q)
    if q.dim() != 4 or 0 in q.shape[1:]:
        raise ValueError(f"{OP}: a packed q must be [B, 3C, H, W], none 0 but B, got {list(q.shape)}")
    batch, channels, height, width = q.shape
    heads, head_dims = _split_channels((channels,), num_heads, 3)
    shape = ((batch,), heads, head_dims, height * width, height * width)
    if q.stride(1) == 1 and not q.is_contiguous():
        return (q.permute(0, 2, 3, 1).reshape(-1).contiguous(), None, None), shape, channels_last
    return (q.reshape(-1).contiguous(), None, None), shape, planar


def _prepare_stage_batches(q, k, v, num_heads):
    checks.require_floating(OP, "q", q.values)
    checks.require_size(OP, "q", q)
    if not isinstance(k, StageBatch):
        raise TypeError(f"{OP}: k must be a StageBatch as q is, got {type(k).__name__}")
    for name, batch in (("k", k), ("v", v)):
        checks.require_layout(OP, name, batch, q.counts, q.channels, k.height, k.width)
    heads, head_dims = _split_channels(q.channels, num_heads, 1)
    shape = (q.counts, heads, head_dims, q.height * q.width, k.height * k.width)
    return (q.values, k.values, v.values), shape, TOKENS_FIRST


def _prepare_dense(q, k, v, num_heads):
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        checks.require_floating(OP, name, tensor)
        if tensor.dim() != 4 or 0 in tensor.shape[1:]:
            raise ValueError(
                f"{OP}: {name} must be [B, heads, tokens, d], none 0 but B, got {list(tensor.shape)}"
            )
    batch, heads, tokens, head_dim = q.shape
    context = k.shape[2]
    for name, tensor in (("k", k), ("v", v)):
        expected = (batch, heads, context, head_dim)
        if tensor.shape != expected:
            raise ValueError(
                f"{OP}: {name} must be {list(expected)} for q of {list(q.shape)} and k of {list(k.shape)}, "
                f"got {list(tensor.shape)}"
            )
    if num_heads not in (1, heads):
        raise ValueError(
            f"{OP}: num_heads={num_heads} differs from the {heads} heads of q of {list(q.shape)}"
        )
    order = TOKENS_FIRST if q.transpose(1, 2).is_contiguous() else HEADS_FIRST
    tensors = tuple(flatten_heads(tensor, order) for tensor in (q, k, v))
    return tensors, ((batch,), (heads,), (head_dim,), tokens, context), order


def _split_channels(channels, num_heads, parts):
    """Heads and head dimensions per stage of tensors with ``parts * heads * d`` channels."""
    heads = checks.per_stage(OP, "num_heads", num_heads, len(channels))
    for stage, (c, h) in enumerate(zip(channels, heads, strict=True)):
        if h < 1 or c % (parts * h):
            what = f"channels={c}" if parts == 1 else f"the {parts} parts of channels={c}"
            raise ValueError(f"{OP}: num_heads={h} does not divide {what} of stage {stage}")
    return heads, tuple(c // (parts * h) for c, h in zip(channels, heads, strict=True))


def _require(q, k, v, layout: AttentionLayout) -> None:
    counts, heads, head_dims, tokens, context, order, _ = layout
    arguments.require_stages(OP, {"counts": 0}, counts=counts, heads=heads, head_dims=head_dims)
    arguments.require_positive(OP, tokens=tokens, context=context)
    if order not in ORDERS:
        raise ValueError(f"{OP}: order must be one of {', '.join(ORDERS)}, got {order!r}")
    packed = layout.packed
    if (k is None, v is None) != (packed, packed) or (packed and tokens != context):
        raise ValueError(
            f"{OP}: order {order!r} goes with {'q alone and as much context as tokens' if packed else 'q, k and v'}, "
            f"got k={'None' if k is None else 'a tensor'}, v={'None' if v is None else 'a tensor'}, "
            f"tokens={tokens} and context={context}"
        )
    checks.require_floating(OP, "q", q)
    keys = arguments.total(OP, counts, heads, head_dims, context)
    queries = arguments.total(OP, counts, heads, head_dims, tokens, 3 if packed else 1)
    arguments.require_flat(OP, q, {"q": (q, queries), "k": (k, keys), "v": (v, keys)})


def _require_backward(dy, q, k, v, y, log_sum, layout: AttentionLayout, wanted) -> None:
    _require(q, k, v, layout)
    rows = (layout.counts, layout.heads, layout.tokens)
    size = arguments.total(OP, *rows, layout.head_dims)
    arguments.require_flat(OP, q, {"dy": (dy, size), "y": (y, size)})
    arguments.require_like(OP, "log_sum", log_sum, q, wide(q.dtype))
    arguments.require_shape(OP, "log_sum", log_sum, arguments.total(OP, *rows))
    arguments.require_dense(OP, "log_sum", log_sum)
    arguments.require_wanted(OP, wanted, 3)


@operator("attention", _require)
def _forward(q: Tensor, k: Tensor | None, v: Tensor | None, layout: AttentionLayout) -> tuple[Tensor, Tensor]:
    implementation = BACKENDS.choose(q, layout)
    return implementation.attention(q, k, v, layout)


@_forward.register_fake
def _(q, k, v, layout):
    return allocate.attention_outputs(q, layout)


@_forward.register_flops
def _(layout):
    """Scores, and their product with the values."""
    return 2 * layout.product_flops


@operator("attention_backward", _require_backward)
def _backward(
    dy: Tensor,
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    y: Tensor,
    log_sum: Tensor,
    layout: AttentionLayout,
    wanted: Sequence[bool],
) -> list[Tensor]:
    """Those gradients of ``(q, k, v)`` that are wanted."""
    implementation = BACKENDS.choose(q, layout, backward=True)
    gradients = implementation.attention_backward(dy, q, k, v, y, log_sum, layout, wanted)
    return autodiff.present(gradients)


@_backward.register_fake
def _(dy, q, k, v, y, log_sum, layout, wanted):
    return autodiff.present(allocate.gradients_like((q, k, v), wanted))


@_backward.register_flops
def _(layout, wanted):
    """The scores again, the gradient of the softmax's result where q or k want one, and a product for each of them."""
    want_q, want_k, want_v = (wanted[0],) * 3 if layout.packed else wanted
    return layout.product_flops * (1 + (want_q or want_k) + want_q + want_k + want_v)


def _save_for_backward(ctx, inputs, output):
    *tensors, ctx.layout = inputs
    y, log_sum = output
    ctx.mark_non_differentiable(log_sum)
    ctx.save_for_backward(*tensors, y, log_sum)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dy, _dlog_sum):
    if dy is None:
        return ()
    found = iter(_backward(dy.contiguous(), *ctx.saved_tensors, ctx.layout, ctx.needed))
    return [next(found) if flag else None for flag in ctx.needed]


def _save_for_double_backward(ctx, inputs, output):
    dy, q, k, v, _, _, ctx.layout, ctx.wanted = inputs
    ctx.save_for_backward(dy, q, k, v)
    ctx.set_materialize_grads(False)


def _differentiate_twice(ctx, *grad_gradients):
    dy, *inputs = ctx.saved_tensors
    return autodiff.second_vjp(
        lambda *leaves: reference.attention(*leaves, ctx.layout)[0], dy, inputs, ctx.wanted, grad_gradients
    )


_forward.register_autograd(_differentiate, setup_context=_save_for_backward)
_backward.register_autograd(_differentiate_twice, setup_context=_save_for_double_backward)

"""A linear layer in which every sample goes through its own stage's weight."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from msd_kernels.dispatch import allocate, autodiff
from msd_kernels.dispatch import arguments as _arguments
from msd_kernels.dispatch import autocast as _autocast
from msd_kernels.dispatch import checks as _checks
from msd_kernels.dispatch import tracing as _tracing
from msd_kernels.dispatch.backends import Candidate, Explanation, OpBackends
from msd_kernels.dispatch.operator import operator
from msd_kernels.dispatch.samples import sample_by_sample
from msd_kernels.layouts import LinearLayout
from msd_kernels.ops.grouped_linear import library, reference, triton
from msd_kernels.runtime.launch import devices
from msd_kernels.stage_batch import StageBatch, StageWeights, fixed_shape

__all__ = ["grouped_linear"]

OP = "grouped_linear"

_LAYOUTS = _checks.Remembered()

BACKENDS = OpBackends(
    OP,
    [
        Candidate("triton", triton, devices(), cannot=triton.cannot, slower=triton.slower),
        Candidate("library", library),
        Candidate("reference", reference),
    ],
)


@sample_by_sample(("x",), ("weight", "bias"))
def grouped_linear(
    x: Tensor | StageBatch,
    weight: StageWeights | Sequence[Tensor],
    bias: StageWeights | Sequence[Tensor] | None = None,
    *,
    counts: Sequence[int] | None = None,
) -> StageBatch:
    """Linear layer with one weight per stage: ``y = x @ weight[s].T + bias[s]`` for every pixel of stage ``s``.

    In and out features may differ from stage to stage; sums are float32 at least.
    Source: the per-stage decoders of Zhang et al., CVPR 2024 (arXiv 2312.09181).

    Args:
        x: dense ``[B, I]`` with the samples in stage order (the same I for all stages), or a StageBatch, whose
            pixels are the rows; float32, bfloat16, float16 or float64.
        weight: ``[O_s, I_s]`` per stage, as a sequence or a StageWeights, in the dtype of ``x``.
        bias: ``[O_s]`` per stage, or None.
        counts: samples per stage of a dense ``x``; not needed with one stage. A StageBatch brings its own.

    Returns:
        A StageBatch of ``O_s`` channels with the counts and the height and width of ``x`` (1×1 for dense input).

    Raises:
        TypeError: a wrong type or dtype, or dtypes that differ.
        ValueError: shapes, counts or devices that do not fit; the message names the stage.

    Under autocast: the autocast dtype, as ``torch.nn.functional.linear``.
    """
    if isinstance(x, _tracing.Proxy):
        return _tracing.symbolic(grouped_linear, x, weight, bias, counts=counts)
    batch, tensors, layout = _prepare(x, weight, bias, counts=counts)
    y = _forward(*tensors, layout)
    return StageBatch(y, batch.counts, layout.out_features, batch.height, batch.width)


def explain(*args, **kwargs) -> Explanation:
    """Which backend serves ``grouped_linear(*args, **kwargs)``, and why the others do not."""
    _, (x, *_), layout = _prepare(*args, **kwargs)
    return BACKENDS.explain(x.device, _predicate_arguments(x, layout))


def _predicate_arguments(x: Tensor, layout: LinearLayout) -> dict:
    return {"op": OP, "device": x.device, "dtype": x.dtype, "layout": layout}


def _prepare(
    x, weight, bias=None, *, counts=None
) -> tuple[StageBatch, tuple[Tensor | None, ...], LinearLayout]:
    """Checks a call; returns the input as a StageBatch, the tensors as they lie, and the layout."""
    batch = _as_stage_batch(x, weight, counts)
    if not _checks.is_packed(weight, bias):
        weight, bias = _checks.pack_layer(OP, weight, bias, _weight_shapes(batch))
    tensors = _autocast.to_lower_precision(
        batch.device.type, batch.values, weight.values, bias and bias.values
    )
    settings = (batch.layout, weight.shapes, bias and bias.shapes)
    layout = _LAYOUTS.find(lambda: _layout(tensors, batch, weight, bias), tensors, settings)
    return batch, tensors, layout


def _weight_shapes(batch: StageBatch) -> list[tuple[int | None, ...]]:
    return [(None, c) for c in batch.channels]


def _layout(tensors, batch, weight, bias) -> LinearLayout:
    """Checks a call."""
    _checks.require_size(OP, "x", batch)
    _checks.pack_layer(OP, weight, bias, _weight_shapes(batch))
    out_features = tuple(shape[0] for shape in weight.shapes)
    for name, tensor in zip(("weight", "bias"), tensors[1:], strict=True):
        if tensor is not None:
            _checks.require_like(OP, name, tensor, tensors[0])
    rows = tuple(n * batch.height * batch.width for n in batch.counts)
    return LinearLayout(rows, batch.channels, out_features)


def _as_stage_batch(x, weight, counts) -> StageBatch:
    counts = None if counts is None else _checks.stage_counts(OP, counts)
    if isinstance(x, StageBatch):
        _checks.require_floating(OP, "x", x.values)
        if counts not in (None, x.counts):
            raise ValueError(f"{OP}: counts={counts} contradict those of the StageBatch, {x.counts}")
        return x
    _checks.require_floating(OP, "x", x)
    if x.dim() != 2:
        raise ValueError(f"{OP}: a dense x must be [B, I], got shape {tuple(x.shape)}")
    x, (batch, _) = fixed_shape(x)
    _checks.require_weights(OP, "weight", weight)
    if counts is None:
        num_stages = len(weight.shapes) if isinstance(weight, StageWeights) else len(weight)
        if num_stages != 1:
            raise ValueError(
                f"{OP}: a dense x with the weights of {num_stages} stages needs counts, got None"
            )
        counts = (batch,)
    if sum(counts) != batch:
        raise ValueError(f"{OP}: counts must sum up to the batch size {batch}, got {counts}")
    return StageBatch.from_dense(x, counts)


def _require(x: Tensor, weight: Tensor, bias: Tensor | None, layout: LinearLayout) -> None:
    rows, in_features, out_features = layout
    _arguments.require_stages(OP, {"rows": 0}, **layout._asdict())
    _checks.require_floating(OP, "x", x)
    sizes = {
        "x": (x, _arguments.total(OP, rows, in_features)),
        "weight": (weight, _arguments.total(OP, out_features, in_features)),
        "bias": (bias, _arguments.total(OP, out_features)),
    }
    _arguments.require_flat(OP, x, sizes)


def _require_backward(
    dy: Tensor, x: Tensor, weight: Tensor, layout: LinearLayout, wanted: Sequence[bool]
) -> None:
    _require(x, weight, None, layout)
    _arguments.require_flat(OP, x, {"dy": (dy, _arguments.total(OP, layout.rows, layout.out_features))})
    _arguments.require_wanted(OP, wanted, 3)


@operator("grouped_linear", _require)
def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, layout: LinearLayout) -> Tensor:
    implementation = BACKENDS.choose(x.device, _predicate_arguments(x, layout))
    return implementation.grouped_linear(x, weight, bias, layout)


@_forward.register_fake
def _(x, weight, bias, layout):
    return x.new_empty(sum(layout.out_sizes))


@_forward.register_flops
def _(layout):
    return layout.flops


@operator("grouped_linear_backward", _require_backward)
def _backward(
    dy: Tensor, x: Tensor, weight: Tensor, layout: LinearLayout, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    implementation = BACKENDS.choose(x.device, _predicate_arguments(x, layout))
    gradients = implementation.grouped_linear_backward(dy, x, weight, layout, wanted)
    return allocate.without_absent(gradients, x)


@_backward.register_fake
def _(dy, x, weight, layout, wanted):
    bias = weight.new_empty(sum(layout.out_features))
    return allocate.without_absent(allocate.gradients_like((x, weight, bias), wanted), x)


@_backward.register_flops
def _(layout, wanted):
    want_x, want_weight, _ = wanted
    return layout.flops * (want_x + want_weight)


def _save_for_backward(ctx, inputs, output):
    x, weight, _, ctx.layout = inputs
    ctx.save_for_backward(x, weight)


def _differentiate(ctx, dy):
    wanted = list(ctx.needs_input_grad[:3])
    gradients = _backward(dy.contiguous(), *ctx.saved_tensors, ctx.layout, wanted)
    return tuple(g if flag else None for g, flag in zip(gradients, wanted, strict=True))


def _save_for_double_backward(ctx, inputs, output):
    dy, x, weight, ctx.layout, ctx.wanted = inputs
    ctx.save_for_backward(dy, x, weight)
    ctx.set_materialize_grads(False)


def _differentiate_twice(ctx, *grad_gradients):
    dy, x, weight = ctx.saved_tensors
    bias = weight.new_zeros(sum(ctx.layout.out_features))
    found = autodiff.second_vjp(
        lambda *leaves: reference.grouped_linear(*leaves, ctx.layout),
        dy,
        (x, weight, bias),
        ctx.wanted,
        grad_gradients,
    )
    return found[:3]


_forward.register_autograd(_differentiate, setup_context=_save_for_backward)
_backward.register_autograd(_differentiate_twice, setup_context=_save_for_double_backward)

"""A linear layer in which every sample goes through its own stage's weight."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from msd_kernels.dispatch import allocate, arguments, autocast, autodiff, checks, stage_weights, tracing
from msd_kernels.dispatch.backends import Candidate, Explanation, OpBackends
from msd_kernels.dispatch.layout_cache import LAYOUTS
from msd_kernels.dispatch.operator import operator
from msd_kernels.dispatch.samples import sample_by_sample
from msd_kernels.layouts import LinearLayout
from msd_kernels.ops.grouped_linear import library, reference, triton
from msd_kernels.runtime.launch import devices
from msd_kernels.stage_batch import StageBatch, fixed_shape

__all__ = ["grouped_linear"]

OP = "grouped_linear"

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
    weight: Sequence[Tensor],
    bias: Sequence[Tensor] | None = None,
    *,
    counts: Sequence[int] | None = None,
) -> StageBatch:
    """Linear layer with one weight per stage: ``y = x @ weight[s].T + bias[s]`` for every pixel of stage ``s``.

    In and out features may differ from stage to stage; sums are float32 at least.
    Source: the per-stage decoders of Zhang et al., CVPR 2024 (arXiv 2312.09181).

    Args:
        x: dense ``[B, I]`` with the samples in stage order (the same I for all stages), or a StageBatch, whose
            pixels are the rows; float32, bfloat16, float16 or float64.
        weight: ``[O_s, I_s]`` per stage, all in the dtype of ``x`` or float32, which is rounded to that of ``x``.
        bias: ``[O_s]`` per stage, or None; as ``weight``.
        counts: samples per stage of a dense ``x``; not needed with one stage. A StageBatch brings its own.

    Returns:
        A StageBatch of ``O_s`` channels with the counts and the height and width of ``x`` (1×1 for dense input).
        The weights of a stage without samples get no gradient (None; zeros where several processes train together).

    Raises:
        TypeError: a wrong type or dtype, or dtypes that differ.
        ValueError: shapes, counts or devices that do not fit; the message names the stage.

    Under autocast: the autocast dtype, as ``torch.nn.functional.linear``.
    """
    if isinstance(x, tracing.Proxy):
        return tracing.symbolic(grouped_linear, x, weight, bias, counts=counts)
    batch, tensors, layout = _prepare(x, weight, bias, counts=counts)
    y = _forward(*tensors, layout)
    return StageBatch(y, batch.counts, layout.out_features, batch.height, batch.width)


def explain(*args, **kwargs) -> Explanation:
    """Which backend serves ``grouped_linear(*args, **kwargs)``, and why the others do not."""
    _, (x, *_), layout = _prepare(*args, **kwargs)
    return BACKENDS.explain(x, layout)


def _prepare(x, weight, bias=None, *, counts=None) -> tuple[StageBatch, tuple, LinearLayout]:
    """Checks a call; returns the input as a StageBatch, the tensors as they lie, and the layout."""
    weight, weight_shapes = checks.stage_weights(OP, "weight", weight)
    bias, bias_shapes = checks.optional_stage_weights(OP, "bias", bias)
    batch = _as_stage_batch(x, len(weight), counts)
    device = batch.device.type
    (values,) = autocast.to_lower_precision(device, batch.values)
    weight, bias = autocast.weights(device, weight), autocast.weights(device, bias)
    layout = LAYOUTS.find(
        OP,
        lambda: _layout(values, weight, bias, batch, weight_shapes, bias_shapes),
        (values, *weight, *bias),
        (batch.layout, len(weight), bias_shapes is None),
    )
    return batch, (values, weight, bias), layout


def _layout(values, weight, bias, batch: StageBatch, weight_shapes, bias_shapes) -> LinearLayout:
    """Checks a call."""
    checks.require_size(OP, "x", batch)
    expected = [(None, c) for c in batch.channels]
    checks.require_layer(OP, values, weight, bias, weight_shapes, bias_shapes, expected)
    rows = tuple(n * batch.height * batch.width for n in batch.counts)
    return LinearLayout(rows, batch.channels, tuple(shape[0] for shape in weight_shapes))


def _as_stage_batch(x, num_stages, counts) -> StageBatch:
    counts = None if counts is None else checks.stage_counts(OP, counts)
    if isinstance(x, StageBatch):
        checks.require_floating(OP, "x", x.values)
        if counts not in (None, x.counts):
            raise ValueError(f"{OP}: counts={counts} contradict those of the StageBatch, {x.counts}")
        return x
    checks.require_floating(OP, "x", x)
    if x.dim() != 2:
        raise ValueError(f"{OP}: a dense x must be [B, I], got shape {tuple(x.shape)}")
    x, (batch, _) = fixed_shape(x)
    if counts is None:
        if num_stages != 1:
            raise ValueError(
                f"{OP}: a dense x with the weights of {num_stages} stages needs counts, got None"
            )
        counts = (batch,)
    if sum(counts) != batch:
        raise ValueError(f"{OP}: counts must sum up to the batch size {batch}, got {counts}")
    return StageBatch.from_dense(x, counts)


def _require(x: Tensor, weight: Sequence[Tensor], bias: Sequence[Tensor], layout: LinearLayout) -> None:
    arguments.require_stages(OP, {"rows": 0}, **layout._asdict())
    checks.require_floating(OP, "x", x)
    arguments.require_flat(OP, x, {"x": (x, arguments.total(OP, layout.rows, layout.in_features))})
    for sizes in ((layout.out_features, layout.in_features), (layout.rows, layout.out_features)):
        arguments.total(OP, *sizes)
    arguments.require_per_stage(OP, "weight", weight, x, layout.weight_shapes)
    if bias:
        arguments.require_per_stage(OP, "bias", bias, x, layout.bias_shapes)


def _require_backward(
    dy: Tensor, x: Tensor, weight: Sequence[Tensor], layout: LinearLayout, wanted: Sequence[bool]
) -> None:
    _require(x, weight, (), layout)
    arguments.require_flat(OP, x, {"dy": (dy, arguments.total(OP, layout.rows, layout.out_features))})
    arguments.require_wanted(OP, wanted, 1 + 2 * len(weight))


@operator("grouped_linear", _require)
def _forward(x: Tensor, weight: Sequence[Tensor], bias: Sequence[Tensor], layout: LinearLayout) -> Tensor:
    """``bias`` is empty where there is none."""
    implementation = BACKENDS.choose(x, layout)
    return implementation.grouped_linear(x, weight, bias, layout)


@_forward.register_fake
def _(x, weight, bias, layout):
    return x.new_empty(sum(layout.out_sizes))


@_forward.register_flops
def _(layout):
    return layout.flops


@operator("grouped_linear_backward", _require_backward)
def _backward(
    dy: Tensor, x: Tensor, weight: Sequence[Tensor], layout: LinearLayout, wanted: Sequence[bool]
) -> list[Tensor]:
    """Those gradients of ``(x, *weight, *bias)`` that are wanted."""
    implementation = BACKENDS.choose(x, layout)
    return autodiff.present(implementation.grouped_linear_backward(dy, x, weight, layout, wanted))


@_backward.register_fake
def _(dy, x, weight, layout, wanted):
    return allocate.wanted_gradients((x,), weight, wanted)


@_backward.register_flops
def _(layout, wanted):
    want_x, *want_parameters = wanted
    weights = zip(layout.stage_flops, want_parameters, strict=False)
    return want_x * layout.flops + sum(product for product, flag in weights if flag)


def _save_for_backward(ctx, inputs, output):
    x, weight, bias, ctx.layout = inputs
    ctx.save_for_backward(x, *weight)
    ctx.biased = bool(bias)


def _differentiate(ctx, dy):
    (x, *weight), layout = ctx.saved_tensors, ctx.layout
    dy = dy.contiguous()
    return stage_weights.differentiate(
        lambda wanted: _backward(dy, x, weight, layout, wanted),
        ctx.needed,
        layout.rows,
        weight,
        layout.bias_shapes if ctx.biased else None,
        dy,
    )


def _save_for_double_backward(ctx, inputs, output):
    dy, x, weight, ctx.layout, ctx.wanted = inputs
    ctx.save_for_backward(dy, x, *weight)
    ctx.set_materialize_grads(False)


def _differentiate_twice(ctx, *grad_gradients):
    dy, x, *weight = ctx.saved_tensors
    stages = len(weight)

    def function(x, *parameters):
        return reference.grouped_linear(x, parameters[:stages], parameters[stages:], ctx.layout)

    bias = [w.new_zeros(o) for w, o in zip(weight, ctx.layout.out_features, strict=True)]
    inputs = (x, *weight, *bias)
    return autodiff.second_vjp(function, dy, inputs, ctx.wanted, grad_gradients)[: 2 + stages]


_forward.register_autograd(_differentiate, setup_context=_save_for_backward)
_backward.register_autograd(_differentiate_twice, setup_context=_save_for_double_backward)

"""GroupNorm with optional per-sample scale and shift and optional SiLU, on dense tensors and stage batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from msd_kernels.dispatch import allocate, autodiff
from msd_kernels.dispatch import arguments as _arguments
from msd_kernels.dispatch import autocast as _autocast
from msd_kernels.dispatch import checks as _checks
from msd_kernels.dispatch import sharding as _sharding
from msd_kernels.dispatch import tracing as _tracing
from msd_kernels.dispatch.backends import Candidate, Explanation, OpBackends
from msd_kernels.dispatch.dtypes import wide
from msd_kernels.dispatch.operator import operator
from msd_kernels.layouts import Affine, GroupNormLayout
from msd_kernels.ops.group_norm import cpu as native
from msd_kernels.ops.group_norm import cuda as cuda_group_norm
from msd_kernels.ops.group_norm import library, reference, triton
from msd_kernels.runtime.launch import devices
from msd_kernels.stage_batch import StageBatch, StageWeights

__all__ = ["group_norm"]

OP = "group_norm"
ACTIVATIONS = (None, "silu")

_DENSE_LAYOUTS, _STAGE_LAYOUTS = _checks.Remembered(), _checks.Remembered()

BACKENDS = OpBackends(
    OP,
    [
        Candidate("cpu", native, ("cpu",), cannot=native.cannot_cpu),
        Candidate("cuda", cuda_group_norm, ("cuda",), cannot=cuda_group_norm.cannot),
        Candidate("triton", triton, devices(), cannot=triton.cannot, slower=triton.slower),
        Candidate("library", library),
        Candidate("reference", reference),
    ],
)


def group_norm(
    x: Tensor | StageBatch,
    num_groups: int | Sequence[int],
    weight: Tensor | StageWeights | Sequence[Tensor] | None = None,
    bias: Tensor | StageWeights | Sequence[Tensor] | None = None,
    eps: float = 1e-5,
    *,
    scale: Tensor | StageBatch | None = None,
    shift: Tensor | StageBatch | None = None,
    activation: str | None = None,
) -> Tensor | StageBatch:
    """GroupNorm, then an optional per-sample scale and shift, then an optional SiLU, in one pass.

    For each sample and group, with the mean and the biased variance over the group's channels and all pixels::

        x_hat = (x - mean) / sqrt(var + eps)
        z = (x_hat * weight + bias) * (1 + scale) + shift
        y = z * sigmoid(z) if activation == "silu" else z

    Statistics and sums are float32 (float64 for float64), never E[x²] - E[x]².
    Source: Wu & He, "Group Normalization" (arXiv 1803.08494); scale and shift as in Dhariwal & Nichol (2105.05233).

    Args:
        x: dense ``[B, C, *spatial]``, NCHW or channels_last, or a StageBatch; float32, bfloat16, float16, float64.
        num_groups: groups; for a StageBatch also one per stage. Must divide the channels.
        weight, bias: ``[C]``; for a StageBatch one ``[C_s]`` per stage, as a sequence or a StageWeights. In the
            dtype of ``x`` or float32. None stands for 1 and 0.
        eps: added to the variance.
        scale, shift: ``[B, C]``; for a StageBatch a StageBatch of height and width 1. In the dtype of ``x`` or float32.
        activation: None or ``"silu"``.

    Returns:
        The same kind, shape, dtype and memory format as ``x``.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: shapes or devices that do not fit, with the stage named, or an unknown activation.

    Under autocast: float32 on CUDA, unchanged on the CPU, as ``torch.nn.functional.group_norm``.

    A dense DTensor that is sharded along its samples stays so: every rank computes its own.
    """
    if isinstance(x, _tracing.Proxy):
        return _tracing.symbolic(
            group_norm, x, num_groups, weight, bias, eps, scale=scale, shift=shift, activation=activation
        )
    if _tracing.is_traced(x):
        return _tracing.group_norm(_prepare, x, num_groups, weight, bias, eps, scale, shift, activation)
    if _sharding.is_distributed(x):
        samples, parameters = {"x": x, "scale": scale, "shift": shift}, {"weight": weight, "bias": bias}
        settings = {"num_groups": num_groups, "eps": eps, "activation": activation}
        return _sharding.on_shards(group_norm, samples, parameters, **settings)
    tensors, layout = _prepare(
        x, num_groups, weight, bias, eps, scale=scale, shift=shift, activation=activation
    )
    y, _, _ = _forward(*tensors, layout)
    if isinstance(x, StageBatch):
        return x.with_values(y)
    return y


def explain(*args, **kwargs) -> Explanation:
    """Which backend serves ``group_norm(*args, **kwargs)``, and why the others do not."""
    (x, *_), layout = _prepare(*args, **kwargs)
    return BACKENDS.explain(x.device, _predicate_arguments(x, layout))


def _prepare(x, num_groups, weight=None, bias=None, eps=1e-5, *, scale=None, shift=None, activation=None):
    """Checks a call; returns its tensors and the layout."""
    settings = (_checks.integers(OP, "num_groups", num_groups), eps, activation)
    if isinstance(x, StageBatch):
        tensors, layout = _prepare_stage_batch(x, weight, bias, scale, shift, *settings)
    else:
        tensors = (x, weight, bias, scale, shift)
        layout = _DENSE_LAYOUTS.find(lambda: _dense_layout(*tensors, *settings), tensors, settings)
    if tensors[0].is_cuda:
        tensors = _autocast.to_float32_on_cuda("cuda", *tensors)
    return tensors, layout


def _prepare_stage_batch(x, weight, bias, scale, shift, *settings):
    _checks.require_floating(OP, "x", x.values)
    shapes = [(c,) for c in x.channels]
    weight, bias = (
        _checks.pack_weights(OP, name, w, shapes) if not (w is None or isinstance(w, StageWeights)) else w
        for name, w in (("weight", weight), ("bias", bias))
    )
    for name, batch in (("scale", scale), ("shift", shift)):
        if batch is not None:
            _checks.require_stage_batch(OP, name, batch)
    packed = (x, weight, bias, scale, shift)
    tensors = tuple(None if t is None else t.values for t in packed)
    key = (
        x.layout,
        *(w and w.shapes for w in (weight, bias)),
        *(t and t.layout for t in (scale, shift)),
        settings,
    )
    return tensors, _STAGE_LAYOUTS.find(lambda: _stage_layout(tensors, *packed, *settings), tensors, key)


def _stage_layout(tensors, x, weight, bias, scale, shift, num_groups, eps, activation):
    _checks.require_size(OP, "x", x)
    for name, w in (("weight", weight), ("bias", bias)):
        if w is not None:
            _checks.pack_weights(OP, name, w, [(c,) for c in x.channels])
    for name, batch in (("scale", scale), ("shift", shift)):
        if batch is not None:
            _checks.require_layout(OP, name, batch, x.counts, x.channels, 1, 1)
    sizes = (x.counts, x.channels, x.height * x.width, True)
    return _layout(tensors, sizes, num_groups, eps, activation)


def _dense_layout(x, weight, bias, scale, shift, num_groups, eps, activation):
    _checks.require_floating(OP, "x", x)
    if x.dim() < 2 or x.shape[1] < 1:
        raise ValueError(f"{OP}: x must be [B, C, *spatial] with C >= 1, got shape {tuple(x.shape)}")
    spatial = math.prod(x.shape[2:])
    if spatial == 0:
        raise ValueError(f"{OP}: x must have at least one pixel, got shape {tuple(x.shape)}")
    batch, channels = x.shape[:2]
    for name, tensor, shape in (
        ("weight", weight, (channels,)),
        ("bias", bias, (channels,)),
        ("scale", scale, (batch, channels)),
        ("shift", shift, (batch, channels)),
    ):
        if tensor is not None and not isinstance(tensor, Tensor):
            raise TypeError(f"{OP}: {name} of a dense x must be a tensor, got {type(tensor).__name__}")
        if tensor is not None and tensor.shape != shape:
            raise ValueError(
                f"{OP}: {name} must be {list(shape)} for x of {list(x.shape)}, got {list(tensor.shape)}"
            )
    channels_last = x.dim() >= 3 and x.stride(1) == 1 and not x.is_contiguous()
    tensors = (x, weight, bias, scale, shift)
    return _layout(tensors, ((batch,), (channels,), spatial, channels_last), num_groups, eps, activation)


def _layout(tensors, sizes, num_groups, eps, activation) -> GroupNormLayout:
    """Checks what dense tensors and stage batches have in common."""
    counts, channels, spatial, channels_last = sizes
    if activation not in ACTIVATIONS:
        raise ValueError(f"{OP}: activation must be None or 'silu', got {activation!r}")
    eps = _checks.real(OP, "eps", eps)
    if not eps >= 0:
        raise ValueError(f"{OP}: eps must be >= 0, got {eps}")
    for name, tensor in zip(("weight", "bias", "scale", "shift"), tensors[1:], strict=True):
        if tensor is not None:
            _checks.require_like(OP, name, tensor, tensors[0], also=(torch.float32,))
    groups = _checks.per_stage(OP, "num_groups", num_groups, len(counts))
    for stage, (c, g) in enumerate(zip(channels, groups, strict=True)):
        if g < 1 or c % g:
            raise ValueError(f"{OP}: num_groups={g} does not divide channels={c} of stage {stage}")
    return GroupNormLayout(counts, channels, groups, spatial, channels_last, eps, activation == "silu")


def _predicate_arguments(x: Tensor, layout: GroupNormLayout) -> dict:
    return {"device_type": x.device.type, "dtype": x.dtype, "layout": layout}


def _order(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def _fits_as_it_is(implementation: ModuleType, x: Tensor, channels_last: bool) -> bool:
    """Whether a backend takes the tensors of a call in their own shapes; the others want them flat."""
    if not getattr(implementation, "TAKES_OWN_SHAPES", False):
        return False
    order = _order(channels_last and x.dim() == 4)
    return x.dim() in (1, 4) and x.is_contiguous(memory_format=order)


def _flat(t: Tensor | None, channels_last: bool) -> Tensor | None:
    """A tensor in the order of its memory, without gaps. Stage batches are flat already."""
    if t is None:
        return None
    if channels_last and t.dim() > 1:
        t = t.movedim(1, -1)
    return t.reshape(-1).contiguous()  # reshape alone keeps a stride that all dimensions share, 0 among them


def _like(t: Tensor, flat: Tensor, channels_last: bool) -> Tensor:
    """``flat`` in the shape of ``t``, which :func:`_flat` has flattened."""
    if t.dim() == 1:
        return flat
    if t.dim() == 2 or not channels_last:
        return flat.view(t.shape)
    return flat.view(t.shape[0], *t.shape[2:], t.shape[1]).movedim(-1, 1)


def _gradients(inputs: Sequence[Tensor | None], flat: Sequence[Tensor | None], channels_last: bool):
    """What the backward op returns for the backends' gradients, None where there is none."""
    gradients = (
        _like(t, gradient, channels_last) if t is not None and gradient is not None else None
        for t, gradient in zip(inputs, flat, strict=True)
    )
    return allocate.without_absent(tuple(gradients), inputs[0])


def _dense(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _require(x, weight, bias, scale, shift, layout: GroupNormLayout) -> None:
    counts, channels, groups = layout.counts, layout.channels, layout.groups
    _arguments.require_stages(OP, {"counts": 0}, counts=counts, channels=channels, groups=groups)
    _arguments.require_positive(OP, spatial=layout.spatial)
    for stage, (c, g) in enumerate(zip(channels, groups, strict=True)):
        if c % g:
            raise ValueError(f"{OP}: num_groups={g} does not divide channels={c} of stage {stage}")
    _checks.require_floating(OP, "x", x)
    _arguments.require_elements(OP, "x", x, _arguments.total(OP, counts, channels, layout.spatial))
    if x.dim() != 1 and (len(counts) > 1 or tuple(x.shape[:2]) != (counts[0], channels[0])):
        raise ValueError(
            f"{OP}: x must be flat, or dense of one stage with counts={list(counts)} and channels={list(channels)}, "
            f"got {list(x.shape)}"
        )
    per_channel, per_sample = _arguments.total(OP, channels), _arguments.total(OP, counts, channels)
    sizes = {
        "weight": (weight, per_channel),
        "bias": (bias, per_channel),
        "scale": (scale, per_sample),
        "shift": (shift, per_sample),
    }
    for name, (tensor, size) in sizes.items():
        if tensor is not None:
            _arguments.require_like(OP, name, tensor, x, x.dtype, torch.float32)
            dense = x.dim() != 1 and name in ("scale", "shift") and tensor.dim() != 1
            _arguments.require_shape(OP, name, tensor, *(x.shape[:2] if dense else (size,)))


def _require_backward(dy, x, mean, rstd, weight, bias, scale, shift, layout: GroupNormLayout, wanted) -> None:
    _require(x, weight, bias, scale, shift, layout)
    _arguments.require_like(OP, "dy", dy, x, x.dtype)
    _arguments.require_shape(OP, "dy", dy, *x.shape)
    size = _arguments.total(OP, layout.counts, layout.groups)
    for name, tensor in (("mean", mean), ("rstd", rstd)):
        _arguments.require_like(OP, name, tensor, x, wide(x.dtype))
        _arguments.require_shape(OP, name, tensor, size)
        _arguments.require_dense(OP, name, tensor)
    _arguments.require_wanted(OP, wanted, 5)


@operator("group_norm", _require)
def _forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    layout: GroupNormLayout,
) -> tuple[Tensor, Tensor, Tensor]:
    """``x`` is dense or the flat buffer of a stage batch; the statistics are flat."""
    implementation = BACKENDS.choose(x.device, _predicate_arguments(x, layout))
    affine = Affine(_dense(weight), _dense(bias), _dense(scale), _dense(shift))
    if _fits_as_it_is(implementation, x, layout.channels_last):
        return implementation.group_norm(x, affine, layout)
    flat = Affine(*(_flat(t, False) for t in affine))
    y, mean, rstd = implementation.group_norm(_flat(x, layout.channels_last), flat, layout)
    return _like(x, y, layout.channels_last), mean, rstd


@_forward.register_fake
def _(x, weight, bias, scale, shift, layout):
    y, mean, rstd = allocate.group_norm_outputs(x.new_empty(x.numel()), layout)
    return _like(x, y, layout.channels_last), mean, rstd


@operator("group_norm_backward", _require_backward)
def _backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    layout: GroupNormLayout,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    implementation = BACKENDS.choose(x.device, _predicate_arguments(x, layout))
    affine = Affine(_dense(weight), _dense(bias), _dense(scale), _dense(shift))
    last = layout.channels_last
    if _fits_as_it_is(implementation, x, last):
        if not dy.is_contiguous():
            dy = dy.contiguous(memory_format=_order(last and x.dim() == 4))
        gradients = implementation.group_norm_backward(dy, x, mean, rstd, affine, layout, wanted)
        return allocate.without_absent(gradients, x)
    flat = Affine(*(_flat(t, False) for t in affine))
    gradients = implementation.group_norm_backward(
        _flat(dy, last), _flat(x, last), mean, rstd, flat, layout, wanted
    )
    return _gradients((x, weight, bias, scale, shift), gradients, last)


@_backward.register_fake
def _(dy, x, mean, rstd, weight, bias, scale, shift, layout, wanted):
    inputs = (x, weight, bias, scale, shift)
    flat = [
        t.new_empty(t.numel()) if t is not None and flag else None
        for t, flag in zip(inputs, wanted, strict=True)
    ]
    return _gradients(inputs, flat, layout.channels_last)


def _save_for_backward(ctx, inputs, output):
    x, *affine, ctx.layout = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, mean, rstd, *affine)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dy, _dmean, _drstd):
    if dy is None:
        return ()
    wanted = list(ctx.needs_input_grad[:5])
    gradients = _backward(dy, *ctx.saved_tensors, ctx.layout, wanted)
    return tuple(g if flag else None for g, flag in zip(gradients, wanted, strict=True))


def _save_for_double_backward(ctx, inputs, output):
    dy, x, _, _, *affine, ctx.layout, ctx.wanted = inputs
    ctx.save_for_backward(dy, x, *affine)
    ctx.set_materialize_grads(False)


def _differentiate_twice(ctx, *grad_gradients):
    dy, *inputs = ctx.saved_tensors
    last = ctx.layout.channels_last

    def function(x, weight, bias, scale, shift):
        affine = Affine(weight, bias, _flat(scale, False), _flat(shift, False))
        return _like(x, reference.group_norm(_flat(x, last), affine, ctx.layout)[0], last)

    d_dy, d_x, *d_affine = autodiff.second_vjp(function, dy, inputs, ctx.wanted, grad_gradients)
    return (d_dy, d_x, None, None, *d_affine)


_forward.register_autograd(_differentiate, setup_context=_save_for_backward)
_backward.register_autograd(_differentiate_twice, setup_context=_save_for_double_backward)

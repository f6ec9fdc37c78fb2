"""GroupNorm with optional per-sample scale and shift and optional SiLU, on dense tensors and stage batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from msd_kernels.dispatch import (
    allocate,
    arguments,
    autocast,
    autodiff,
    checks,
    sharding,
    stage_weights,
    tracing,
)
from msd_kernels.dispatch.backends import Candidate, Explanation, OpBackends
from msd_kernels.dispatch.dtypes import wide
from msd_kernels.dispatch.layout_cache import LAYOUTS
from msd_kernels.dispatch.operator import operator
from msd_kernels.layouts import Affine, GroupNormLayout
from msd_kernels.ops.group_norm import cpu, cuda, library, reference, triton
from msd_kernels.runtime.launch import devices
from msd_kernels.stage_batch import StageBatch

__all__ = ["group_norm"]

OP = "group_norm"
ACTIVATIONS = (None, "silu")
# The tensors that are not one per stage: x, skip, scale, shift, seed.
SINGLES = 5

BACKENDS = OpBackends(
    OP,
    [
        Candidate("cpu", cpu, ("cpu",), cannot=cpu.cannot),
        Candidate("cuda", cuda, ("cuda",), cannot=cuda.cannot),
        Candidate("triton", triton, devices(), cannot=triton.cannot, slower=triton.slower),
        Candidate("library", library),
        Candidate("reference", reference),
    ],
)


def group_norm(
    x: Tensor | StageBatch,
    num_groups: int | Sequence[int],
    weight: Tensor | Sequence[Tensor] | None = None,
    bias: Tensor | Sequence[Tensor] | None = None,
    eps: float = 1e-5,
    *,
    skip: StageBatch | Tensor | None = None,
    scale: Tensor | StageBatch | None = None,
    shift: Tensor | StageBatch | None = None,
    activation: str | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor | StageBatch:
    """GroupNorm, then an optional per-sample scale and shift, then an optional SiLU, in one pass.

    For each sample and group, with the mean and the biased variance over the group's channels and all pixels::

        x = [x, skip]
        x_hat = (x - mean) / sqrt(var + eps)
        z = (x_hat * weight + bias) * (1 + scale) + shift
        y = z * sigmoid(z) if activation == "silu" else z

    ``[x, skip]`` puts the channels of ``skip`` behind those of ``x``, as in :func:`msd_kernels.grouped_conv2d`; both
    are read where they are, and a group may have channels of either.
    Statistics and sums are float32 (float64 for float64), never E[x²] - E[x]².
    Source: Wu & He, "Group Normalization" (arXiv 1803.08494); scale and shift as in Dhariwal & Nichol (2105.05233).

    Args:
        x: dense ``[B, C, *spatial]``, NCHW or channels_last, or a StageBatch; float32, bfloat16, float16, float64.
        num_groups: groups; for a StageBatch also one per stage. Must divide the channels, C below: of both sources.
        weight, bias: ``[C]``; for a StageBatch one ``[C_s]`` per stage. In the dtype of ``x`` or float32. None stands
            for 1 and 0.
        eps: added to the variance.
        skip: second source of a StageBatch: another one of its counts, size and dtype, or a dense ``[B, D, H, W]``
            tensor in stage order.
        scale, shift: ``[B, C]``; for a StageBatch a StageBatch of height and width 1. In the dtype of ``x`` or float32.
        activation: None or ``"silu"``.
        dropout: probability, from 0 to 1, that an element of the result is 0; the others are divided by 1 - dropout.
            Which ones follows from the seed and the element's place in memory: no mask is kept for the backward.
        seed: int64 ``[1]`` on the device of ``x``; where dropout is above 0. One seed per call: equal ones drop the
            same places.

    Returns:
        The same kind, shape, dtype and memory format as ``x``, with the channels of both sources. The weights of a
        stage without samples get no gradient (None; zeros where several processes train together).

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: shapes or devices that do not fit, with the stage named, or an unknown activation.

    Under autocast: float32 on CUDA, unchanged on the CPU, as ``torch.nn.functional.group_norm``.

    A dense DTensor that is sharded along its samples stays so: every rank computes its own.
    """
    if isinstance(x, tracing.Proxy):
        return tracing.symbolic(
            group_norm,
            x,
            num_groups,
            weight,
            bias,
            eps,
            skip=skip,
            scale=scale,
            shift=shift,
            activation=activation,
            dropout=dropout,
            seed=seed,
        )
    if skip is None and not dropout and tracing.is_traced(x):
        return tracing.group_norm(_prepare, x, num_groups, weight, bias, eps, scale, shift, activation)
    if skip is None and not dropout and sharding.is_distributed(x):
        samples, parameters = {"x": x, "scale": scale, "shift": shift}, {"weight": weight, "bias": bias}
        settings = {"num_groups": num_groups, "eps": eps, "activation": activation}
        return sharding.on_shards(group_norm, samples, parameters, **settings)
    options = {"activation": activation, "dropout": dropout, "seed": seed}
    tensors, layout = _prepare(
        x, num_groups, weight, bias, eps, skip=skip, scale=scale, shift=shift, **options
    )
    y, _, _ = _forward(*tensors, layout)
    if isinstance(x, StageBatch):
        return StageBatch(y, x.counts, layout.in_channels, x.height, x.width)
    return y


def explain(*args, **kwargs) -> Explanation:
    """Which backend serves ``group_norm(*args, **kwargs)``, and why the others do not."""
    (x, *_), layout = _prepare(*args, **kwargs)
    return BACKENDS.explain(x, layout)


def _prepare(
    x, num_groups, weight=None, bias=None, eps=1e-5, *, skip=None, scale=None, shift=None, **options
):
    """Checks a call; returns its tensors, the weights and biases as lists, and the layout."""
    activation, dropout, seed = _options(**options)
    settings = (checks.integers(OP, "num_groups", num_groups), eps, activation, dropout)
    if isinstance(x, StageBatch):
        tensors, layout = _prepare_stage_batch(x, weight, bias, skip, scale, shift, *settings)
    elif skip is not None:
        raise TypeError(
            f"{OP}: skip goes with a StageBatch x, got {type(x).__name__}; see StageBatch.from_dense"
        )
    else:
        given = (x, weight, bias, scale, shift)
        layout = LAYOUTS.find(OP, lambda: _dense_layout(*given, *settings), given, settings)
        tensors = (x, None, scale, shift, *([] if t is None else [t] for t in (weight, bias)))
    seed = _seed(tensors[0], layout, seed)
    if tensors[0].is_cuda:
        *singles, weight, bias = tensors
        singles = autocast.to_float32_on_cuda("cuda", *singles)
        lists = (list(autocast.to_float32_on_cuda("cuda", *tensors)) for tensors in (weight, bias))
        tensors = (*singles, *lists)
    return (*tensors[:-2], seed, *tensors[-2:]), layout


def _options(activation=None, dropout=0.0, seed=None) -> tuple:
    """What follows the norm."""
    return activation, dropout, seed


def _seed(x: Tensor, layout: GroupNormLayout, seed: Tensor | None) -> Tensor | None:
    """The seed of a call that drops something."""
    if not layout.dropout:
        return None
    if not isinstance(seed, Tensor):
        raise TypeError(f"{OP}: seed must be a tensor where dropout is above 0, got {type(seed).__name__}")
    _require_seed(x, seed, layout)
    return seed


def _require_seed(x: Tensor, seed: Tensor | None, layout: GroupNormLayout) -> None:
    dropout = layout.dropout
    if not 0 <= dropout <= 1:
        raise ValueError(f"{OP}: dropout probability has to be between 0 and 1, but got {dropout}")
    if (seed is not None) != (dropout > 0):
        raise ValueError(f"{OP}: seed goes with a dropout above 0, got dropout={dropout}")
    if seed is not None:
        arguments.require_like(OP, "seed", seed, x, torch.int64)
        arguments.require_shape(OP, "seed", seed, 1)


def _prepare_stage_batch(x, weight, bias, skip, scale, shift, *settings):
    checks.require_floating(OP, "x", x.values)
    (weight, weight_shapes), (bias, bias_shapes) = (
        checks.optional_stage_weights(OP, name, tensors)
        for name, tensors in (("weight", weight), ("bias", bias))
    )
    skip = checks.skip_batch(OP, x, skip)
    for name, batch in (("scale", scale), ("shift", shift)):
        if batch is not None:
            checks.require_stage_batch(OP, name, batch)
    batches = (x, skip, scale, shift)
    singles = tuple(None if t is None else t.values for t in batches)
    layout = LAYOUTS.find(
        OP,
        lambda: _stage_layout(singles, weight, bias, batches, weight_shapes, bias_shapes, *settings),
        (*singles, *weight, *bias),
        (
            *(t and t.layout for t in batches),
            len(weight),
            weight_shapes is None,
            bias_shapes is None,
            settings,
        ),
    )
    return (*singles, weight, bias), layout


def _stage_layout(singles, weight, bias, batches, weight_shapes, bias_shapes, *settings):
    x, skip, *modulation = batches
    checks.require_size(OP, "x", x)
    skip_channels = (0,) * x.num_stages
    if skip is not None:
        checks.require_like(OP, "skip", singles[1], singles[0])
        skip_channels = skip.channels
    channels = tuple(c + d for c, d in zip(x.channels, skip_channels, strict=True))
    for name, tensors, shapes in (("weight", weight, weight_shapes), ("bias", bias, bias_shapes)):
        if shapes is not None:
            checks.require_shapes(OP, name, shapes, [(c,) for c in channels])
        checks.require_dtypes(OP, name, tensors, singles[0])
    for name, batch in zip(("scale", "shift"), modulation, strict=True):
        if batch is not None:
            checks.require_layout(OP, name, batch, x.counts, channels, 1, 1)
    sizes = (x.counts, x.channels, skip_channels, x.height * x.width, True)
    return _layout({"scale": singles[2], "shift": singles[3]}, singles[0], sizes, *settings)


def _dense_layout(x, weight, bias, scale, shift, num_groups, eps, activation, dropout):
    checks.require_floating(OP, "x", x)
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
    parameters = {"weight": weight, "bias": bias, "scale": scale, "shift": shift}
    sizes = ((batch,), (channels,), (0,), spatial, channels_last)
    return _layout(parameters, x, sizes, num_groups, eps, activation, dropout)


def _layout(parameters, x, sizes, num_groups, eps, activation, dropout) -> GroupNormLayout:
    """Checks what dense tensors and stage batches have in common."""
    counts, channels, skip_channels, spatial, channels_last = sizes
    if activation not in ACTIVATIONS:
        raise ValueError(f"{OP}: activation must be None or 'silu', got {activation!r}")
    eps = checks.real(OP, "eps", eps)
    if not eps >= 0:
        raise ValueError(f"{OP}: eps must be >= 0, got {eps}")
    dropout = checks.real(OP, "dropout", dropout)
    if not 0 <= dropout <= 1:
        raise ValueError(f"{OP}: dropout probability has to be between 0 and 1, but got {dropout}")
    for name, tensor in parameters.items():
        if tensor is not None:
            checks.require_like(OP, name, tensor, x, also=(torch.float32,))
    groups = checks.per_stage(OP, "num_groups", num_groups, len(counts))
    layout = GroupNormLayout(
        counts, channels, skip_channels, groups, spatial, channels_last, eps, activation == "silu", dropout
    )
    _require_whole_groups(layout)
    return layout


def _require_whole_groups(layout: GroupNormLayout) -> None:
    for stage, (c, g) in enumerate(zip(layout.in_channels, layout.groups, strict=True)):
        if g < 1 or c % g:
            raise ValueError(f"{OP}: num_groups={g} does not divide channels={c} of stage {stage}")


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


def _dense(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _require(x, skip, scale, shift, seed, weight, bias, layout: GroupNormLayout) -> None:
    counts, channels, skip_channels, groups = layout[:4]
    least = {"counts": 0, "skip_channels": 0}
    lists = {"channels": channels, "skip_channels": skip_channels, "groups": groups}
    arguments.require_stages(OP, least, counts=counts, **lists)
    arguments.require_positive(OP, spatial=layout.spatial)
    _require_whole_groups(layout)
    checks.require_floating(OP, "x", x)
    _require_skip(x, skip, layout)
    _require_seed(x, seed, layout)
    arguments.require_elements(OP, "x", x, arguments.total(OP, counts, channels, layout.spatial))
    if x.dim() != 1 and (len(counts) > 1 or tuple(x.shape[:2]) != (counts[0], channels[0])):
        raise ValueError(
            f"{OP}: x must be flat, or dense of one stage with counts={list(counts)} and channels={list(channels)}, "
            f"got {list(x.shape)}"
        )
    per_sample = arguments.total(OP, counts, layout.in_channels)
    for name, tensor in (("scale", scale), ("shift", shift)):
        if tensor is not None:
            arguments.require_like(OP, name, tensor, x, x.dtype, torch.float32)
            dense = x.dim() != 1 and tensor.dim() != 1
            arguments.require_shape(OP, name, tensor, *(x.shape[:2] if dense else (per_sample,)))
    for name, tensors in (("weight", weight), ("bias", bias)):
        if tensors:
            arguments.require_per_stage(OP, name, tensors, x, layout.weight_shapes)


def _require_skip(x: Tensor, skip: Tensor | None, layout: GroupNormLayout) -> None:
    """Two sources are flat, and channels lie innermost in them."""
    if (skip is not None) != layout.has_skip:
        given = "None" if skip is None else "one"
        raise ValueError(
            f"{OP}: skip must be given for skip_channels above 0 alone, got {given} for {list(layout.skip_channels)}"
        )
    if skip is None:
        return
    if not layout.channels_last:
        raise ValueError(f"{OP}: channels_last must be True for two sources, got False")
    sizes = {"x": (x, layout.channels), "skip": (skip, layout.skip_channels)}
    elements = {
        name: (tensor, arguments.total(OP, layout.counts, channels, layout.spatial))
        for name, (tensor, channels) in sizes.items()
    }
    arguments.require_flat(OP, x, elements)
    arguments.total(OP, layout.counts, layout.in_channels, layout.spatial)


def _require_backward(
    dy, x, skip, mean, rstd, scale, shift, seed, weight, bias, layout: GroupNormLayout, wanted: Sequence[bool]
) -> None:
    _require(x, skip, scale, shift, seed, weight, bias, layout)
    arguments.require_like(OP, "dy", dy, x, x.dtype)
    arguments.require_shape(OP, "dy", dy, *((sum(layout.out_sizes),) if layout.has_skip else x.shape))
    size = arguments.total(OP, layout.counts, layout.groups)
    for name, tensor in (("mean", mean), ("rstd", rstd)):
        arguments.require_like(OP, name, tensor, x, wide(x.dtype))
        arguments.require_shape(OP, name, tensor, size)
        arguments.require_dense(OP, name, tensor)
    stages = len(layout.channels)
    arguments.require_wanted(OP, wanted, SINGLES + 2 * stages)
    if wanted[4]:
        raise ValueError(f"{OP}: wanted asks for the gradient of seed, which has none")
    if wanted[1] and skip is None:
        raise ValueError(f"{OP}: wanted asks for the gradient of skip, which is not given")
    parts = (weight, wanted[SINGLES : SINGLES + stages]), (bias, wanted[SINGLES + stages :])
    for name, (tensors, flags) in zip(("weight", "bias"), parts, strict=True):
        if any(flags) and not tensors:
            raise ValueError(f"{OP}: wanted asks for gradients of {name}, which is not given")


@operator("group_norm", _require)
def _forward(
    x: Tensor,
    skip: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    seed: Tensor | None,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
    layout: GroupNormLayout,
) -> tuple[Tensor, Tensor, Tensor]:
    """``x`` is dense or the flat buffer of a stage batch; the statistics are flat. Absent parameters are empty."""
    implementation = BACKENDS.choose(x, layout)
    if _fits_as_it_is(implementation, x, layout.channels_last):
        affine = Affine(*map(stage_weights.joined, (weight, bias)), _dense(scale), _dense(shift))
        return implementation.group_norm(x, skip, affine, layout, seed)
    affine = _flat_affine(scale, shift, weight, bias)
    y, mean, rstd = implementation.group_norm(_flat(x, layout.channels_last), skip, affine, layout, seed)
    return _like(x, y, layout.channels_last), mean, rstd


def _flat_affine(scale, shift, weight, bias) -> Affine:
    flat = (_flat(t, False) for t in (scale, shift))
    return Affine(*map(stage_weights.joined, (weight, bias)), *flat)


@_forward.register_fake
def _(x, skip, scale, shift, seed, weight, bias, layout):
    y, mean, rstd = allocate.group_norm_outputs(x.new_empty(x.numel()), layout)
    return _like(x, y, layout.channels_last), mean, rstd


@operator("group_norm_backward", _require_backward)
def _backward(
    dy: Tensor,
    x: Tensor,
    skip: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    seed: Tensor | None,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
    layout: GroupNormLayout,
    wanted: Sequence[bool],
) -> list[Tensor]:
    """Those gradients of ``(x, skip, scale, shift, seed, *weight, *bias)`` that are wanted; a seed's never is."""
    implementation = BACKENDS.choose(x, layout)
    last, stages = layout.channels_last, len(layout.channels)
    want_weight, want_bias = wanted[SINGLES : SINGLES + stages], wanted[SINGLES + stages :]
    flags = [*wanted[:2], any(want_weight), any(want_bias), *wanted[2:4]]
    if _fits_as_it_is(implementation, x, last):
        affine = Affine(*map(stage_weights.joined, (weight, bias)), _dense(scale), _dense(shift))
        if not dy.is_contiguous():
            dy = dy.contiguous(memory_format=_order(last and x.dim() == 4))
        gradients = implementation.group_norm_backward(dy, x, skip, mean, rstd, affine, layout, flags, seed)
        dx, dskip, dweight, dbias, *modulation = gradients
        singles = (dx, dskip, *modulation)
    else:
        affine = _flat_affine(scale, shift, weight, bias)
        dx, dskip, dweight, dbias, *modulation = implementation.group_norm_backward(
            _flat(dy, last), _flat(x, last), skip, mean, rstd, affine, layout, flags, seed
        )
        pairs = zip((x, skip, scale, shift), (dx, dskip, *modulation), strict=True)
        singles = (g if g is None else _like(t, g, last) for t, g in pairs)
    return autodiff.present(
        [
            *singles,
            *stage_weights.wanted_parts(dweight, layout.weight_shapes, want_weight),
            *stage_weights.wanted_parts(dbias, layout.weight_shapes, want_bias),
        ]
    )


@_backward.register_fake
def _(dy, x, skip, mean, rstd, scale, shift, seed, weight, bias, layout, wanted):
    flat = (
        _like(t, t.new_empty(t.numel()), layout.channels_last)
        for t, flag in zip((x, skip, scale, shift), wanted, strict=False)
        if flag
    )
    stages = len(layout.channels)
    parameters = [*(weight or [None] * stages), *(bias or [None] * stages)]
    return [*flat, *autodiff.present(allocate.gradients_like(parameters, wanted[SINGLES:]))]


def _save_for_backward(ctx, inputs, output):
    x, skip, scale, shift, seed, weight, bias, ctx.layout = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, skip, mean, rstd, scale, shift, seed, *weight, *bias)
    ctx.set_materialize_grads(False)
    ctx.weights = len(weight)


def _differentiate(ctx, dy, _dmean, _drstd):
    if dy is None:
        return ()
    (x, skip, mean, rstd, scale, shift, seed, *parameters), layout = ctx.saved_tensors, ctx.layout
    weight, bias = parameters[: ctx.weights], parameters[ctx.weights :]
    return stage_weights.differentiate(
        lambda wanted: _backward(dy, x, skip, mean, rstd, scale, shift, seed, weight, bias, layout, wanted),
        ctx.needed,
        layout.counts,
        weight,
        layout.weight_shapes if bias else None,
        dy,
    )


def _save_for_double_backward(ctx, inputs, output):
    dy, x, skip, _, _, scale, shift, seed, weight, bias, ctx.layout, ctx.wanted = inputs
    ctx.save_for_backward(seed, dy, x, skip, scale, shift, *weight, *bias)
    ctx.set_materialize_grads(False)
    ctx.weights, ctx.biases = len(weight), len(bias)


def _differentiate_twice(ctx, *grad_gradients):
    seed, dy, *inputs = ctx.saved_tensors
    last = ctx.layout.channels_last

    def function(x, skip, scale, shift, *parameters):
        affine = _flat_affine(scale, shift, parameters[: ctx.weights], parameters[ctx.weights :])
        return _like(x, reference.group_norm(_flat(x, last), skip, affine, ctx.layout, seed)[0], last)

    stages, weights = len(ctx.layout.channels), SINGLES + ctx.weights
    wanted = [
        *ctx.wanted[: SINGLES - 1],
        *ctx.wanted[SINGLES:weights],
        *ctx.wanted[SINGLES + stages : SINGLES + stages + ctx.biases],
    ]
    found = autodiff.second_vjp(function, dy, inputs, wanted, grad_gradients)
    d_dy, d_x, d_skip, d_scale, d_shift, *others = found
    return (d_dy, d_x, d_skip, None, None, d_scale, d_shift, None, *others)


_forward.register_autograd(_differentiate, setup_context=_save_for_backward)
_backward.register_autograd(_differentiate_twice, setup_context=_save_for_double_backward)

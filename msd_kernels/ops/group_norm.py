"""GroupNorm with optional per-sample scale and shift and optional SiLU, on dense tensors and stage batches."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from msd_kernels import allocate
from msd_kernels.backends import Candidate, Explanation, OpBackends
from msd_kernels.library import group_norm as library
from msd_kernels.native import group_norm as native
from msd_kernels.native.channels_last import to_channels_last
from msd_kernels.ops import _autocast, _checks
from msd_kernels.reference import autodiff
from msd_kernels.reference import group_norm as reference
from msd_kernels.stage_batch import StageBatch, StageWeights
from msd_kernels.triton import group_norm as triton
from msd_kernels.triton.launch import devices

__all__ = ["group_norm"]

OP = "group_norm"

BACKENDS = OpBackends(
    OP,
    [
        Candidate("cpu", native, ("cpu",), cannot=native.cannot_cpu),
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
    """
    call = _prepare(x, num_groups, weight, bias, eps, scale=scale, shift=shift, activation=activation)
    y, _, _ = torch.ops.msd_kernels.group_norm(*call)
    if isinstance(x, StageBatch):
        return x.with_values(y)
    return _restore(y, x, channels_last=call[9])


def explain(*args, **kwargs) -> Explanation:
    """Which backend serves ``group_norm(*args, **kwargs)``, and why the others do not."""
    call = _prepare(*args, **kwargs)
    x, channels, groups = call[0], call[6], call[7]
    return BACKENDS.explain(x.device.type, _predicate_arguments(x, channels, groups))


def _prepare(x, num_groups, weight=None, bias=None, eps=1e-5, *, scale=None, shift=None, activation=None):
    """Checks a call and flattens it to the arguments of the dispatcher op."""
    if activation not in (None, "silu"):
        raise ValueError(f"{OP}: activation must be None or 'silu', got {activation!r}")
    if not eps >= 0:
        raise ValueError(f"{OP}: eps must be >= 0, got {eps}")
    if isinstance(x, StageBatch):
        flat, modulation = _prepare_stage_batch(x, weight, bias, scale, shift)
        counts, channels, spatial, channels_last = x.counts, x.channels, x.height * x.width, True
    else:
        flat, modulation, channels_last = _prepare_dense(x, weight, bias, scale, shift)
        counts, channels, spatial = (x.shape[0],), (x.shape[1],), math.prod(x.shape[2:])
    values, weight, bias = flat
    scale, shift = modulation
    for name, tensor in (("weight", weight), ("bias", bias), ("scale", scale), ("shift", shift)):
        if tensor is not None:
            _checks.require_like(OP, name, tensor, values, also=(torch.float32,))
    groups = _checks.per_stage(OP, "num_groups", num_groups, len(counts))
    for stage, (c, g) in enumerate(zip(channels, groups, strict=True)):
        if g < 1 or c % g:
            raise ValueError(f"{OP}: num_groups={g} does not divide channels={c} of stage {stage}")
    tensors = _autocast.to_float32_on_cuda(values.device.type, values, weight, bias, scale, shift)
    return (*tensors, counts, channels, groups, spatial, channels_last, float(eps), activation == "silu")


def _prepare_stage_batch(x, weight, bias, scale, shift):
    _checks.require_floating(OP, "x", x.values)
    shapes = [(c,) for c in x.channels]
    packed = (
        None if w is None else _checks.pack_weights(OP, name, w, shapes).values
        for name, w in (("weight", weight), ("bias", bias))
    )
    modulation = []
    for name, batch in (("scale", scale), ("shift", shift)):
        if batch is not None:
            _checks.require_layout(OP, name, batch, x.counts, x.channels, 1, 1)
        modulation.append(None if batch is None else batch.values)
    return (x.values, *packed), modulation


def _prepare_dense(x, weight, bias, scale, shift):
    _checks.require_floating(OP, "x", x)
    if x.dim() < 2 or x.shape[1] < 1:
        raise ValueError(f"{OP}: x must be [B, C, *spatial] with C >= 1, got shape {tuple(x.shape)}")
    if math.prod(x.shape[2:]) == 0:
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
    values = x.movedim(1, -1).reshape(-1) if channels_last else x.reshape(-1)
    modulation = [None if t is None else t.reshape(-1) for t in (scale, shift)]
    return (values, weight, bias), modulation, channels_last


def _restore(y: Tensor, x: Tensor, channels_last: bool) -> Tensor:
    if not channels_last:
        return y.view(x.shape)
    dense = y.view(x.shape[0], *x.shape[2:], x.shape[1]).movedim(-1, 1)
    if dense.requires_grad and not torch.compiler.is_compiling():
        dense.register_hook(to_channels_last)
    return dense


def _predicate_arguments(x: Tensor, channels: Sequence[int], groups: Sequence[int]) -> dict:
    return {"device_type": x.device.type, "dtype": x.dtype, "channels": channels, "groups": groups}


@torch.library.custom_op("msd_kernels::group_norm", mutates_args=())
def _forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    counts: Sequence[int],
    channels: Sequence[int],
    groups: Sequence[int],
    spatial: int,
    channels_last: bool,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    implementation = BACKENDS.choose(x.device.type, _predicate_arguments(x, channels, groups))
    return implementation.group_norm(
        x, weight, bias, scale, shift, counts, channels, groups, spatial, channels_last, eps, silu
    )


@_forward.register_fake
def _(x, weight, bias, scale, shift, counts, channels, groups, spatial, channels_last, eps, silu):
    return allocate.group_norm_outputs(x, counts, groups)


@torch.library.custom_op("msd_kernels::group_norm_backward", mutates_args=())
def _backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    counts: Sequence[int],
    channels: Sequence[int],
    groups: Sequence[int],
    spatial: int,
    channels_last: bool,
    eps: float,
    silu: bool,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    implementation = BACKENDS.choose(x.device.type, _predicate_arguments(x, channels, groups))
    layout = (counts, channels, groups, spatial, channels_last, eps, silu)
    gradients = implementation.group_norm_backward(
        dy, x, mean, rstd, weight, bias, scale, shift, *layout, wanted
    )
    return allocate.without_absent(gradients, x)


@_backward.register_fake
def _(
    dy,
    x,
    mean,
    rstd,
    weight,
    bias,
    scale,
    shift,
    counts,
    channels,
    groups,
    spatial,
    channels_last,
    eps,
    silu,
    wanted,
):
    gradients = allocate.gradients_like((x, weight, bias, scale, shift), wanted)
    return allocate.without_absent(gradients, x)


def _save_for_backward(ctx, inputs, output):
    x, weight, bias, scale, shift = inputs[:5]
    _, mean, rstd = output
    ctx.save_for_backward(x, mean, rstd, weight, bias, scale, shift)
    ctx.layout = inputs[5:]
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dy, _dmean, _drstd):
    if dy is None:
        return (None,) * 12
    wanted = list(ctx.needs_input_grad[:5])
    gradients = torch.ops.msd_kernels.group_norm_backward(
        dy.contiguous(), *ctx.saved_tensors, *ctx.layout, wanted
    )
    return (*(g if flag else None for g, flag in zip(gradients, wanted, strict=True)), *(None,) * 7)


def _save_for_double_backward(ctx, inputs, output):
    dy, x, _, _, *parameters = inputs[:8]
    ctx.save_for_backward(dy, x, *parameters)
    ctx.layout, ctx.wanted = inputs[8:15], inputs[15]
    ctx.set_materialize_grads(False)


def _differentiate_twice(ctx, *grad_gradients):
    dy, *inputs = ctx.saved_tensors
    found = autodiff.second_vjp(
        lambda *leaves: reference.group_norm(*leaves, *ctx.layout)[0], dy, inputs, ctx.wanted, grad_gradients
    )
    d_dy, d_x, *d_parameters = found
    return (d_dy, d_x, None, None, *d_parameters, *(None,) * 8)


_forward.register_autograd(_differentiate, setup_context=_save_for_backward)
_backward.register_autograd(_differentiate_twice, setup_context=_save_for_double_backward)

"""``torch.nn.functional.conv2d`` of 3×3, stride 1 and padding 1, by the compiled kernels where they are faster.

A dense tensor is a stage batch of one stage. NCHW maps are brought into the kernels' order and back by a transposition
of our own (csrc/cpu/exchange_axes.cpp); whatever the kernels do not serve is PyTorch's own call.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from msd_kernels import _private
from msd_kernels.dispatch import arguments, autocast, autodiff, tracing
from msd_kernels.dispatch.backends import Explanation, forced_backend
from msd_kernels.dispatch.operator import PLAIN, operator
from msd_kernels.dispatch.samples import sample_by_sample
from msd_kernels.dispatch.stage_weights import has_channels_innermost
from msd_kernels.layouts import Conv2dLayout
from msd_kernels.ops.grouped_conv2d import BACKENDS, cpu
from msd_kernels.runtime.extension import TYPE_CODES, addresses, load

__all__ = ["conv2d", "explain"]

OP = "conv2d"
# So many products of channels must stand behind each channel of a map that is transposed.
LEAST_PRODUCTS = 20
# An image of a single tile, which may come alone, needs so many weights per tap: with fewer their transform costs more
# than what oneDNN does with them.
LEAST_WEIGHTS = 2**21


@sample_by_sample(("x",))
def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.conv2d(x, weight, bias, padding=1)``, in the memory format that PyTorch gives it.

    Args:
        x: ``[B, C, H, W]`` in any memory format.
        weight: ``[O, C, 3, 3]``, contiguous or channels_last.
        bias: ``[O]`` or None.

    Under autocast: the autocast dtype.
    """
    call = None if tracing.is_traced(x) else _Call(x, weight, bias)
    if call is None or call.reason() is not None:
        return F.conv2d(x, weight, bias, padding=1)
    return _forward(*call.tensors, call.layout, call.channels_last)


def explain(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Explanation:
    """Which backend of ``grouped_conv2d`` serves :func:`conv2d`, and why the others do not."""
    call = _Call(x, weight, bias)
    reason = call.reason()
    if reason is None:
        return BACKENDS.explain(call.tensors[0], call.layout)
    return Explanation(BACKENDS.op, "library", "torch.nn.functional.conv2d", {"cpu": reason})


class _Call:
    """A call with its tensors as autocast leaves them, the layout, and whether the output is channels_last."""

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        self._unlike = _why_not_like(x, weight, bias)
        if self._unlike is not None:
            return
        (x,) = autocast.to_lower_precision("cpu", x)
        present = [t for t in (weight, bias) if t is not None]
        weight, *bias = autocast.weights("cpu", present)
        self.tensors = (x, weight, *(bias or [None]))
        batch, channels, height, width = x.shape
        self.layout = Conv2dLayout((batch,), (channels,), (0,), (weight.shape[0],), height, width, 3, "none")
        self.channels_last = _is_last(x) or _is_last(weight)

    def reason(self) -> str | None:
        """Why PyTorch's own call is preferred, or None. A compiler is told what holds for all sizes alone."""
        if self._unlike is not None:
            return self._unlike
        x, weight, bias = self.tensors
        own = {t.dtype for t in (weight, bias) if t is not None} <= {x.dtype, torch.float32}
        if not own or (x.dtype != weight.dtype and autocast.lower_precision_dtype("cpu") is None):
            return f"x is {x.dtype}, the weight {weight.dtype}"
        if torch.compiler.is_compiling():
            return None if min(weight.shape[:2]) >= cpu.LEAST_CHANNELS else "too few channels"
        return _slower(x, self.layout, self.channels_last)


def _why_not_like(x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    """What the kernels do not take at all, or None."""
    compiling = torch.compiler.is_compiling()
    if not compiling and not PLAIN.issuperset(map(type, (x, weight, bias))):
        return "takes ordinary tensors"
    if not compiling and (_private.in_transform() or _private.forward_mode()):
        return "torch.func and forward mode are PyTorch's own"
    for tensor in (x, weight) if bias is None else (x, weight, bias):
        if tensor.device.type != "cpu":
            return f"serves cpu tensors, got {tensor.device}"
        if tensor.layout is not torch.strided:
            return f"takes dense tensors, got {tensor.layout}"
        if tensor.dtype not in cpu.DTYPES:
            return f"takes float32, bfloat16 and float16, got {tensor.dtype}"
    if x.dim() != 4 or not x.numel():
        return f"takes [B, C, H, W] with values, got {list(x.shape)}"
    outs = weight.shape[0]
    if weight.shape != (outs, x.shape[1], 3, 3) or (bias is not None and bias.shape != (outs,)):
        return f"takes a weight of [O, {x.shape[1]}, 3, 3] and a bias of [O], got {list(weight.shape)}"
    return None


def _slower(x: Tensor, layout: Conv2dLayout, channels_last: bool) -> str | None:
    """Why PyTorch's own call is preferred, or None: by the layer's shape, the order in memory and the processor."""
    if BACKENDS.choose(x, layout) is not cpu:
        explanation = BACKENDS.explain(x, layout)
        return explanation.why_not.get("cpu", "another backend is forced")
    if forced_backend(BACKENDS.op) == "cpu":
        return None
    (channels,), (outs,) = layout.channels, layout.out_channels
    if max(layout.height, layout.width) <= cpu.TILE and channels * outs < LEAST_WEIGHTS:
        return f"{channels} to {outs} channels are too few for an image of a single tile"
    exchanged = channels * (not _is_last(x)) + outs * (not channels_last)
    if channels * outs < LEAST_PRODUCTS * exchanged:
        return f"{channels} to {outs} channels are too few for the transpositions of NCHW to pay"
    return None


def _is_last(t: Tensor) -> bool:
    """Whether PyTorch's convolutions take a tensor for channels_last."""
    return t.stride(1) == 1 and not t.is_contiguous()


def _order(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def _pixels(x: Tensor) -> Tensor:
    """The flat NHWC buffer of a map, a view where it is one."""
    if not x.is_contiguous() or x.shape[1] == 1:
        return x.permute(0, 2, 3, 1).reshape(-1)
    batch, channels, *size = x.shape
    return _exchanged(x, batch, channels, size[0] * size[1])


def _map(pixels: Tensor, shape: Sequence[int], channels_last: bool) -> Tensor:
    """A flat NHWC buffer as a map of this shape."""
    batch, channels, height, width = shape
    if channels_last:
        return pixels.view(batch, height, width, channels).permute(0, 3, 1, 2)
    return _exchanged(pixels, batch, height * width, channels).view(shape)


def _exchanged(x: Tensor, count: int, rows: int, columns: int) -> Tensor:
    """``[count, rows, columns]`` with its last two axes exchanged, flat."""
    y = x.new_empty(x.numel())
    load("cpu").module.exchange_axes(count, rows, columns, [TYPE_CODES[x.dtype]], addresses(x), addresses(y))
    return y


def _require(x, weight, bias, layout: Conv2dLayout, channels_last=True) -> None:
    if (
        len(layout.counts) != 1
        or layout.kernel != 3
        or layout.resample != "none"
        or any(layout.skip_channels)
    ):
        raise ValueError(f"{OP}: there must be one stage and one source, and 3×3 kernels, got {layout}")
    (batch,), (channels,), (outs,) = layout.counts, layout.channels, layout.out_channels
    arguments.require_shape(OP, "x", x, batch, channels, layout.height, layout.width)
    arguments.require_positive(OP, counts=batch, channels=channels, out_channels=outs)
    arguments.require_positive(OP, height=layout.height, width=layout.width)
    arguments.require_like(OP, "x", x, x, *cpu.DTYPES, torch.float64)
    for name, tensor, shape in (("weight", weight, (outs, channels, 3, 3)), ("bias", bias, (outs,))):
        if tensor is not None:
            arguments.require_like(OP, name, tensor, x, x.dtype, torch.float32)
            arguments.require_shape(OP, name, tensor, *shape)


def _require_backward(dy, x, weight, layout: Conv2dLayout, wanted) -> None:
    _require(x, weight, None, layout)
    arguments.require_like(OP, "dy", dy, x, x.dtype)
    arguments.require_shape(OP, "dy", dy, layout.counts[0], *layout.out_channels, layout.height, layout.width)
    arguments.require_wanted(OP, wanted, 3)


@operator("conv2d", _require)
def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, layout: Conv2dLayout, channels_last: bool
) -> Tensor:
    if _slower(x, layout, channels_last) is not None:
        y = F.conv2d(x, *(t if t is None else t.to(x.dtype) for t in (weight, bias)), padding=1)
        return y.contiguous(memory_format=_order(channels_last))
    biases = [] if bias is None else [bias]
    y = cpu.grouped_conv2d(_pixels(x), None, None, None, [weight], biases, layout, 1.0)
    return _map(y, (*layout.counts, *layout.out_channels, layout.height, layout.width), channels_last)


@_forward.register_fake
def _(x, weight, bias, layout, channels_last):
    shape = (*layout.counts, *layout.out_channels, layout.height, layout.width)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_order(channels_last))


@_forward.register_flops
def _(layout, channels_last):
    return layout.flops


@operator("conv2d_backward", _require_backward)
def _backward(
    dy: Tensor, x: Tensor, weight: Tensor, layout: Conv2dLayout, wanted: Sequence[bool]
) -> list[Tensor]:
    """Those gradients of ``(x, weight, bias)`` that are wanted; the bias has the weight's dtype."""
    want_x, want_weight, want_bias = wanted
    if _slower(x, layout, _is_last(dy)) is not None:
        outs = list(layout.out_channels)
        dx, dweight, dbias = torch.ops.aten.convolution_backward(
            dy, x, weight.to(x.dtype), outs, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, list(wanted)
        )
        dx = dx if dx is None else dx.contiguous(memory_format=_order(_is_last(x)))
    else:
        flags = [want_x, False, False, want_weight, want_bias]
        pixels = _pixels(x) if want_weight else x.new_empty(x.numel())  # which is not read
        dx, _, _, dweight, dbias = cpu.grouped_conv2d_backward(
            _pixels(dy), pixels, None, [weight], layout, flags
        )
        dx = dx if dx is None else _map(dx, x.shape, _is_last(x))
    if dweight is not None:
        dweight = dweight.to(weight.dtype).contiguous(memory_format=_order(has_channels_innermost(weight)))
    return autodiff.present([dx, dweight, dbias if dbias is None else dbias.to(weight.dtype)])


@_backward.register_fake
def _(dy, x, weight, layout, wanted):
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=_order(_is_last(x)))
    order = _order(has_channels_innermost(weight))
    dweight = torch.empty(weight.shape, dtype=weight.dtype, device=x.device, memory_format=order)
    gradients = (dx, dweight, weight.new_empty(weight.shape[0]))
    return [gradient for gradient, flag in zip(gradients, wanted, strict=True) if flag]


@_backward.register_flops
def _(layout, wanted):
    return layout.flops * (wanted[0] + wanted[1])


def _save_for_backward(ctx, inputs, output):
    x, weight, bias, ctx.layout, _ = inputs
    ctx.save_for_backward(x, weight)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _differentiate(ctx, dy):
    x, weight = ctx.saved_tensors
    wanted = [bool(flag) for flag in ctx.needed]
    found = iter(_backward(dy, x, weight, ctx.layout, wanted) if any(wanted) else ())
    dx, dweight, dbias = (next(found) if flag else None for flag in wanted)
    return dx, dweight, dbias if dbias is None else dbias.to(ctx.bias_dtype)


def _save_for_double_backward(ctx, inputs, output):
    dy, x, weight, ctx.layout, ctx.wanted = inputs
    ctx.save_for_backward(dy, x, weight)
    ctx.set_materialize_grads(False)


def _differentiate_twice(ctx, *grad_gradients):
    dy, x, weight = ctx.saved_tensors

    def function(x, weight, bias):
        return F.conv2d(x, weight.to(x.dtype), bias.to(x.dtype), padding=1)

    inputs = (x, weight, weight.new_zeros(weight.shape[0]))
    ddy, dx, dweight, _ = autodiff.second_vjp(function, dy, inputs, ctx.wanted, grad_gradients)
    return ddy, dx, dweight


_forward.register_autograd(_differentiate, setup_context=_save_for_backward)
_backward.register_autograd(_differentiate_twice, setup_context=_save_for_double_backward)

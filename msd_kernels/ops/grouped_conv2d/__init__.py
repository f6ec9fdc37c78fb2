"""A convolution in which every sample goes through its own stage's weight, with the neighbouring steps fused."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from msd_kernels.dispatch import allocate, arguments, autocast, autodiff, checks, stage_weights, tracing
from msd_kernels.dispatch.backends import Candidate, Explanation, OpBackends
from msd_kernels.dispatch.layout_cache import LAYOUTS
from msd_kernels.dispatch.operator import operator
from msd_kernels.dispatch.samples import sample_by_sample
from msd_kernels.layouts import Conv2dLayout, resampled_size
from msd_kernels.ops.grouped_conv2d import cpu, library, reference, triton
from msd_kernels.runtime.launch import devices
from msd_kernels.stage_batch import StageBatch

__all__ = ["grouped_conv2d"]

OP = "grouped_conv2d"
RESAMPLE = (None, "up", "down")

BACKENDS = OpBackends(
    OP,
    [
        Candidate("triton", triton, devices(), cannot=triton.cannot, slower=triton.slower),
        Candidate("cpu", cpu, ("cpu",), cannot=cpu.cannot, slower=cpu.slower),
        Candidate("library", library),
        Candidate("reference", reference),
    ],
)


@sample_by_sample(("x", "skip", "sample_bias", "residual"), ("weight", "bias"))
def grouped_conv2d(
    x: StageBatch,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor] | None = None,
    *,
    skip: StageBatch | Tensor | None = None,
    sample_bias: StageBatch | None = None,
    residual: StageBatch | None = None,
    scale: float = 1.0,
    resample: str | None = None,
) -> StageBatch:
    """Convolution with one weight per stage, stride 1, zero padding k // 2, in one call for all stages.

    For every sample of stage ``s``::

        y = scale * (conv(resample([x, skip]), weight[s]) + bias[s] + sample_bias + residual)

    ``[x, skip]`` puts the channels of ``skip`` behind those of ``x``. ``"up"`` doubles height and width (nearest),
    ``"down"`` halves them (mean of 2×2): the resampling of a U-Net with the filter [1, 1]; others go through
    :func:`msd_kernels.resample2d`. Sums are float32 at least.
    Source: the per-stage decoders of Zhang et al., CVPR 2024 (arXiv 2312.09181); the fused steps are those of the U-Net
    blocks of Karras et al. (arXiv 2206.00364).

    Args:
        x: StageBatch with channels ``C_s``; float32, bfloat16, float16 or float64.
        weight: ``[O_s, C_s + D_s, k, k]`` per stage, k odd and the same for all; all in the dtype of ``x`` or float32,
            which is rounded to that of ``x``.
        bias: ``[O_s]`` per stage, or None; as ``weight``.
        skip: second source: a StageBatch with the counts and size of ``x`` and channels ``D_s``, or a dense
            ``[B, D, H, W]`` tensor in stage order (D the same for all stages). None: ``D_s = 0``.
        sample_bias: one value per sample and out channel: a StageBatch of channels ``O_s``, height and width 1.
        residual: StageBatch of the output's layout.
        scale: factor on the whole sum.
        resample: None, ``"up"`` or ``"down"``; ``"down"`` needs even height and width.

    All tensors share the device of ``x``, and all but the weights its dtype.

    Returns:
        A StageBatch of ``O_s`` channels with the counts of ``x``, at the resampled size. The weights of a stage without
        samples get no gradient (None; zeros where several processes train together).

    Raises:
        TypeError: a wrong type or dtype, or dtypes that differ.
        ValueError: shapes, counts or devices that do not fit; the message names the stage.

    Under autocast: the autocast dtype, as ``torch.nn.functional.conv2d``.

    On processors, 3×3 convolutions of at least 16 channels are computed by Winograd's F(4×4, 3×3): relative root mean
    square errors are 1e-6 in float32, where a direct convolution has 0.3e-6. ``msd_kernels.explain`` tells, and
    ``MSD_KERNELS_BACKEND=grouped_conv2d=library`` forbids it.
    """
    options = {"skip": skip, "sample_bias": sample_bias, "residual": residual, "scale": scale}
    options["resample"] = resample
    if isinstance(x, tracing.Proxy):
        return tracing.symbolic(grouped_conv2d, x, weight, bias, **options)
    tensors, layout, scale = _prepare(x, weight, bias, **options)
    return StageBatch(_forward(*tensors, layout, scale), x.counts, layout.out_channels, *layout.out_size)


def explain(*args, **kwargs) -> Explanation:
    """Which backend serves ``grouped_conv2d(*args, **kwargs)``, and why the others do not."""
    (x, *_), layout, _ = _prepare(*args, **kwargs)
    return BACKENDS.explain(x, layout)


def _prepare(x, weight, bias=None, *, skip=None, sample_bias=None, residual=None, scale=1.0, resample=None):
    """Checks a call; returns its tensors as they lie, the layout and the scale."""
    if not isinstance(x, StageBatch):
        raise TypeError(f"{OP}: x must be a StageBatch, got {type(x).__name__}; see StageBatch.from_dense")
    checks.require_floating(OP, "x", x.values)
    skip = checks.skip_batch(OP, x, skip)
    weight, weight_shapes = checks.stage_weights(OP, "weight", weight)
    bias, bias_shapes = checks.optional_stage_weights(OP, "bias", bias)
    for name, batch in (("sample_bias", sample_bias), ("residual", residual)):
        if batch is not None:
            checks.require_stage_batch(OP, name, batch)
    device, batches = x.device.type, (x, skip, sample_bias, residual)
    singles = autocast.to_lower_precision(device, *(None if t is None else t.values for t in batches))
    weight, bias = autocast.weights(device, weight), autocast.weights(device, bias)
    layouts = (None if t is None else t.layout for t in batches)
    settings = (*layouts, len(weight), bias_shapes is None, resample)
    layout = LAYOUTS.find(
        OP,
        lambda: _layout(singles, weight, bias, batches, weight_shapes, bias_shapes, resample),
        (*singles, *weight, *bias),
        settings,
    )
    return (*singles, weight, bias), layout, checks.number(OP, "scale", scale)


def _layout(singles, weight, bias, batches, weight_shapes, bias_shapes, resample) -> Conv2dLayout:
    """Checks a call."""
    x, skip, sample_bias, residual = batches
    checks.require_size(OP, "x", x)
    _require_resample(x, resample)
    skip_channels = (0,) * x.num_stages
    if skip is not None:
        skip_channels = skip.channels
    expected = [(None, c + d, None, None) for c, d in zip(x.channels, skip_channels, strict=True)]
    checks.require_layer(OP, singles[0], weight, bias, weight_shapes, bias_shapes, expected)
    kernel = _kernel_size(weight_shapes)
    out_channels = tuple(shape[0] for shape in weight_shapes)
    if sample_bias is not None:
        checks.require_layout(OP, "sample_bias", sample_bias, x.counts, out_channels, 1, 1)
    if residual is not None:
        out_size = resampled_size(x.height, x.width, resample or "none")
        checks.require_layout(OP, "residual", residual, x.counts, out_channels, *out_size)
    for name, tensor in zip(("skip", "sample_bias", "residual"), singles[1:], strict=True):
        if tensor is not None:
            checks.require_like(OP, name, tensor, singles[0])
    sizes = (x.height, x.width, kernel)
    return Conv2dLayout(x.counts, x.channels, skip_channels, out_channels, *sizes, resample or "none")


def _require_resample(x: StageBatch, resample: str | None) -> None:
    if resample not in RESAMPLE:
        raise ValueError(f"{OP}: resample must be None, 'up' or 'down', got {resample!r}")
    if resample == "down" and (x.height % 2 or x.width % 2):
        raise ValueError(f"{OP}: resample='down' needs even height and width, got {x.height}x{x.width}")


def _kernel_size(shapes: Sequence[tuple[int, ...]]) -> int:
    kernels = {tuple(shape[2:]) for shape in shapes}
    kernel = next(iter(kernels))
    if len(kernels) > 1 or kernel[0] != kernel[1] or kernel[0] % 2 == 0:
        raise ValueError(
            f"{OP}: weight must have one odd, square kernel size for all stages, got {sorted(kernels)}"
        )
    return kernel[0]


def _require(x, skip, sample_bias, residual, weight, bias, layout: Conv2dLayout, scale=1.0) -> None:
    counts, channels, skip_channels, out_channels, height, width, kernel, resample = layout
    least = {"counts": 0, "skip_channels": 0}
    lists = {"channels": channels, "skip_channels": skip_channels, "out_channels": out_channels}
    arguments.require_stages(OP, least, counts=counts, **lists)
    arguments.require_positive(OP, height=height, width=width, kernel=kernel)
    if kernel % 2 == 0:
        raise ValueError(f"{OP}: kernel must be odd, got {kernel}")
    if resample not in ("none", "up", "down") or (resample == "down" and (height % 2 or width % 2)):
        raise ValueError(
            f"{OP}: resample must be 'none', 'up' or, with even height and width, 'down', "
            f"got {resample!r} at {height}x{width}"
        )
    if skip is None and any(skip_channels):
        raise ValueError(f"{OP}: skip must be given for skip_channels={list(skip_channels)}, got None")
    checks.require_floating(OP, "x", x)
    sizes = {
        "x": (x, arguments.total(OP, counts, channels, height, width)),
        "skip": (skip, arguments.total(OP, counts, skip_channels, height, width)),
        "sample_bias": (sample_bias, arguments.total(OP, counts, out_channels)),
        "residual": (residual, arguments.total(OP, counts, out_channels, *layout.out_size)),
    }
    arguments.require_flat(OP, x, sizes)
    arguments.require_per_stage(OP, "weight", weight, x, layout.weight_shapes)
    if bias:
        arguments.require_per_stage(OP, "bias", bias, x, layout.bias_shapes)


def _require_backward(dy, x, skip, weight, layout: Conv2dLayout, wanted) -> None:
    # The cotangent lies as a residual does.
    _require(x, skip, None, dy, weight, (), layout)
    arguments.require_wanted(OP, wanted, 3 + 2 * len(weight))


@operator("grouped_conv2d", _require)
def _forward(
    x: Tensor,
    skip: Tensor | None,
    sample_bias: Tensor | None,
    residual: Tensor | None,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
    layout: Conv2dLayout,
    scale: float,
) -> Tensor:
    """``bias`` is empty where there is none."""
    implementation = BACKENDS.choose(x, layout)
    return implementation.grouped_conv2d(x, skip, sample_bias, residual, weight, bias, layout, scale)


@_forward.register_fake
def _(x, skip, sample_bias, residual, weight, bias, layout, scale):
    return x.new_empty(sum(layout.out_sizes))


@_forward.register_flops
def _(layout, scale):
    return layout.flops


@operator("grouped_conv2d_backward", _require_backward)
def _backward(
    dy: Tensor,
    x: Tensor,
    skip: Tensor | None,
    weight: Sequence[Tensor],
    layout: Conv2dLayout,
    wanted: Sequence[bool],
) -> list[Tensor]:
    """Those gradients of ``(x, skip, sample_bias, *weight, *bias)`` that are wanted."""
    implementation = BACKENDS.choose(x, layout)
    return autodiff.present(implementation.grouped_conv2d_backward(dy, x, skip, weight, layout, wanted))


@_backward.register_fake
def _(dy, x, skip, weight, layout, wanted):
    sample_bias = x.new_empty(sum(layout.sample_sizes))
    return allocate.wanted_gradients((x, skip, sample_bias), weight, wanted)


@_backward.register_flops
def _(layout, wanted):
    want_x, want_skip, _, *want_parameters = wanted
    sources = ((want_x, layout.channels), (want_skip, layout.skip_channels))
    flops = sum(sum(layout.source_flops(channels)) for flag, channels in sources if flag)
    weights = zip(layout.source_flops(layout.in_channels), want_parameters, strict=False)
    return flops + sum(product for product, flag in weights if flag)


def _save_for_backward(ctx, inputs, output):
    x, skip, _, _, weight, bias, ctx.layout, ctx.scale = inputs
    ctx.save_for_backward(x, skip, *weight)
    ctx.biased = bool(bias)


def _differentiate(ctx, dy):
    """The residual's gradient is the cotangent of the unscaled sum; all the others follow from it."""
    (x, skip, *weight), layout = ctx.saved_tensors, ctx.layout
    dsum = dy.contiguous() if ctx.scale == 1.0 else dy * ctx.scale
    gradients = stage_weights.differentiate(
        lambda wanted: _backward(dsum, x, skip, weight, layout, wanted),
        (*ctx.needed[:3], *ctx.needed[4:]),
        layout.counts,
        weight,
        layout.bias_shapes if ctx.biased else None,
        dsum,
    )
    return (*gradients[:3], dsum if ctx.needed[3] else None, *gradients[3:])


def _save_for_double_backward(ctx, inputs, output):
    dy, x, skip, weight, ctx.layout, ctx.wanted = inputs
    ctx.save_for_backward(dy, x, skip, *weight)
    ctx.set_materialize_grads(False)


def _differentiate_twice(ctx, *grad_gradients):
    dy, x, skip, *weight = ctx.saved_tensors
    stages = len(weight)

    def function(x, skip, sample_bias, *parameters):
        parameters = (parameters[:stages], parameters[stages:])
        return reference.grouped_conv2d(x, skip, sample_bias, None, *parameters, ctx.layout, 1.0)

    bias = [w.new_zeros(w.shape[0]) for w in weight]
    inputs = (x, skip, x.new_zeros(sum(ctx.layout.sample_sizes)), *weight, *bias)
    dy, x, skip, _, *parameters = autodiff.second_vjp(function, dy, inputs, ctx.wanted, grad_gradients)
    return (dy, x, skip, *parameters[:stages])


_forward.register_autograd(_differentiate, setup_context=_save_for_backward)
_backward.register_autograd(_differentiate_twice, setup_context=_save_for_double_backward)

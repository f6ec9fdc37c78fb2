"""FIR resampling by 2, up or down, on dense tensors and stage batches."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from msd_kernels.dispatch import allocate, arguments, autocast, checks, sharding, tracing
from msd_kernels.dispatch.backends import Candidate, Explanation, OpBackends
from msd_kernels.dispatch.layout_cache import LAYOUTS
from msd_kernels.dispatch.operator import operator
from msd_kernels.dispatch.samples import sample_by_sample
from msd_kernels.layouts import Resample2dLayout
from msd_kernels.ops.resample2d import cpu, library, reference, triton
from msd_kernels.ops.resample2d import cuda as cuda_resample2d
from msd_kernels.runtime.launch import devices
from msd_kernels.stage_batch import StageBatch

__all__ = ["resample2d"]

OP = "resample2d"
MAX_TAPS = 8

BACKENDS = OpBackends(
    OP,
    [
        Candidate("cpu", cpu, ("cpu",), cannot=cpu.cannot),
        Candidate("cuda", cuda_resample2d, ("cuda",), cannot=cuda_resample2d.cannot),
        Candidate("triton", triton, devices(), cannot=triton.cannot, slower=triton.slower),
        Candidate("library", library),
        Candidate("reference", reference),
    ],
)


@sample_by_sample(("x",))
def resample2d(
    x: Tensor | StageBatch, filter: Sequence[float], up: int = 1, down: int = 1
) -> Tensor | StageBatch:
    """Halves or doubles height and width with a separable FIR filter, each channel alone.

    With the L taps f, divided by their sum, and p = (L - 1) // 2, along each of the two axes::

        down = 2:  y[i] = sum_t f[t] * x[2 * i + t - p]                     # x is 0 outside of its range
        up = 2:    y[2 * i + t - p] += 2 * f[t] * x[i]  for all i and t     # the adjoint of down, times 2
        neither:   y[i] = sum_t f[t] * x[i + t - p]                         # a plain filter

    Sums are float32 at least. ``[1, 1]`` is the mean of 2×2 pixels and nearest-neighbour upsampling. With
    ``[1, 3, 3, 1]``, and any other symmetric filter of even length, it is ``upfirdn2d`` of StyleGAN2 and score
    SDE with its usual padding. Source: the depthwise convolutions of Karras et al., EDM (arXiv 2206.00364).

    An axis of size H becomes

    - down = 2: H // 2 with an even number of taps, (H + 1) // 2 with an odd one. H may be odd; then two taps
      do not read its last pixel.
    - up = 2: 2 * H with an even number of taps, 2 * H - 1 with an odd one.
    - neither: H - 1 with an even number of taps, H with an odd one.

    Args:
        x: dense ``[B, C, H, W]``, NCHW or channels_last, or a StageBatch; float32, bfloat16, float16 or float64.
        filter: 1 to 8 numbers, the same for both axes; their sum must not be 0.
        up, down: 1 or 2, not both 2.

    Returns:
        The same kind, dtype and memory format as ``x``, never ``x`` itself.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: not ``[B, C, H, W]``, a wrong filter or factor, or an output without pixels.

    Under autocast: the autocast dtype, as ``torch.nn.functional.conv2d``.

    A dense DTensor that is sharded along its samples stays so: every rank computes its own.
    """
    if isinstance(x, tracing.Proxy):
        return tracing.symbolic(resample2d, x, filter, up, down)
    if tracing.is_traced(x):
        return tracing.resample2d(_prepare, x, filter, up, down)
    if sharding.is_distributed(x):
        return sharding.on_shards(resample2d, {"x": x}, {}, filter=filter, up=up, down=down)
    values, layout = _prepare(x, filter, up, down)
    y = _forward(values, layout)
    if isinstance(x, StageBatch):
        return StageBatch(y, x.counts, x.channels, layout.out_height, layout.out_width)
    batch, channels = x.shape[:2]
    if layout.channels_last:
        return y.view(batch, layout.out_height, layout.out_width, channels).permute(0, 3, 1, 2)
    return y.view(batch, channels, layout.out_height, layout.out_width)


def explain(*args, **kwargs) -> Explanation:
    """Which backend serves ``resample2d(*args, **kwargs)``, and why the others do not."""
    x, layout = _prepare(*args, **kwargs)
    return BACKENDS.explain(x, layout)


def _prepare(x, filter, up=1, down=1) -> tuple[Tensor, Resample2dLayout]:
    """Checks a call; returns the elements as they lie, and the layout."""
    taps = _normalised(filter)
    up, down = checks.integer(OP, "up", up), checks.integer(OP, "down", down)
    if (up, down) not in ((1, 1), (2, 1), (1, 2)):
        raise ValueError(f"{OP}: up and down must be 1 or 2 and not both 2, got up={up} and down={down}")
    if isinstance(x, StageBatch):
        checks.require_floating(OP, "x", x.values)
        checks.require_size(OP, "x", x)
        flat, counts, channels, channels_last = x.values, x.counts, x.channels, True
        height, width = x.height, x.width
    else:
        checks.require_floating(OP, "x", x)
        if x.dim() != 4 or 0 in x.shape[1:]:
            raise ValueError(f"{OP}: x must be [B, C, H, W], none 0 but B, got {list(x.shape)}")
        counts, channels = (x.shape[0],), (x.shape[1],)
        height, width = x.shape[2:]
        channels_last = x.stride(1) == 1 and not x.is_contiguous()
        flat = (x.permute(0, 2, 3, 1) if channels_last else x).reshape(-1).contiguous()
    out_height, out_width = (_out_size(n, len(taps), up, down) for n in (height, width))
    if out_height < 1 or out_width < 1:
        raise ValueError(
            f"{OP}: {len(taps)} taps with up={up} and down={down} leave no pixels of {height}x{width}, "
            f"but {out_height}x{out_width}"
        )
    (flat,) = autocast.to_lower_precision(flat.device.type, flat)
    taps = tuple(up * tap for tap in taps)
    sizes = (height, width, out_height, out_width)
    layout = Resample2dLayout(taps, up == 2, max(up, down), counts, channels, *sizes, channels_last)
    return flat, LAYOUTS.same(layout)


def _normalised(filter) -> list[float]:
    if isinstance(filter, str | bytes | Tensor) or not isinstance(filter, Sequence):
        raise TypeError(f"{OP}: filter must be a sequence of numbers, got {type(filter).__name__}")
    if not 1 <= len(filter) <= MAX_TAPS:
        raise ValueError(f"{OP}: filter must have 1 to {MAX_TAPS} taps, got {len(filter)}")
    taps = [checks.real(OP, "filter", tap) for tap in filter]
    total = sum(taps)
    if not math.isfinite(total) or total == 0:
        raise ValueError(f"{OP}: filter must have finite taps whose sum is not 0, got {list(filter)}")
    return [tap / total for tap in taps]


def _out_size(size: int, taps: int, up: int, down: int) -> int:
    padding = (taps - 1) // 2
    if up == 2:
        return 2 * (size - 1) - 2 * padding + taps
    return (size + 2 * padding - taps) // down + 1


def _require(x: Tensor, layout: Resample2dLayout) -> None:
    taps, upward, stride, counts, channels, height, width, out_height, out_width, _ = layout
    arguments.require_stages(OP, {"counts": 0}, counts=counts, channels=channels)
    arguments.require_positive(OP, height=height, width=width, out_height=out_height, out_width=out_width)
    if not 1 <= len(taps) <= MAX_TAPS or stride not in (1, 2):
        raise ValueError(
            f"{OP}: there must be 1 to {MAX_TAPS} taps and a stride of 1 or 2, got {len(taps)} and {stride}"
        )
    for size, out_size in ((height, out_height), (width, out_width)):
        coarse, fine = (size, out_size) if upward else (out_size, size)
        if coarse != _out_size(fine, len(taps), 1, stride):
            raise ValueError(
                f"{OP}: {len(taps)} taps with a stride of {stride} do not lead {'up' if upward else 'down'} "
                f"from {height}x{width} to {out_height}x{out_width}"
            )
    checks.require_floating(OP, "x", x)
    arguments.total(OP, counts, channels, out_height, out_width)
    arguments.require_flat(OP, x, {"x": (x, arguments.total(OP, counts, channels, height, width))})


@operator("resample2d", _require)
def _forward(x: Tensor, layout: Resample2dLayout) -> Tensor:
    return BACKENDS.choose(x, layout).resample2d(x, layout)


@_forward.register_fake
def _(x, layout):
    return allocate.resample2d_output(x, layout)


def _save_for_backward(ctx, inputs, output):
    _, ctx.layout = inputs


def _differentiate(ctx, dy):
    return (_forward(dy.contiguous(), ctx.layout.adjoint),)


_forward.register_autograd(_differentiate, setup_context=_save_for_backward)

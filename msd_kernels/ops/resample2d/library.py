"""FIR resampling per stage: depthwise convolution, and pooling or repetition for the filter [1, 1]."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from msd_kernels.dispatch.segments import gather
from msd_kernels.layouts import Resample2dLayout

# The filter [1, 1] as the dispatcher op gets it, and what the mean over 2×2 pixels is to be divided by.
BOXES = {(0.5, 0.5): 4, (1.0, 1.0): 1}


def resample2d(x: Tensor, layout: Resample2dLayout) -> Tensor:
    """The flat output of :func:`msd_kernels.resample2d`."""
    planes = layout.planes(x)

    def stage_output(s: int) -> Tensor:
        stage = planes[s].permute(0, 3, 1, 2) if layout.channels_last else planes[s]
        y = _resample(stage, layout)
        return (y.permute(0, 2, 3, 1) if layout.channels_last else y).reshape(-1)

    return gather(x, layout.counts, stage_output)


def _resample(x: Tensor, layout: Resample2dLayout) -> Tensor:
    """``x`` is one stage, ``[n, C, H, W]``, in either memory format, which the result has, too."""
    taps, upward, stride = layout.taps, layout.upward, layout.stride
    out_size = layout.out_height, layout.out_width
    if taps == (1.0,) and stride == 1:
        return x.clone()
    if taps in BOXES and stride == 2:
        return (
            _repeat(x, taps[0] ** 2, out_size) if upward else F.avg_pool2d(x, 2, divisor_override=BOXES[taps])
        )
    dtype = _working_dtype(x, taps, upward)
    weight = _kernel(taps, dtype, x.device).expand(x.shape[1], 1, -1, -1).contiguous()
    settings = {"stride": stride, "padding": (len(taps) - 1) // 2, "groups": x.shape[1]}
    if not upward:
        return F.conv2d(x.to(dtype), weight, **settings).to(x.dtype)
    smallest = [stride * (n - 1) - 2 * settings["padding"] + len(taps) for n in x.shape[2:]]
    missing = [n - least for n, least in zip(out_size, smallest, strict=True)]
    return F.conv_transpose2d(x.to(dtype), weight, output_padding=missing, **settings).to(x.dtype)


def _repeat(x: Tensor, gain: float, out_size: tuple[int, int]) -> Tensor:
    """Every pixel four times, times ``gain``, and zeros where the output has an odd row or column more."""
    n, c, height, width = x.shape
    x = x if gain == 1 else x * gain
    if x.is_contiguous():
        y = x[:, :, :, None, :, None].expand(-1, -1, -1, 2, -1, 2).reshape(n, c, 2 * height, 2 * width)
    else:
        pixels = x.permute(0, 2, 3, 1)[:, :, None, :, None]
        y = pixels.expand(-1, -1, 2, -1, 2, -1).reshape(n, 2 * height, 2 * width, c).permute(0, 3, 1, 2)
    missing = (0, out_size[1] - 2 * width, 0, out_size[0] - 2 * height)
    return F.pad(y, missing) if any(missing) else y


def _working_dtype(x: Tensor, taps: tuple[float, ...], upward: bool) -> torch.dtype:
    """float32 for half precision that cannot hold the filter; upward on the CPU always, for it is slow."""
    if x.dtype not in (torch.bfloat16, torch.float16):
        return x.dtype
    kernel = _kernel(taps, torch.float64, torch.device("cpu"))
    exact = torch.equal(kernel.to(x.dtype).double(), kernel)
    return x.dtype if exact and not (upward and x.is_cpu) else torch.float32


@lru_cache(maxsize=64)
def _kernel(taps: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The separable filter ``[k, k]``; kept, because making it copies from the host."""
    line = torch.tensor(taps, dtype=torch.float64)
    return torch.outer(line, line).to(device, dtype)

"""A convolution with one weight per stage, two sources and fused resampling: the sums over the taps, spelled out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from msd_kernels.reference.dtypes import wide


@dataclass(frozen=True)
class _Stage:
    """One stage's source ``[n, H, W, C + D]`` and weight ``[O, k, k, C + D]``, in the wide dtype."""

    source: Tensor
    weight: Tensor
    bias: Tensor
    sample_bias: Tensor
    residual: Tensor
    channels: int


def grouped_conv2d(
    x: Tensor,
    skip: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    sample_bias: Tensor | None,
    residual: Tensor | None,
    counts: Sequence[int],
    channels: Sequence[int],
    skip_channels: Sequence[int],
    out_channels: Sequence[int],
    height: int,
    width: int,
    kernel: int,
    resample: str,
    scale: float,
) -> Tensor:
    """Differentiable in plain autograd; arguments as the dispatcher op ``msd_kernels::grouped_conv2d``."""
    layout = (counts, channels, skip_channels, out_channels, height, width, kernel, resample)
    outputs = []
    for stage in _stages(x, skip, weight, bias, sample_bias, residual, *layout):
        y = _convolve(_resample(stage.source, resample), stage.weight)
        y = (y + stage.bias + stage.sample_bias + stage.residual) * scale
        outputs.append(y.reshape(-1))
    return torch.cat(outputs).to(x.dtype)


def grouped_conv2d_backward(
    dy: Tensor,
    x: Tensor,
    skip: Tensor | None,
    weight: Tensor,
    counts: Sequence[int],
    channels: Sequence[int],
    skip_channels: Sequence[int],
    out_channels: Sequence[int],
    height: int,
    width: int,
    kernel: int,
    resample: str,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients for ``(x, skip, weight, bias, sample_bias)`` from the cotangent of the unscaled sum."""
    layout = (counts, channels, skip_channels, out_channels, height, width, kernel, resample)
    out_height, out_width = resampled_size(height, width, resample)
    sizes = [n * out_height * out_width * o for n, o in zip(counts, out_channels, strict=True)]
    gradients = []
    stages = _stages(x, skip, weight, None, None, None, *layout)
    for stage, part, n, o in zip(stages, dy.split(sizes), counts, out_channels, strict=True):
        d = part.view(n, out_height, out_width, o).to(wide(x.dtype))
        source = _resample(stage.source, resample)
        dsource = _resample_adjoint(_convolve(d, _adjoint_weight(stage.weight)), resample)
        dx, dskip = dsource[..., : stage.channels], dsource[..., stage.channels :]
        gradients.append(
            (dx, dskip, _weight_gradient(source, d, kernel), d.sum(dim=(0, 1, 2)), d.sum(dim=(1, 2)))
        )
    dtypes = (x.dtype, x.dtype, weight.dtype, weight.dtype, x.dtype)
    return [
        torch.cat([g.reshape(-1) for g in parts]).to(dtype) if flag else None
        for parts, dtype, flag in zip(zip(*gradients, strict=True), dtypes, wanted, strict=True)
    ]


def resampled_size(height: int, width: int, resample: str) -> tuple[int, int]:
    """Height and width after ``"none"``, ``"up"`` or ``"down"``."""
    if resample == "up":
        return 2 * height, 2 * width
    return (height // 2, width // 2) if resample == "down" else (height, width)


def _convolve(source: Tensor, weight: Tensor) -> Tensor:
    """``[n, H, W, I]`` with ``[O, k, k, I]`` at stride 1 and padding k // 2."""
    height, width = source.shape[1:3]
    kernel = weight.shape[1]
    padded = _pad(source, kernel // 2)
    return sum(
        padded[:, i : i + height, j : j + width] @ weight[:, i, j].t()
        for i in range(kernel)
        for j in range(kernel)
    )


def _adjoint_weight(weight: Tensor) -> Tensor:
    """The weight of the adjoint convolution: taps mirrored, in and out channels exchanged."""
    return weight.flip(1, 2).permute(3, 1, 2, 0)


def _weight_gradient(source: Tensor, d: Tensor, kernel: int) -> Tensor:
    height, width = source.shape[1:3]
    padded = _pad(source, kernel // 2)
    rows = [
        torch.stack(
            [
                torch.einsum("nhwo,nhwi->oi", d, padded[:, i : i + height, j : j + width])
                for j in range(kernel)
            ],
            dim=1,
        )
        for i in range(kernel)
    ]
    return torch.stack(rows, dim=1)


def _pad(source: Tensor, pixels: int) -> Tensor:
    return F.pad(source, (0, 0, pixels, pixels, pixels, pixels)) if pixels else source


def _resample(source: Tensor, resample: str) -> Tensor:
    if resample == "up":
        return source.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
    return _sum_of_blocks(source) / 4 if resample == "down" else source


def _resample_adjoint(d: Tensor, resample: str) -> Tensor:
    if resample == "up":
        return _sum_of_blocks(d)
    return d.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2) / 4 if resample == "down" else d


def _sum_of_blocks(source: Tensor) -> Tensor:
    n, height, width, c = source.shape
    return source.view(n, height // 2, 2, width // 2, 2, c).sum(dim=(2, 4))


def _stages(
    x, skip, weight, bias, sample_bias, residual,
    counts, channels, skip_channels, out_channels, height, width, kernel, resample,
):  # fmt: skip
    dtype = wide(x.dtype)
    in_channels = [c + d for c, d in zip(channels, skip_channels, strict=True)]
    out_height, out_width = resampled_size(height, width, resample)
    samples = [n * o for n, o in zip(counts, out_channels, strict=True)]

    def pieces(flat: Tensor | None, sizes: Sequence[int]) -> Sequence[Tensor]:
        if flat is None:
            return [x.new_zeros(size, dtype=dtype) for size in sizes]
        return flat.to(dtype).split(list(sizes))

    sources = [
        pieces(flat, [n * height * width * c for n, c in zip(counts, widths, strict=True)])
        for flat, widths in ((x, channels), (skip, skip_channels))
    ]
    weights = pieces(weight, [o * kernel**2 * i for o, i in zip(out_channels, in_channels, strict=True)])
    biases = pieces(bias, out_channels)
    sample_biases = pieces(sample_bias, samples)
    residuals = pieces(residual, [m * out_height * out_width for m in samples])
    for s, (n, o) in enumerate(zip(counts, out_channels, strict=True)):
        planes = [
            part[s].view(n, height, width, widths[s])
            for part, widths in zip(sources, (channels, skip_channels), strict=True)
        ]
        yield _Stage(
            torch.cat(planes, dim=3),
            weights[s].view(o, kernel, kernel, in_channels[s]),
            biases[s],
            sample_biases[s].view(n, 1, 1, o),
            residuals[s].view(n, out_height, out_width, o),
            channels[s],
        )

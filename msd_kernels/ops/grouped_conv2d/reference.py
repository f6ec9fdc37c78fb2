"""A convolution with one weight per stage, two sources and fused resampling: the sums over the taps, spelled out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from msd_kernels.dispatch.dtypes import wide
from msd_kernels.layouts import Conv2dLayout


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
    sample_bias: Tensor | None,
    residual: Tensor | None,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
    layout: Conv2dLayout,
    scale: float,
) -> Tensor:
    """The flat output of :func:`msd_kernels.grouped_conv2d`; differentiable in plain autograd."""
    outputs = []
    for stage in _stages(x, skip, sample_bias, residual, weight, bias, layout):
        y = _convolve(_resample(stage.source, layout.resample), stage.weight)
        y = (y + stage.bias + stage.sample_bias + stage.residual) * scale
        outputs.append(y.reshape(-1))
    return torch.cat(outputs).to(x.dtype)


def grouped_conv2d_backward(
    dy: Tensor,
    x: Tensor,
    skip: Tensor | None,
    weight: Sequence[Tensor],
    layout: Conv2dLayout,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients for ``(x, skip, sample_bias, *weight, *bias)`` from the cotangent of the unscaled sum."""
    gradients = []
    for stage in _stages(x, skip, None, dy, weight, (), layout):
        d = stage.residual  # the cotangent lies as a residual does
        source = _resample(stage.source, layout.resample)
        dsource = _resample_adjoint(_convolve(d, _adjoint_weight(stage.weight)), layout.resample)
        dx, dskip = dsource[..., : stage.channels], dsource[..., stage.channels :]
        dweight = _weight_gradient(source, d, layout.kernel).permute(0, 3, 1, 2).contiguous()
        gradients.append((dx, dskip, d.sum(dim=(1, 2)), dweight, d.sum(dim=(0, 1, 2))))
    *singles, dweight, dbias = zip(*gradients, strict=True)
    found = [torch.cat([g.reshape(-1) for g in parts]).to(x.dtype) for parts in singles]
    found += [g.to(w.dtype) for g, w in zip((*dweight, *dbias), (*weight, *weight), strict=True)]
    return [gradient if flag else None for gradient, flag in zip(found, wanted, strict=True)]


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


def _stages(x, skip, sample_bias, residual, weight, bias, layout: Conv2dLayout) -> Iterator[_Stage]:
    """Weights are rounded to the dtype of ``x`` first."""
    dtype = wide(x.dtype)

    def pieces(flat: Tensor | None, sizes: Sequence[int]) -> Sequence[Tensor]:
        if flat is None:
            return [x.new_zeros(size, dtype=dtype) for size in sizes]
        return flat.to(dtype).split(list(sizes))

    widths = (layout.channels, layout.skip_channels)
    sources = [pieces(flat, layout.source_sizes(c)) for flat, c in zip((x, skip), widths, strict=True)]
    weights, biases = ([t.to(x.dtype).to(dtype) for t in tensors] for tensors in (weight, bias))
    biases = biases or pieces(None, layout.out_channels)
    samples, residuals = pieces(sample_bias, layout.sample_sizes), pieces(residual, layout.out_sizes)
    for s, (n, o) in enumerate(zip(layout.counts, layout.out_channels, strict=True)):
        planes = [
            part[s].view(n, layout.height, layout.width, c[s])
            for part, c in zip(sources, widths, strict=True)
        ]
        yield _Stage(
            torch.cat(planes, dim=3),
            weights[s].permute(0, 2, 3, 1),
            biases[s],
            samples[s].view(n, 1, 1, o),
            residuals[s].view(n, *layout.out_size, o),
            layout.channels[s],
        )

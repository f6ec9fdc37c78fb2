"""What the ops are measured against: the same work in ordinary PyTorch, as people write it today."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def group_norm_silu(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-5
) -> Tensor:
    """GroupNorm, scale and shift, SiLU, as the residual blocks of U-Nets spell it."""
    normalised = F.group_norm(x, groups, weight, bias, eps)
    return F.silu(torch.addcmul(shift[:, :, None, None], normalised, 1 + scale[:, :, None, None]))


def step(
    forward: Callable[..., Tensor], leaves: Sequence[Tensor], dy: Tensor
) -> Callable[[], tuple[Tensor, ...]]:
    """Forward and backward of ``forward(*leaves)``."""

    def run() -> tuple[Tensor, ...]:
        return torch.autograd.grad(forward(*leaves), leaves, dy)

    return run


def inference(forward: Callable[..., Tensor], leaves: Sequence[Tensor]) -> Callable[[], Tensor]:
    """Forward only."""

    def run() -> Tensor:
        with torch.no_grad():
            return forward(*leaves)

    return run


class MixedConv:
    """A stage's convolution, sample bias, residual and scale on a mixed batch, in three usual ways.

    Every way takes ``x`` (one ``[n, C_s, H, W]`` channels_last tensor per non-empty stage), weights, biases, sample
    biases and residuals the same, and returns one tensor per non-empty stage.
    """

    def __init__(self, counts: Sequence[int], channels: Sequence[int], scale: float) -> None:
        self.stages = [s for s, n in enumerate(counts) if n]
        self.counts = [counts[s] for s in self.stages]
        self.channels = [channels[s] for s in self.stages]
        self.widest, self.scale = max(channels), scale

    def _finish(self, y: Tensor, sample_bias: Tensor, residual: Tensor) -> Tensor:
        return (y + sample_bias[:, :, None, None] + residual) * self.scale

    def loop(self, x, weight, bias, sample_bias, residual) -> list[Tensor]:
        """One convolution per stage."""
        return [
            self._finish(F.conv2d(*parts[:3], padding="same"), *parts[3:])
            for parts in zip(x, weight, bias, sample_bias, residual, strict=True)
        ]

    def padded(self, x, weight, bias, sample_bias, residual) -> list[Tensor]:
        """Every stage padded to the widest, one convolution per stage: activations share one buffer and one size."""
        outputs = []
        for i, c in enumerate(self.channels):
            missing = self.widest - c
            y = F.conv2d(
                F.pad(x[i], (0, 0, 0, 0, 0, missing)).contiguous(memory_format=torch.channels_last),
                F.pad(weight[i], (0, 0, 0, 0, 0, missing, 0, missing)),
                F.pad(bias[i], (0, missing)),
                padding="same",
            )
            y = self._finish(
                y, F.pad(sample_bias[i], (0, missing)), F.pad(residual[i], (0, 0, 0, 0, 0, missing))
            )
            outputs.append(y[:, :c])
        return outputs

    def as_groups(self, x, weight, bias, sample_bias, residual) -> list[Tensor]:
        """Padded to the widest, then ONE convolution with a group, and a copy of its stage's weight, per sample."""
        wide = self.widest
        pads = [wide - c for c in self.channels]
        batch = torch.cat([F.pad(t, (0, 0, 0, 0, 0, p)) for t, p in zip(x, pads, strict=True)])
        kernels = [
            F.pad(w, (0, 0, 0, 0, 0, p, 0, p)).expand(n, -1, -1, -1, -1)
            for w, p, n in zip(weight, pads, self.counts, strict=True)
        ]
        biases = [F.pad(b, (0, p)).expand(n, -1) for b, p, n in zip(bias, pads, self.counts, strict=True)]
        samples, _, height, width = batch.shape
        y = F.conv2d(
            batch.reshape(1, samples * wide, height, width),
            torch.cat(kernels).reshape(samples * wide, wide, *weight[0].shape[2:]),
            torch.cat(biases).reshape(-1),
            padding="same",
            groups=samples,
        )
        parts = y.view(samples, wide, height, width).split(self.counts)
        return [
            self._finish(part[:, :c], b, r)
            for part, c, b, r in zip(parts, self.channels, sample_bias, residual, strict=True)
        ]


class MixedLinear:
    """A stage's linear layer on the vectors of a mixed batch, in three usual ways; see :class:`MixedConv`."""

    def __init__(self, counts: Sequence[int], out_features: Sequence[int]) -> None:
        self.counts = [n for n in counts if n]
        self.out_features = [o for o, n in zip(out_features, counts, strict=True) if n]
        self.widest = max(out_features)

    def loop(self, x, weight, bias) -> list[Tensor]:
        """One matrix product per stage."""
        return [F.linear(*parts) for parts in zip(x, weight, bias, strict=True)]

    def padded(self, x, weight, bias) -> list[Tensor]:
        """Every stage padded to the widest, one matrix product per stage."""
        outputs = []
        for rows, w, b, o in zip(x, weight, bias, self.out_features, strict=True):
            missing = self.widest - o
            outputs.append(F.linear(rows, F.pad(w, (0, 0, 0, missing)), F.pad(b, (0, missing)))[:, :o])
        return outputs

    def batched(self, x, weight, bias) -> list[Tensor]:
        """Padded to the widest, then one batched product with a copy of its stage's weight per sample."""
        pads = [self.widest - o for o in self.out_features]
        repeats = [len(rows) for rows in x]
        kernels = [
            F.pad(w, (0, 0, 0, p)).expand(n, -1, -1) for w, p, n in zip(weight, pads, repeats, strict=True)
        ]
        biases = [F.pad(b, (0, p)).expand(n, -1) for b, p, n in zip(bias, pads, repeats, strict=True)]
        y = torch.baddbmm(torch.cat(biases)[:, :, None], torch.cat(kernels), torch.cat(list(x))[:, :, None])
        parts = y[:, :, 0].split(repeats)
        return [part[:, :o] for part, o in zip(parts, self.out_features, strict=True)]

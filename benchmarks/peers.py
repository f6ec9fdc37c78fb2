"""What the ops are measured against: the same work in ordinary PyTorch, as people write it today."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


def group_norm_silu(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-5
) -> Tensor:
    """GroupNorm, scale and shift, SiLU, as the residual blocks of U-Nets spell it."""
    normalised = F.group_norm(x, groups, weight, bias, eps)
    return F.silu(torch.addcmul(shift[:, :, None, None], normalised, 1 + scale[:, :, None, None]))


def upfirdn2d(x: Tensor, filter: Sequence[float], up: int, down: int) -> Callable[[Tensor], Tensor]:
    """FIR resampling of tensors like ``x`` as score SDE does it in plain PyTorch, with its usual padding.

    Zeros between and around the pixels, one convolution of all channels of all samples as images of their own with the
    flipped kernel, then every ``down``-th pixel.
    """
    line = torch.tensor(filter, dtype=torch.float64)
    line = line * up / line.sum()
    kernel = torch.outer(line, line).flip(0, 1)[None, None].to(x)
    excess = len(filter) - 2
    before, after = (excess + 1) // 2 + up - 1, excess // 2

    def forward(x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        spread = F.pad(x.reshape(-1, 1, height, 1, width, 1), (0, up - 1, 0, 0, 0, up - 1))
        planes = F.pad(spread.reshape(-1, 1, height * up, width * up), (before, after, before, after))
        y = F.conv2d(planes, kernel)[:, :, ::down, ::down]
        return y.reshape(batch, channels, *y.shape[2:])

    return forward


def depthwise_resampling(
    x: Tensor, filter: Sequence[float], up: int, down: int
) -> Callable[[Tensor], Tensor]:
    """FIR resampling of tensors like ``x`` as EDM does it: a convolution with one group per channel."""
    line = torch.tensor(filter, dtype=torch.float64)
    line = line * up / line.sum()
    weight = torch.outer(line, line).to(x).expand(x.shape[1], 1, -1, -1).contiguous()
    convolve = F.conv_transpose2d if up > 1 else F.conv2d
    settings = {"stride": max(up, down), "padding": (len(filter) - 1) // 2, "groups": x.shape[1]}
    return lambda x: convolve(x, weight, **settings)


def step(
    forward: Callable[..., Tensor], leaves: Sequence[Tensor], dy: Tensor
) -> Callable[[], tuple[Tensor, ...]]:
    """Forward and backward of ``forward(*leaves)``."""

    def run() -> tuple[Tensor, ...]:
        return torch.autograd.grad(forward(*leaves), leaves, dy, allow_unused=True)

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


def einsum_attention(x: Tensor, heads: int, *, wide: bool) -> Tensor:
    """Self-attention on a packed ``[B, 3C, H, W]`` as EDM's U-Net spells it, with a float32 softmax.

    ``wide``: the scores are float32, as there; else products of the tensors' own dtype, as under autocast.
    """
    batch, channels, height, width = x.shape
    q, k, v = x.reshape(batch * heads, channels // (3 * heads), 3, height * width).unbind(2)
    k = k / k.shape[1] ** 0.5
    if wide:
        q, k = q.float(), k.float()
    p = torch.einsum("ncq,nck->nqk", q, k).float().softmax(dim=2).to(v.dtype)
    return torch.einsum("nqk,nck->ncq", p, v).reshape(batch, channels // 3, height, width)


def packed_sdpa(x: Tensor, heads: int, *, parts_last: bool) -> Tensor:
    """PyTorch's attention on a packed ``[B, 3C, H, W]``, channels_last, to ``[B, C, H, W]``, channels_last.

    ``parts_last``: q, k and v alternate from channel to channel; else they follow each other within a head.
    """
    batch, channels, height, width = x.shape
    parts = (channels // 3 // heads, 3) if parts_last else (3, channels // 3 // heads)
    pixels = x.permute(0, 2, 3, 1).reshape(batch, height * width, heads, *parts)
    q, k, v = (part.transpose(1, 2) for part in pixels.unbind(4 if parts_last else 3))
    y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    return y.reshape(batch, height, width, channels // 3).permute(0, 3, 1, 2)


def sdpa(backend: SDPBackend | None) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """PyTorch's attention on ``[B, heads, tokens, d]``, by one of its backends or by its own choice."""

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with nullcontext() if backend is None else sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return forward

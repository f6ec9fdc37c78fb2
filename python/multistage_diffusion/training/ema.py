"""Exponential moving average of a network's weights."""

from __future__ import annotations

import copy

import torch
from torch import nn


class EMA:
    """A copy of a network whose weights follow it with a half-life measured in training images (EDM, arXiv
    2206.00364).

    Args:
        network: the network to follow.
        halflife_images: after that many images an old weight counts half.
        rampup_ratio: early in training the half-life is at most this share of the images seen so far, so
            that the average forgets the random start; ``None`` switches that off. EDM: 0.05.

    Attributes:
        network: the averaged network, in eval mode, without gradients; in float32 where the network's weights have 16
            bits, which would round most of the small steps of an average to nothing.
    """

    def __init__(
        self, network: nn.Module, halflife_images: float = 500_000, rampup_ratio: float | None = 0.05
    ):
        if not halflife_images >= 0:
            raise ValueError(f"EMA: halflife_images={halflife_images} must be at least 0")
        if rampup_ratio is not None and not rampup_ratio > 0:
            raise ValueError(f"EMA: rampup_ratio={rampup_ratio} must be positive, or None for no ramp-up")
        self.halflife_images = float(halflife_images)
        self.rampup_ratio = rampup_ratio
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        if any(parameter.dtype in (torch.bfloat16, torch.float16) for parameter in network.parameters()):
            self.network.float()

    def decay(self, images_seen: int, batch_size: int) -> float:
        """beta = ½^(batch_size / half-life); 0 when nothing has been seen."""
        halflife = self.halflife_images
        if self.rampup_ratio is not None:
            halflife = min(halflife, images_seen * self.rampup_ratio)
        return 0.5 ** (batch_size / max(halflife, 1e-8))

    @torch.no_grad()
    def update(self, network: nn.Module, images_seen: int, batch_size: int) -> None:
        """Moves the average towards the weights of ``network`` after a step.

        Args:
            network: the network in training.
            images_seen: images seen before this step.
            batch_size: images of this step.
        """
        beta = self.decay(images_seen, batch_size)
        averages, current = [], []
        for average, parameter in zip(self.network.parameters(), network.parameters(), strict=True):
            averages.append(average)
            current.append(parameter.detach().to(average.dtype))
        _move(averages, current, 1 - beta)
        for average, buffer in zip(self.network.buffers(), network.buffers(), strict=True):
            average.copy_(buffer)


def _move(averages: list[torch.Tensor], targets: list[torch.Tensor], weight: float) -> None:
    """Moves each average towards its target: in one launch, where this PyTorch has it, or one by one."""
    together = getattr(torch, "_foreach_lerp_", None)
    if together is not None:
        together(averages, targets, weight)
        return
    for average, target in zip(averages, targets, strict=True):
        average.lerp_(target, weight)

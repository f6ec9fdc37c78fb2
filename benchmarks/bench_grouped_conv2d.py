"""Mixed-stage 3x3 convolutions: ours beside a loop over the stages, padding to the widest, and ``groups=batch``.

    python -m pytest benchmarks/bench_grouped_conv2d.py

A residual block's convolution in the EDM decoders (widths 384, 256 and 32): convolution, bias, the sample's bias,
residual and scale, at batch 8, forward and forward + backward. On the CPU the peers are oneDNN's convolutions, ours
Winograd's where `auto` takes them, else the same ones: then the ratio to the loop shows the price of the packing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import harness
import peers
from harness import OURS
from msd_kernels import StageBatch, explain, grouped_conv2d
from msd_kernels.dispatch.backends import use
from msd_kernels.runtime import processor

WIDTHS = (384, 256, 32)
SCALE = 0.5**0.5
# Training of score SDEs draws the stages 1/3 each, EDM's noise 0.961 / 0.035 / 0.004.
MIXES = {"thirds": (3, 3, 2), "edm": (7, 1, 0)}
# Where the processor has no bfloat16, its convolutions are computed in float32, and a peer's call takes seconds.
SIZES = {"float32": (32, 16, 8), "bfloat16": (32, 16, 8) if processor.computes_in(torch.bfloat16) else (8,)}
WAYS = ("loop", "padded", "as_groups")  # of peers.MixedConv


@dataclass(frozen=True)
class Problem:
    """Random inputs: x, sample_bias and residual flat, then the weights and the biases of the stages."""

    counts: Sequence[int]
    side: int
    leaves: tuple[Tensor, ...]
    dy: Tensor

    @staticmethod
    def of(counts: Sequence[int], side: int, dtype: torch.dtype, device: str = "cpu") -> Problem:
        generator = torch.Generator().manual_seed(0)

        def draw(size: int, std: float = 1.0) -> Tensor:
            return (torch.randn(size, generator=generator) * std).to(device, dtype)

        vectors = sum(n * c for n, c in zip(counts, WIDTHS, strict=True))
        kernels = [draw(9 * c * c, (9 * c) ** -0.5).view(c, c, 3, 3) for c in WIDTHS]
        batches = (draw(vectors * side**2), draw(vectors), draw(vectors * side**2))
        leaves = (*batches, *kernels, *map(draw, WIDTHS))
        return Problem(counts, side, tuple(t.requires_grad_() for t in leaves), draw(vectors * side**2))

    def arguments(
        self, leaves: Sequence[Tensor]
    ) -> tuple[StageBatch, list[Tensor], list[Tensor], StageBatch, StageBatch]:
        """The leaves as the op takes them."""
        x, sample_bias, residual, *weights = leaves
        return (
            StageBatch(x, self.counts, WIDTHS, self.side, self.side),
            weights[: len(WIDTHS)],
            weights[len(WIDTHS) :],
            StageBatch(sample_bias, self.counts, WIDTHS, 1, 1),
            StageBatch(residual, self.counts, WIDTHS, self.side, self.side),
        )

    def ours(self, *leaves: Tensor) -> Tensor:
        x, weight, bias, sample_bias, residual = self.arguments(leaves)
        return grouped_conv2d(x, weight, bias, sample_bias=sample_bias, residual=residual, scale=SCALE).values

    def peer(self, way: str):
        """One way of :class:`peers.MixedConv` on its own tensors: what it takes, and its results joined flat."""
        mixed = peers.MixedConv(self.counts, WIDTHS, SCALE)
        x, weight, bias, sample_bias, residual = self.arguments([t.detach() for t in self.leaves])
        per_stage = (
            x.segments(),
            weight,
            bias,
            [segment.flatten(1) for segment in sample_bias.segments()],
            residual.segments(),
        )
        leaves = [stage[s].detach().requires_grad_() for stage in per_stage for s in mixed.stages]
        stages = len(mixed.stages)

        def forward(*tensors: Tensor) -> Tensor:
            groups = [tensors[i : i + stages] for i in range(0, len(tensors), stages)]
            outputs = getattr(mixed, way)(*groups)
            return torch.cat([y.permute(0, 2, 3, 1).reshape(-1) for y in outputs])

        return forward, leaves

    def cases(self, backward: bool, ways: Sequence[str] = WAYS) -> dict[str, harness.Function]:
        sides = {way: self.peer(way) for way in ways} | {OURS: (self.ours, self.leaves)}
        if backward:
            return {name: peers.step(forward, leaves, self.dy) for name, (forward, leaves) in sides.items()}
        return {name: peers.inference(forward, leaves) for name, (forward, leaves) in sides.items()}

    def check(self, ways: Sequence[str] = WAYS) -> None:
        """Ours and the peers against the reference in float32; gradients of ours too."""
        exact = [t.detach().float().requires_grad_() for t in self.leaves]
        with use("reference"):
            expected = self.ours(*exact)
            gradients = torch.autograd.grad(expected, exact, self.dy.float(), materialize_grads=True)
        y = self.ours(*self.leaves)
        found = [y, *torch.autograd.grad(y, self.leaves, self.dy, materialize_grads=True)]
        harness.check("grouped_conv2d", found, [expected, *gradients], y.dtype)
        for name, function in self.cases(False, ways).items():
            harness.check(name, [function()], [expected.detach()], y.dtype)


@pytest.mark.benchmark(group="grouped_conv2d")
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "step"])
@pytest.mark.parametrize(("dtype", "side"), [(d, side) for d, sides in SIZES.items() for side in sides])
@pytest.mark.parametrize("mix", MIXES)
def test_grouped_conv2d(mix, side, dtype, backward, race):
    problem = Problem.of(MIXES[mix], side, getattr(torch, dtype))
    # Where the processor has no bfloat16, a single call of this peer takes up to a minute.
    slow = dtype == "bfloat16" and not processor.computes_in(torch.bfloat16)
    ways = [way for way in WAYS if way != "as_groups" or not slow]
    problem.check(ways)
    race(problem.cases(backward, ways), seconds=1.0, warm=not backward)
    x, weight, bias, *_ = problem.arguments(problem.leaves)
    race.note(backend=explain("grouped_conv2d", x, weight, bias).backend)

"""Mixed-stage linear layers: ours beside a loop over the stages, padding to the widest, and one batched product.

    python -m pytest benchmarks/bench_grouped_linear.py

The embedding's projection of the EDM decoders: a vector of 512 per sample to widths 384, 256 and 32, forward and
forward + backward.
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
from msd_kernels import explain, grouped_linear
from msd_kernels.dispatch.backends import use

WIDTHS, FEATURES = (384, 256, 32), 512
MIXES = {
    "thirds of 8": (3, 3, 2),
    "edm of 8": (7, 1, 0),
    "thirds of 512": (171, 171, 170),
    "edm of 512": (492, 18, 2),
}

WAYS = ("loop", "padded", "batched")  # of peers.MixedLinear


@dataclass(frozen=True)
class Problem:
    """Random inputs: x ``[B, 512]`` in stage order, then the weights and the biases of the stages."""

    counts: Sequence[int]
    leaves: tuple[Tensor, ...]
    dy: Tensor

    @staticmethod
    def of(counts: Sequence[int], dtype: torch.dtype, device: str = "cpu") -> Problem:
        generator = torch.Generator().manual_seed(0)

        def draw(*size: int, std: float = 1.0) -> Tensor:
            return (torch.randn(size, generator=generator) * std).to(device, dtype)

        weights = [draw(o, FEATURES, std=FEATURES**-0.5) for o in WIDTHS]
        leaves = (draw(sum(counts), FEATURES), *weights, *map(draw, WIDTHS))
        outputs = sum(n * o for n, o in zip(counts, WIDTHS, strict=True))
        return Problem(counts, tuple(t.requires_grad_() for t in leaves), draw(outputs))

    def ours(self, x: Tensor, *weights: Tensor) -> Tensor:
        weight, bias = weights[: len(WIDTHS)], weights[len(WIDTHS) :]
        return grouped_linear(x, weight, bias, counts=self.counts).values

    def peer(self, way: str):
        """One way of :class:`peers.MixedLinear` on its own tensors: what it takes, and its results joined flat."""
        mixed = peers.MixedLinear(self.counts, WIDTHS)
        x, *weights = (t.detach() for t in self.leaves)
        per_stage = (x.split(self.counts), weights[: len(WIDTHS)], weights[len(WIDTHS) :])
        stages = [s for s, n in enumerate(self.counts) if n]
        leaves = [parts[s].detach().requires_grad_() for parts in per_stage for s in stages]

        def forward(*tensors: Tensor) -> Tensor:
            groups = [tensors[i : i + len(stages)] for i in range(0, len(tensors), len(stages))]
            return torch.cat([y.reshape(-1) for y in getattr(mixed, way)(*groups)])

        return forward, leaves

    def cases(self, backward: bool, ways: Sequence[str] = WAYS) -> dict[str, harness.Function]:
        sides = {way: self.peer(way) for way in ways} | {OURS: (self.ours, self.leaves)}
        if backward:
            return {name: peers.step(forward, leaves, self.dy) for name, (forward, leaves) in sides.items()}
        return {name: peers.inference(forward, leaves) for name, (forward, leaves) in sides.items()}

    def check(self, ways: Sequence[str] = WAYS) -> None:
        """Ours and every peer against the reference in float32; gradients of ours too."""
        exact = [t.detach().float().requires_grad_() for t in self.leaves]
        with use("reference"):
            expected = self.ours(*exact)
            gradients = torch.autograd.grad(expected, exact, self.dy.float(), materialize_grads=True)
        y = self.ours(*self.leaves)
        found = [y, *torch.autograd.grad(y, self.leaves, self.dy, materialize_grads=True)]
        harness.check("grouped_linear", found, [expected, *gradients], y.dtype)
        for name, function in self.cases(False, ways).items():
            harness.check(name, [function()], [expected.detach()], y.dtype)


@pytest.mark.benchmark(group="grouped_linear")
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "step"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("mix", MIXES, ids=lambda mix: mix.replace(" ", "-"))
def test_grouped_linear(mix, dtype, backward, race):
    problem = Problem.of(MIXES[mix], getattr(torch, dtype))
    # A weight for every sample of 512 takes a gigabyte, and a processor seconds.
    ways = [way for way in WAYS if sum(problem.counts) <= 8 or way != "batched"]
    problem.check(ways)
    race(problem.cases(backward, ways), seconds=0.5, warm=not backward)
    x, *weights = problem.leaves
    weight = weights[: len(WIDTHS)]
    race.note(backend=explain("grouped_linear", x, weight, counts=problem.counts).backend)

"""FIR resampling by 2: ours beside score SDE's native path, EDM's depthwise convolutions and PyTorch per stage.

    python -m pytest benchmarks/bench_resample2d.py

Sizes are those of the larger side. Goal C6. ``share_of_copy`` is the least that must move (the larger tensor once and
the smaller one once, forward; the same again backward) over the time, as a share of the bandwidth of a large copy in
the same run. Tensors that fit the cache can exceed 1.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

import harness
import peers
from harness import OURS
from msd_kernels import resample2d
from msd_kernels.dispatch.backends import use

# (batch, channels, side of the larger tensor): EDM's and score SDE's feature maps, LDM's, and images.
SHAPES = [(8, 256, 32), (8, 384, 32), (8, 256, 16), (8, 32, 32), (1, 256, 32), (4, 224, 64), (8, 3, 32)]
HEADLINE = (8, 256, 32)
LEAST_RATIO = 5.0
FILTERS = {"box": (1, 1), "fir": (1, 3, 3, 1)}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
LAYOUTS = {"nhwc": torch.channels_last, "nchw": torch.contiguous_format}
# Compilation costs ten seconds, so only this one races against torch.compile: shape, filter, dtype and layout.
COMPILED = (HEADLINE, "fir", "bfloat16", "nhwc")


@dataclass(frozen=True)
class Problem:
    """A random input and cotangent."""

    x: Tensor
    dy: Tensor
    filter: tuple[float, ...]
    up: int
    down: int

    @staticmethod
    def of(
        shape: tuple[int, int, int],
        filter: tuple[float, ...],
        upward: bool,
        dtype: torch.dtype,
        memory_format: torch.memory_format,
        device: str = "cpu",
    ) -> Problem:
        batch, channels, side = shape
        generator = torch.Generator().manual_seed(0)

        def draw(size: int) -> Tensor:
            values = torch.randn((batch, channels, size, size), generator=generator)
            return values.to(device, dtype).contiguous(memory_format=memory_format)

        sides = (side // 2, side) if upward else (side, side // 2)
        x, dy = map(draw, sides)
        return Problem(x.requires_grad_(), dy, filter, 2 if upward else 1, 1 if upward else 2)

    def ours(self, x: Tensor) -> Tensor:
        return resample2d(x, self.filter, self.up, self.down)

    def cases(self, backward: bool, compiled: bool) -> dict[str, harness.Function]:
        """Score SDE's path gets NCHW tensors, for which it was made, whatever ours are."""
        settings = (self.filter, self.up, self.down)
        native = peers.upfirdn2d(self.x, *settings)
        planar = replace(self, x=self.x.detach().contiguous().requires_grad_(), dy=self.dy.contiguous())
        depthwise = peers.depthwise_resampling(self.x, *settings)
        ours = self.run(self.ours, backward)
        cases = {
            "score SDE": planar.run(native, backward),
            "depthwise": self.run(depthwise, backward),
            "library": forced("library", ours),
            OURS: ours,
        }
        if compiled:
            torch.compiler.reset()
            cases["score SDE compiled"] = planar.run(torch.compile(native, dynamic=False), backward)
            cases["depthwise compiled"] = self.run(torch.compile(depthwise, dynamic=False), backward)
        return cases

    def run(self, forward: Callable[[Tensor], Tensor], backward: bool) -> harness.Function:
        return peers.step(forward, (self.x,), self.dy) if backward else peers.inference(forward, (self.x,))

    def check(self) -> None:
        """Ours and every peer against the reference in float64."""
        exact = self.x.detach().double().requires_grad_()
        with use("reference"):
            expected = self.ours(exact)
            gradients = torch.autograd.grad(expected, exact, self.dy.double())
        for backward, results in ((False, [expected]), (True, gradients)):
            for name, run in self.cases(backward, compiled=False).items():
                found = run() if backward else [run()]
                harness.check(f"resample2d, {name}", found, results, self.x.dtype)

    def least_bytes(self, backward: bool) -> int:
        """Read one tensor, write the other; backward the same once more."""
        return (2 if backward else 1) * (self.x.nbytes + self.dy.nbytes)


def forced(backend: str, run: harness.Function) -> harness.Function:
    """``run`` with a backend forced for the forward and the backward."""

    def forced_run() -> object:
        with use(backend):
            return run()

    return forced_run


@functools.lru_cache(maxsize=1)
def checked_problem(
    shape: tuple[int, int, int], filter: str, upward: bool, dtype: str, layout: str
) -> Problem:
    problem = Problem.of(shape, FILTERS[filter], upward, DTYPES[dtype], LAYOUTS[layout])
    problem.check()
    return problem


DIRECTIONS = pytest.mark.parametrize("upward", [False, True], ids=["down", "up"])


@pytest.mark.benchmark(group="resample2d")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@DIRECTIONS
@pytest.mark.parametrize("filter", FILTERS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, (*s, s[2]))))
def test_resample2d(shape, filter, upward, dtype, layout, backward, race, bandwidth):
    problem = checked_problem(shape, filter, upward, dtype, layout)
    compiled = backward and (shape, filter, dtype, layout) == COMPILED
    comparison = race(problem.cases(backward, compiled), seconds=0.2)
    share = problem.least_bytes(backward) / comparison.time().median / bandwidth
    race.note(share_of_copy=f"{share:.2f}")


@pytest.mark.goal
@pytest.mark.benchmark(group="resample2d goals")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@DIRECTIONS
@pytest.mark.parametrize("filter", FILTERS)
def test_resample2d_reaches_its_goal(filter, upward, dtype, layout, race, two_threads):
    """C6: [8, 256, 32, 32] on two threads, forward and backward, against score SDE's path."""
    problem = checked_problem(HEADLINE, filter, upward, dtype, layout)
    comparison = race(problem.cases(backward=True, compiled=False), seconds=1.0)
    ratio = comparison.ratio("score SDE").median
    assert ratio >= LEAST_RATIO, f"C6: {ratio:.2f} times as fast as score SDE's path, wanted {LEAST_RATIO}"

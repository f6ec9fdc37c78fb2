"""Attention of U-Nets: ours beside EDM's einsum formulation and PyTorch's own attention, per stage.

    python -m pytest benchmarks/bench_attention.py

Ours reads the packed output of the qkv convolution where it lies, in the order of our EDM networks and in the
reference's, which interleaves q, k and v; the einsum gets it in NCHW, for which it was made, and PyTorch's attention
gets q, k and v apart and dense, or, as in a plain network, the packed output ("sdpa of packed"). Goal C8.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

import harness
import peers
from harness import OURS
from msd_kernels import StageBatch, attention, explain
from msd_kernels.dispatch.backends import use

EDM_HEADS = (384, 256, 32)
# counts, heads and head dimensions per stage, side of the feature map
SHAPES = {
    "edm-16": ((8,), (1,), (384,), 16),
    "edm-8": ((8,), (1,), (384,), 8),
    "edm-thirds-16": ((3, 3, 2), (1, 1, 1), EDM_HEADS, 16),
    "ldm-32": ((1, 1, 1), (8, 6, 4), (32, 32, 32), 32),
    "ldm-16": ((2, 1, 1), (24, 18, 12), (32, 32, 32), 16),
}
NETWORK_LAYOUT = "per_head"  # of EDM's decoders here; the reference interleaves
LAYOUTS = ("interleaved", NETWORK_LAYOUT)
# Compilation costs seconds, so only this one races against torch.compile.
COMPILED = "edm-16"
DECODERS = ("edm-16", "edm-8", "edm-thirds-16")
# The peers that start and end where ours does.
SAME_WORK = ("einsum", "sdpa of packed")
LEAST_RATIO = 0.97  # ratios of equals are off by so much
SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


@dataclass(frozen=True)
class Problem:
    """A random packed input and a cotangent, flat; all stages."""

    x: Tensor
    dy: Tensor
    counts: tuple[int, ...]
    heads: tuple[int, ...]
    head_dims: tuple[int, ...]
    side: int
    layout: str

    @staticmethod
    def of(shape, layout: str, dtype: torch.dtype, device: str = "cpu") -> Problem:
        counts, heads, head_dims, side = shape
        generator = torch.Generator().manual_seed(0)
        size = side**2 * sum(n * h * d for n, h, d in zip(counts, heads, head_dims, strict=True))
        x, dy = (torch.randn(n, generator=generator).to(device, dtype) for n in (3 * size, size))
        return Problem(x.requires_grad_(), dy, counts, heads, head_dims, side, layout)

    @functools.cached_property
    def channels(self) -> tuple[int, ...]:
        return tuple(h * d for h, d in zip(self.heads, self.head_dims, strict=True))

    def batch(self, x: Tensor) -> StageBatch:
        return StageBatch(x, self.counts, tuple(3 * c for c in self.channels), self.side, self.side)

    def ours(self, x: Tensor) -> Tensor:
        return attention(self.batch(x), num_heads=self.heads, layout=self.layout).values

    def explain(self):
        return explain("attention", self.batch(self.x), num_heads=self.heads, layout=self.layout)

    def parts(self, segment: Tensor, heads: int) -> Sequence[Tensor]:
        """q, k and v of a stage as dense ``[B, heads, tokens, d]``."""
        axes = {"interleaved": (-1, 3), "per_head": (3, -1)}[self.layout]
        view = segment.unflatten(1, (heads, *axes)).flatten(4)
        if self.layout == "interleaved":
            view = view.transpose(2, 3)
        return [part.mT.contiguous() for part in view.unbind(2)]

    @functools.cached_property
    def stages(self) -> list[tuple[Tensor, Tensor, int]]:
        """Packed input and cotangent as images, and the heads, of every stage with samples."""
        images = self.batch(self.x.detach()).segments()
        cotangents = StageBatch(self.dy, self.counts, self.channels, self.side, self.side).segments()
        stages = zip(images, cotangents, self.heads, strict=True)
        return [(x, dy, h) for x, dy, h in stages if x.shape[0]]

    def loop(
        self, stages: Sequence[tuple[Callable, Sequence[Tensor], Tensor]], backward: bool
    ) -> harness.Function:
        """Runs ``(forward, inputs, cotangent)`` of each stage."""
        make = [
            peers.step(forward, [t.requires_grad_() for t in inputs], dy)
            if backward
            else peers.inference(forward, inputs)
            for forward, inputs, dy in stages
        ]
        return lambda: [run() for run in make]

    def einsum(self, wide: bool, backward: bool, compiled: bool = False) -> harness.Function:
        """The order of the channels is EDM's whatever ours is; it costs the same."""
        stages = []
        for x, dy, heads in self.stages:
            forward = functools.partial(peers.einsum_attention, heads=heads, wide=wide)
            if compiled:
                forward = torch.compile(forward, dynamic=False)
            stages.append((forward, [x.detach().contiguous()], dy.contiguous()))
        return self.loop(stages, backward)

    def sdpa(self, backend: SDPBackend | None, backward: bool, compiled: bool = False) -> harness.Function:
        stages = []
        for x, dy, heads in self.stages:
            forward = peers.sdpa(backend)
            if compiled:
                forward = torch.compile(forward, dynamic=False)
            cotangent = dy.unflatten(1, (heads, -1)).flatten(3).mT.contiguous()
            stages.append((forward, self.parts(x, heads), cotangent))
        return self.loop(stages, backward)

    def packed_sdpa(self, backward: bool) -> harness.Function:
        """PyTorch's attention between the packed input and an image, as plain networks call it."""
        stages = []
        for x, dy, heads in self.stages:
            forward = functools.partial(
                peers.packed_sdpa, heads=heads, parts_last=self.layout == "interleaved"
            )
            stages.append((forward, [x.detach()], dy))
        return self.loop(stages, backward)

    def cases(
        self, backward: bool, compiled: bool, backends: Sequence[str] = ()
    ) -> dict[str, harness.Function]:
        """``backends``: those of PyTorch's attention to force, left out where they do not take the call."""
        cases = {
            "einsum": self.einsum(True, backward),
            "einsum, rounded scores": self.einsum(False, backward),
            "sdpa": self.sdpa(None, backward),
            "sdpa of packed": self.packed_sdpa(backward),
            OURS: peers.step(self.ours, (self.x,), self.dy)
            if backward
            else peers.inference(self.ours, (self.x,)),
        }
        for name in backends:
            run = self.sdpa(SDPA[name], backward)
            if takes(run):
                cases[f"sdpa {name}"] = run
        if compiled:
            torch.compiler.reset()
            cases["einsum compiled"] = self.einsum(False, backward, compiled=True)
            cases["sdpa compiled"] = self.sdpa(None, backward, compiled=True)
        return cases

    def check(self) -> None:
        """Ours with its gradient, and the results of every peer, against the reference in float32."""
        exact = self.x.detach().float().requires_grad_()
        with use("reference"):
            expected = self.ours(exact)
            (gradient,) = torch.autograd.grad(expected, exact, self.dy.float())
        y = self.ours(self.x)
        found = [y, *torch.autograd.grad(y, self.x, self.dy)]
        harness.check("attention", found, [expected, gradient], y.dtype)
        results = StageBatch(expected.detach(), self.counts, self.channels, self.side, self.side).segments()
        results = [result for result in results if result.shape[0]]
        tokens = [
            result.unflatten(1, (heads, -1)).flatten(3).mT
            for result, (_, _, heads) in zip(results, self.stages, strict=True)
        ]
        harness.check("sdpa", self.sdpa(None, backward=False)(), tokens, y.dtype)
        harness.check("sdpa of packed", self.packed_sdpa(backward=False)(), results, y.dtype)
        if self.layout == "interleaved":  # rounded scores would fail this
            harness.check("einsum", self.einsum(True, backward=False)(), results, y.dtype)

    @property
    def least_bytes(self) -> tuple[int, int]:
        """Read x, write y; backward read x, y and dy, write dx."""
        return self.x.nbytes + self.dy.nbytes, 3 * self.x.nbytes + 3 * self.dy.nbytes

    @property
    def operations(self) -> int:
        """Of the two products of a forward."""
        stages = zip(self.counts, self.channels, strict=True)
        return sum(4 * n * self.side**4 * c for n, c in stages)


def takes(run: harness.Function) -> bool:
    """Whether a forced backend of PyTorch takes the call."""
    try:
        run()
    except RuntimeError:
        return False
    return True


@functools.lru_cache(maxsize=1)
def checked_problem(shape, layout: str, dtype: torch.dtype) -> Problem:
    problem = Problem.of(shape, layout, dtype)
    problem.check()
    return problem


@pytest.mark.benchmark(group="attention")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", SHAPES)
def test_attention(name, layout, backward, race):
    problem = checked_problem(SHAPES[name], layout, torch.bfloat16)
    race(problem.cases(backward, compiled=(name, layout) == (COMPILED, "interleaved")), seconds=1.0)
    race.note(backend=problem.explain().backend)


@pytest.mark.goal
@pytest.mark.benchmark(group="attention goals")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", DECODERS)
def test_attention_of_edm_decoders_beats_pytorch(name, dtype, backward, race, two_threads):
    """C8: ours, and both peers, from the packed output of the qkv convolution to an input of the next one."""
    problem = checked_problem(SHAPES[name], NETWORK_LAYOUT, getattr(torch, dtype))
    cases = problem.cases(backward, compiled=False)
    comparison = race({case: cases[case] for case in (OURS, *SAME_WORK)}, seconds=1.5)
    slower = {peer: round(comparison.ratio(peer).median, 2) for peer in SAME_WORK}
    assert min(slower.values()) >= LEAST_RATIO, f"C8: {slower} times as fast, wanted {LEAST_RATIO}"

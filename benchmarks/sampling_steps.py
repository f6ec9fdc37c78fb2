"""An evaluation of the EDM CIFAR-10 multi-stage denoiser: ours beside the same network in plain PyTorch.

Both hold their weights in the dtype that they compute in, which spares them the casts. Ours takes samples of all stages
at once, plain PyTorch one stage after the other. On the CPU they race in whole_step.py, on a GPU, goal G8, in
gpu_races.py.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import whole_networks
from torch import Tensor, nn
from whole_networks import SIGMAS, Networks

import harness
import peers
from harness import OURS
from multistage_diffusion.sampling.cuda_graphs import GraphedNetwork

DTYPE = torch.bfloat16
COMPILE = {"mode": "reduce-overhead", "fullgraph": True, "dynamic": False}
# Inductor's best on a processor: weights are known, and reordered for oneDNN once.
COMPILE_ON_CPU = {"options": {"freezing": True}, "fullgraph": True, "dynamic": False}
# Of the checks on a GPU: from the third call on compiled functions and CUDA graphs are replayed.
CALLS = 3


@dataclass(frozen=True)
class Problem:
    """Noisy images, so many of each stage, in the order of the stages."""

    networks: Networks
    counts: tuple[int, ...]
    x: Tensor

    @staticmethod
    def of(counts: Sequence[int], device: str = "cpu", dtype: torch.dtype = DTYPE) -> Problem:
        networks = whole_networks.published(device, dtype)
        y, noise = whole_networks.images(sum(counts), device)
        sigma = torch.tensor(_per_sample(counts, SIGMAS), device=device).view(-1, 1, 1, 1)
        return Problem(networks, tuple(counts), y + sigma * noise)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.networks.ours.parameters()).dtype

    @property
    def sigma(self) -> float | Tensor:
        """Of all samples; one number where they are of one stage, as samplers ask for it."""
        present = [sigma for sigma, count in zip(SIGMAS, self.counts, strict=True) if count]
        values = _per_sample(self.counts, SIGMAS)
        return present[0] if len(present) == 1 else torch.tensor(values, dtype=torch.float64)

    def ours(self, network: nn.Module) -> harness.Function:
        return self._evaluation(network, self.x, self.sigma)

    def plain(self, dtype: torch.dtype, compile_options: dict | None = None) -> harness.Function:
        """The twins of the stages, their weights in ``dtype``, one after the other."""
        runs = []
        for twin, x, sigma in zip(self.networks.plain, self.x.split(self.counts), SIGMAS, strict=True):
            if len(x):
                network = twin if dtype == self.dtype else copy.deepcopy(twin).to(dtype)
                network = torch.compile(network, **compile_options) if compile_options else network
                runs.append(self._evaluation(network, x, sigma))
        return runs[0] if len(runs) == 1 else lambda: torch.cat([run() for run in runs])

    def _evaluation(self, network: nn.Module, x: Tensor, sigma: float | Tensor) -> harness.Function:
        return peers.inference(whole_networks.denoiser(network.eval()), (x, sigma))

    @property
    def plain_dtype(self) -> torch.dtype:
        """Of the peers, the best for them."""
        return whole_networks.plain_dtype(self.x.device.type, self.dtype)

    def cases(self, compiled: bool, graphed: bool = True) -> dict[str, harness.Function]:
        """``graphed``: ours from a CUDA graph, where there is CUDA, and as it is."""
        cases = {OURS: self.ours(self.networks.ours), "eager": self.plain(self.plain_dtype)}
        if graphed:
            cases = {**cases, "ours, eager": cases[OURS], OURS: self.ours(GraphedNetwork(self.networks.ours))}
        if compiled:
            torch.compiler.reset()
            options = COMPILE if self.x.is_cuda else COMPILE_ON_CPU
            cases["compiled"] = self.plain(self.plain_dtype, options)
        return cases

    def checked_cases(self, compiled: bool, graphed: bool = True) -> dict[str, harness.Function]:
        """All of them beside the plain network in float32."""
        exact = whole_networks.once(self.plain(torch.float32))
        cases = self.cases(compiled, graphed)
        for name, run in cases.items():
            for _ in range(CALLS if self.x.is_cuda else 1):
                found = run()
            harness.check(name, [found], [exact], self.dtype)
        return cases


def _per_sample(counts: Sequence[int], values: Sequence[float]) -> list[float]:
    return [value for value, count in zip(values, counts, strict=True) for _ in range(count)]

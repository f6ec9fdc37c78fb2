"""One evaluation of the EDM CIFAR-10 multi-stage denoiser in bfloat16: ours beside the same network in plain PyTorch.

    python -m pytest benchmarks/bench_sampling_step.py

Goal G8 on a GPU, see gpu_races.py. Both hold their weights in bfloat16, which spares them the casts. A batch is of one
noise level and so of one stage, as samplers ask for it.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
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
# Of the checks on a GPU: from the third call on compiled functions and CUDA graphs are replayed.
CALLS = 3


@dataclass(frozen=True)
class Problem:
    """Noisy images of one stage."""

    networks: Networks
    x: Tensor
    stage: int

    @staticmethod
    def of(batch: int, stage: int, device: str = "cpu") -> Problem:
        networks = whole_networks.published(device, DTYPE)
        y, noise = whole_networks.images(batch, device)
        return Problem(networks, y + SIGMAS[stage] * noise, stage)

    @property
    def counts(self) -> tuple[int, ...]:
        return tuple(len(self.x) if stage == self.stage else 0 for stage in range(len(SIGMAS)))

    def plain(self, dtype: torch.dtype) -> nn.Module:
        """The twin of the stage with its weights in ``dtype``; bfloat16 are those of ours."""
        twin = self.networks.plain[self.stage]
        return twin if dtype == DTYPE else copy.deepcopy(twin).to(dtype)

    def evaluation(self, network: nn.Module) -> harness.Function:
        return peers.inference(whole_networks.denoiser(network.eval()), (self.x, SIGMAS[self.stage]))

    def cases(self, compiled: bool) -> dict[str, harness.Function]:
        """Ours from a CUDA graph, where there is CUDA."""
        plain = self.plain(whole_networks.plain_dtype(self.x.device.type))
        cases = {
            OURS: self.evaluation(GraphedNetwork(self.networks.ours)),
            "ours, eager": self.evaluation(self.networks.ours),
            "eager": self.evaluation(plain),
        }
        if compiled:
            torch.compiler.reset()
            cases["compiled"] = self.evaluation(torch.compile(plain, **COMPILE))
        return cases

    def checked_cases(self, compiled: bool) -> dict[str, harness.Function]:
        """All of them beside the plain network in float32."""
        exact = whole_networks.once(self.evaluation(self.plain(torch.float32)))
        cases = self.cases(compiled)
        for name, run in cases.items():
            for _ in range(CALLS if self.x.is_cuda else 1):
                found = run()
            harness.check(name, [found], [exact], DTYPE)
        return cases


@pytest.mark.benchmark(group="sampling step")
@pytest.mark.parametrize("stage", range(len(SIGMAS)))
@pytest.mark.parametrize("batch", [1, 8])
def test_sampling_step(batch, stage, race, say, two_threads):
    say("         checks every network against float32")
    cases = Problem.of(batch, stage).checked_cases(compiled=False)
    del cases["ours, eager"]  # the same without a GPU
    race(cases, seconds=5.0, warm=True)

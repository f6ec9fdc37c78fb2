"""A training step of the EDM CIFAR-10 multi-stage network, forward and backward: ours and plain PyTorch's.

Ours takes a mixed batch; the same network in plain PyTorch takes one step per stage, as a training without grouped
layers must do. On the CPU they race in whole_step.py, on a GPU, goal G9, in gpu_races.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import plain_network
import torch
import whole_networks
from torch import Tensor, nn
from whole_networks import SIGMAS, Networks

import harness
from harness import OURS
from multistage_diffusion.networks.stage_order import StageOrder
from multistage_diffusion.noise.losses import loss_at, loss_scalars
from multistage_diffusion.noise.preconditioning import Preconditioner
from multistage_diffusion.sampling.cuda_graphs import GraphedFunction
from multistage_diffusion.training.parameters import FlatGradients

DTYPE = torch.bfloat16
COMPILE = {"fullgraph": True, "dynamic": False}

# What not every race has.
GRAPH, COMPILED = "ours, graph", "compiled loop"
# A loss with dropout against the exact one without.
LOSS_TOLERANCE = 0.2

Result = tuple[Tensor, Sequence[Tensor | None]]  # the loss and the gradients of all parameters


class Samples(NamedTuple):
    """A batch on the device, with all that the host has to say about it: a step neither copies nor waits.

    ``scalars`` are those of ``losses.loss_scalars``, with the weight of a mean over the batch.
    """

    clean: Tensor
    noise: Tensor
    scalars: Tensor

    def take(self, indices: Tensor) -> Samples:
        indices = indices.to(self.clean.device)
        return Samples(self.clean[indices], self.noise[indices], self.scalars[:, indices])


def mean_loss(denoiser: Preconditioner, samples: Samples, order: StageOrder) -> Tensor:
    """EDM's loss, the samples' part of the mean over the batch."""
    return loss_at(denoiser, samples.clean, samples.scalars, order, noise=samples.noise).sum()


@dataclass(frozen=True, eq=False)
class Step:
    """Loss and gradients of a network on some samples."""

    denoiser: Preconditioner
    samples: Samples
    order: StageOrder
    loss: Callable[..., Tensor] = mean_loss
    dtype: torch.dtype = DTYPE

    @property
    def network(self) -> nn.Module:
        return self.denoiser.network

    @property
    def is_exact(self) -> bool:
        return self.dtype == torch.float32 and isinstance(self.network, plain_network.PlainUNet)

    def __call__(self) -> Result:
        loss = self.forward(self.samples, self.order)
        return loss.detach(), torch.autograd.grad(loss, list(self.network.parameters()), allow_unused=True)

    def forward(self, samples: Samples, order: StageOrder) -> Tensor:
        reduced = self.dtype != torch.float32
        # Without the cache: a capture must not read casts that were made outside of it.
        with torch.autocast(samples.clean.device.type, self.dtype, enabled=reduced, cache_enabled=False):
            return self.loss(self.denoiser, samples, order)

    def named(self, result: Result) -> dict[str, Tensor]:
        return {"loss": result[0], **plain_network.named_gradients(self.network, result[1])}


class Steps(tuple[Step, ...]):
    """Steps one after the other."""

    @property
    def is_exact(self) -> bool:
        """Whether they are what the others are compared with."""
        return all(step.is_exact for step in self)

    def __call__(self) -> Tensor:
        """The sum of the losses; the gradients of one step are gone when the next one begins."""
        return torch.stack([step()[0] for step in self]).sum()

    def named(self) -> dict[str, Tensor]:
        """Sums of the losses and gradients."""
        sums: dict[str, Tensor] = {}
        for step in self:
            for name, value in step.named(step()).items():
                sums[name] = sums[name] + value if name in sums else value
        return sums


class GraphedStep:
    """A step of ours from a CUDA graph, where there is CUDA, with its gradients in one place, as in training."""

    is_exact = False

    def __init__(self, step: Step) -> None:
        self._step, self._tensors = step, step.samples._asdict()
        self._gradients = FlatGradients(step.network).values
        self._graphed = GraphedFunction(self._forward_and_backward, adds_to=[self._gradients])

    def _forward_and_backward(self, tensors: dict[str, Tensor], order: StageOrder) -> Tensor:
        loss = self._step.forward(Samples(**tensors), order)
        loss.backward()
        return loss.detach()

    def __call__(self) -> Tensor:
        """The loss."""
        self._gradients.zero_()
        return self._graphed(self._tensors, self._step.order)

    def named(self) -> dict[str, Tensor]:
        """Loss and gradients of a second call, which does not capture any more."""
        self()
        loss = self()
        return self._step.named((loss, [parameter.grad for parameter in self._step.network.parameters()]))


class CheckedLoss:
    """A step whose first loss is compared with the one without dropout."""

    def __init__(self, name: str, run: Callable[[], Tensor], exact: Tensor) -> None:
        self._name, self._run, self._exact, self._checked = name, run, exact, False

    def __call__(self) -> Tensor:
        loss = self._run()
        if not self._checked:
            if not abs(loss - self._exact) <= LOSS_TOLERANCE * self._exact:
                raise AssertionError(
                    f"{self._name}: the loss is {loss:.4g}, without dropout {self._exact:.4g}"
                )
            self._checked = True
        return loss


@dataclass(frozen=True)
class Problem:
    """A shuffled batch with so many samples per stage."""

    networks: Networks
    counts: tuple[int, ...]
    stage: Tensor
    samples: Samples

    @staticmethod
    def of(counts: tuple[int, ...], device: str = "cpu") -> Problem:
        networks = whole_networks.published(device, torch.float32)
        stage = torch.tensor([k for k, count in enumerate(counts) for _ in range(count)])
        stage = stage[torch.randperm(len(stage), generator=torch.Generator().manual_seed(0))]
        scalars = loss_scalars(
            whole_networks.denoiser(networks.ours), torch.tensor(SIGMAS, dtype=torch.float64)[stage]
        )
        scalars[-1] /= len(stage)
        clean, noise = whole_networks.images(len(stage), device)
        return Problem(networks, counts, stage, Samples(clean, noise, scalars.to(device, torch.float32)))

    def mixed(self, **options) -> Steps:
        """Ours, all stages in one step."""
        order = StageOrder.of(self.stage, len(self.counts), len(self.stage), self.samples.clean.device)
        return Steps([Step(whole_networks.denoiser(self.networks.ours), self.samples, order, **options)])

    def graphed(self) -> GraphedStep:
        """The same from a CUDA graph."""
        (step,) = self.mixed()
        return GraphedStep(step)

    def per_stage(self, networks: Sequence[nn.Module], **options) -> Steps:
        """One step per stage that has samples, of its samples alone."""
        steps = []
        for k, count in enumerate(self.counts):
            if count:
                part = self.samples.take((self.stage == k).nonzero().flatten())
                order = StageOrder.of([k] * count, len(self.counts), count)
                steps.append(Step(whole_networks.denoiser(networks[k]), part, order, **options))
        return Steps(steps)

    def loop(self, **options) -> Steps:
        """The plain networks."""
        return self.per_stage(self.networks.plain, **options)

    def cases(self, extra: str | None = None, dtype: torch.dtype = DTYPE) -> dict[str, Steps | GraphedStep]:
        """Ours, the loop in its best dtype, and GRAPH or COMPILED; each returns its loss."""
        plain_dtype = whole_networks.plain_dtype(self.samples.clean.device.type, dtype)
        cases = {OURS: self.mixed(dtype=dtype), "loop": self.loop(dtype=plain_dtype)}
        if extra == GRAPH:
            cases[extra] = self.graphed()
        elif extra == COMPILED:  # each network whole, when it is first called
            torch.compiler.reset()
            cases[extra] = self.loop(dtype=plain_dtype, loss=torch.compile(mean_loss, **COMPILE))
        return cases

    def checked_cases(
        self, extra: str | None = None, dtype: torch.dtype = DTYPE, *, at_once: bool = True
    ) -> dict[str, harness.Function]:
        """Losses and gradients are compared with those of the plain networks in float32, without dropout.

        With it, and compiled, only the losses are compared: now, or where the first call is left to the race, then.
        """
        self._train(False)
        exact = whole_networks.once(self.loop(dtype=torch.float32).named)
        for name, run in self.cases(None if extra == COMPILED else extra, dtype).items():
            if not run.is_exact:
                whole_networks.check(name, run.named(), exact, whole_networks.TOLERANCES[dtype])
        self._train(True)
        cases = {
            name: CheckedLoss(name, run, exact["loss"]) for name, run in self.cases(extra, dtype).items()
        }
        for run in cases.values() if at_once else ():
            run()
        return cases

    def _train(self, mode: bool) -> None:
        for network in (self.networks.ours, *self.networks.plain):
            network.train(mode)

"""Counts multiply-accumulates by running a network on the meta device: no weights, no arithmetic.

A network is run on a batch of all stages under PyTorch's counter, which shows the ops of ``msd_kernels`` and
PyTorch's own convolutions and matrix products to the rules of this module. One multiply-accumulate (MAC) is two FLOPs.
Normalisations, activations and FIR filters are not counted, as is usual.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from msd_kernels.dispatch.flops import FORMULAS
from multistage_diffusion.networks import build
from multistage_diffusion.networks.layers import OnStages, StageModule, shared_layers
from multistage_diffusion.networks.stage_network import StageNetwork, Takes

__all__ = ["NetworkCost", "conditioning", "count", "count_config", "expected"]

TRAINING = 3  # a training step costs three forward passes: forward, and both gradients of every product


@dataclass(frozen=True)
class NetworkCost:
    """What a network costs.

    Attributes:
        macs: per stage, multiply-accumulates of one forward pass of one sample.
        attention_macs: the part of them that is attention's products of queries, keys and values.
        shared_macs: the part of them in the layers that all stages share; 0 if there are none.
        parameters: per stage, parameters of its own layers.
        shared_parameters: parameters of the layers that all stages share.
    """

    macs: tuple[int, ...]
    attention_macs: tuple[int, ...]
    shared_macs: int
    parameters: tuple[int, ...]
    shared_parameters: int

    @property
    def total_parameters(self) -> int:
        return self.shared_parameters + sum(self.parameters)


def count(network: nn.Module) -> NetworkCost:
    """Counts a network of this library, or one with its interface and layers.

    Raises:
        ValueError: the network is not on the meta device, where tensors have shapes, but no memory::

            with torch.device("meta"):
                network = networks.build(config)
    """
    devices = {parameter.device.type for parameter in network.parameters()}
    if devices != {"meta"}:
        raise ValueError(
            f"flops.count: the network must be on the meta device, got {', '.join(sorted(devices))}; "
            'build it under torch.device("meta"), or move it with network.to("meta")'
        )
    stages = list(range(network.num_stages))
    # As many samples of each stage as of no other tell whose an op is. What other networks do, with ops that know no
    # stages, shows in batches of one stage alone.
    mixed = [stage for stage in stages for _ in range(stage + 1)]
    batches = [mixed] if isinstance(network, StageNetwork) else [[stage] for stage in stages]
    counter = _Counter(network.num_stages)
    for batch in batches:
        _forward(network, batch, counter)
    everyones = set(shared_layers(network))
    own, shared = [0] * network.num_stages, 0
    for layer in network.modules():
        if isinstance(layer, StageModule):
            for stage, tensor in layer.stage_parameters():
                if layer in everyones:
                    shared += tensor.numel()
                else:
                    own[stage] += tensor.numel()
    return NetworkCost(
        macs=tuple(counter.macs),
        attention_macs=tuple(counter.attention_macs),
        shared_macs=counter.shared_macs[0],
        parameters=tuple(own),
        shared_parameters=shared,
    )


def expected(costs: Sequence[float], shares: Sequence[float]) -> float:
    """The mean cost where a sample belongs to stage k with probability ``shares[k]``.

    Raises:
        ValueError: as many shares as stages are missing, or they do not sum up to 1.
    """
    if len(costs) != len(shares) or not math.isclose(math.fsum(shares), 1, abs_tol=1e-6):
        raise ValueError(
            f"flops.expected: shares must be one per stage ({len(costs)}) and sum up to 1, got {tuple(shares)}"
        )
    return math.fsum(c * s for c, s in zip(costs, shares, strict=True))


def count_config(config: Mapping[str, object]) -> NetworkCost:
    """Counts the network that ``networks.build`` makes of a configuration."""
    with torch.device("meta"):
        network = build(config)
    return count(network)


def conditioning(network: nn.Module, batch: int) -> dict[str, torch.Tensor]:
    """Labels and context of the shapes that a network needs, filled with zeros, on the network's device."""
    device = next(network.parameters()).device
    takes = Takes.of(network)
    shapes = {
        "class_labels": (batch, takes.class_labels),
        "context": (batch, 1, takes.context),
        "augment_labels": (batch, takes.augment_labels),
    }
    return {name: torch.zeros(shape, device=device) for name, shape in shapes.items() if shape[-1]}


def _forward(network: nn.Module, stages: Sequence[int], counter: _Counter) -> None:
    """Counts the forward pass of samples of these stages."""
    batch, size = len(stages), network.image_size
    x = torch.zeros(batch, network.in_channels, size, size, device="meta")
    noise = torch.zeros(batch, device="meta")
    inside = [part for part in network.modules() if isinstance(part, OnStages)]
    hooks = [part.register_forward_pre_hook(lambda part, *_: counter.enter(part.stages)) for part in inside]
    hooks += [part.register_forward_hook(lambda *_: counter.enter(None)) for part in inside]
    try:
        with torch.no_grad(), counter.counting(stages):
            network(x, noise, stages, **conditioning(network, batch))
    finally:
        for hook in hooks:
            hook.remove()


class _Counter:
    """Adds up the MACs of the ops that pass by: those of one sample of each stage.

    Ops for all samples at once are shared. Inside of an ``OnStages`` all are of its stages.
    """

    def __init__(self, num_stages: int) -> None:
        self.macs, self.attention_macs, self.shared_macs = ([0] * num_stages for _ in range(3))
        self.enter(None)

    def enter(self, stages: Sequence[int] | None) -> None:
        """What follows is of these stages; None: of the whole network."""
        self.stages = tuple(range(len(self.macs))) if stages is None else stages

    def counting(self, samples: Sequence[int]) -> FlopCounterMode:
        """A counter for a batch of samples of these stages."""
        rules = {op: partial(self._add, op, rule, samples) for op, rule in RULES.items()}
        return FlopCounterMode(display=False, custom_mapping=rules)

    def _add(self, op, rule: Callable, samples: Sequence[int], *args, out_shape, **kwargs) -> int:
        """Adds one call's, with shapes in the place of its tensors; returns its FLOPs."""
        counts, macs = rule(args, out_shape)
        number = {stage: samples.count(stage) for stage in samples}
        whole = len(set(counts)) == 1 and len(self.stages) == len(self.macs) > 1
        if alone := [stage for stage, n in number.items() if [n] == list(counts)]:
            shares, whole = [(alone[0], sum(macs) / number[alone[0]])], False
        elif whole:
            shares = [(stage, sum(macs) / len(samples)) for stage in number]
        else:  # a call may serve several layers, stage after stage in each
            shares = [
                (s, m / number[s]) for s, m in zip(cycle(self.stages), macs, strict=False) if s in number
            ]
        for stage, share in ((stage, round(share)) for stage, share in shares):
            self.macs[stage] += share
            self.attention_macs[stage] += share if op is torch.ops.msd_kernels.attention else 0
            self.shared_macs[stage] += share if whole else 0
        return 2 * sum(macs)


def _of_stages(op, args, out) -> tuple[Sequence[int], list[int]]:
    """Samples and MACs of a call of one of ``msd_kernels``, for each of its stages, by its own formula."""
    formula = FORMULAS[op]
    layout, *options = formula.settings(args)
    counts, found = layout[0], []
    for stage, count in enumerate(counts):
        alone = tuple(count if other == stage else 0 for other in range(len(counts)))
        found.append(formula.count(layout._replace(**{layout._fields[0]: alone}), *options) // 2)
    return counts, found


def _convolution(args, out) -> tuple[Sequence[int], list[int]]:
    """PyTorch's own ops see all samples alike, as one stage."""
    return out[:1], [math.prod(out) * math.prod(args[1][1:])]


def _product(args, out) -> tuple[Sequence[int], list[int]]:
    """``mm``, ``bmm`` and ``addmm``; the last argument is ``[..., inner, columns]``."""
    return out[:1], [math.prod(out) * args[-1][-2]]


OWN = tuple(getattr(torch.ops.msd_kernels, op) for op in ("grouped_conv2d", "grouped_linear", "attention"))
RULES: Mapping = {op: partial(_of_stages, op) for op in OWN} | {
    torch.ops.aten.convolution: _convolution,
    torch.ops.aten.mm: _product,
    torch.ops.aten.bmm: _product,
    torch.ops.aten.addmm: _product,
}

"""Counts multiply-accumulates by running a network on the meta device: no weights, no arithmetic.

A network is run once per stage under PyTorch's counter, which shows the ops of ``msd_kernels`` and PyTorch's own
convolutions and matrix products to the rules of this module. One multiply-accumulate (MAC) is two FLOPs.
Normalisations, activations and FIR filters are not counted, as is usual.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from msd_kernels.dispatch.flops import FORMULAS
from multistage_diffusion.networks.layers import OnStages, StageModule, shared_layers
from multistage_diffusion.networks.stage_network import Takes

__all__ = ["NetworkCost", "conditioning", "count", "expected"]

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
    runs = [_forward(network, stage) for stage in range(network.num_stages)]
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
        macs=tuple(run.macs for run in runs),
        attention_macs=tuple(run.attention_macs for run in runs),
        shared_macs=runs[0].shared_macs,
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


def _forward(network: nn.Module, stage: int) -> _Counter:
    """Counts the forward pass of one sample."""
    size = network.image_size
    x = torch.zeros(1, network.in_channels, size, size, device="meta")
    noise = torch.zeros(1, device="meta")
    counter = _Counter(network.num_stages)
    inside = [part for part in network.modules() if isinstance(part, OnStages)]
    hooks = [part.register_forward_pre_hook(lambda *_: counter.enter()) for part in inside]
    hooks += [part.register_forward_hook(lambda *_: counter.leave()) for part in inside]
    try:
        with torch.no_grad(), counter.counting():
            network(x, noise, [stage], **conditioning(network, 1))
    finally:
        for hook in hooks:
            hook.remove()
    return counter


class _Counter:
    """Adds up the MACs of the ops that pass by. Ops for one stage are shared, but inside of an ``OnStages``."""

    def __init__(self, num_stages: int) -> None:
        self.macs = self.attention_macs = self.shared_macs = 0
        self.outside = num_stages > 1

    def enter(self) -> None:
        self.outside = False

    def leave(self) -> None:
        self.outside = True

    def counting(self) -> FlopCounterMode:
        rules = {op: partial(self._add, op, rule) for op, rule in RULES.items()}
        return FlopCounterMode(display=False, custom_mapping=rules)

    def _add(self, op, rule: Callable, *args, out_shape, **kwargs) -> int:
        """Adds one call's, with shapes in the place of its tensors; returns its FLOPs."""
        macs, stages = rule(args, out_shape)
        self.macs += macs
        self.attention_macs += macs if op is torch.ops.msd_kernels.attention else 0
        self.shared_macs += macs if stages == 1 and self.outside else 0
        return 2 * macs


def _of_stages(op, args, out):
    """MACs and stages of a call of one of ``msd_kernels``, by its own formula."""
    layout, *_ = FORMULAS[op].settings(args)
    return FORMULAS[op](*args) // 2, len(layout[0])


def _convolution(args, out):
    """PyTorch's own ops see all samples alike, as one stage."""
    return math.prod(out) * math.prod(args[1][1:]), 1


def _product(args, out):
    """``mm``, ``bmm`` and ``addmm``; the last argument is ``[..., inner, columns]``."""
    return math.prod(out) * args[-1][-2], 1


OWN = tuple(getattr(torch.ops.msd_kernels, op) for op in ("grouped_conv2d", "grouped_linear", "attention"))
RULES: Mapping = {op: partial(_of_stages, op) for op in OWN} | {
    torch.ops.aten.convolution: _convolution,
    torch.ops.aten.mm: _product,
    torch.ops.aten.bmm: _product,
    torch.ops.aten.addmm: _product,
}

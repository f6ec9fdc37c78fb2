"""The published multi-stage network at work: ours and, with the same weights, its plain twin of every stage."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import plain_network
import torch
from torch import Tensor, nn

from harness import Function
from msd_kernels.runtime.processor import computes_in
from multistage_diffusion import flops, networks, presets
from multistage_diffusion.networks.layers import StageModule
from multistage_diffusion.noise.preconditioning import Preconditioner

PRESET = presets.find("edm-cifar10")
CONFIG = PRESET.config()
SIGMAS = (0.5, 5.0, 30.0)  # one in each stage
# Largest error of a network, as a share of the exact result. A hundred roundings and more lie on the way of a gradient:
# in bfloat16 up to 0.09 in the deepest layers, for PyTorch's layers as for ours, in float32 8e-6.
TOLERANCE = 0.2
TOLERANCES = {torch.bfloat16: TOLERANCE, torch.float32: 1e-4}


@dataclass(frozen=True)
class Networks:
    """One set of weights, twice.

    Attributes:
        ours: serves every stage.
        plain: one network per stage.
        cost: of one sample.
    """

    ours: nn.Module
    plain: Sequence[plain_network.PlainUNet]
    cost: flops.NetworkCost

    def operations(self, counts: Sequence[int]) -> int:
        """Of a forward of so many samples per stage."""
        return sum(2 * n * macs for n, macs in zip(counts, self.cost.macs, strict=True))

    def weight_bytes(self, counts: Sequence[int]) -> int:
        """What the weights of the stages with samples take."""
        own = sum(size for n, size in zip(counts, self.cost.parameters, strict=True) if n)
        return (self.cost.shared_parameters + own) * next(self.ours.parameters()).element_size()


@functools.lru_cache(maxsize=1)
def published(device: str, dtype: torch.dtype) -> Networks:
    """The networks with weights of ``dtype``, in training mode as they are built."""
    with torch.device("meta"):
        cost = flops.count(networks.build(CONFIG))
    with torch.device(device):
        ours = networks.build(CONFIG)
    draw_weights(ours)
    ours = ours.to(dtype)
    return Networks(ours, plain_network.twins(ours), cost)


def draw_weights(network: nn.Module) -> None:
    """As after some training: new networks have layers near zero, behind which no error would show."""
    generator = torch.Generator(next(network.parameters()).device).manual_seed(0)
    for layer in network.modules():
        for _, tensor in layer.stage_parameters() if isinstance(layer, StageModule) else ():
            with torch.no_grad():
                noise = torch.randn(tensor.shape, generator=generator, device=tensor.device)
                if tensor.dim() > 1:
                    tensor.copy_(noise * tensor[0].numel() ** -0.5)
                else:
                    tensor.add_(0.1 * noise)


def denoiser(network: nn.Module) -> Preconditioner:
    """D(x; sigma) around ours or a plain twin."""
    return PRESET.denoiser(network)


def plain_dtype(device: str, dtype: torch.dtype = torch.bfloat16) -> torch.dtype:
    """What plain PyTorch computes in beside ours in ``dtype``: the same, but float32 on processors whose library lacks
    it, where PyTorch's own layers are slower by far.
    """
    return dtype if device != "cpu" or computes_in(dtype) else torch.float32


def images(batch: int, device: str) -> tuple[Tensor, Tensor]:
    """Clean images, with EDM's standard deviation, and unit noise."""
    generator = torch.Generator().manual_seed(0)
    size = CONFIG["image_size"]
    y, noise = (torch.randn(batch, 3, size, size, generator=generator).to(device) for _ in range(2))
    return 0.5 * y, noise


def once(run: Function) -> object:
    """What ``run`` returns, without the search for the fastest convolutions: for the exact result, needed once."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    try:
        return run()
    finally:
        torch.backends.cudnn.benchmark = before


def check(
    name: str, found: Mapping[str, Tensor], exact: Mapping[str, Tensor], tolerance: float = TOLERANCE
) -> None:
    """Refuses to time a network whose results are off. What is not among the exact ones is exactly zero.

    Raises:
        AssertionError: a result is missing, or the norm of its error is above ``tolerance`` of its own.
    """
    if missing := sorted(set(exact) - set(found)):
        raise AssertionError(f"{name}: {len(missing)} results are missing, first {missing[0]}")
    for key, value in found.items():
        expected = exact.get(key, torch.zeros_like(value))
        error = torch.linalg.vector_norm(value.float() - expected).item()
        allowed = tolerance * torch.linalg.vector_norm(expected).item()
        if not error <= allowed:
            raise AssertionError(
                f"{name}: {key} is off by {error:.2e}, allowed {allowed:.2e}; a wrong network has no speed"
            )

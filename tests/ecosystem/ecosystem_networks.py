"""The networks that other people's tools are tried on, and the comparison that every load has to pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from msd_kernels import StageBatch
from multistage_diffusion.networks import EDMUNet, StageOrder
from multistage_diffusion.networks.layers import StageConv2d, StageGroupNorm, StageLinear

STAGE = [2, 0, 0, 1, 0]
SIZE = 8
STAGE_LAYERS = (StageConv2d, StageLinear, StageGroupNorm)
UNET = {
    "image_size": SIZE,
    "encoder_widths": (8,),
    "decoder_widths": (12, 8, 4),
    "channel_mult": (1, 2),
    "num_blocks": 1,
    "attn_resolutions": (4,),
    "dropout": 0.0,
}


class Decoder(nn.Module):
    """README's decoder, and a linear layer."""

    def __init__(self, encoder: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        stages = len(widths)
        self.up = StageConv2d((encoder,) * stages, widths, 3, resample="up")
        self.merge = StageConv2d([width + encoder for width in widths], widths, 3)
        self.mix = StageLinear(widths, widths)
        self.norm = StageGroupNorm(widths, groups=(8,) * stages)
        self.out = StageConv2d(widths, (3,) * stages, 3)

    def forward(self, h: StageBatch, skip: Tensor) -> StageBatch:
        h = self.mix(self.merge(self.up(h), skip=skip))
        return self.out(self.norm(h, activation="silu"))


class Network(nn.Module):
    """README's own U-Net: an encoder of PyTorch's layers, a decoder of ours."""

    def __init__(self, encoder: int = 16, widths: tuple[int, ...] = (24, 16, 8)) -> None:
        super().__init__()
        self.num_stages = len(widths)
        self.fine = nn.Conv2d(3, encoder, 3, padding=1)
        self.coarse = nn.Conv2d(encoder, encoder, 3, stride=2, padding=1)
        self.decoder = Decoder(encoder, widths)

    def forward(self, x: Tensor, stage) -> Tensor:
        order = StageOrder.of(stage, self.num_stages, len(x), x.device)
        skip = silu(self.fine(order.sort(x)))
        h = silu(self.coarse(skip))
        return order.restore(self.decoder(StageBatch.from_dense(h, order.counts), skip).dense())


class UNet(EDMUNet):
    """EDM's U-Net, small, called as README's network is."""

    def __init__(self) -> None:
        super().__init__(**UNET)

    def forward(self, x: Tensor, stage) -> Tensor:
        return super().forward(x, torch.linspace(-1, 1, len(x)), stage)


NETWORKS: dict[str, Callable[[], nn.Module]] = {"readme": Network, "edm": UNet}


def filled(network: nn.Module, seed: int = 0) -> nn.Module:
    """The network with random numbers in every parameter, biases and norms too: two seeds share no tensor."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return network


def images(samples: int = len(STAGE), seed: int = 0) -> Tensor:
    return torch.randn(samples, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def loss_of(network: nn.Module, stage=STAGE, seed: int = 0) -> Tensor:
    return network(images(len(stage), seed), stage).square().mean()


def copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The values as they are now, whole where they are spread over processes."""
    return {name: whole(tensor).detach().clone() for name, tensor in tensors.items()}


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def difference(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str | None:
    """The first tensor that differs from the expected one in name, type, shape or a single bit, and how."""
    if missing := expected.keys() - actual.keys():
        return f"{sorted(missing)} missing"
    if more := actual.keys() - expected.keys():
        return f"{sorted(more)} not expected"
    for name, tensor in expected.items():
        got = whole(actual[name])
        if (got.dtype, got.shape) != (tensor.dtype, tensor.shape):
            return f"{name} is {got.dtype} {list(got.shape)}, not {tensor.dtype} {list(tensor.shape)}"
        if not torch.equal(_bits(got), _bits(tensor)):
            return f"{name} has other values"
    return None


def assert_arrived(network: nn.Module, expected: Mapping[str, Tensor]) -> None:
    """All tensors of the network are those, bit for bit."""
    assert difference(network.state_dict(), expected) is None
    buffers = {name for name, _ in network.named_buffers()}
    assert dict(network.named_parameters()).keys() == expected.keys() - buffers


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)

"""EDM's U-Net in ordinary PyTorch, one stage per call: what whole networks are measured against.

As people write it today: convolutions in channels_last, PyTorch's own GroupNorm and attention, weights that stay in
float32 and are cast where they are used, as EDM's own half precision does; under autocast alone the normalisations
would run in float32. ``torch.compile`` takes it whole.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multistage_diffusion.networks import EDMUNet
from multistage_diffusion.networks.blocks import DecoderLevel, EncoderLevel, OutputHead, ResidualBlock
from multistage_diffusion.networks.embeddings import EmbeddingMLP, positional_embedding
from multistage_diffusion.networks.layers import (
    BOX,
    OnStages,
    StageAttention,
    StageConv2d,
    StageGroupNorm,
    StageLinear,
)

# What a network must be like to have a twin.
NEEDED = {
    "embedding_type": "positional",
    "encoder_type": "standard",
    "decoder_type": "standard",
    "resample_filter": list(BOX),
    "label_dim": 0,
}


class Conv2d(nn.Conv2d):
    def __init__(self, layer: StageConv2d, stage: int) -> None:
        super().__init__(
            layer.in_channels[stage], layer.out_channels[stage], layer.kernel, padding=layer.kernel // 2
        )

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class Linear(nn.Linear):
    def __init__(self, layer: StageLinear, stage: int) -> None:
        super().__init__(layer.in_features[stage], layer.out_features[stage])

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class GroupNorm(nn.GroupNorm):
    def __init__(self, layer: StageGroupNorm, stage: int) -> None:
        super().__init__(layer.groups[stage], layer.channels[stage], layer.eps)

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Self-attention over the pixels, added to its input."""

    def __init__(self, attention: StageAttention, stage: int) -> None:
        super().__init__()
        self.norm = GroupNorm(attention.norm, stage)
        self.qkv, self.proj = Conv2d(attention.qkv, stage), Conv2d(attention.proj, stage)
        self.heads, self.scale = attention.num_heads[stage], attention.scale

    def forward(self, x: Tensor) -> Tensor:
        pixels = self.qkv(self.norm(x)).permute(0, 2, 3, 1)
        q, k, v = pixels.reshape(len(x), -1, self.heads, 3, x.shape[1] // self.heads).unbind(3)
        tokens = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        attended = tokens.transpose(1, 2).reshape(len(x), *x.shape[2:], x.shape[1]).permute(0, 3, 1, 2)
        return self.scale * (x + self.proj(attended))


class Block(nn.Module):
    """A residual block, see :class:`multistage_diffusion.networks.blocks.ResidualBlock`."""

    def __init__(self, block: ResidualBlock, stage: int) -> None:
        super().__init__()
        self.norm0, self.norm1 = GroupNorm(block.norm0, stage), GroupNorm(block.norm1, stage)
        self.conv0, self.conv1 = Conv2d(block.conv0, stage), Conv2d(block.conv1, stage)
        self.affine = Linear(block.affine, stage)
        self.skip = projection(block.skip, stage)
        self.attention = None if block.attention is None else Attention(block.attention, stage)
        self.resample, self.dropout, self.scale = block.conv0.resample, block.dropout, block.scale

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv0(self._resampled(F.silu(self.norm0(x))))
        h = F.silu(self.norm1(h + self.affine(emb)[:, :, None, None]))
        h = self.conv1(F.dropout(h, self.dropout, self.training))
        h = self.scale * (h + self._projected(x))
        return h if self.attention is None else self.attention(h)

    def _projected(self, x: Tensor) -> Tensor:
        if self.skip is None:
            return x
        if self.resample == "up":  # a 1x1 convolution may run on the small map
            return self._resampled(self.skip(x))
        return self.skip(self._resampled(x))

    def _resampled(self, x: Tensor) -> Tensor:
        if self.resample == "up":
            return F.interpolate(x, scale_factor=2.0, mode="nearest")
        return F.avg_pool2d(x, 2) if self.resample == "down" else x


class Embedding(nn.Module):
    def __init__(self, layers: EmbeddingMLP, stage: int) -> None:
        super().__init__()
        self.layer0, self.layer1 = Linear(layers.layer0, stage), Linear(layers.layer1, stage)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.layer1(F.silu(self.layer0(x))))


class Encoder(nn.Module):
    """One resolution."""

    def __init__(self, level: EncoderLevel, stage: int) -> None:
        super().__init__()
        self.down = None if level.down is None else Block(level.down, stage)
        self.blocks = nn.ModuleList(Block(block, stage) for block in level.blocks)

    def forward(self, h: Tensor, emb: Tensor, skips: list[Tensor]) -> Tensor:
        for block in self.blocks if self.down is None else (self.down, *self.blocks):
            h = block(h, emb)
            skips.append(h)
        return h


class Head(nn.Module):
    def __init__(self, head: OutputHead, stage: int) -> None:
        super().__init__()
        self.norm, self.conv = GroupNorm(head.norm, stage), Conv2d(head.conv, stage)

    def forward(self, h: Tensor) -> Tensor:
        return self.conv(F.silu(self.norm(h)))


class Decoder(nn.Module):
    """One resolution."""

    def __init__(self, level: DecoderLevel, stage: int) -> None:
        super().__init__()
        self.entry = nn.ModuleList(Block(block, stage) for block in level.entry)
        self.blocks = nn.ModuleList(Block(block, stage) for block in level.blocks)
        self.head = None if level.head is None else Head(level.head, stage)

    def forward(self, h: Tensor, emb: Tensor, skips: list[Tensor]) -> Tensor:
        for block in self.entry:
            h = block(h, emb)
        for block in self.blocks:
            h = block(torch.cat([h, skips.pop()], dim=1), emb)
        return h if self.head is None else self.head(h)


class PlainUNet(nn.Module):
    """The twin of one stage of a network; :func:`twins` gives it the weights.

    Attributes:
        sources: for every parameter, its name in the network's ``state_dict``.

    Raises:
        TypeError: another network than an ``EDMUNet``.
        ValueError: one with more than the published EDM networks for CIFAR-10 and CelebA have.
    """

    num_stages = 1
    sources: dict[str, str]

    def __init__(self, network: EDMUNet, stage: int) -> None:
        super().__init__()
        if not isinstance(network, EDMUNet):
            raise TypeError(f"PlainUNet: needs an EDMUNet, got {type(network).__name__}")
        for key, needed in NEEDED.items():
            if network.config[key] != needed:
                raise ValueError(f"PlainUNet: {key} must be {needed!r}, got {network.config[key]!r}")
        of_encoder = 0 if network.shared_encoder else stage
        self.noise_channels = network.map_noise.channels[of_encoder]
        self.map_layers = Embedding(network.map_layers, of_encoder)
        self.conv = Conv2d(network.conv, of_encoder)
        self.enc = nn.ModuleDict({size: Encoder(level, of_encoder) for size, level in network.enc.items()})
        self.dec = nn.ModuleDict({size: Decoder(level, stage) for size, level in network.dec.items()})

    def forward(self, x: Tensor, noise: Tensor, stage=None) -> Tensor:
        """As the network, for samples of its own stage; ``stage`` is there so that both are called alike."""
        dtype = self._compute_dtype(x)
        with torch.autocast(x.device.type, enabled=False):
            emb = self.map_layers(positional_embedding(noise, self.noise_channels).to(dtype))
            h = self.conv(x.to(dtype, memory_format=torch.channels_last))
            skips = [h]
            for level in self.enc.values():
                h = level(h, emb, skips)
            for level in self.dec.values():
                h = level(h, emb, skips)
        return h.to(x.dtype)

    def _compute_dtype(self, x: Tensor) -> torch.dtype:
        if torch.is_autocast_enabled(x.device.type):
            return torch.get_autocast_dtype(x.device.type)
        return self.conv.weight.dtype


def projection(skip: OnStages | StageConv2d | None, stage: int) -> Conv2d | None:
    """A block's ``skip`` in this stage."""
    if isinstance(skip, OnStages):
        return Conv2d(skip.module, skip.stages.index(stage)) if stage in skip.stages else None
    return None if skip is None else Conv2d(skip, stage)


def twins(network: EDMUNet) -> list[PlainUNet]:
    """One network per stage with copies of the weights; what the stages share, the twins share, too."""
    orders = {True: torch.channels_last, False: torch.contiguous_format}  # of convolutions, and of the rest
    weights = {
        name: nn.Parameter(tensor.detach().clone(memory_format=orders[tensor.dim() == 4]))
        for name, tensor in network.state_dict().items()
    }
    found = []
    for stage in range(network.num_stages):
        with torch.device("meta"):
            twin = PlainUNet(network, stage)
        twin.sources = weight_names(network, twin, stage)
        twin.load_state_dict({name: weights[source] for name, source in twin.sources.items()}, assign=True)
        found.append(twin.train(network.training))
    return found


def weight_names(network: EDMUNet, twin: PlainUNet, stage: int) -> dict[str, str]:
    """For the twin's parameters, what ``network.state_dict()`` calls them."""
    own = set(twin.state_dict())
    found = {}
    for source in network.state_dict():
        name, _, number = source.replace(".skip.module.", ".skip.").rpartition(".")
        used = 0 if network.shared_encoder and not name.startswith("dec.") else stage
        if name in own and int(number) == used:
            found[name] = source
    return found


def named_gradients(network: nn.Module, gradients: Sequence[Tensor | None]) -> dict[str, Tensor]:
    """Gradients of the parameters of a network, or of a twin, by the names and in the shapes of the network's state."""
    if isinstance(network, PlainUNet):
        names = (network.sources[name] for name, _ in network.named_parameters())
        return dict(zip(names, gradients, strict=True))
    given = zip(network.named_parameters(), gradients, strict=True)
    return {name: gradient for (name, _), gradient in given if gradient is not None}

"""The blocks that the U-Nets of all families are built from: residual blocks and the levels of encoder and decoder."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from msd_kernels import StageBatch, grouped_linear, resample2d
from multistage_diffusion.networks.dropout import belongs_to_norm, dropout
from multistage_diffusion.networks.layers import (
    BOX,
    Initialiser,
    StageConv2d,
    StageGroupNorm,
    StageLinear,
    StageStridedConv2d,
    Widths,
    on_stages,
    xavier_uniform,
)
from multistage_diffusion.networks.stage_module import is_sharded

SKIP_SCALE = math.sqrt(0.5)
ZERO = xavier_uniform(1e-5)
SEEDS_AT_ONCE = 256  # of the dropouts of a network


@dataclass(frozen=True)
class BlockStyle:
    """What is the same in all residual blocks of a network.

    Attributes:
        emb: channels of the embedding, per stage.
        norm: channels per stage -> normalisation.
        attention: channels per stage -> attention that keeps its input's layout.
        dropout: dropout probability.
        scale: factor on the sum of residual and skip.
        filter: taps of the resampling filter.
        adaptive_scale: the embedding scales and shifts the second normalisation's output, instead of being added
            to its input.
        initialise, initialise_last: of the weights, and of those of the last convolution of each block.
    """

    emb: Widths
    norm: Callable[[Widths], StageGroupNorm]
    attention: Callable[[Widths], nn.Module]
    dropout: float = 0.0
    scale: float = 1.0
    filter: Sequence[float] = BOX
    adaptive_scale: bool = False
    initialise: Initialiser | None = None
    initialise_last: Initialiser | None = ZERO


class Projections:
    """What residual blocks make of one embedding, ``block.affine(emb)``: by one launch for many of them.

    It depends on nothing else, so one launch can compute it for all blocks and stages: every layer's stages are stages
    of one grouped layer, and all layers see the same samples. Where ``fully_shard`` was applied to parts of a network,
    their weights exist only while those parts run: then each part projects for its own blocks, see :meth:`inside`.
    What has taken the place of a layer, as an adapter does, is called like any module.
    """

    def __init__(self, emb: StageBatch) -> None:
        self.emb = emb
        self._outputs: dict[StageLinear, StageBatch] = {}
        self._seeds: dict[nn.Module, Tensor] = {}
        self._drawn: list[Tensor] = []

    def inside(self, *modules: nn.Module) -> Projections:
        """Projects in one launch for all blocks in these modules but those in parts that are sharded by themselves."""
        layers = [layer for module in modules for layer in _affines(module) if layer not in self._outputs]
        if layers:
            emb, repeats = self.emb, len(layers)
            inputs = StageBatch(
                emb.values.repeat(repeats), emb.counts * repeats, emb.channels * repeats, 1, 1
            )
            weight, bias = (
                [tensor for layer in layers for tensor in layer.weights(name, emb.dtype)]
                for name in ("weight", "bias")
            )
            outputs = grouped_linear(inputs, weight, bias).values
            sizes = [_size(emb.counts, layer.out_features) for layer in layers]
            for layer, values in zip(layers, outputs.split(sizes), strict=True):
                self._outputs[layer] = StageBatch(values, emb.counts, layer.out_features, 1, 1)
        return self

    def seed_of(self, module: nn.Module) -> Tensor:
        """What a module's dropout follows from: an int64 ``[1]`` where the embedding is, of PyTorch's generator there.

        The same whenever it is asked, as where a checkpointed part runs once more. One draw serves many modules.
        """
        if module not in self._seeds:
            if not self._drawn:
                seeds = torch.empty(SEEDS_AT_ONCE, dtype=torch.int64, device=self.emb.device)
                self._drawn = list(seeds.random_(-(1 << 63), None).split(1))
            self._seeds[module] = self._drawn.pop()
        return self._seeds[module]

    def of(self, part: nn.Module) -> Projections:
        """As a part of the network takes them, in its forward."""
        return self.inside(part) if is_sharded(part) else self

    def __getitem__(self, layer: StageLinear) -> StageBatch:
        return self._outputs[layer] if layer in self._outputs else layer(self.emb)


def _affines(module: nn.Module) -> Iterator[StageLinear]:
    if isinstance(module, ResidualBlock):
        if type(module.affine) is StageLinear:  # no adapter, nor sharded, which changes the class
            yield module.affine
        return
    for child in module.children():
        if not is_sharded(child):
            yield from _affines(child)


def _size(counts: Widths, channels: Widths) -> int:
    return sum(n * c for n, c in zip(counts, channels, strict=True))


class ResidualBlock(nn.Module):
    """Residual block: ``scale · (skip(x) + conv1(dropout(silu(norm1(conv0(silu(norm0(x))) + affine(emb))))))``.

    ``conv0`` and ``skip`` resample where the block changes the resolution. ``skip`` is a 1×1 convolution in the stages
    where the shapes differ, the identity in the others. An attention follows where one is given.
    """

    def __init__(
        self,
        in_channels: Widths,
        out_channels: Widths,
        style: BlockStyle,
        *,
        resample: str | None = None,
        attention: nn.Module | bool | None = None,
    ) -> None:
        super().__init__()
        self.dropout, self.scale, self.adaptive_scale = style.dropout, style.scale, style.adaptive_scale
        conv = {"initialise": style.initialise, "resample": resample, "filter": style.filter}
        self.norm0 = style.norm(in_channels)
        self.conv0 = StageConv2d(in_channels, out_channels, 3, **conv)
        affine = tuple(2 * c for c in out_channels) if style.adaptive_scale else out_channels
        self.affine = StageLinear(style.emb, affine, initialise=style.initialise)
        self.norm1 = style.norm(out_channels)
        self.conv1 = StageConv2d(out_channels, out_channels, 3, initialise=style.initialise_last)
        projecting = [
            stage for stage, c in enumerate(in_channels) if resample is not None or c != out_channels[stage]
        ]
        self.skip = on_stages(partial(StageConv2d, kernel=1, **conv), projecting, in_channels, out_channels)
        self.attention = style.attention(out_channels) if attention is True else attention or None

    def forward(
        self,
        x: StageBatch,
        emb: Projections,
        *,
        skip: StageBatch | None = None,
        context: StageBatch | None = None,
    ) -> StageBatch:
        """Runs the block.

        Args:
            x: features of the level below, or of the block before.
            emb: holds this block's projection.
            skip: features of the encoder, whose channels come behind those of ``x``; both are read where they are.
            context: what the attention looks at as well.
        """
        sources = {} if skip is None else {"skip": skip}
        h, affine = self.norm0(x, activation="silu", **sources), emb.of(self)[self.affine]
        options = {"activation": "silu"}
        in_norm = belongs_to_norm(x.values)
        if self.training and self.dropout and in_norm:
            options |= {"dropout": self.dropout, "seed": emb.seed_of(self)}
        if self.adaptive_scale:
            halves = [segment.chunk(2, dim=1) for segment in affine.segments()]
            scale, shift = (StageBatch.from_segments([half[i] for half in halves]) for i in (0, 1))
            h = self.norm1(self.conv0(h), scale=scale, shift=shift, **options)
        else:
            h = self.norm1(self.conv0(h, sample_bias=affine), **options)
        if not in_norm:
            h = h.map(lambda values: dropout(values, self.dropout, self.training))
        h = self.conv1(h, residual=self._residual(x, sources), scale=self.scale)
        return h if self.attention is None else self.attention(h, context)

    def _residual(self, x: StageBatch, sources: dict[str, StageBatch]) -> StageBatch:
        if self.skip is not None:
            return self.skip(x, **sources)
        return StageBatch.concatenate(x, sources["skip"]) if sources else x


def encoder_blocks(
    channels: Widths,
    out_channels: Widths,
    style: BlockStyle,
    count: int,
    skips: list[Widths],
    *,
    attention: bool,
) -> list[ResidualBlock]:
    """The residual blocks of an encoder's level; appends the channels of each one's output to ``skips``."""
    blocks = []
    for _ in range(count):
        blocks.append(ResidualBlock(channels, out_channels, style, attention=attention))
        channels = out_channels
        skips.append(channels)
    return blocks


def decoder_blocks(
    channels: Widths,
    out_channels: Widths,
    style: BlockStyle,
    skips: list[Widths],
    attention: Sequence[nn.Module | bool | None],
) -> list[ResidualBlock]:
    """The residual blocks of a decoder's level, one per entry of ``attention``; each takes the last of ``skips``."""
    blocks = []
    for attends in attention:
        joined = tuple(c + s for c, s in zip(channels, skips.pop(), strict=True))
        blocks.append(ResidualBlock(joined, out_channels, style, attention=attends))
        channels = out_channels
    return blocks


class Resample(nn.Module):
    """A convolution that changes the resolution, where a family resamples outside of the residual blocks."""

    def __init__(self, conv: StageConv2d | StageStridedConv2d) -> None:
        super().__init__()
        self.conv = conv

    def forward(
        self, x: StageBatch, emb: Projections | None = None, *, context: StageBatch | None = None
    ) -> StageBatch:
        """Called as a residual block is; embedding and context are ignored."""
        return self.conv(x)


class SkipInput(nn.Module):
    """Adds the image itself, filtered down to this resolution, through a 1×1 convolution (NCSN++, "skip")."""

    def __init__(
        self,
        image_channels: Widths,
        channels: Widths,
        filter: Sequence[float],
        initialise: Initialiser | None = None,
    ) -> None:
        super().__init__()
        self.filter = tuple(filter)
        self.conv = StageConv2d(image_channels, channels, 1, initialise=initialise)

    def forward(self, x: StageBatch, image: StageBatch) -> tuple[StageBatch, StageBatch]:
        """Returns the sum, and the image at this resolution for the next level."""
        image = resample2d(image, self.filter, down=2)
        return self.conv(image, residual=x), image


class ResidualInput(nn.Module):
    """Adds the previous level's sum, filtered and convolved down to this resolution (NCSN++, "residual")."""

    def __init__(
        self,
        in_channels: Widths,
        channels: Widths,
        filter: Sequence[float],
        *,
        scale: float = SKIP_SCALE,
        initialise: Initialiser | None = None,
    ) -> None:
        super().__init__()
        self.scale = scale
        self.conv = StageStridedConv2d(in_channels, channels, 3, filter=filter, initialise=initialise)

    def forward(self, x: StageBatch, pyramid: StageBatch) -> tuple[StageBatch, StageBatch]:
        """Returns the sum twice: for this level, and for the next level's residual input."""
        x = x.with_values((x.values + self.conv(pyramid).values) * self.scale)
        return x, x


class EncoderLevel(nn.Module):
    """One resolution of an encoder.

    Args:
        down: brings the features to this resolution; None at the finest level.
        blocks: residual blocks.
        input: brings the image to this resolution as well, or None.
    """

    def __init__(
        self,
        down: nn.Module | None,
        blocks: Sequence[ResidualBlock],
        input: SkipInput | ResidualInput | None = None,
    ) -> None:
        super().__init__()
        self.down, self.input, self.blocks = down, input, nn.ModuleList(blocks)

    def forward(
        self,
        x: StageBatch,
        emb: Projections,
        *,
        pyramid: StageBatch | None = None,
        context: StageBatch | None = None,
    ) -> tuple[list[StageBatch], StageBatch | None]:
        """Returns each feature map that the decoder needs, the last of which goes on, and the pyramid."""
        emb, features = emb.of(self), []
        if self.down is not None:
            x = self.down(x, emb, context=context)
            if self.input is not None:
                x, pyramid = self.input(x, pyramid)
            features.append(x)
        for block in self.blocks:
            x = block(x, emb, context=context)
            features.append(x)
        return features, pyramid


def take_last(features: list[StageBatch], number: int) -> list[StageBatch]:
    """Removes that many from the end of a list and returns them in its order.

    Levels get what is theirs, not the list: what hooks into modules (accelerate) gives them a copy of it.
    """
    taken = features[len(features) - number :]
    del features[len(features) - number :]
    return taken


class OutputHead(nn.Module):
    """Normalisation, SiLU and a convolution to the image, added to the coarser levels' image where there is one."""

    def __init__(
        self,
        norm: StageGroupNorm,
        image_channels: Widths,
        *,
        filter: Sequence[float] = BOX,
        initialise: Initialiser | None = ZERO,
    ) -> None:
        super().__init__()
        self.filter, self.norm = tuple(filter), norm
        self.conv = StageConv2d(norm.channels, image_channels, 3, initialise=initialise)

    def forward(self, x: StageBatch, image: StageBatch | None = None) -> StageBatch:
        upsampled = None if image is None else resample2d(image, self.filter, up=2)
        return self.conv(self.norm(x, activation="silu"), residual=upsampled)


class DecoderLevel(nn.Module):
    """One resolution of a decoder.

    Args:
        entry: blocks before those with skips: the upsampling, or the first blocks of the coarsest level.
        blocks: residual blocks, each joined with the encoder's last unused features.
        head: makes an image at this resolution, or None.
    """

    def __init__(
        self, entry: Sequence[nn.Module], blocks: Sequence[ResidualBlock], head: OutputHead | None = None
    ) -> None:
        super().__init__()
        self.entry, self.blocks, self.head = nn.ModuleList(entry), nn.ModuleList(blocks), head

    def forward(
        self,
        x: StageBatch,
        emb: Projections,
        skips: Sequence[StageBatch],
        *,
        image: StageBatch | None = None,
        context: StageBatch | None = None,
    ) -> tuple[StageBatch, StageBatch | None]:
        """Joins each of its blocks with one of ``skips``, last first; returns the features and the image so far."""
        emb = emb.of(self)
        for block in self.entry:
            x = block(x, emb, context=context)
        for block, skip in zip(self.blocks, reversed(skips), strict=True):
            x = block(x, emb, skip=skip, context=context)
        return x, image if self.head is None else self.head(x, image)

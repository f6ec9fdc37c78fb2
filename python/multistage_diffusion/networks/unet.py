"""The U-Net that EDM, score SDE and latent diffusion share: one way down, and up once per stage."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from msd_kernels import StageBatch
from multistage_diffusion.networks.blocks import (
    BlockStyle,
    DecoderLevel,
    EncoderLevel,
    OutputHead,
    Projections,
    ResidualBlock,
    decoder_blocks,
    encoder_blocks,
    take_last,
)
from multistage_diffusion.networks.layers import StageConv2d, Widths
from multistage_diffusion.networks.stage_network import Features, StageNetwork


class UNet(StageNetwork):
    """A U-Net with a shared encoder and one decoder per stage; a batch may mix samples of all stages.

    A family makes its embedding, then calls :meth:`add_levels`, and gives :meth:`embedding`; it may override what is
    under "what a family gives". It takes ``channel_mult`` (per level, finest first, the multiple of the base width),
    ``num_blocks`` (residual blocks per level) and ``attn_resolutions``, all of them among the resolutions of the
    levels.

    Attributes:
        attending: the resolutions with attention where no others were given, as far as the network has them.
        middle_in_decoders: the two blocks between encoder and decoder belong to each decoder, not to the encoder.
        middle: those of the encoder.
    """

    attending: ClassVar[tuple[int, ...]]
    middle_in_decoders: ClassVar[bool] = False

    def __init__(self, arguments: Mapping[str, object]) -> None:
        if arguments["attn_resolutions"] is None:
            found = _present(self.attending, arguments["image_size"], arguments["channel_mult"])
            arguments = {**arguments, "attn_resolutions": found}
        super().__init__(arguments)
        self.image_sizes = _resolutions(self.image_size, self.config["channel_mult"])
        self._check_levels()
        self.middle = None

    @classmethod
    def in_effect(cls, arguments: Mapping[str, object]) -> dict[str, object]:
        """The arguments without those of ``attn_resolutions`` that the image never has.

        For the configurations of networks that exist: earlier versions and the reference implementations take such
        resolutions and ignore them, where the constructor raises.
        """
        known = {name: p.default for name, p in inspect.signature(cls).parameters.items()} | dict(arguments)
        if known.get("attn_resolutions") is None:
            return dict(arguments)
        try:
            kept = list(_present(known["attn_resolutions"], known["image_size"], known["channel_mult"]))
        except TypeError:  # something else is wrong, which the constructor says
            return dict(arguments)
        return {**arguments, "attn_resolutions": kept}

    def _check_levels(self) -> None:
        """Raises ValueError unless the image can be halved at each of these levels and has these resolutions."""
        name, there = type(self).__name__, self.image_sizes
        channel_mult, num_blocks = self.config["channel_mult"], self.config["num_blocks"]
        attending = self.config["attn_resolutions"]
        if not channel_mult or min(channel_mult) < 1 or num_blocks < 1:
            raise ValueError(
                f"{name}: channel_mult and num_blocks must be >= 1, got channel_mult={tuple(channel_mult)}, "
                f"num_blocks={num_blocks}"
            )
        factor = 2 ** (len(channel_mult) - 1)
        if self.image_size < factor or self.image_size % factor:
            raise ValueError(
                f"{name}: image_size must be a multiple of {factor} for {len(channel_mult)} levels, "
                f"got {self.image_size}"
            )
        if missing := [size for size in attending if size not in there]:
            nearest = {min(there, key=lambda size: abs(size - other)) for other in missing}
            instead = sorted(nearest.union(attending).difference(missing), reverse=True)
            raise ValueError(
                f"{name}: attn_resolutions={attending} names {', '.join(map(str, missing))}, but with "
                f"image_size={self.image_size} and {len(there)} levels the resolutions are "
                f"{', '.join(map(str, there))}; "
                f"choose among these, for example attn_resolutions={instead}, or give none"
            )

    # ------------------------------------------------------------------ what a family gives

    def downsample(self, channels: Widths, style: BlockStyle) -> nn.Module:
        """The way from a level to the coarser one."""
        return ResidualBlock(channels, channels, style, resample="down")

    def upsample(self, channels: Widths, style: BlockStyle) -> nn.Module:
        """The way from a level to the finer one."""
        return ResidualBlock(channels, channels, style, resample="up")

    def image_input(
        self, pyramid: Widths, channels: Widths, style: BlockStyle
    ) -> tuple[nn.Module | None, Widths]:
        """What brings the image to a coarser level, and the channels of what it hands to the next one."""
        return None, pyramid

    def decoder_attention(self, level: int, channels: Widths) -> Sequence[nn.Module | bool | None]:
        """Attention of each block of a decoder's level: after the last one, where the resolution has any."""
        attends = self.image_sizes[level] in self.config["attn_resolutions"]
        return [False] * self.config["num_blocks"] + [attends]

    def makes_image(self, level: int) -> bool:
        """Whether a decoder's level has a head: the finest one."""
        return level == 0

    def centered(self, x: Tensor) -> Tensor:
        """The images as the first convolution takes them."""
        return x

    def tokens(self, counts: Widths, dtype: torch.dtype, conditioning: dict[str, Tensor | None]):
        """The context as a StageBatch whose pixels are its tokens; None where there is none."""
        return None

    # ------------------------------------------------------------------ construction

    def add_levels(self, emb: Widths, style: Callable[[Widths], BlockStyle]) -> None:
        """Adds encoder, middle and decoders.

        Args:
            emb: channels of the embedding, per encoder.
            style: channels of an embedding -> what is the same in all blocks.
        """
        self.enc = nn.ModuleDict()
        skips = self._add_encoder(style(emb))
        self.dec = nn.ModuleDict()
        self._add_decoders(style(self.per_decoder(emb)), skips)

    def _add_encoder(self, style: BlockStyle) -> list[Widths]:
        """Returns the channels of the skips that it leaves."""
        config, widths = self.config, self.encoder_widths
        pyramid = (self.in_channels,) * len(widths)
        self.conv = StageConv2d(pyramid, widths, 3, initialise=style.initialise)
        channels, skips = widths, [widths]
        for level, mult in enumerate(config["channel_mult"]):
            size = self.image_sizes[level]
            down = input = None
            if level > 0:
                down = self.downsample(channels, style)
                input, pyramid = self.image_input(pyramid, channels, style)
                skips.append(channels)
            out = tuple(w * mult for w in widths)
            attends = size in config["attn_resolutions"]
            blocks = encoder_blocks(channels, out, style, config["num_blocks"], skips, attention=attends)
            channels = out
            self.enc[f"{size}x{size}"] = EncoderLevel(down, blocks, input)
        if not self.middle_in_decoders:
            self.middle = nn.ModuleList(_middle(channels, style))
        return skips

    def _add_decoders(self, style: BlockStyle, skips: list[Widths]) -> None:
        config = self.config
        image = (self.out_channels,) * self.num_stages
        skips = [self.per_decoder(channels) for channels in skips]
        channels, coarsest = skips[-1], len(self.image_sizes) - 1
        for level in range(coarsest, -1, -1):
            size, mult = self.image_sizes[level], config["channel_mult"][level]
            if level < coarsest:
                entry = [self.upsample(channels, style)]
            else:
                entry = _middle(channels, style) if self.middle_in_decoders else []
            out = tuple(w * mult for w in self.decoder_widths)
            blocks = decoder_blocks(channels, out, style, skips, self.decoder_attention(level, out))
            channels = out
            head = None
            if self.makes_image(level):
                head = OutputHead(style.norm(channels), image, filter=style.filter)
            self.dec[f"{size}x{size}"] = DecoderLevel(entry, blocks, head)

    # ------------------------------------------------------------------ the walk

    def run_encoder(self, x: Tensor, noise: Tensor, conditioning: dict[str, Tensor | None], counts: Widths):
        counts = self.encoder_counts(counts)
        tokens = self.tokens(counts, x.dtype, conditioning)
        emb = self.embedding(noise, counts, x.dtype, conditioning)
        pyramid = StageBatch.from_dense(self.centered(x), counts)
        skips = [self.conv(pyramid)]
        parts = [self.enc] if self.middle is None else [self.enc, self.middle]
        projections = Projections(emb).inside(*parts)
        for level in self.enc.values():
            features, pyramid = level(skips[-1], projections, pyramid=pyramid, context=tokens)
            skips += features
        h = skips[-1]
        for block in self.middle or ():
            h = block(h, projections, context=tokens)
        return h, skips, emb, tokens

    def run_decoder(self, features: Features) -> Tensor:
        counts = features.order.counts
        h, emb, tokens = (
            self.to_decoders(counts, batch) for batch in (features.state, features.emb, features.tokens)
        )
        projections = Projections(emb).inside(self.dec)
        skips = [self.to_decoders(counts, skip) for skip in features.skips]
        image = None
        for level in self.dec.values():
            h, image = level(h, projections, take_last(skips, len(level.blocks)), image=image, context=tokens)
        return image.dense()


def _middle(channels: Widths, style: BlockStyle) -> list[ResidualBlock]:
    return [
        ResidualBlock(channels, channels, style, attention=True),
        ResidualBlock(channels, channels, style),
    ]


def _resolutions(image_size: int, channel_mult: Sequence[int]) -> list[int]:
    """Those of a U-Net's levels, finest first."""
    return [image_size >> level for level in range(len(channel_mult))]


def _present(
    attn_resolutions: Sequence[int], image_size: int, channel_mult: Sequence[int]
) -> tuple[int, ...]:
    """Those that a U-Net of these levels has."""
    there = _resolutions(image_size, channel_mult)
    return tuple(size for size in attn_resolutions if size in there)

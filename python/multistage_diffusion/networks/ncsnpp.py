"""The NCSN++ U-Net of score SDE (Song et al., arXiv 2011.13456) with one decoder per stage (arXiv 2312.09181).

BigGAN residual blocks, FIR resampling, residual progressive input; the middle belongs to the encoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from msd_kernels import StageBatch
from multistage_diffusion.networks.blocks import (
    SKIP_SCALE,
    BlockStyle,
    DecoderLevel,
    EncoderLevel,
    OutputHead,
    Projections,
    ResidualBlock,
    ResidualInput,
    decoder_blocks,
    encoder_blocks,
    take_last,
)
from multistage_diffusion.networks.embeddings import EmbeddingMLP, PositionalEmbedding
from multistage_diffusion.networks.layers import (
    StageAttention,
    StageConv2d,
    StageGroupNorm,
    Widths,
    xavier_uniform,
)
from multistage_diffusion.networks.stage_network import StageNetwork, check_levels, present

__all__ = ["NCSNpp"]

ATTENTION, ZERO = xavier_uniform(0.1**0.5), xavier_uniform(1e-5)
MIN_CHANNELS_PER_GROUP, EPS = 4, 1e-6
ATTENDING = (16,)
EMB_MULT = 4


def norm(channels: Widths, max_groups: int = 16) -> StageGroupNorm:
    """GroupNorm of this family: a group for every 4 channels, at most ``max_groups``."""
    groups = [max(min(c // MIN_CHANNELS_PER_GROUP, max_groups), 1) for c in channels]
    return StageGroupNorm(channels, groups, eps=EPS)


def attention(channels: Widths, max_groups: int = 16, scale: float = SKIP_SCALE) -> StageAttention:
    """Self-attention of this family: one head; q, k and v one after the other."""
    return StageAttention(
        norm(channels, max_groups),
        StageConv2d(channels, [3 * c for c in channels], 1, initialise=ATTENTION),
        StageConv2d(channels, channels, 1, initialise=ZERO),
        num_heads=(1,) * len(channels),
        layout="blocked",
        scale=scale,
    )


class NCSNpp(StageNetwork):
    """NCSN++ with a shared encoder and one decoder per stage; a batch may mix samples of all stages.

    ``decoder_widths`` with one entry is the unified network; as many ``encoder_widths`` as ``decoder_widths`` are
    separate networks. The defaults are the deep network for CIFAR-10.

    Args:
        image_size: height and width of the images, divisible by 2 to the number of levels less one.
        in_channels: channels of the images.
        encoder_widths: base width of the encoder: one for a shared encoder, or one per stage.
        decoder_widths: base width of each stage's decoder.
        channel_mult: per level, finest first, the multiple of the base width.
        num_blocks: residual blocks per level.
        attn_resolutions: resolutions with attention, after every encoder block and once in the decoder; all among those
            of the levels: ``image_size``, its half and so on. Default: 16, where that is one.
            The middle has one attention more.
        dropout: dropout probability inside the residual blocks.
        resample_filter: taps of the resampling filter, an even number.
        skip_rescale: the sum of residual and skip is scaled by √½.
        centered: images are in [−1, 1]; if not, they are in [0, 1] and are centred first.
        max_groups: most groups of a GroupNorm: 16 in the multi-stage models, 32 in the original.

    Raises:
        ValueError: sizes that do not fit together; the message says what is allowed.
    """

    family = "ncsnpp"

    def __init__(
        self,
        image_size: int,
        *,
        in_channels: int = 3,
        encoder_widths: Sequence[int] = (128,),
        decoder_widths: Sequence[int] = (192, 128, 16),
        channel_mult: Sequence[int] = (1, 2, 2, 2),
        num_blocks: int = 8,
        attn_resolutions: Sequence[int] | None = None,
        dropout: float = 0.1,
        resample_filter: Sequence[float] = (1, 3, 3, 1),
        skip_rescale: bool = True,
        centered: bool = True,
        max_groups: int = 16,
    ) -> None:
        encoder_widths, decoder_widths = tuple(encoder_widths), tuple(decoder_widths)
        channel_mult = tuple(channel_mult)
        if attn_resolutions is None:
            attn_resolutions = present(ATTENDING, image_size, channel_mult)
        super().__init__(
            {
                "image_size": image_size,
                "in_channels": in_channels,
                "encoder_widths": list(encoder_widths),
                "decoder_widths": list(decoder_widths),
                "channel_mult": list(channel_mult),
                "num_blocks": num_blocks,
                "attn_resolutions": list(attn_resolutions),
                "dropout": dropout,
                "resample_filter": list(resample_filter),
                "skip_rescale": skip_rescale,
                "centered": centered,
                "max_groups": max_groups,
            },
            image_size=image_size,
            in_channels=in_channels,
            out_channels=in_channels,
            encoder_widths=encoder_widths,
            decoder_widths=decoder_widths,
        )
        check_levels("NCSNpp", image_size, channel_mult, num_blocks, attn_resolutions)
        emb = tuple(EMB_MULT * w for w in encoder_widths)
        scale = SKIP_SCALE if skip_rescale else 1.0
        style = {
            "norm": partial(norm, max_groups=max_groups),
            "attention": partial(attention, max_groups=max_groups, scale=scale),
            "dropout": dropout,
            "scale": scale,
            "filter": tuple(resample_filter),
        }
        self.embed_noise = PositionalEmbedding(encoder_widths)
        self.embed = EmbeddingMLP(encoder_widths, emb)
        self.enc = nn.ModuleDict()
        skips = self._add_encoder(encoder_widths, BlockStyle(emb, **style))
        self.dec = nn.ModuleDict()
        self._add_decoder(decoder_widths, BlockStyle(self.per_decoder(emb), **style), skips)

    def _add_encoder(self, widths: Widths, style: BlockStyle) -> list[Widths]:
        """Adds the encoder and the middle, and returns the channels of the skips that they leave."""
        config = self.config
        image = (self.in_channels,) * len(widths)
        self.conv = StageConv2d(image, widths, 3)
        channels, pyramid, skips = widths, image, [widths]
        for level, mult in enumerate(config["channel_mult"]):
            size = self.image_size >> level
            down = input = None
            if level > 0:
                down = ResidualBlock(channels, channels, style, resample="down")
                input = ResidualInput(pyramid, channels, style.filter, scale=style.scale)
                pyramid = channels
                skips.append(channels)
            out = tuple(w * mult for w in widths)
            attends = size in config["attn_resolutions"]
            blocks = encoder_blocks(channels, out, style, config["num_blocks"], skips, attention=attends)
            channels = out
            self.enc[f"{size}x{size}"] = EncoderLevel(down, blocks, input)
        self.middle = nn.ModuleList(
            [
                ResidualBlock(channels, channels, style, attention=True),
                ResidualBlock(channels, channels, style),
            ]
        )
        return skips

    def _add_decoder(self, widths: Widths, style: BlockStyle, skips: list[Widths]) -> None:
        config = self.config
        image = (self.out_channels,) * self.num_stages
        skips = [self.per_decoder(channels) for channels in skips]
        channels, coarsest = skips[-1], len(config["channel_mult"]) - 1
        for level in range(coarsest, -1, -1):
            size, mult = self.image_size >> level, config["channel_mult"][level]
            entry = [] if level == coarsest else [ResidualBlock(channels, channels, style, resample="up")]
            out = tuple(w * mult for w in widths)
            attends = [False] * config["num_blocks"] + [size in config["attn_resolutions"]]
            blocks = decoder_blocks(channels, out, style, skips, attends)
            channels = out
            head = OutputHead(style.norm(channels), image) if level == 0 else None
            self.dec[f"{size}x{size}"] = DecoderLevel(entry, blocks, head)

    def forward(self, x: Tensor, noise: Tensor, stage: Sequence[int] | Tensor) -> Tensor:
        """Runs a mixed batch.

        Args:
            x: ``[B, in_channels, image_size, image_size]``, in any floating dtype.
            noise: ``[B]``, 999 t with the SDE's time t in [0, 1].
            stage: one stage id per sample, on the host, in any order; or a :class:`StageOrder`.

        Returns:
            ``[B, in_channels, image_size, image_size]`` in the caller's order and in the dtype of ``x``.

        Runs in the dtype of autocast where it is on, in that of the parameters elsewhere.

        Raises:
            ValueError: shapes, devices or stage ids that do not fit.
            TypeError: what is no tensor or of a wrong dtype; stage ids that are no integers.
        """
        return self.mixed(x, noise, stage)

    def run(self, x: Tensor, noise: Tensor, counts: Widths, dtype: torch.dtype) -> Tensor:
        encoder_counts = self.encoder_counts(counts)
        emb = self.embed(self.embed_noise(noise, encoder_counts).to(dtype))
        pyramid = StageBatch.from_dense(x if self.config["centered"] else 2 * x - 1, encoder_counts)
        skips, projections = [self.conv(pyramid)], Projections(emb).inside(self.enc, self.middle)
        for level in self.enc.values():
            features, pyramid = level(skips[-1], projections, pyramid=pyramid)
            skips += features
        h = skips[-1]
        for block in self.middle:
            h = block(h, projections)
        h, emb = self.to_decoders(counts, h), self.to_decoders(counts, emb)
        projections = Projections(emb).inside(self.dec)
        skips = [self.to_decoders(counts, skip) for skip in skips]
        image = None
        for level in self.dec.values():
            h, image = level(h, projections, take_last(skips, len(level.blocks)), image=image)
        return image.dense()

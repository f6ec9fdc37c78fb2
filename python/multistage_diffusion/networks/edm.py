"""The U-Nets of EDM (DDPM++ and NCSN++ variants; Karras et al., arXiv 2206.00364; Song et al., arXiv 2011.13456)
with one decoder per stage (arXiv 2312.09181)."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from msd_kernels import StageBatch
from multistage_diffusion.networks.blocks import (
    SKIP_SCALE,
    ZERO,
    BlockStyle,
    DecoderLevel,
    EncoderLevel,
    OutputHead,
    Projections,
    ResidualBlock,
    ResidualInput,
    SkipInput,
    decoder_blocks,
    encoder_blocks,
    take_last,
)
from multistage_diffusion.networks.embeddings import (
    EmbeddingMLP,
    FourierEmbedding,
    PositionalEmbedding,
    add,
    drop_labels,
    label_batch,
)
from multistage_diffusion.networks.layers import (
    BOX,
    StageAttention,
    StageConv2d,
    StageGroupNorm,
    StageLinear,
    Widths,
    xavier_uniform,
)
from multistage_diffusion.networks.stage_network import StageNetwork, check_levels, present
from multistage_diffusion.networks.stage_order import StageOrder

__all__ = ["EDMUNet"]

ATTENTION = xavier_uniform(math.sqrt(0.2))
MIN_CHANNELS_PER_GROUP, EPS = 4, 1e-6
ATTENDING = (16,)

EMBEDDING_TYPES = {"positional": PositionalEmbedding, "fourier": FourierEmbedding}
ENCODER_TYPES = {"standard": None, "skip": SkipInput, "residual": ResidualInput}
DECODER_TYPES = ("standard", "skip")


def norm(channels: Widths, max_groups: int = 16) -> StageGroupNorm:
    """GroupNorm of this family: at most ``max_groups`` groups, at least 4 channels in each."""
    groups = [max(min(max_groups, c // MIN_CHANNELS_PER_GROUP), 1) for c in channels]
    return StageGroupNorm(channels, groups, eps=EPS)


def attention(channels: Widths, max_groups: int = 16) -> StageAttention:
    """Self-attention of this family: one head.

    The reference interleaves q, k and v. Here each lies in one piece, which kernels read faster;
    ``official.edm`` reorders the weights.
    """
    return StageAttention(
        norm(channels, max_groups),
        StageConv2d(channels, [3 * c for c in channels], 1, initialise=ATTENTION),
        StageConv2d(channels, channels, 1, initialise=ZERO),
        num_heads=(1,) * len(channels),
        layout="per_head",
        scale=SKIP_SCALE,
    )


class EDMUNet(StageNetwork):
    """U-Net with a shared encoder and one decoder per stage; a batch may mix samples of all stages.

    ``decoder_widths`` with one entry is the unified network; as many ``encoder_widths`` as ``decoder_widths`` are
    separate networks, one per stage. The defaults are the DDPM++ network for CIFAR-10; NCSN++ has
    ``embedding_type="fourier", encoder_type="residual", channel_mult_noise=2, resample_filter=(1, 3, 3, 1)``.

    Args:
        image_size: height and width of the images, divisible by 2 to the number of levels less one.
        in_channels, out_channels: channels of the images.
        encoder_widths: base width of the encoder: one for a shared encoder, or one per stage.
        decoder_widths: base width of each stage's decoder.
        channel_mult: per level, finest first, the multiple of the base width.
        num_blocks: residual blocks per level.
        attn_resolutions: resolutions with attention, all among those of the levels: ``image_size``, its half and so on.
            Default: 16, where that is one. The coarsest level has one attention more, whatever its resolution.
        dropout: dropout probability inside the residual blocks.
        channel_mult_emb: the embedding has this multiple of the encoder's base width.
        label_dim, augment_dim: sizes of the class and augmentation labels; 0: none.
        label_dropout: probability that a sample's class label is dropped in training.
        embedding_type: of the noise: ``"positional"`` or ``"fourier"``.
        channel_mult_noise: the noise's embedding has this multiple of the encoder's base width.
        encoder_type: what the coarser levels see of the image: ``"standard"`` nothing, ``"skip"`` the image filtered
            down, ``"residual"`` the level above, filtered and convolved down.
        decoder_type: ``"standard"``: the finest level makes the image; ``"skip"``: every level adds to it.
        resample_filter: taps of the resampling filter.
        max_groups: most groups of a GroupNorm: 16 in the multi-stage models, 32 in the original EDM.

    Raises:
        ValueError: sizes that do not fit together, or an unknown type; the message says what is allowed.
    """

    family = "edm"

    def __init__(
        self,
        image_size: int,
        *,
        in_channels: int = 3,
        out_channels: int = 3,
        encoder_widths: Sequence[int] = (128,),
        decoder_widths: Sequence[int] = (192, 128, 16),
        channel_mult: Sequence[int] = (2, 2, 2),
        num_blocks: int = 4,
        attn_resolutions: Sequence[int] | None = None,
        dropout: float = 0.13,
        channel_mult_emb: int = 4,
        label_dim: int = 0,
        augment_dim: int = 0,
        label_dropout: float = 0.0,
        embedding_type: str = "positional",
        channel_mult_noise: int = 1,
        encoder_type: str = "standard",
        decoder_type: str = "standard",
        resample_filter: Sequence[float] = BOX,
        max_groups: int = 16,
    ) -> None:
        encoder_widths, decoder_widths = tuple(encoder_widths), tuple(decoder_widths)
        channel_mult, resample_filter = tuple(channel_mult), tuple(resample_filter)
        if attn_resolutions is None:
            attn_resolutions = present(ATTENDING, image_size, channel_mult)
        super().__init__(
            {
                "image_size": image_size,
                "in_channels": in_channels,
                "out_channels": out_channels,
                "encoder_widths": list(encoder_widths),
                "decoder_widths": list(decoder_widths),
                "channel_mult": list(channel_mult),
                "num_blocks": num_blocks,
                "attn_resolutions": list(attn_resolutions),
                "dropout": dropout,
                "channel_mult_emb": channel_mult_emb,
                "label_dim": label_dim,
                "augment_dim": augment_dim,
                "label_dropout": label_dropout,
                "embedding_type": embedding_type,
                "channel_mult_noise": channel_mult_noise,
                "encoder_type": encoder_type,
                "decoder_type": decoder_type,
                "resample_filter": list(resample_filter),
                "max_groups": max_groups,
            },
            image_size=image_size,
            in_channels=in_channels,
            out_channels=out_channels,
            encoder_widths=encoder_widths,
            decoder_widths=decoder_widths,
        )
        check_levels("EDMUNet", image_size, channel_mult, num_blocks, attn_resolutions)
        _check_type("embedding_type", embedding_type, EMBEDDING_TYPES)
        _check_type("encoder_type", encoder_type, ENCODER_TYPES)
        _check_type("decoder_type", decoder_type, DECODER_TYPES)
        self.label_dim, self.augment_dim, self.label_dropout = label_dim, augment_dim, label_dropout
        self.image_sizes = [image_size >> level for level in range(len(channel_mult))]
        emb = tuple(w * channel_mult_emb for w in encoder_widths)
        noise = tuple(w * channel_mult_noise for w in encoder_widths)
        self.map_noise = EMBEDDING_TYPES[embedding_type](noise)
        self.map_label = StageLinear((label_dim,) * len(noise), noise) if label_dim else None
        self.map_augment = (
            StageLinear((augment_dim,) * len(noise), noise, bias=False) if augment_dim else None
        )
        self.map_layers = EmbeddingMLP(noise, emb)
        style = {
            "norm": partial(norm, max_groups=max_groups),
            "attention": partial(attention, max_groups=max_groups),
            "dropout": dropout,
            "scale": SKIP_SCALE,
            "filter": resample_filter,
        }
        self.enc = nn.ModuleDict()
        skips = self._add_encoder(encoder_widths, BlockStyle(emb, **style))
        self.dec = nn.ModuleDict()
        self._add_decoder(decoder_widths, BlockStyle(self.per_decoder(emb), **style), skips)

    def _add_encoder(self, widths: Widths, style: BlockStyle) -> list[Widths]:
        """Adds the encoder's levels and returns the channels of the skips that they leave."""
        config = self.config
        image = (self.in_channels,) * len(widths)
        input_type = ENCODER_TYPES[config["encoder_type"]]
        self.conv = StageConv2d(image, widths, 3)
        channels, pyramid, skips = widths, image, [widths]
        for level, mult in enumerate(config["channel_mult"]):
            size = self.image_sizes[level]
            down = input = None
            if level > 0:
                down = ResidualBlock(channels, channels, style, resample="down")
                skips.append(channels)
                if input_type is not None:
                    input = input_type(pyramid, channels, style.filter)
                    pyramid = channels if input_type is ResidualInput else image
            out = tuple(w * mult for w in widths)
            attends = size in config["attn_resolutions"]
            blocks = encoder_blocks(channels, out, style, config["num_blocks"], skips, attention=attends)
            channels = out
            self.enc[f"{size}x{size}"] = EncoderLevel(down, blocks, input)
        return skips

    def _add_decoder(self, widths: Widths, style: BlockStyle, skips: list[Widths]) -> None:
        config = self.config
        image = (self.out_channels,) * self.num_stages
        skips = [self.per_decoder(channels) for channels in skips]
        channels, coarsest = skips[-1], len(config["channel_mult"]) - 1
        for level in range(coarsest, -1, -1):
            size, mult = self.image_sizes[level], config["channel_mult"][level]
            if level == coarsest:
                entry = [
                    ResidualBlock(channels, channels, style, attention=True),
                    ResidualBlock(channels, channels, style),
                ]
            else:
                entry = [ResidualBlock(channels, channels, style, resample="up")]
            out = tuple(w * mult for w in widths)
            attends = [False] * config["num_blocks"] + [size in config["attn_resolutions"]]
            blocks = decoder_blocks(channels, out, style, skips, attends)
            channels = out
            makes_image = level == 0 or config["decoder_type"] == "skip"
            head = OutputHead(style.norm(channels), image, filter=style.filter) if makes_image else None
            self.dec[f"{size}x{size}"] = DecoderLevel(entry, blocks, head)

    def forward(
        self,
        x: Tensor,
        noise: Tensor,
        stage: Sequence[int] | Tensor | StageOrder,
        *,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        """Runs a mixed batch.

        Args:
            x: ``[B, in_channels, image_size, image_size]``, in any floating dtype.
            noise: ``[B]``, c_noise = ln(σ) / 4.
            stage: one stage id per sample, on the host, in any order; or a :class:`StageOrder`.
            class_labels: ``[B, label_dim]``, one-hot or soft; None: no class, as labels of 0.
            augment_labels: ``[B, augment_dim]``; None: no augmentation.

        Returns:
            ``[B, out_channels, image_size, image_size]`` in the caller's order and in the dtype of ``x``.

        Runs in the dtype of autocast where it is on, in that of the parameters elsewhere.

        Raises:
            ValueError: shapes, devices or stage ids that do not fit.
            TypeError: what is no tensor or of a wrong dtype; stage ids that are no integers.
        """
        return self.mixed(x, noise, stage, class_labels=class_labels, augment_labels=augment_labels)

    def prepared(
        self, batch: int, *, class_labels: Tensor | None, augment_labels: Tensor | None
    ) -> dict[str, Tensor | None]:
        """In training, drops some samples' class labels."""
        if self.training:
            class_labels = drop_labels(class_labels, self.label_dropout)
        return {"class_labels": class_labels, "augment_labels": augment_labels}

    def run(
        self,
        x: Tensor,
        noise: Tensor,
        counts: Widths,
        dtype: torch.dtype,
        *,
        class_labels: Tensor | None,
        augment_labels: Tensor | None,
    ) -> Tensor:
        encoder_counts = self.encoder_counts(counts)
        emb = self._embed(noise, encoder_counts, dtype, class_labels, augment_labels)
        pyramid = StageBatch.from_dense(x, encoder_counts)
        skips, projections = [self.conv(pyramid)], Projections(emb).inside(self.enc)
        for level in self.enc.values():
            features, pyramid = level(skips[-1], projections, pyramid=pyramid)
            skips += features
        projections = Projections(self.to_decoders(counts, emb)).inside(self.dec)
        h, image = self.to_decoders(counts, skips[-1]), None
        skips = [self.to_decoders(counts, skip) for skip in skips]
        for level in self.dec.values():
            h, image = level(h, projections, take_last(skips, len(level.blocks)), image=image)
        return image.dense()

    def _embed(self, noise, counts, dtype, class_labels, augment_labels) -> StageBatch:
        if class_labels is not None:
            class_labels = class_labels * math.sqrt(self.label_dim)
        elif self.label_dim:
            class_labels = torch.zeros(sum(counts), self.label_dim, dtype=dtype, device=noise.device)
        emb = self.map_noise(noise, counts).to(dtype)
        emb = add(emb, label_batch("EDMUNet", "class_labels", class_labels, self.map_label, counts, dtype))
        emb = add(
            emb, label_batch("EDMUNet", "augment_labels", augment_labels, self.map_augment, counts, dtype)
        )
        return self.map_layers(emb)


def _check_type(name: str, value: str, allowed) -> None:
    if value not in allowed:
        raise ValueError(f"EDMUNet: {name} must be one of {', '.join(allowed)}, got {reprlib.repr(value)}")

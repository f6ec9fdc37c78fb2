"""The U-Net of EDM (DDPM++ variant; Karras et al., arXiv 2206.00364) with one decoder per stage (arXiv 2312.09181)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msd_kernels import StageBatch
from multistage_diffusion.layers import (
    StageAttention,
    StageConv2d,
    StageGroupNorm,
    StageLinear,
    xavier_uniform,
)
from multistage_diffusion.networks.mixed_batch import StageOrder

__all__ = ["EDMUNet"]

SKIP_SCALE = math.sqrt(0.5)
ZERO = xavier_uniform(1e-5)
ATTENTION = xavier_uniform(math.sqrt(0.2))
MAX_GROUPS, MIN_CHANNELS_PER_GROUP, EPS = 16, 4, 1e-6

Widths = tuple[int, ...]


def norm(channels: Widths) -> StageGroupNorm:
    """GroupNorm of this family: at most 16 groups, at least 4 channels in each."""
    return StageGroupNorm(channels, [max(min(MAX_GROUPS, c // MIN_CHANNELS_PER_GROUP), 1) for c in channels], eps=EPS)


class UNetBlock(nn.Module):
    """Residual block: ``√½ · (skip(x) + conv1(dropout(silu(norm1(conv0(silu(norm0(x))) + affine(emb))))))``.

    ``conv0`` and ``skip`` resample where the block changes the resolution; attention follows where asked for.
    """

    def __init__(
        self,
        in_channels: Widths,
        out_channels: Widths,
        emb_channels: Widths,
        *,
        resample: str | None = None,
        attention: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.norm0 = norm(in_channels)
        self.conv0 = StageConv2d(in_channels, out_channels, 3, resample=resample)
        self.affine = StageLinear(emb_channels, out_channels)
        self.norm1 = norm(out_channels)
        self.conv1 = StageConv2d(out_channels, out_channels, 3, initialise=ZERO)
        projects = in_channels != out_channels or resample is not None
        self.skip = StageConv2d(in_channels, out_channels, 1, resample=resample) if projects else None
        self.attention = _attention(out_channels) if attention else None

    def forward(self, x: StageBatch, emb: StageBatch) -> StageBatch:
        h = self.conv0(self.norm0(x, activation="silu"), sample_bias=self.affine(emb))
        h = self.norm1(h, activation="silu").map(lambda values: F.dropout(values, self.dropout, self.training))
        h = self.conv1(h, residual=x if self.skip is None else self.skip(x), scale=SKIP_SCALE)
        return h if self.attention is None else self.attention(h)


def _attention(channels: Widths) -> StageAttention:
    return StageAttention(
        norm(channels),
        StageConv2d(channels, [3 * c for c in channels], 1, initialise=ATTENTION),
        StageConv2d(channels, channels, 1, initialise=ZERO),
        num_heads=(1,) * len(channels),
        layout="interleaved",
        scale=SKIP_SCALE,
    )


class NoiseEmbedding(nn.Module):
    """Positional embedding of the noise input, plus the labels' embedding, through two layers."""

    def __init__(self, noise_channels: Widths, emb_channels: Widths, label_dim: int, augment_dim: int) -> None:
        super().__init__()
        self.noise_channels = noise_channels
        num_stages = len(noise_channels)
        self.map_label = StageLinear((label_dim,) * num_stages, noise_channels) if label_dim else None
        self.map_augment = (
            StageLinear((augment_dim,) * num_stages, noise_channels, bias=False) if augment_dim else None
        )
        self.map_layer0 = StageLinear(noise_channels, emb_channels)
        self.map_layer1 = StageLinear(emb_channels, emb_channels)

    def forward(
        self,
        noise: Tensor,
        counts: Sequence[int],
        class_labels: Tensor | None,
        augment_labels: Tensor | None,
        dtype: torch.dtype,
    ) -> StageBatch:
        parts = zip(noise.split(list(counts)), self.noise_channels, strict=True)
        emb = StageBatch.from_segments([positional_embedding(n, c)[:, :, None, None] for n, c in parts]).to(dtype)
        if class_labels is not None:
            class_labels = class_labels * math.sqrt(class_labels.shape[1])
        emb = _add_labels(emb, "class_labels", class_labels, self.map_label)
        emb = _add_labels(emb, "augment_labels", augment_labels, self.map_augment)
        return self.map_layer1(self.map_layer0(emb).map(F.silu)).map(F.silu)


def _add_labels(emb: StageBatch, name: str, labels: Tensor | None, layer: StageLinear | None) -> StageBatch:
    if labels is None:
        return emb
    if layer is None:
        raise ValueError(f"EDMUNet: the network was built without {name}, but some were given")
    if labels.dim() != 2 or labels.shape[1] != layer.in_features[0]:
        raise ValueError(f"EDMUNet: {name} must be [B, {layer.in_features[0]}], got {list(labels.shape)}")
    embedded = layer(StageBatch.from_dense(labels.to(emb.dtype), emb.counts))
    return emb.with_values(emb.values + embedded.values)


def positional_embedding(noise: Tensor, channels: int, max_positions: int = 10_000) -> Tensor:
    """``[B] -> [B, channels]``: sines, then cosines, of frequencies from 1 down to 1 / max_positions, both included."""
    half = channels // 2
    dtype = torch.float64 if noise.dtype == torch.float64 else torch.float32
    exponents = torch.arange(half, dtype=dtype, device=noise.device) / max(half - 1, 1)
    angles = noise.to(dtype)[:, None] * (1 / max_positions) ** exponents
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class EDMUNet(nn.Module):
    """U-Net with a shared encoder and one decoder per stage; a batch may mix samples of all stages.

    ``decoder_widths`` with one entry is the unified network; as many ``encoder_widths`` as ``decoder_widths`` are
    separate networks, one per stage.

    Args:
        image_size: height and width of the images, divisible by 2 to the number of levels less one.
        in_channels, out_channels: channels of the images.
        encoder_widths: base width of the encoder: one for a shared encoder, or one per stage.
        decoder_widths: base width of each stage's decoder.
        channel_mult: per level, finest first, the multiple of the base width.
        num_blocks: residual blocks per level.
        attn_resolutions: resolutions with attention.
        dropout: dropout probability inside the residual blocks.
        channel_mult_emb: the embedding has this multiple of the encoder's base width.
        label_dim, augment_dim: sizes of the class and augmentation labels; 0: none.
        label_dropout: probability that a sample's class label is dropped in training.

    Raises:
        ValueError: sizes that do not fit together; the message says which and what is allowed.
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
        attn_resolutions: Sequence[int] = (16,),
        dropout: float = 0.13,
        channel_mult_emb: int = 4,
        label_dim: int = 0,
        augment_dim: int = 0,
        label_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        encoder_widths, decoder_widths = tuple(encoder_widths), tuple(decoder_widths)
        channel_mult, attn_resolutions = tuple(channel_mult), tuple(attn_resolutions)
        _check_sizes(image_size, encoder_widths, decoder_widths, channel_mult, num_blocks)
        self.config = {
            "family": self.family,
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
        }
        self.image_size, self.in_channels, self.out_channels = image_size, in_channels, out_channels
        self.num_stages, self.shared_encoder = len(decoder_widths), len(encoder_widths) == 1
        self.label_dim, self.label_dropout = label_dim, label_dropout
        emb = tuple(w * channel_mult_emb for w in encoder_widths)
        self.embedding = NoiseEmbedding(encoder_widths, emb, label_dim, augment_dim)
        block = {"dropout": dropout}
        self.enc = nn.ModuleDict()
        skips = self._build_encoder(encoder_widths, emb, channel_mult, num_blocks, attn_resolutions, block)
        self.dec = nn.ModuleDict()
        self._build_decoder(decoder_widths, emb, channel_mult, num_blocks, attn_resolutions, block, skips)

    def _build_encoder(self, widths, emb, channel_mult, num_blocks, attn_resolutions, block) -> list[Widths]:
        """Adds the encoder's layers and returns the channels of the skips that they leave."""
        channels = (self.in_channels,) * len(widths)
        skips = []
        for level, mult in enumerate(channel_mult):
            size = self.image_size >> level
            if level == 0:
                self.enc[f"{size}x{size}_conv"] = StageConv2d(channels, widths, 3)
                channels = widths
            else:
                self.enc[f"{size}x{size}_down"] = UNetBlock(channels, channels, emb, resample="down", **block)
            skips.append(channels)
            for index in range(num_blocks):
                out = tuple(w * mult for w in widths)
                attention = size in attn_resolutions
                self.enc[f"{size}x{size}_block{index}"] = UNetBlock(channels, out, emb, attention=attention, **block)
                channels = out
                skips.append(channels)
        return skips

    def _build_decoder(self, widths, emb, channel_mult, num_blocks, attn_resolutions, block, skips) -> None:
        skips = [self._per_decoder(channels) for channels in skips]
        emb = self._per_decoder(emb)
        channels = skips[-1]
        for level, mult in reversed(list(enumerate(channel_mult))):
            size = self.image_size >> level
            if level == len(channel_mult) - 1:
                self.dec[f"{size}x{size}_in0"] = UNetBlock(channels, channels, emb, attention=True, **block)
                self.dec[f"{size}x{size}_in1"] = UNetBlock(channels, channels, emb, **block)
            else:
                self.dec[f"{size}x{size}_up"] = UNetBlock(channels, channels, emb, resample="up", **block)
            for index in range(num_blocks + 1):
                joined = tuple(c + s for c, s in zip(channels, skips.pop(), strict=True))
                channels = tuple(w * mult for w in widths)
                attention = index == num_blocks and size in attn_resolutions
                self.dec[f"{size}x{size}_block{index}"] = UNetBlock(joined, channels, emb, attention=attention, **block)
        size = self.image_size
        self.dec[f"{size}x{size}_aux_norm"] = norm(channels)
        self.dec[f"{size}x{size}_aux_conv"] = StageConv2d(
            channels, (self.out_channels,) * self.num_stages, 3, initialise=ZERO
        )

    def _per_decoder(self, channels: Widths) -> Widths:
        return channels * self.num_stages if self.shared_encoder else channels

    def forward(
        self,
        x: Tensor,
        noise: Tensor,
        stage: Sequence[int] | Tensor,
        *,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        """Runs a mixed batch.

        Args:
            x: ``[B, in_channels, image_size, image_size]``.
            noise: ``[B]``, c_noise = ln(σ) / 4.
            stage: one stage id per sample, on the host, in any order.
            class_labels: ``[B, label_dim]``, one-hot or soft; None: no class.
            augment_labels: ``[B, augment_dim]``; None: no augmentation.

        Returns:
            ``[B, out_channels, image_size, image_size]`` in the caller's order and in the dtype of ``x``.

        Runs in the dtype of autocast where it is on, in that of the parameters elsewhere.

        Raises:
            ValueError, TypeError: shapes or stage ids that do not fit.
        """
        self._check_input(x, noise)
        order = StageOrder.of(stage, self.num_stages, x.shape[0])
        device_type, dtype = x.device.type, self._compute_dtype(x)
        labels = self._drop_labels(class_labels)
        with torch.autocast(device_type, enabled=False):
            inputs = [order.sort(t) for t in (x.to(dtype), noise, labels, augment_labels)]
            y = self._run(*inputs, order.counts, dtype)
        return order.restore(y).to(x.dtype)

    def _run(self, x, noise, class_labels, augment_labels, counts, dtype) -> Tensor:
        encoder_counts = (x.shape[0],) if self.shared_encoder else counts
        emb = self.embedding(noise, encoder_counts, class_labels, augment_labels, dtype)
        h, skips = StageBatch.from_dense(x, encoder_counts), []
        for layer in self.enc.values():
            h = layer(h, emb) if isinstance(layer, UNetBlock) else layer(h)
            skips.append(h)
        if self.shared_encoder:
            h, emb, skips = h.restage(counts), emb.restage(counts), [s.restage(counts) for s in skips]
        for name, layer in self.dec.items():
            if "_block" in name:
                h = StageBatch.concatenate(h, skips.pop())
            if isinstance(layer, UNetBlock):
                h = layer(h, emb)
            else:
                h = layer(h, activation="silu") if isinstance(layer, StageGroupNorm) else layer(h)
        return h.dense()

    def _compute_dtype(self, x: Tensor) -> torch.dtype:
        if torch.is_autocast_enabled(x.device.type):
            return torch.get_autocast_dtype(x.device.type)
        return self.embedding.map_layer0.weight.dtype

    def _drop_labels(self, class_labels: Tensor | None) -> Tensor | None:
        """Drops each sample's class with probability ``label_dropout`` in training."""
        if class_labels is None or not self.training or self.label_dropout == 0:
            return class_labels
        keep = torch.rand(class_labels.shape[0], 1, device=class_labels.device) >= self.label_dropout
        return class_labels * keep.to(class_labels.dtype)

    def _check_input(self, x: Tensor, noise: Tensor) -> None:
        expected = (self.in_channels, self.image_size, self.image_size)
        if x.dim() != 4 or tuple(x.shape[1:]) != expected:
            raise ValueError(f"EDMUNet: x must be [B, {', '.join(map(str, expected))}], got {list(x.shape)}")
        if tuple(noise.shape) != (x.shape[0],):
            raise ValueError(f"EDMUNet: noise must be [{x.shape[0]}], one value per sample, got {list(noise.shape)}")


def _check_sizes(image_size, encoder_widths, decoder_widths, channel_mult, num_blocks) -> None:
    if len(encoder_widths) not in (1, len(decoder_widths)) or not decoder_widths:
        raise ValueError(
            f"EDMUNet: encoder_widths must hold one width (shared) or one per decoder, "
            f"got {encoder_widths} for decoder_widths={decoder_widths}"
        )
    if min(encoder_widths + decoder_widths) < 1 or not channel_mult or min(channel_mult) < 1 or num_blocks < 1:
        raise ValueError(
            f"EDMUNet: widths, channel_mult and num_blocks must be >= 1, got encoder_widths={encoder_widths}, "
            f"decoder_widths={decoder_widths}, channel_mult={channel_mult}, num_blocks={num_blocks}"
        )
    factor = 2 ** (len(channel_mult) - 1)
    if image_size < factor or image_size % factor:
        raise ValueError(
            f"EDMUNet: image_size must be a multiple of {factor} for {len(channel_mult)} levels, got {image_size}"
        )

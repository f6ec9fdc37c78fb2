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
from multistage_diffusion.networks.blocks import SKIP_SCALE, ZERO, BlockStyle, ResidualInput, SkipInput
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
from multistage_diffusion.networks.unet import UNet

__all__ = ["EDMUNet"]

ATTENTION = xavier_uniform(math.sqrt(0.2))
MIN_CHANNELS_PER_GROUP, EPS = 4, 1e-6

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


class EDMUNet(UNet):
    """U-Net with a shared encoder and one decoder per stage; a batch may mix samples of all stages.

    ``decoder_widths`` with one entry is the unified network; as many ``encoder_widths`` as ``decoder_widths`` are
    separate networks, one per stage. The defaults are the DDPM++ network for CIFAR-10; NCSN++ has
    ``embedding_type="fourier", encoder_type="residual", channel_mult_noise=2, resample_filter=(1, 3, 3, 1)``.

    ``noise`` is c_noise = ln(σ) / 4. Without class labels all of them are zero.

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
    attending = (16,)
    middle_in_decoders = True

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
        super().__init__(locals())
        _check_type("embedding_type", embedding_type, EMBEDDING_TYPES)
        _check_type("encoder_type", encoder_type, ENCODER_TYPES)
        _check_type("decoder_type", decoder_type, DECODER_TYPES)
        self.label_dropout = label_dropout
        emb = tuple(w * channel_mult_emb for w in self.encoder_widths)
        noise = tuple(w * channel_mult_noise for w in self.encoder_widths)
        self.map_noise = EMBEDDING_TYPES[embedding_type](noise)
        self.map_label = StageLinear((label_dim,) * len(noise), noise) if label_dim else None
        self.map_augment = (
            StageLinear((augment_dim,) * len(noise), noise, bias=False) if augment_dim else None
        )
        self.map_layers = EmbeddingMLP(noise, emb)
        style = partial(
            BlockStyle,
            norm=partial(norm, max_groups=max_groups),
            attention=partial(attention, max_groups=max_groups),
            dropout=dropout,
            scale=SKIP_SCALE,
            filter=tuple(resample_filter),
        )
        self.add_levels(emb, style)

    def image_input(
        self, pyramid: Widths, channels: Widths, style: BlockStyle
    ) -> tuple[nn.Module | None, Widths]:
        kind = ENCODER_TYPES[self.config["encoder_type"]]
        if kind is None:
            return None, pyramid
        return kind(pyramid, channels, style.filter), channels if kind is ResidualInput else pyramid

    def makes_image(self, level: int) -> bool:
        return level == 0 or self.config["decoder_type"] == "skip"

    def prepared(self, conditioning: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
        """In training, drops some samples' class labels."""
        if not self.training:
            return conditioning
        return conditioning | {"class_labels": drop_labels(conditioning["class_labels"], self.label_dropout)}

    def embedding(
        self, noise: Tensor, counts: Widths, dtype: torch.dtype, conditioning: dict[str, Tensor | None]
    ) -> StageBatch:
        class_labels, augment_labels = conditioning["class_labels"], conditioning["augment_labels"]
        if class_labels is not None:
            class_labels = class_labels * math.sqrt(self.label_dim)
        elif self.label_dim:
            class_labels = torch.zeros(sum(counts), self.label_dim, dtype=dtype, device=noise.device)
        emb = self.map_noise(noise, counts).to(dtype)
        emb = add(emb, label_batch(class_labels, self.map_label, counts, dtype))
        emb = add(emb, label_batch(augment_labels, self.map_augment, counts, dtype))
        return self.map_layers(emb)


def _check_type(name: str, value: str, allowed) -> None:
    if value not in allowed:
        raise ValueError(f"EDMUNet: {name} must be one of {', '.join(allowed)}, got {reprlib.repr(value)}")

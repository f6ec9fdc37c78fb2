"""U-ViT (Bao et al., arXiv 2209.12152), a vision transformer with long skips, with the second half of its blocks
once per stage (arXiv 2312.09181)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from msd_kernels import StageBatch
from multistage_diffusion.networks.embeddings import PositionalEmbedding, label_batch
from multistage_diffusion.networks.layers import (
    StageConv2d,
    StageLayerNorm,
    StageLinear,
    StageStridedConv2d,
    StageTable,
    Widths,
    normal,
)
from multistage_diffusion.networks.stage_network import Features, StageNetwork
from multistage_diffusion.networks.transformer import FeedForward, TransformerBlock, self_attention

__all__ = ["UViT"]

INITIALISE = normal(0.02)


class LongSkipBlock(nn.Module):
    """``block(linear([x, skip]))``: a decoder's transformer block; the linear map changes the width."""

    def __init__(
        self, in_channels: Widths, skip_channels: Widths, channels: Widths, block: TransformerBlock
    ) -> None:
        super().__init__()
        joined = tuple(c + s for c, s in zip(in_channels, skip_channels, strict=True))
        self.linear = StageConv2d(joined, channels, 1, initialise=INITIALISE)
        self.block = block

    def forward(self, x: StageBatch, skip: StageBatch) -> StageBatch:
        return self.block(self.linear(x, skip=skip))


class UViT(StageNetwork):
    """U-ViT with shared in-blocks and middle, and one set of out-blocks per stage; a batch may mix all stages.

    Tokens are the class (where there is one), the time, and the image's patches. ``decoder_widths`` with one entry
    is the unified network; as many ``encoder_widths`` as ``decoder_widths`` are separate networks. The defaults are
    the network for CIFAR-10.

    ``noise`` is 999 t with the SDE's time t in [0, 1].

    Args:
        image_size: height and width of the images, a multiple of ``patch_size``.
        in_channels: channels of the images.
        encoder_widths: width of the in-blocks: one if they are shared, or one per stage; even.
        decoder_widths: width of each stage's out-blocks.
        depth: blocks in all, an odd number: depth // 2 in-blocks, one in the middle, depth // 2 out-blocks. An even
            depth has one block more, as in the reference.
        num_heads: heads of every attention; divides the widths.
        patch_size: height and width of a patch.
        mlp_ratio: width of the feed-forward layers in multiples of the block's.
        qkv_bias: whether q, k and v have a bias.
        final_conv: a 3×3 convolution ends the network, one for all stages that share the encoder.
        label_dim: number of classes; 0: none.

    Raises:
        ValueError: sizes that do not fit together; the message says what is allowed.
    """

    family = "uvit"
    needed = ("class_labels",)

    def __init__(
        self,
        image_size: int,
        *,
        in_channels: int = 3,
        encoder_widths: Sequence[int] = (512,),
        decoder_widths: Sequence[int] = (768, 512, 128),
        depth: int = 13,
        num_heads: int = 8,
        patch_size: int = 2,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        final_conv: bool = True,
        label_dim: int = 0,
    ) -> None:
        super().__init__(locals())
        encoder_widths, decoder_widths = self.encoder_widths, self.decoder_widths
        _check_sizes(image_size, patch_size, depth, num_heads, encoder_widths + decoder_widths)
        self.patch_size = patch_size
        self.grid = image_size // patch_size
        self.extras = 2 if label_dim else 1
        block = {"num_heads": num_heads, "mlp_ratio": mlp_ratio, "qkv_bias": qkv_bias}

        image = (in_channels,) * len(encoder_widths)
        self.embed_patches = StageStridedConv2d(image, encoder_widths, patch_size, stride=patch_size)
        self.embed_time = PositionalEmbedding(encoder_widths, endpoint=False, cosine_first=True)
        labels = (label_dim,) * len(encoder_widths)
        self.embed_label = (
            StageLinear(labels, encoder_widths, bias=False, initialise=INITIALISE) if label_dim else None
        )
        self.positions = StageTable(self.extras + self.grid**2, encoder_widths, initialise=INITIALISE)
        self.in_blocks = nn.ModuleList(transformer_block(encoder_widths, **block) for _ in range(depth // 2))
        self.middle = transformer_block(encoder_widths, **block)

        skip = channels = self.per_decoder(encoder_widths)
        self.out_blocks = nn.ModuleList()
        for _ in range(depth // 2):
            self.out_blocks.append(
                LongSkipBlock(channels, skip, decoder_widths, transformer_block(decoder_widths, **block))
            )
            channels = decoder_widths
        patch = (patch_size**2 * in_channels,) * self.num_stages
        self.norm = StageLayerNorm(channels)
        self.predict = StageLinear(channels, patch, initialise=INITIALISE)
        self.final_conv = StageConv2d(image, image, 3) if final_conv else None

    def run_encoder(self, x: Tensor, noise: Tensor, conditioning: dict[str, Tensor | None], counts: Widths):
        h = self._tokens(x, noise, self.encoder_counts(counts), conditioning["class_labels"])
        skips = []
        for block in self.in_blocks:
            h = block(h)
            skips.append(h)
        return self.middle(h), skips, None, None

    def run_decoder(self, features: Features) -> Tensor:
        counts = features.order.counts
        h = self.to_decoders(counts, features.state)
        skips = [self.to_decoders(counts, skip) for skip in features.skips]
        for block in self.out_blocks:
            h = block(h, skips.pop())
        patches = StageBatch.from_segments([segment[:, :, self.extras :] for segment in h.segments()])
        image = self._unpatchify(self.predict(self.norm(patches)))
        if self.final_conv is None:
            return image
        return self.final_conv(StageBatch.from_dense(image, self.encoder_counts(counts))).dense()

    def _tokens(self, x: Tensor, noise: Tensor, counts: Widths, class_labels: Tensor | None) -> StageBatch:
        """The class, the time and the patches, as the pixels of a feature map of width 1."""
        first = [self.embed_time(noise, counts).to(x.dtype)]
        if self.embed_label is not None:
            first.insert(0, label_batch(class_labels, self.embed_label, counts, x.dtype))
        patches = self.embed_patches(StageBatch.from_dense(x, counts))
        parts = [batch.segments() for batch in (*first, patches)]
        tokens = [torch.cat([part.flatten(2) for part in stage], dim=2) for stage in zip(*parts, strict=True)]
        return self.positions(StageBatch.from_segments([t[:, :, :, None] for t in tokens]))

    def _unpatchify(self, patches: StageBatch) -> Tensor:
        """Patches, their channels ordered [row, column, image channel], as a dense channels_last image."""
        p, grid = self.patch_size, self.grid
        rows = patches.values.view(-1, grid, grid, p, p, self.in_channels).transpose(2, 3)
        return rows.reshape(-1, grid * p, grid * p, self.in_channels).permute(0, 3, 1, 2)


def transformer_block(channels: Widths, num_heads: int, mlp_ratio: float, qkv_bias: bool) -> TransformerBlock:
    """``x + attention(layer_norm(x))``, then ``x + mlp(layer_norm(x))``."""
    heads = (num_heads,) * len(channels)
    return TransformerBlock(
        self_attention(channels, heads, qkv_bias=qkv_bias, initialise=INITIALISE),
        None,
        FeedForward(channels, mlp_ratio, initialise=INITIALISE),
    )


def _check_sizes(image_size: int, patch_size: int, depth: int, num_heads: int, widths: Widths) -> None:
    if patch_size < 1 or image_size % patch_size:
        raise ValueError(f"UViT: patch_size must divide image_size={image_size}, got {patch_size}")
    if depth < 1:
        raise ValueError(f"UViT: depth must be >= 1, got {depth}")
    wrong = [w for w in widths if num_heads < 1 or w % num_heads]
    if wrong:
        raise ValueError(f"UViT: num_heads={num_heads} must divide every width, got width {wrong[0]}")

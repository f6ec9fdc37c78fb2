"""The U-Net of latent diffusion (Rombach et al., arXiv 2112.10752; blocks of Dhariwal & Nichol, arXiv 2105.05233)
with one decoder per stage (arXiv 2312.09181)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from msd_kernels import StageBatch
from multistage_diffusion.networks.blocks import (
    BlockStyle,
    DecoderLevel,
    EncoderLevel,
    OutputHead,
    Projections,
    Resample,
    ResidualBlock,
    decoder_blocks,
    encoder_blocks,
    take_last,
)
from multistage_diffusion.networks.embeddings import EmbeddingMLP, PositionalEmbedding, label_batch
from multistage_diffusion.networks.layers import (
    StageAttention,
    StageConv2d,
    StageGroupNorm,
    StageLinear,
    StageStridedConv2d,
    Widths,
    fan_in_uniform,
    on_stages,
    xavier_uniform,
)
from multistage_diffusion.networks.stage_network import StageNetwork, check_levels, present
from multistage_diffusion.networks.stage_order import StageOrder
from multistage_diffusion.networks.transformer import SpatialTransformer

__all__ = ["LDMUNet"]

GROUPS, EPS, TRANSFORMER_EPS = 32, 1e-5, 1e-6
EMB_MULT = 4
ATTENDING = (8, 16, 32)
ZERO = xavier_uniform(1e-5)


def norm(channels: Widths, eps: float = EPS) -> StageGroupNorm:
    """GroupNorm of this family: 32 groups."""
    return StageGroupNorm(channels, (GROUPS,) * len(channels), eps=eps)


class LDMUNet(StageNetwork):
    """U-Net of latent diffusion with shared encoder and middle and one decoder per stage; a batch may mix all stages.

    ``decoder_widths`` with one entry is the unified network; as many ``encoder_widths`` as ``decoder_widths`` are
    separate networks. The defaults are the network for CelebA-HQ 256. With ``context_dim`` every attention is a
    spatial transformer that looks at the context, too.

    Args:
        image_size: height and width of the latents, divisible by 2 to the number of levels less one.
        in_channels, out_channels: channels of the latents.
        encoder_widths: base width of the encoder: one for a shared encoder, or one per stage. Multiples of 32.
        decoder_widths: base width of each stage's decoder. Multiples of 32.
        channel_mult: per level, finest first, the multiple of the base width.
        num_blocks: residual blocks per level.
        attn_resolutions: resolutions (of the latents) with attention after every block, all among those of the levels:
            ``image_size``, its half and so on. Default: those of 8, 16 and 32 that there are.
            The middle has one attention more.
        head_channels: channels per attention head: there are as many heads as fit into a width, and they share it.
        num_heads: heads of every attention, instead of ``head_channels``.
        dropout: dropout probability inside the residual blocks.
        context_dim: channels of the context's tokens; 0: no context.
        transformer_depth: transformer blocks in each spatial transformer.
        label_dim: number of classes; 0: none. With ``context_dim`` the class is the context's one token, else it is
            added to the embedding of the noise.
        adaptive_scale: the embedding scales and shifts the second normalisation of a block.
        reduced_attention: leave attention out of the later decoders exactly as the reference implementation does, whose
            constructor goes on counting the resolution from one decoder to the next. For its checkpoints only.

    Raises:
        ValueError: sizes that do not fit together; the message says what is allowed.
    """

    family = "ldm"

    def __init__(
        self,
        image_size: int,
        *,
        in_channels: int = 3,
        out_channels: int = 3,
        encoder_widths: Sequence[int] = (224,),
        decoder_widths: Sequence[int] = (256, 192, 128),
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        num_blocks: int = 2,
        attn_resolutions: Sequence[int] | None = None,
        head_channels: int = 32,
        num_heads: int | None = None,
        dropout: float = 0.0,
        context_dim: int = 0,
        transformer_depth: int = 1,
        label_dim: int = 0,
        adaptive_scale: bool = False,
        reduced_attention: bool = False,
    ) -> None:
        encoder_widths, decoder_widths = tuple(encoder_widths), tuple(decoder_widths)
        channel_mult = tuple(channel_mult)
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
                "head_channels": head_channels,
                "num_heads": num_heads,
                "dropout": dropout,
                "context_dim": context_dim,
                "transformer_depth": transformer_depth,
                "label_dim": label_dim,
                "adaptive_scale": adaptive_scale,
                "reduced_attention": reduced_attention,
            },
            image_size=image_size,
            in_channels=in_channels,
            out_channels=out_channels,
            encoder_widths=encoder_widths,
            decoder_widths=decoder_widths,
        )
        check_levels("LDMUNet", image_size, channel_mult, num_blocks, attn_resolutions)
        self.label_dim, self.context_dim = label_dim, context_dim
        emb = tuple(EMB_MULT * w for w in encoder_widths)
        stages = len(encoder_widths)
        self.embed_noise = PositionalEmbedding(encoder_widths, endpoint=False, cosine_first=True)
        self.embed = EmbeddingMLP(encoder_widths, emb, initialise=fan_in_uniform)
        labels = ((context_dim,) * stages if context_dim else emb) if label_dim else None
        self.embed_label = (
            StageLinear((label_dim,) * stages, labels, bias=False, initialise=fan_in_uniform)
            if labels
            else None
        )
        style = {
            "norm": norm,
            "attention": self._attention,
            "dropout": dropout,
            "adaptive_scale": adaptive_scale,
            "initialise": fan_in_uniform,
            "initialise_last": ZERO,
        }
        self.enc = nn.ModuleDict()
        skips = self._add_encoder(encoder_widths, BlockStyle(emb, **style))
        self.dec = nn.ModuleDict()
        self._add_decoder(decoder_widths, BlockStyle(self.per_decoder(emb), **style), skips)

    def _attention(self, channels: Widths) -> StageAttention | SpatialTransformer:
        heads = tuple(self._heads(c) for c in channels)
        if self.context_dim:
            return SpatialTransformer(
                norm(channels, TRANSFORMER_EPS),
                (self.context_dim,) * len(channels),
                heads,
                depth=self.config["transformer_depth"],
                initialise=fan_in_uniform,
                initialise_last=ZERO,
            )
        return StageAttention(
            norm(channels),
            StageConv2d(channels, [3 * c for c in channels], 1, initialise=fan_in_uniform),
            StageConv2d(channels, channels, 1, initialise=ZERO),
            heads,
            layout="per_head",
        )

    def _heads(self, channels: int) -> int:
        heads = self.config["num_heads"]
        if heads is None:
            heads = channels // self.config["head_channels"]
        if heads < 1 or channels % heads:
            raise ValueError(
                f"LDMUNet: {channels} channels are no multiple of head_channels={self.config['head_channels']} "
                f"or num_heads={self.config['num_heads']}"
            )
        return heads

    def _add_encoder(self, widths: Widths, style: BlockStyle) -> list[Widths]:
        """Adds the encoder and the middle, and returns the channels of the skips that they leave."""
        config = self.config
        self.conv = StageConv2d((self.in_channels,) * len(widths), widths, 3, initialise=fan_in_uniform)
        channels, skips = widths, [widths]
        for level, mult in enumerate(config["channel_mult"]):
            size = self.image_size >> level
            down = None
            if level > 0:
                down = Resample(
                    StageStridedConv2d(channels, channels, 3, padding=1, initialise=fan_in_uniform)
                )
                skips.append(channels)
            out = tuple(w * mult for w in widths)
            attends = size in config["attn_resolutions"]
            blocks = encoder_blocks(channels, out, style, config["num_blocks"], skips, attention=attends)
            channels = out
            self.enc[f"{size}x{size}"] = EncoderLevel(down, blocks)
        self.middle = nn.ModuleList(
            [
                ResidualBlock(channels, channels, style, attention=True),
                ResidualBlock(channels, channels, style),
            ]
        )
        return skips

    def _add_decoder(self, widths: Widths, style: BlockStyle, skips: list[Widths]) -> None:
        config = self.config
        skips = [self.per_decoder(channels) for channels in skips]
        channels, coarsest = skips[-1], len(config["channel_mult"]) - 1
        attending = self._attending_stages()
        for level in range(coarsest, -1, -1):
            size, mult = self.image_size >> level, config["channel_mult"][level]
            up = partial(StageConv2d, resample="up", initialise=fan_in_uniform)
            entry = [] if level == coarsest else [Resample(up(channels, channels, 3))]
            out = tuple(w * mult for w in widths)
            attention = [
                on_stages(self._attention, attending[level], out) for _ in range(config["num_blocks"] + 1)
            ]
            blocks = decoder_blocks(channels, out, style, skips, attention)
            channels = out
            image = (self.out_channels,) * self.num_stages
            head = OutputHead(norm(channels), image, initialise=ZERO) if level == 0 else None
            self.dec[f"{size}x{size}"] = DecoderLevel(entry, blocks, head)

    def _attending_stages(self) -> list[Widths]:
        """Per level, the stages whose decoders have attention."""
        config = self.config
        levels = range(len(config["channel_mult"]))
        if not config["reduced_attention"]:
            everyone = tuple(range(self.num_stages))
            return [
                everyone if self.image_size >> level in config["attn_resolutions"] else () for level in levels
            ]
        attending: list[list[int]] = [[] for _ in levels]
        downsampling = 2 ** (len(levels) - 1)
        for stage in range(self.num_stages):
            for level in reversed(levels):
                if downsampling and self.image_size // downsampling in config["attn_resolutions"]:
                    attending[level].append(stage)
                if level:
                    downsampling //= 2  # never reset: this is the reference's structure
        return [tuple(stages) for stages in attending]

    def forward(
        self,
        x: Tensor,
        noise: Tensor,
        stage: Sequence[int] | Tensor | StageOrder,
        *,
        context: Tensor | None = None,
        class_labels: Tensor | None = None,
    ) -> Tensor:
        """Runs a mixed batch.

        Args:
            x: ``[B, in_channels, image_size, image_size]``, noisy latents, in any floating dtype.
            noise: ``[B]``, the integer steps 0 to 999.
            stage: one stage id per sample, on the host, in any order; or a :class:`StageOrder`.
            context: ``[B, tokens, context_dim]``; needed if there is a context and no classes.
            class_labels: ``[B, label_dim]``, one-hot; needed if there are classes.

        Returns:
            ``[B, out_channels, image_size, image_size]`` in the caller's order and in the dtype of ``x``.

        Runs in the dtype of autocast where it is on, in that of the parameters elsewhere.

        Raises:
            ValueError: shapes, devices or stage ids that do not fit.
            TypeError: what is no tensor or of a wrong dtype; stage ids that are no integers.
        """
        return self.mixed(x, noise, stage, context=context, class_labels=class_labels)

    def prepared(
        self, batch: int, *, context: Tensor | None, class_labels: Tensor | None
    ) -> dict[str, Tensor | None]:
        if self.label_dim and class_labels is None:
            raise ValueError(f"LDMUNet: class_labels [{batch}, {self.label_dim}] are needed, got none")
        takes_context = self.context_dim and not self.label_dim
        if not takes_context and context is not None:
            raise ValueError("LDMUNet: the network was built without context, but some was given")
        if takes_context:
            given = None if context is None else list(context.shape)
            fits = given is not None and len(given) == 3 and given[2] == self.context_dim
            if not fits or given[1] < 1:
                raise ValueError(
                    f"LDMUNet: context must be [{batch}, tokens, {self.context_dim}], "
                    f"got {'none' if given is None else given}"
                )
        return {"context": context, "class_labels": class_labels}

    def run(
        self,
        x: Tensor,
        noise: Tensor,
        counts: Widths,
        dtype: torch.dtype,
        *,
        context: Tensor | None,
        class_labels: Tensor | None,
    ) -> Tensor:
        encoder_counts = self.encoder_counts(counts)
        labels = label_batch("LDMUNet", "class_labels", class_labels, self.embed_label, encoder_counts, dtype)
        extra, tokens = (None, labels) if self.context_dim else (labels, None)
        if context is not None:
            tokens = StageBatch.from_dense(context.to(dtype).transpose(1, 2)[..., None], encoder_counts)
        emb = self.embed(self.embed_noise(noise, encoder_counts).to(dtype), extra)
        skips = [self.conv(StageBatch.from_dense(x, encoder_counts))]
        projections = Projections(emb).inside(self.enc, self.middle)
        for level in self.enc.values():
            features, _ = level(skips[-1], projections, context=tokens)
            skips += features
        h = skips[-1]
        for block in self.middle:
            h = block(h, projections, context=tokens)
        h, emb, tokens = (self.to_decoders(counts, batch) for batch in (h, emb, tokens))
        projections = Projections(emb).inside(self.dec)
        skips = [self.to_decoders(counts, skip) for skip in skips]
        image = None
        for level in self.dec.values():
            h, image = level(h, projections, take_last(skips, len(level.blocks)), image=image, context=tokens)
        return image.dense()

"""The entrance and the exit of a network: from the caller's order to stage order and back."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from msd_kernels import StageBatch
from msd_kernels.dispatch.stage_weights import several_processes
from multistage_diffusion.networks.layers import Widths
from multistage_diffusion.networks.stage_order import StageOrder


class StageNetwork(nn.Module):
    """A network with an encoder, shared or one per stage, and one decoder per stage.

    A family calls :meth:`mixed` from its ``forward`` and gives ``run``, which sees the samples in stage order.

    Args:
        config: the constructor's arguments; ``networks.build`` inverts it.
        image_size, in_channels, out_channels: of the images.
        encoder_widths: base width of the encoder: one for a shared encoder, or one per stage.
        decoder_widths: base width of each stage's decoder.

    Attributes:
        family: the name of the family.
        num_stages: stages, the number of decoders.
        shared_encoder: whether one encoder serves all stages.
        takes_stage_order: a :class:`StageOrder` may be given in place of the stages.

    Raises:
        ValueError: widths or sizes that do not fit together.
    """

    family: str
    takes_stage_order = True
    absent_stages_are_left_alone = False  # set by what sees to that in several processes

    def __init__(
        self,
        config: dict[str, object],
        *,
        image_size: int,
        in_channels: int,
        out_channels: int,
        encoder_widths: Widths,
        decoder_widths: Widths,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if not decoder_widths or len(encoder_widths) not in (1, len(decoder_widths)):
            raise ValueError(
                f"{name}: encoder_widths must hold one width (shared) or one per decoder, "
                f"got {encoder_widths} for decoder_widths={decoder_widths}"
            )
        sizes = {"image_size": image_size, "in_channels": in_channels, "out_channels": out_channels}
        sizes |= {"encoder_widths": min(encoder_widths), "decoder_widths": min(decoder_widths)}
        for key, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name}: {key} must be >= 1, got {config[key]}")
        self.config = {"family": self.family, **config}
        self.image_size, self.in_channels, self.out_channels = image_size, in_channels, out_channels
        self.num_stages, self.shared_encoder = len(decoder_widths), len(encoder_widths) == 1

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
            kept = list(present(known["attn_resolutions"], known["image_size"], known["channel_mult"]))
        except TypeError:  # something else is wrong, which the constructor says
            return dict(arguments)
        return {**arguments, "attn_resolutions": kept}

    def prepared(self, batch: int, **conditioning: Tensor | None) -> dict[str, Tensor | None]:
        """The conditioning as :meth:`run` gets it, still in the caller's order; ``batch`` is the number of samples.

        Raises:
            ValueError: what the family needs and did not get, or cannot take.
        """
        return conditioning

    def run(self, x: Tensor, noise: Tensor, counts: Widths, dtype: torch.dtype, **conditioning) -> Tensor:
        """The network on samples in stage order, ``x`` in ``dtype``; returns the dense output."""
        raise NotImplementedError

    def mixed(self, x: Tensor, noise: Tensor, stage, **conditioning: Tensor | None) -> Tensor:
        """Checks and sorts a batch, runs it, and restores the caller's order and dtype."""
        self._check(x, noise, conditioning)
        conditioning = self.prepared(x.shape[0], **conditioning)
        order = StageOrder.of(stage, self.num_stages, x.shape[0], x.device)
        if not self.absent_stages_are_left_alone and torch.is_grad_enabled() and several_processes():
            self._warn_of_absent_stages()
        dtype = self._compute_dtype(x)
        with nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False):
            conditioning = {key: order.sort(value) for key, value in conditioning.items()}
            y = self.run(order.sort(x).to(dtype), order.sort(noise), order.counts, dtype, **conditioning)
        return order.restore(y).to(x.dtype)

    def _warn_of_absent_stages(self) -> None:
        if self.training and self.num_stages > 1:
            self.absent_stages_are_left_alone = True  # warned once
            warnings.warn(
                f"{type(self).__name__}: several processes train it, where a stage without samples has gradients of "
                "zero, by which an optimizer goes on moving its decoder; StageParameters(network, optimizer) sees to "
                "that",
                stacklevel=4,
            )

    def encoder_counts(self, counts: Widths) -> Widths:
        """Samples per stage as the encoder sees them: one stage if it is shared."""
        return (sum(counts),) if self.shared_encoder else counts

    def to_decoders(self, counts: Widths, batch: StageBatch | None) -> StageBatch | None:
        """A batch that left the encoder, cut into the decoders' stages, without a copy."""
        return batch.restage(counts) if self.shared_encoder and batch is not None else batch

    def per_decoder(self, channels: Widths) -> Widths:
        """Channels that left the encoder, one per decoder."""
        return channels * self.num_stages if self.shared_encoder else channels

    def _check(self, x: Tensor, noise: Tensor, conditioning: dict[str, Tensor | None]) -> None:
        name, expected = type(self).__name__, (self.in_channels, self.image_size, self.image_size)
        labels = {key: value for key, value in conditioning.items() if value is not None}
        for key, value in {"x": x, "noise": noise, **labels}.items():
            if not isinstance(value, Tensor):
                raise TypeError(f"{name}: {key} must be a tensor, got {type(value).__name__}")
            if value.is_complex():
                raise TypeError(f"{name}: {key} must be real, got {value.dtype}")
            if value.device != x.device:
                raise ValueError(f"{name}: {key} is on {value.device}, but x is on {x.device}")
        if not x.is_floating_point():
            raise TypeError(f"{name}: x must be of a floating dtype, got {x.dtype}")
        if x.dim() != 4 or tuple(x.shape[1:]) != expected:
            raise ValueError(f"{name}: x must be [B, {', '.join(map(str, expected))}], got {list(x.shape)}")
        if tuple(noise.shape) != (x.shape[0],):
            raise ValueError(
                f"{name}: noise must be [{x.shape[0]}], one value per sample, got {list(noise.shape)}"
            )
        for key, value in labels.items():
            if value.shape[:1] != x.shape[:1]:
                raise ValueError(
                    f"{name}: {key} must have one entry per sample ({x.shape[0]}), got {list(value.shape)}"
                )

    def _compute_dtype(self, x: Tensor) -> torch.dtype:
        if not x.is_meta and torch.is_autocast_enabled(x.device.type):
            return torch.get_autocast_dtype(x.device.type)
        return next(self.parameters()).dtype


def _resolutions(image_size: int, channel_mult: Widths) -> list[int]:
    """Those of a U-Net's levels, finest first."""
    return [image_size >> level for level in range(len(channel_mult))]


def present(attn_resolutions: Sequence[int], image_size: int, channel_mult: Widths) -> tuple[int, ...]:
    """Those that a U-Net of these levels has."""
    there = _resolutions(image_size, channel_mult)
    return tuple(size for size in attn_resolutions if size in there)


def check_levels(
    name: str, image_size: int, channel_mult: Widths, num_blocks: int, attn_resolutions: Sequence[int]
) -> None:
    """Raises ValueError unless a U-Net can halve its image at each of these levels and has these resolutions."""
    if not channel_mult or min(channel_mult) < 1 or num_blocks < 1:
        raise ValueError(
            f"{name}: channel_mult and num_blocks must be >= 1, got channel_mult={channel_mult}, "
            f"num_blocks={num_blocks}"
        )
    factor = 2 ** (len(channel_mult) - 1)
    if image_size < factor or image_size % factor:
        raise ValueError(
            f"{name}: image_size must be a multiple of {factor} for {len(channel_mult)} levels, got {image_size}"
        )
    there = _resolutions(image_size, channel_mult)
    if missing := [size for size in attn_resolutions if size not in there]:
        nearest = {min(there, key=lambda size: abs(size - other)) for other in missing}
        instead = sorted(nearest.union(attn_resolutions).difference(missing), reverse=True)
        raise ValueError(
            f"{name}: attn_resolutions={list(attn_resolutions)} names {', '.join(map(str, missing))}, but with "
            f"image_size={image_size} and {len(there)} levels the resolutions are {', '.join(map(str, there))}; "
            f"choose among these, for example attn_resolutions={instead}, or give none"
        )

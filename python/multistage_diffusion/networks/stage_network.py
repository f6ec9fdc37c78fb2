"""What all networks have in common: their two halves, and the way from the caller's order to stage order and back."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from msd_kernels import StageBatch
from msd_kernels.dispatch.stage_weights import several_processes
from multistage_diffusion.networks.layers import Widths
from multistage_diffusion.networks.stage_order import StageOrder


class Takes(NamedTuple):
    """What a network takes besides images, noise and stages. A network declares it as ``network.takes``.

    Attributes:
        class_labels: classes, one-hot or soft labels ``[B, class_labels]``; 0: none.
        augment_labels: numbers that tell of an augmentation, ``[B, augment_labels]``; 0: none.
        context: channels of a context's tokens, ``[B, tokens, context]``; 0: none.
        stage_order: a :class:`StageOrder` in place of the stages.
    """

    class_labels: int = 0
    augment_labels: int = 0
    context: int = 0
    stage_order: bool = False

    @classmethod
    def of(cls, network: nn.Module) -> Takes:
        """What a network declares; nothing, where it declares nothing."""
        return getattr(network, "takes", cls())


class Features(NamedTuple):
    """What an encoder makes of a batch, for the decoders of any stages.

    Attributes:
        state: what the first decoder block starts from, in the encoder's order: one stage where the encoder is shared.
        skips: what joins it later, first to last.
        emb: what the blocks are told of noise and labels; None where the decoder is not told.
        tokens: of the context; None where there is none.
        conditioning: as the encoder got it, in stage order.
        order: of the samples.
        dtype: of the caller's images.
    """

    state: StageBatch
    skips: list[StageBatch]
    emb: StageBatch | None
    tokens: StageBatch | None
    conditioning: dict[str, Tensor | None]
    order: StageOrder
    dtype: torch.dtype


class StageNetwork(nn.Module):
    """A network with an encoder, shared or one per stage, and one decoder per stage.

    A family calls this constructor with its own ``locals()`` first, and gives :meth:`run_encoder` and
    :meth:`run_decoder`, which see the samples in stage order. Every family takes ``image_size``, ``in_channels``,
    ``encoder_widths`` (the base width of the encoder: one for a shared encoder, or one per stage) and
    ``decoder_widths`` (that of each stage's decoder).

    Args:
        arguments: the constructor's arguments by name.

    Attributes:
        family: the name of the family.
        config: ``family`` and the constructor's arguments; ``networks.build`` inverts it.
        num_stages: stages, the number of decoders.
        shared_encoder: whether one encoder serves all stages.
        takes: the conditioning; what it names must be given where ``needed`` has its name.

    Raises:
        ValueError: widths or sizes that do not fit together.
    """

    family: str
    needed: ClassVar[tuple[str, ...]] = ()
    absent_stages_are_left_alone = False  # set by what sees to that in several processes

    def __init__(self, arguments: Mapping[str, object]) -> None:
        super().__init__()
        own = {name: value for name, value in arguments.items() if name not in ("self", "__class__")}
        plain = {
            name: list(value) if isinstance(value, Iterable) and not isinstance(value, str) else value
            for name, value in own.items()
        }
        self.config = {"family": self.family, **plain}
        self.encoder_widths, self.decoder_widths = (
            tuple(plain["encoder_widths"]),
            tuple(plain["decoder_widths"]),
        )
        self.num_stages, self.shared_encoder = len(self.decoder_widths), len(self.encoder_widths) == 1
        self.image_size, self.in_channels = own["image_size"], own["in_channels"]
        self.out_channels = own.get("out_channels", self.in_channels)
        self.label_dim, self.augment_dim = own.get("label_dim", 0), own.get("augment_dim", 0)
        self.context_dim = own.get("context_dim", 0)
        context = 0 if self.label_dim else self.context_dim  # else the class is the context
        self.takes = Takes(self.label_dim, self.augment_dim, context, stage_order=True)
        self._check_sizes()

    def _check_sizes(self) -> None:
        name, encoders = type(self).__name__, self.encoder_widths
        if not self.decoder_widths or len(encoders) not in (1, self.num_stages):
            raise ValueError(
                f"{name}: encoder_widths must hold one width (shared) or one per decoder, "
                f"got {encoders} for decoder_widths={self.decoder_widths}"
            )
        sizes = {key: getattr(self, key) for key in ("image_size", "in_channels", "out_channels")}
        sizes |= {"encoder_widths": min(encoders), "decoder_widths": min(self.decoder_widths)}
        for key, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name}: {key} must be >= 1, got {self.config[key]}")

    @classmethod
    def in_effect(cls, arguments: Mapping[str, object]) -> dict[str, object]:
        """The arguments of a network that exists, without those that have no effect and that ``build`` refuses."""
        return dict(arguments)

    # ------------------------------------------------------------------ the two halves

    def forward(
        self,
        x: Tensor,
        noise: Tensor,
        stage: Sequence[int] | Tensor | StageOrder,
        **conditioning: Tensor | None,
    ) -> Tensor:
        """Runs a mixed batch: ``decode(encode(...))``.

        Args:
            x: ``[B, in_channels, image_size, image_size]``, in any floating dtype.
            noise: ``[B]``, as the family counts it.
            stage: one stage id per sample, on the host, in any order; or a :class:`StageOrder`.
            **conditioning: what the network ``takes``, see :class:`Takes`: ``class_labels``, ``augment_labels``,
                ``context``.

        Returns:
            ``[B, out_channels, image_size, image_size]`` in the caller's order and in the dtype of ``x``.

        Runs in the dtype of autocast where it is on, in that of the parameters elsewhere.

        Raises:
            ValueError: shapes, devices or stage ids that do not fit; conditioning that is needed or not taken.
            TypeError: what is no tensor or of a wrong dtype; stage ids that are no integers.
        """
        return self.decode(self.encode(x, noise, stage, **conditioning))

    def encode(
        self,
        x: Tensor,
        noise: Tensor,
        stage: Sequence[int] | Tensor | StageOrder,
        *,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
        context: Tensor | None = None,
    ) -> Features:
        """The encoder's half of a call, with its arguments."""
        conditioning = {"class_labels": class_labels, "augment_labels": augment_labels, "context": context}
        self._check_images(x)
        self._check_noise(noise, x.shape[0], x.device)
        self._check_conditioning(conditioning, x.shape[0], x.device)
        conditioning = self.prepared(conditioning)
        order = StageOrder.of(stage, self.num_stages, x.shape[0], x.device)
        if not self.absent_stages_are_left_alone and torch.is_grad_enabled() and several_processes():
            self._warn_of_absent_stages()
        dtype = self._compute_dtype(x)
        with _as_written(x.device.type):
            conditioning = {key: order.sort(value) for key, value in conditioning.items()}
            half = self.run_encoder(order.sort(x).to(dtype), order.sort(noise), conditioning, order.counts)
        return Features(*half, conditioning, order, x.dtype)

    def decode(
        self,
        features: Features,
        noise: Tensor | None = None,
        stage: Sequence[int] | Tensor | StageOrder | None = None,
    ) -> Tensor:
        """The decoders' half of a call, on what :meth:`encode` returned.

        Args:
            features: of a batch of B samples.
            noise: ``[B]``, other noise than the encoder was told of; default: the same.
            stage: other stages, whose decoders run on the same features; default: the same.

        Returns:
            As :meth:`forward`.

        Raises:
            ValueError: noise or stages that do not fit; other stages for an encoder that is not shared, or other noise
                for a decoder that is not told of it.
            TypeError: noise that is no real tensor; stage ids that are no integers.
        """
        with _as_written(features.state.values.device.type):
            if stage is not None:
                features = self._reordered(features, stage)
            if noise is not None:
                features = self._told(features, noise)
            y = self.run_decoder(features)
        return features.order.restore(y).to(features.dtype)

    def prepared(self, conditioning: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
        """The conditioning as :meth:`run_encoder` gets it, still in the caller's order."""
        return conditioning

    def run_encoder(
        self, x: Tensor, noise: Tensor, conditioning: dict[str, Tensor | None], counts: Widths
    ) -> tuple[StageBatch, list[StageBatch], StageBatch | None, StageBatch | None]:
        """The encoder on samples in stage order, ``x`` in the dtype to compute in: the first four of ``Features``."""
        raise NotImplementedError

    def run_decoder(self, features: Features) -> Tensor:
        """The decoders; returns the dense output in stage order."""
        raise NotImplementedError

    def embedding(
        self, noise: Tensor, counts: Widths, dtype: torch.dtype, conditioning: dict[str, Tensor | None]
    ) -> StageBatch:
        """What a decoder is told of the noise, of samples in stage order; raises ValueError where it is not told."""
        raise ValueError(
            f"{type(self).__name__}: its decoders are told of the noise by the encoder alone; leave noise out"
        )

    # ------------------------------------------------------------------ for the families

    def encoder_counts(self, counts: Widths) -> Widths:
        """Samples per stage as the encoder sees them: one stage if it is shared."""
        return (sum(counts),) if self.shared_encoder else counts

    def to_decoders(self, counts: Widths, batch: StageBatch | None) -> StageBatch | None:
        """A batch that left the encoder, cut into the decoders' stages, without a copy."""
        return batch.restage(counts) if self.shared_encoder and batch is not None else batch

    def per_decoder(self, channels: Widths) -> Widths:
        """Channels that left the encoder, one per decoder."""
        return channels * self.num_stages if self.shared_encoder else channels

    # ------------------------------------------------------------------ other stages, other noise

    def _reordered(self, features: Features, stage) -> Features:
        """The same samples in the order of other stages."""
        if not self.shared_encoder:
            raise ValueError(
                f"{type(self).__name__}: every stage has an encoder of its own, whose features no other stage decodes"
            )
        state, before = features.state, features.order
        order = StageOrder.of(stage, self.num_stages, sum(state.counts), state.values.device)

        def moved(batch: StageBatch | None) -> StageBatch | None:
            if batch is None or (before.order is None and order.order is None):
                return batch
            return StageBatch.from_dense(order.sort(before.restore(batch.dense())), batch.counts)

        return features._replace(
            state=moved(state),
            skips=[moved(skip) for skip in features.skips],
            emb=moved(features.emb),
            tokens=moved(features.tokens),
            conditioning={
                key: None if value is None else order.sort(before.restore(value))
                for key, value in features.conditioning.items()
            },
            order=order,
        )

    def _told(self, features: Features, noise: Tensor) -> Features:
        """The same features with other noise for the decoders."""
        state, order = features.state, features.order
        self._check_noise(noise, sum(state.counts), state.values.device)
        emb = self.embedding(order.sort(noise), state.counts, state.values.dtype, features.conditioning)
        return features._replace(emb=emb)

    # ------------------------------------------------------------------ checks

    def _warn_of_absent_stages(self) -> None:
        if self.training and self.num_stages > 1:
            self.absent_stages_are_left_alone = True  # warned once
            warnings.warn(
                f"{type(self).__name__}: several processes train it, where a stage without samples has gradients of "
                "zero, by which an optimizer goes on moving its decoder; StageParameters(network, optimizer) sees to "
                "that",
                stacklevel=4,
            )

    def _check_images(self, x: Tensor) -> None:
        name, expected = type(self).__name__, (self.in_channels, self.image_size, self.image_size)
        self._check_real("x", x, None)
        if not x.is_floating_point():
            raise TypeError(f"{name}: x must be of a floating dtype, got {x.dtype}")
        if x.dim() != 4 or tuple(x.shape[1:]) != expected:
            raise ValueError(f"{name}: x must be [B, {', '.join(map(str, expected))}], got {list(x.shape)}")

    def _check_noise(self, noise: Tensor, batch: int, device: torch.device) -> None:
        self._check_real("noise", noise, device)
        if tuple(noise.shape) != (batch,):
            raise ValueError(
                f"{type(self).__name__}: noise must be [{batch}], one value per sample, got {list(noise.shape)}"
            )

    def _check_conditioning(
        self, conditioning: dict[str, Tensor | None], batch: int, device: torch.device
    ) -> None:
        """Raises TypeError or ValueError for conditioning that is needed or not taken, or does not fit."""
        name = type(self).__name__
        for key, value in conditioning.items():
            size = getattr(self.takes, key)
            shape = [batch, "tokens", size] if key == "context" else [batch, size]
            expected = f"[{', '.join(map(str, shape))}]"
            if value is None:
                if size and key in self.needed:
                    raise ValueError(f"{name}: {key} must be {expected}, got none")
                continue
            self._check_real(key, value, device)
            if not value.dim() or value.shape[0] != batch:
                raise ValueError(
                    f"{name}: {key} must have one entry per sample ({batch}), got {list(value.shape)}"
                )
            if not size:
                raise ValueError(f"{name}: the network was built without {key}, but some were given")
            if value.dim() != len(shape) or value.shape[-1] != size or not value.shape[1]:
                raise ValueError(f"{name}: {key} must be {expected}, got {list(value.shape)}")

    def _check_real(self, key: str, value: Tensor, device: torch.device | None) -> None:
        """Raises TypeError for what is no tensor of real numbers, and ValueError for one that is not where x is."""
        name = type(self).__name__
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: {key} must be a tensor, got {type(value).__name__}")
        if value.is_complex():
            raise TypeError(f"{name}: {key} must be real, got {value.dtype}")
        if device is not None and value.device != device:
            raise ValueError(f"{name}: {key} is on {value.device}, but x is on {device}")

    def _compute_dtype(self, x: Tensor) -> torch.dtype:
        if not x.is_meta and torch.is_autocast_enabled(x.device.type):
            return torch.get_autocast_dtype(x.device.type)
        return next(self.parameters()).dtype


def _as_written(device_type: str):
    """Without autocast: the families choose their dtypes themselves."""
    return nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False)

"""Stage-grouped layers: one module holds the weights of all stages and runs a mixed batch in one call.

Every stage's weight is an ordinary ``torch.nn.Parameter`` in PyTorch's own shape, named ``conv.weight.0``,
``conv.weight.1``, ... (see :class:`PerStage`). A layer with one stage is an ordinary layer; it runs the shared encoder
and the unified network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msd_kernels import StageBatch, attention, group_norm, grouped_conv2d, grouped_linear, resample2d
from msd_kernels.runtime import processor
from multistage_diffusion.common.checks import integer
from multistage_diffusion.networks.stage_module import PerStage, StageModule

__all__ = [
    "OnStages",
    "PerStage",
    "StageAttention",
    "StageConv2d",
    "StageCrossAttention",
    "StageGroupNorm",
    "StageLayerNorm",
    "StageLinear",
    "StageModule",
    "StageStridedConv2d",
    "StageTable",
    "fan_in_uniform",
    "normal",
    "on_stages",
    "shared_layers",
    "xavier_uniform",
]

BOX = (1, 1)
RESAMPLE = (None, "up", "down")

Widths = tuple[int, ...]
Initialiser = Callable[[Tensor, int, int], None]


def xavier_uniform(gain: float = 1.0) -> Initialiser:
    """Weights from U(−1, 1) · gain · √(6 / (fan_in + fan_out)), as in the EDM networks (Glorot & Bengio 2010)."""

    def initialise(weight: Tensor, fan_in: int, fan_out: int) -> None:
        bound = gain * math.sqrt(6 / (fan_in + fan_out))
        with torch.no_grad():
            weight.uniform_(-bound, bound)

    return initialise


def fan_in_uniform(weight: Tensor, fan_in: int, fan_out: int) -> None:
    """Weights from U(−1, 1) / √fan_in: PyTorch's default, which latent diffusion keeps."""
    with torch.no_grad():
        weight.uniform_(-(fan_in**-0.5), fan_in**-0.5)


def normal(std: float) -> Initialiser:
    """Weights from N(0, std²), truncated at two standard deviations, as in vision transformers."""
    bound = math.erf(math.sqrt(2))  # the share of the normal distribution within two standard deviations

    def initialise(weight: Tensor, fan_in: int, fan_out: int) -> None:
        if weight.is_meta:  # nothing to fill, and PyTorch would first import for seconds what says so
            return
        with torch.no_grad():
            weight.uniform_(-bound, bound).erfinv_().mul_(std * math.sqrt(2))

    return initialise


class StageLinear(StageModule):
    """:func:`msd_kernels.grouped_linear` with its weights. ``in_features`` and ``out_features`` are per stage."""

    def __init__(
        self,
        in_features: Sequence[int],
        out_features: Sequence[int],
        *,
        bias: bool = True,
        initialise: Initialiser | None = None,
    ) -> None:
        super().__init__(len(in_features))
        self.in_features = _integers("StageLinear", "in_features", in_features)
        self.out_features = _integers("StageLinear", "out_features", out_features)
        _add_weight_and_bias(self, self.in_features, self.out_features, (), initialise, bias)

    def forward(self, x: StageBatch, *, residual: StageBatch | None = None, scale: float = 1.0) -> StageBatch:
        """``scale * (x @ weight.T + bias + residual)`` for every pixel.

        Raises:
            TypeError, ValueError: as the op; a residual of another layout, device or, but for autocast, dtype than y.
        """
        y = grouped_linear(x, self.weights("weight", x.dtype), self.weights("bias", x.dtype))
        if residual is not None:
            _require_like("StageLinear", "residual", residual, y)
            y = y.with_values(y.values + residual.values)
        return y if scale == 1.0 else y.with_values(y.values * scale)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}"


class StageConv2d(StageModule):
    """:func:`msd_kernels.grouped_conv2d` with its weights, after optional resampling by 2 with a FIR ``filter``.

    Args:
        in_channels, out_channels: per stage; ``in_channels`` counts both sources where there is a skip.
        kernel: odd kernel size.
        resample: None, ``"up"`` or ``"down"``.
        filter: taps of the resampling filter. [1, 1] is fused into the convolution.

    Raises:
        TypeError: sizes that are no integers.
        ValueError: sizes below 1, an even kernel, another ``resample``.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: Sequence[int],
        kernel: int,
        *,
        resample: str | None = None,
        filter: Sequence[float] = BOX,
        bias: bool = True,
        initialise: Initialiser | None = None,
    ) -> None:
        super().__init__(len(in_channels))
        self.in_channels = _integers("StageConv2d", "in_channels", in_channels)
        self.out_channels = _integers("StageConv2d", "out_channels", out_channels)
        self.kernel = kernel = integer("StageConv2d", "kernel", kernel, 1)
        if kernel % 2 == 0:
            raise ValueError(f"StageConv2d: kernel must be odd, got {kernel}")
        if resample not in RESAMPLE:
            raise ValueError(f"StageConv2d: resample must be None, 'up' or 'down', got {resample!r}")
        self.resample, self.filter = resample, tuple(filter)
        _add_weight_and_bias(self, self.in_channels, self.out_channels, (kernel, kernel), initialise, bias)

    def forward(
        self,
        x: StageBatch,
        *,
        skip: StageBatch | Tensor | None = None,
        sample_bias: StageBatch | None = None,
        residual: StageBatch | None = None,
        scale: float = 1.0,
    ) -> StageBatch:
        return self.convolve(
            x,
            self.weights("weight", x.dtype),
            self.weights("bias", x.dtype),
            skip=skip,
            sample_bias=sample_bias,
            residual=residual,
            scale=scale,
        )

    def convolve(
        self, x: StageBatch, weight: Sequence[Tensor], bias: Sequence[Tensor] | None = None, **others
    ) -> StageBatch:
        """What the layer does, with weights that are not its own; ``others`` as in ``forward``."""
        resample = self.resample
        if resample is not None and self.filter != BOX:
            x = resample2d(x, self.filter, **{resample: 2})
            resample = None
        return grouped_conv2d(x, weight, bias, resample=resample, **others)

    def extra_repr(self) -> str:
        return f"{self.in_channels} -> {self.out_channels}, kernel={self.kernel}, resample={self.resample}"


class StageStridedConv2d(StageModule):
    """Convolution with a stride: a U-Net's learned downsampling, a transformer's patches. One call per stage.

    Args:
        in_channels, out_channels: per stage.
        kernel, stride, padding: as in :class:`torch.nn.Conv2d`.
        filter: an even number of taps of a FIR filter to apply first. Filter and convolution then act on the
            image as if it went on with zeros, nothing cut off between them: the fused downsampling of
            StyleGAN2, score SDE and EDM. None: no filter.

    Raises:
        TypeError: sizes that are no integers; input that is no StageBatch of a floating dtype.
        ValueError: sizes out of range, a filter that does not go with them; input of other channels or too small.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: Sequence[int],
        kernel: int,
        *,
        stride: int = 2,
        padding: int = 0,
        filter: Sequence[float] | None = None,
        initialise: Initialiser | None = None,
    ) -> None:
        super().__init__(len(in_channels))
        self.in_channels = _integers("StageStridedConv2d", "in_channels", in_channels)
        self.out_channels = _integers("StageStridedConv2d", "out_channels", out_channels)
        self.kernel = kernel = integer("StageStridedConv2d", "kernel", kernel, 1)
        self.stride = integer("StageStridedConv2d", "stride", stride, 1)
        self.padding = integer("StageStridedConv2d", "padding", padding, 0)
        self.filter = None if filter is None else tuple(filter)
        if self.filter is not None and (len(self.filter) % 2 or (kernel, stride, padding) != (3, 2, 0)):
            raise ValueError(
                f"StageStridedConv2d: a filter must have an even number of taps and goes with kernel 3, "
                f"stride 2, padding 0, got {len(self.filter)} taps with kernel {kernel}, stride {stride}, "
                f"padding {padding}"
            )
        # The filter comes with a padding of 1 on each side and takes 1 off: an image grows by one pixel.
        self._smallest = max(self.kernel - (2 * self.padding if self.filter is None else 1), 1)
        _add_weight_and_bias(self, self.in_channels, self.out_channels, (kernel, kernel), initialise, True)

    def forward(self, x: StageBatch) -> StageBatch:
        _require_channels("StageStridedConv2d", x, self.in_channels)
        if min(x.height, x.width) < self._smallest:
            raise ValueError(
                f"StageStridedConv2d: x must be at least {self._smallest}x{self._smallest} for kernel {self.kernel} "
                f"and padding {self.padding}, got {x.height}x{x.width}"
            )
        if self.filter is not None:
            x = resample2d(
                StageBatch.from_segments([F.pad(s, (1, 1, 1, 1)) for s in x.segments()]), self.filter
            )
        dtype = x.dtype
        if x.device.type == "cpu" and not processor.computes_in(dtype):
            x = x.to(torch.float32)
        weights, biases = ([t.to(x.dtype) for t in holder()] for holder in (self.weight, self.bias))
        return StageBatch.from_segments(
            [
                F.conv2d(segment, weight, bias, self.stride, self.padding)
                for segment, weight, bias in zip(x.segments(), weights, biases, strict=True)
            ]
        ).to(dtype)

    def extra_repr(self) -> str:
        return f"{self.in_channels} -> {self.out_channels}, kernel={self.kernel}, stride={self.stride}"


class StageTable(StageModule):
    """One learned vector per row and stage, ``[rows, C_s]``: the position embedding of a transformer.

    Raises:
        TypeError: sizes that are no integers; input that is no StageBatch of a floating dtype.
        ValueError: sizes below 1; input of other channels or another number of pixels.
    """

    def __init__(self, rows: int, channels: Sequence[int], *, initialise: Initialiser | None = None) -> None:
        super().__init__(len(channels))
        self.rows = integer("StageTable", "rows", rows, 1)
        self.channels = _integers("StageTable", "channels", channels)
        tables = [torch.empty(self.rows, c) for c in self.channels]
        for table in tables:
            (initialise or normal(0.02))(table, table.shape[1], table.shape[0])
        self.hold("weight", tables)

    def forward(self, x: StageBatch) -> StageBatch:
        """Adds row i to pixel i of every sample; x has ``rows`` pixels."""
        _require_channels("StageTable", x, self.channels)
        if x.height * x.width != self.rows:
            raise ValueError(f"StageTable: x must have {self.rows} pixels, got {x.height}x{x.width}")
        tables = [table.to(x.dtype) for table in self.weight()]
        rows = [t.t().view(1, c, x.height, x.width) for t, c in zip(tables, self.channels, strict=True)]
        return StageBatch.from_segments([s + r for s, r in zip(x.segments(), rows, strict=True)])


class StageGroupNorm(StageModule):
    """:func:`msd_kernels.group_norm` with its weights; channels and groups are per stage."""

    def __init__(self, channels: Sequence[int], groups: Sequence[int], *, eps: float = 1e-6) -> None:
        super().__init__(len(channels))
        for stage, (c, g) in enumerate(zip(channels, groups, strict=True)):
            if g < 1 or c % g:
                raise ValueError(
                    f"StageGroupNorm: {g} groups do not divide the {c} channels of stage {stage}; "
                    f"choose a width that gives a multiple of {max(g, 1)}"
                )
        self.channels, self.groups, self.eps = tuple(channels), tuple(groups), eps
        self.hold("weight", (torch.ones(c) for c in channels))
        self.hold("bias", (torch.zeros(c) for c in channels))

    def forward(
        self,
        x: StageBatch,
        *,
        skip: StageBatch | Tensor | None = None,
        scale: StageBatch | None = None,
        shift: StageBatch | None = None,
        activation: str | None = None,
        dropout: float = 0.0,
        seed: Tensor | None = None,
    ) -> StageBatch:
        """``channels`` counts both sources where there is a skip."""
        options = {"skip": skip, "scale": scale, "shift": shift, "activation": activation}
        options |= {"dropout": dropout, "seed": seed}
        return group_norm(x, self.groups, self.weight(), self.bias(), self.eps, **options)

    def extra_repr(self) -> str:
        return f"{self.channels} in {self.groups} groups"


class StageLayerNorm(StageModule):
    """Normalises the channels of every pixel: :func:`msd_kernels.group_norm` with each pixel as a sample."""

    def __init__(self, channels: Sequence[int], *, eps: float = 1e-5) -> None:
        super().__init__(len(channels))
        self.channels, self.eps = tuple(channels), eps
        self.hold("weight", (torch.ones(c) for c in channels))
        self.hold("bias", (torch.zeros(c) for c in channels))

    def forward(self, x: StageBatch) -> StageBatch:
        _require_channels("StageLayerNorm", x, self.channels)
        counts = tuple(n * x.height * x.width for n in x.counts)
        pixels = StageBatch(x.values, counts, x.channels, 1, 1)
        return x.with_values(group_norm(pixels, 1, self.weight(), self.bias(), self.eps).values)

    def extra_repr(self) -> str:
        return f"{self.channels}"


class StageAttention(nn.Module):
    """Self-attention over the pixels of a feature map: norm, qkv, :func:`msd_kernels.attention`, projection.

    ``y = scale * (x + proj(attention(qkv(norm(x)))))``. ``layout`` is the order of the qkv channels. ``qkv`` and
    ``proj`` are 1×1 convolutions or linear layers, which are the same thing.
    """

    def __init__(
        self,
        norm: StageGroupNorm | StageLayerNorm,
        qkv: StageConv2d | StageLinear,
        proj: StageConv2d | StageLinear,
        num_heads: Sequence[int],
        *,
        layout: str,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.norm, self.qkv, self.proj = norm, qkv, proj
        self.num_heads, self.layout, self.scale = tuple(num_heads), layout, scale

    def forward(self, x: StageBatch, context: StageBatch | None = None) -> StageBatch:
        """``context`` is ignored: it is there so that every attention of a U-Net is called alike."""
        qkv = self.qkv(self.norm(x))
        attended = attention(qkv, num_heads=self.num_heads, layout=self.layout)
        return self.proj(attended, residual=x, scale=self.scale)


class StageCrossAttention(nn.Module):
    """Attention from the pixels of a feature map to the tokens of a context: ``y = x + proj(attention(q, k, v))``.

    ``q(norm(x))`` has as many channels as each half of ``kv(context)``, which holds k, then v.
    """

    def __init__(
        self,
        norm: StageLayerNorm,
        q: StageLinear,
        kv: StageLinear,
        proj: StageLinear,
        num_heads: Sequence[int],
    ) -> None:
        super().__init__()
        self.norm, self.q, self.kv, self.proj = norm, q, kv, proj
        self.num_heads = tuple(num_heads)

    def forward(self, x: StageBatch, context: StageBatch) -> StageBatch:
        """``context``: a StageBatch with the tokens as its pixels."""
        halves = [segment.chunk(2, dim=1) for segment in self.kv(context).segments()]
        k, v = (StageBatch.from_segments([half[i] for half in halves]) for i in (0, 1))
        attended = attention(self.q(self.norm(x)), k, v, num_heads=self.num_heads)
        return self.proj(attended, residual=x)


class OnStages(nn.Module):
    """Applies a module to some stages only; the others pass through.

    Args:
        module: built for ``stages`` alone, in this order. Its parameters are named by the network's stage ids.
        stages: the stages that it serves, at least one, ascending.

    Raises:
        TypeError: stages that are no integers.
        ValueError: no stages, or not ascending; a module built for another number of them; input without them.
    """

    def __init__(self, module: nn.Module, stages: Sequence[int]) -> None:
        super().__init__()
        self.module, self.stages = module, _integers("OnStages", "stages", stages, least=0)
        if not self.stages or any(second <= first for first, second in pairwise(self.stages)):
            raise ValueError(f"OnStages: stages must be ascending, at least one, got {self.stages}")
        for layer in module.modules():
            if isinstance(layer, StageModule):
                if layer.num_stages != len(self.stages):
                    got = f"a {type(layer).__name__} of {layer.num_stages} stages"
                    raise ValueError(
                        f"OnStages: module must be built for the stages {self.stages}, got {got}"
                    )
                layer.renumber(self.stages)

    def forward(
        self, x: StageBatch, *others: StageBatch | None, skip: StageBatch | None = None
    ) -> StageBatch:
        """``module(x, *others)`` with the stages served taken out of each of them.

        With a ``skip``, which the module takes by this name, the others have its channels behind those of ``x``.
        """
        sources = {} if skip is None else {"skip": self._take(skip)}
        taken = (batch if batch is None else self._take(batch) for batch in (x, *others))
        served = self.module(*taken, **sources)
        segments = self._left_alone(x, skip)
        for stage, segment in zip(self.stages, served.segments(), strict=True):
            segments[stage] = segment
        return StageBatch.from_segments(segments)

    def _left_alone(self, x: StageBatch, skip: StageBatch | None) -> list[Tensor]:
        """The segments of the stages that the module does not serve; of the others anything."""
        if skip is None:
            return x.segments()
        pairs = enumerate(zip(x.segments(), skip.segments(), strict=True))
        return [pair[0] if stage in self.stages else torch.cat(pair, dim=1) for stage, pair in pairs]

    def _take(self, batch: StageBatch) -> StageBatch:
        if not isinstance(batch, StageBatch):
            raise TypeError(f"OnStages: x must be a StageBatch, got {type(batch).__name__}")
        if self.stages[-1] >= batch.num_stages:
            raise ValueError(f"OnStages: x must have the stages {self.stages}, got {batch.num_stages} stages")
        segments = batch.segments()
        return StageBatch.from_segments([segments[stage] for stage in self.stages])


def on_stages(build: Callable[..., nn.Module], stages: Sequence[int], *channels: Widths) -> nn.Module | None:
    """A module for some stages: ``build`` gets each of ``channels`` cut down to them. None for no stage."""
    if not stages:
        return None
    module = build(*(tuple(widths[stage] for stage in stages) for widths in channels))
    return module if len(stages) == len(channels[0]) else OnStages(module, stages)


def shared_layers(network: nn.Module) -> Iterator[StageModule]:
    """The layers of a network of several stages that hold one set of weights for all of them."""
    if network.num_stages == 1:
        return
    selected = {layer for part in network.modules() if isinstance(part, OnStages) for layer in part.modules()}
    for layer in network.modules():
        if isinstance(layer, StageModule) and layer.num_stages == 1 and layer not in selected:
            yield layer


def _integers(user: str, name: str, values: Sequence[int], least: int = 1) -> Widths:
    return tuple(integer(user, name, value, least) for value in values)


def _require_channels(layer: str, x: StageBatch, channels: Widths) -> None:
    if not isinstance(x, StageBatch):
        raise TypeError(f"{layer}: x must be a StageBatch, got {type(x).__name__}")
    if not x.values.is_floating_point():
        raise TypeError(f"{layer}: x must be of a floating dtype, got {x.dtype}")
    if x.channels != channels:
        raise ValueError(f"{layer}: x must have channels={channels}, one per stage, got {x.channels}")


def _require_like(layer: str, name: str, batch: StageBatch, y: StageBatch) -> None:
    """``batch`` must fit ``y`` element by element; dtypes may differ under autocast, as in PyTorch's own sums."""
    if not isinstance(batch, StageBatch):
        raise TypeError(f"{layer}: {name} must be a StageBatch, got {type(batch).__name__}")
    if batch.layout != y.layout:
        raise ValueError(
            f"{layer}: {name} must have counts={y.counts}, channels={y.channels} at {y.height}x{y.width}, "
            f"got counts={batch.counts}, channels={batch.channels} at {batch.height}x{batch.width}"
        )
    if batch.device != y.device:
        raise ValueError(f"{layer}: {name} is on {batch.device}, but x is on {y.device}")
    if batch.dtype != y.dtype and (y.values.is_meta or not torch.is_autocast_enabled(y.device.type)):
        raise TypeError(f"{layer}: {name} must be {y.dtype} as x, got {batch.dtype}")


def _add_weight_and_bias(
    layer: StageModule, ins: Widths, outs: Widths, window: Widths, initialise: Initialiser | None, bias: bool
) -> None:
    taps = math.prod(window)

    def drawn() -> Iterator[Tensor]:
        for o, i in zip(outs, ins, strict=True):
            # Channels last, the order in which random numbers have always been drawn.
            weight = torch.empty(o, *window, i).movedim(-1, 1)
            (initialise or xavier_uniform())(weight, i * taps, o * taps)
            yield weight.clone(memory_format=torch.contiguous_format)

    layer.hold("weight", drawn())
    if bias:
        layer.hold("bias", (torch.zeros(o) for o in outs))
    else:
        layer.register_parameter("bias", None)

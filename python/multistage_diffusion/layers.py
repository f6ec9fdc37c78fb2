"""Stage-grouped layers: one module holds the weights of all stages and runs a mixed batch in one call.

Every layer keeps each of its parameters as ONE flat ``torch.nn.Parameter`` over all stages (see
:class:`msd_kernels.StageWeights`), so that a launch reads all stages through one pointer. ``state_dict`` names the
parameters per stage all the same: ``conv.weight.0``, ``conv.weight.1``, ... in PyTorch's own shapes.
A layer with one stage is an ordinary layer; it runs the shared encoder and the unified network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msd_kernels import (
    StageBatch,
    StageWeights,
    attention,
    group_norm,
    grouped_conv2d,
    grouped_linear,
    resample2d,
)

__all__ = [
    "OnStages",
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
        with torch.no_grad():
            weight.uniform_(-bound, bound).erfinv_().mul_(std * math.sqrt(2))

    return initialise


class StageModule(nn.Module):
    """A module whose parameters are packed over the stages but saved and loaded per stage.

    Attributes:
        num_stages: stages that the module holds weights of.
        stage_ids: their numbers in the network, which name the parameters; see :class:`OnStages`.
    """

    def __init__(self, num_stages: int) -> None:
        super().__init__()
        self.num_stages = num_stages
        self.stage_ids = tuple(range(num_stages))
        self._stage_shapes: dict[str, tuple[tuple[int, ...], ...]] = {}

    def add_stage_parameter(self, name: str, shapes: Sequence[tuple[int, ...]]) -> StageWeights:
        """Registers one flat parameter for tensors of ``shapes``, uninitialised."""
        self._stage_shapes[name] = tuple(tuple(shape) for shape in shapes)
        setattr(self, name, nn.Parameter(torch.empty(sum(math.prod(shape) for shape in shapes))))
        return self.packed(name)

    def packed(self, name: str, dtype: torch.dtype | None = None) -> StageWeights | None:
        """The parameter as the ops take it, cast to ``dtype``; None for a parameter that the layer lacks."""
        parameter = getattr(self, name)
        if parameter is None:
            return None
        return StageWeights(parameter if dtype is None else parameter.to(dtype), self._stage_shapes[name])

    def stage_tensors(self, name: str, values: Tensor | None = None) -> list[Tensor]:
        """Each stage's part of a parameter, or of ``values`` (its gradient, say), as a view in its own shape."""
        flat = getattr(self, name).detach() if values is None else values
        return StageWeights(flat, self._stage_shapes[name]).tensors()

    def stage_parameter_names(self) -> Iterator[str]:
        """The names of the packed parameters."""
        return iter(self._stage_shapes)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        for name in self._stage_shapes:
            flat = getattr(self, name)
            tensors = self.stage_tensors(name, flat if keep_vars else flat.detach())
            for stage, tensor in zip(self.stage_ids, tensors, strict=True):
                destination[f"{prefix}{name}.{stage}"] = tensor

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        known = set()
        for name, shapes in self._stage_shapes.items():
            keys = [f"{prefix}{name}.{stage}" for stage in self.stage_ids]
            known.update(keys)
            missing_keys.extend(key for key in keys if key not in state_dict)
            for key, shape, view in zip(keys, shapes, self.stage_tensors(name), strict=True):
                if key not in state_dict:
                    continue
                given = state_dict[key]
                if tuple(given.shape) != shape:
                    error_msgs.append(f"{key} has shape {list(given.shape)}, the network needs {list(shape)}")
                else:
                    view.copy_(given)
        if strict:
            unexpected_keys.extend(
                key
                for key in state_dict
                if key.startswith(prefix)
                and key not in known
                and key[len(prefix) :].split(".")[0] in self._stage_shapes
            )


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
        self.in_features, self.out_features = tuple(in_features), tuple(out_features)
        self.add_stage_parameter("weight", list(zip(out_features, in_features, strict=True)))
        for weight in self.stage_tensors("weight"):
            (initialise or xavier_uniform())(weight, weight.shape[1], weight.shape[0])
        _add_bias(self, out_features, bias)

    def forward(self, x: StageBatch, *, residual: StageBatch | None = None, scale: float = 1.0) -> StageBatch:
        """``scale * (x @ weight.T + bias + residual)`` for every pixel."""
        y = grouped_linear(x, self.packed("weight", x.dtype), self.packed("bias", x.dtype))
        if residual is not None:
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
        self.in_channels, self.out_channels, self.kernel = tuple(in_channels), tuple(out_channels), kernel
        self.resample, self.filter = resample, tuple(filter)
        self.add_stage_parameter(
            "weight", [(o, i, kernel, kernel) for i, o in zip(in_channels, out_channels, strict=True)]
        )
        for weight in self.stage_tensors("weight"):
            taps = kernel * kernel
            (initialise or xavier_uniform())(weight, weight.shape[1] * taps, weight.shape[0] * taps)
        _add_bias(self, out_channels, bias)

    def forward(
        self,
        x: StageBatch,
        *,
        skip: StageBatch | Tensor | None = None,
        sample_bias: StageBatch | None = None,
        residual: StageBatch | None = None,
        scale: float = 1.0,
    ) -> StageBatch:
        resample = self.resample
        if resample is not None and self.filter != BOX:
            x = resample2d(x, self.filter, **{resample: 2})
            resample = None
        return grouped_conv2d(
            x,
            self.packed("weight", x.dtype),
            self.packed("bias", x.dtype),
            skip=skip,
            sample_bias=sample_bias,
            residual=residual,
            scale=scale,
            resample=resample,
        )

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
        self.in_channels, self.out_channels, self.kernel = tuple(in_channels), tuple(out_channels), kernel
        self.stride, self.padding = stride, padding
        self.filter = None if filter is None else tuple(filter)
        if self.filter is not None and (len(self.filter) % 2 or (kernel, stride, padding) != (3, 2, 0)):
            raise ValueError(
                f"StageStridedConv2d: a filter must have an even number of taps and goes with kernel 3, "
                f"stride 2, padding 0, got {len(self.filter)} taps with kernel {kernel}, stride {stride}, "
                f"padding {padding}"
            )
        self.add_stage_parameter(
            "weight", [(o, i, kernel, kernel) for i, o in zip(in_channels, out_channels, strict=True)]
        )
        for weight in self.stage_tensors("weight"):
            taps = kernel * kernel
            (initialise or xavier_uniform())(weight, weight.shape[1] * taps, weight.shape[0] * taps)
        _add_bias(self, out_channels, True)

    def forward(self, x: StageBatch) -> StageBatch:
        if self.filter is not None:
            x = resample2d(
                StageBatch.from_segments([F.pad(s, (1, 1, 1, 1)) for s in x.segments()]), self.filter
            )
        weights, biases = (self.packed(name, x.dtype).tensors() for name in ("weight", "bias"))
        return StageBatch.from_segments(
            [
                F.conv2d(segment, weight, bias, self.stride, self.padding)
                for segment, weight, bias in zip(x.segments(), weights, biases, strict=True)
            ]
        )

    def extra_repr(self) -> str:
        return f"{self.in_channels} -> {self.out_channels}, kernel={self.kernel}, stride={self.stride}"


class StageTable(StageModule):
    """One learned vector per row and stage, ``[rows, C_s]``: the position embedding of a transformer."""

    def __init__(self, rows: int, channels: Sequence[int], *, initialise: Initialiser | None = None) -> None:
        super().__init__(len(channels))
        self.rows, self.channels = rows, tuple(channels)
        self.add_stage_parameter("weight", [(rows, c) for c in channels])
        for weight in self.stage_tensors("weight"):
            (initialise or normal(0.02))(weight, weight.shape[1], weight.shape[0])

    def forward(self, x: StageBatch) -> StageBatch:
        """Adds row i to pixel i of every sample; x has ``rows`` pixels."""
        tables = self.packed("weight", x.dtype).tensors()
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
        for name in ("weight", "bias"):
            self.add_stage_parameter(name, [(c,) for c in channels])
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(
        self,
        x: StageBatch,
        *,
        scale: StageBatch | None = None,
        shift: StageBatch | None = None,
        activation: str | None = None,
    ) -> StageBatch:
        weight, bias = self.packed("weight"), self.packed("bias")
        return group_norm(
            x, self.groups, weight, bias, self.eps, scale=scale, shift=shift, activation=activation
        )

    def extra_repr(self) -> str:
        return f"{self.channels} in {self.groups} groups"


class StageLayerNorm(StageModule):
    """Normalises the channels of every pixel: :func:`msd_kernels.group_norm` with each pixel as a sample."""

    def __init__(self, channels: Sequence[int], *, eps: float = 1e-5) -> None:
        super().__init__(len(channels))
        self.channels, self.eps = tuple(channels), eps
        for name in ("weight", "bias"):
            self.add_stage_parameter(name, [(c,) for c in channels])
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: StageBatch) -> StageBatch:
        counts = tuple(n * x.height * x.width for n in x.counts)
        pixels = StageBatch(x.values, counts, x.channels, 1, 1)
        return x.with_values(
            group_norm(pixels, 1, self.packed("weight"), self.packed("bias"), self.eps).values
        )

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
        stages: the stages that it serves, ascending.
    """

    def __init__(self, module: nn.Module, stages: Sequence[int]) -> None:
        super().__init__()
        self.module, self.stages = module, tuple(stages)
        for layer in module.modules():
            if isinstance(layer, StageModule):
                layer.stage_ids = self.stages

    def forward(self, x: StageBatch, *others: StageBatch | None) -> StageBatch:
        """``module(x, *others)`` with the stages served taken out of each of them."""
        served = self.module(*(batch if batch is None else self._take(batch) for batch in (x, *others)))
        segments = x.segments()
        for stage, segment in zip(self.stages, served.segments(), strict=True):
            segments[stage] = segment
        return StageBatch.from_segments(segments)

    def _take(self, batch: StageBatch) -> StageBatch:
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


def _add_bias(layer: StageModule, sizes: Sequence[int], bias: bool) -> None:
    if not bias:
        layer.register_parameter("bias", None)
        return
    layer.add_stage_parameter("bias", [(size,) for size in sizes])
    nn.init.zeros_(layer.bias)

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

__all__ = ["StageAttention", "StageConv2d", "StageGroupNorm", "StageLinear", "StageModule", "xavier_uniform"]

BOX = (1, 1)

Initialiser = Callable[[Tensor, int, int], None]


def xavier_uniform(gain: float = 1.0) -> Initialiser:
    """Weights from U(−1, 1) · gain · √(6 / (fan_in + fan_out)), as in the EDM networks (Glorot & Bengio 2010)."""

    def initialise(weight: Tensor, fan_in: int, fan_out: int) -> None:
        bound = gain * math.sqrt(6 / (fan_in + fan_out))
        with torch.no_grad():
            weight.uniform_(-bound, bound)

    return initialise


class StageModule(nn.Module):
    """A module whose parameters are packed over the stages but saved and loaded per stage."""

    def __init__(self, num_stages: int) -> None:
        super().__init__()
        self.num_stages = num_stages
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
            for stage, tensor in enumerate(self.stage_tensors(name, flat if keep_vars else flat.detach())):
                destination[f"{prefix}{name}.{stage}"] = tensor

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        known = set()
        for name, shapes in self._stage_shapes.items():
            keys = [f"{prefix}{name}.{stage}" for stage in range(len(shapes))]
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

    def forward(self, x: StageBatch) -> StageBatch:
        return grouped_linear(x, self.packed("weight", x.dtype), self.packed("bias", x.dtype))

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
        self.add_stage_parameter("weight", [(o, i, kernel, kernel) for i, o in zip(in_channels, out_channels, strict=True)])
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


class StageAttention(nn.Module):
    """Self-attention over the pixels of a feature map: norm, 1×1 qkv, :func:`msd_kernels.attention`, 1×1 projection.

    ``y = scale * (x + proj(attention(qkv(norm(x)))))``. ``layout`` is the order of the qkv channels.
    """

    def __init__(
        self,
        norm: StageGroupNorm,
        qkv: StageConv2d,
        proj: StageConv2d,
        num_heads: Sequence[int],
        *,
        layout: str,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.norm, self.qkv, self.proj = norm, qkv, proj
        self.num_heads, self.layout, self.scale = tuple(num_heads), layout, scale

    def forward(self, x: StageBatch) -> StageBatch:
        qkv = self.qkv(self.norm(x))
        attended = attention(qkv, num_heads=self.num_heads, layout=self.layout)
        return self.proj(attended, residual=x, scale=self.scale)


def _add_bias(layer: StageModule, sizes: Sequence[int], bias: bool) -> None:
    if not bias:
        layer.register_parameter("bias", None)
        return
    layer.add_stage_parameter("bias", [(size,) for size in sizes])
    nn.init.zeros_(layer.bias)

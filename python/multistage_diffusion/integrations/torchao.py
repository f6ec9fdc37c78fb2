"""Quantised weights of stage layers, by ``torchao``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torchao.core.config import AOBaseConfig
from torchao.quantization import quantize_

from multistage_diffusion.networks.layers import PerStage, StageConv2d, StageLinear

__all__ = ["QuantizedPerStage", "quantize_stages_"]


class QuantizedPerStage(PerStage):
    """One quantised matrix per stage, in place of a layer's weights; called, it gives them in floating point.

    Args:
        matrices: per stage the weight as ``torchao``'s tensor ``[O, I · kh · kw]``.
        shapes: per stage the weight's own shape.
        stage_ids: the stages' numbers in the network, which name them.
    """

    def __init__(
        self, matrices: Sequence[Tensor], shapes: Sequence[torch.Size], stage_ids: Sequence[int]
    ) -> None:
        super().__init__([nn.Parameter(matrix, requires_grad=False) for matrix in matrices])
        self.renumber(stage_ids)
        self._shapes = tuple(shapes)

    def forward(self) -> list[Tensor]:
        """The weights in their own shapes, made anew in every call."""
        pairs = zip(super().forward(), self._shapes, strict=True)
        return [matrix.dequantize().view(shape) for matrix, shape in pairs]


def quantize_stages_(
    network: nn.Module,
    config: AOBaseConfig,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
) -> None:
    """Quantises the weights of :class:`StageLinear` and :class:`StageConv2d` layers in place, for inference.

    ``torchao.quantization.quantize_`` knows ``nn.Linear`` alone and skips stage layers without a word. Here each
    stage's weight goes through it as the matrix ``[O, I · kh · kw]`` of an ``nn.Linear``. The layers stay what they
    are, with the same kernels: they get the weights in floating point again in every call, so this saves memory and no
    time, and what a ``config`` says of activations has no effect. Biases stay as they are. To load a quantised
    ``state_dict``, quantise the network first.

    Args:
        config: as ``quantize_`` takes it, such as ``Int8WeightOnlyConfig()``.
        filter_fn: called with a stage layer and its name; whether to quantise it. Default: all.

    Raises:
        ValueError: ``torchao`` left a weight as it is (groups that do not divide its rows, say); nothing is changed.
    """
    holders = {}
    for name, layer in network.named_modules():
        if isinstance(layer, StageLinear | StageConv2d) and (filter_fn is None or filter_fn(layer, name)):
            matrices = [_quantized(weight, config) for weight in layer.weight()]
            if any(type(matrix) is Tensor for matrix in matrices):
                raise ValueError(
                    f"quantize_stages_: {type(config).__name__} quantises no weight like those of {name}, "
                    f"{[list(weight.shape) for weight in layer.weight()]}; exclude the layer by filter_fn"
                )
            shapes = [weight.shape for weight in layer.weight()]
            holders[layer] = QuantizedPerStage(matrices, shapes, layer.stage_ids)
    for layer, holder in holders.items():
        layer.weight = holder


def _quantized(weight: Tensor, config: AOBaseConfig) -> Tensor:
    rows, *window = weight.shape
    linear = nn.Linear(math.prod(window), rows, bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach().flatten(1), requires_grad=False)
    quantize_(linear, config)
    return linear.weight.detach()

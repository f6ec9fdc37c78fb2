"""What a network multiplies: its convolutions, linear layers and attention's products, each alone on random tensors.

All of them one after another are the floor of a step, :class:`Floor`: what it would take if nothing else cost anything.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from harness import Function, wall_clock
from msd_kernels import StageBatch, grouped_conv2d, grouped_linear
from msd_kernels.dispatch.backends import BackendError, use
from msd_kernels.layouts import AttentionLayout, Conv2dLayout, LinearLayout
from multistage_diffusion import networks
from multistage_diffusion.flops import conditioning

Layout = Conv2dLayout | LinearLayout | AttentionLayout
LAYOUTS = {"grouped_conv2d": Conv2dLayout, "grouped_linear": LinearLayout, "attention": AttentionLayout}
# What computes a layer on a processor: our kernels, or PyTorch's library.
WAYS = ("cpu", "library")


class Recorder(TorchDispatchMode):
    """Counts the layouts of the products that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.layouts: Counter[Layout] = Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        namespace, _, name = op._schema.name.partition("::")
        if namespace == "msd_kernels" and (layout := LAYOUTS.get(name)):
            named = dict(zip((argument.name for argument in op._schema.arguments), args, strict=False))
            fields = (named[field] for field in layout._fields)
            self.layouts[layout(*(tuple(f) if isinstance(f, list) else f for f in fields))] += 1
        return op(*args, **(kwargs or {}))


def layouts(config: dict, counts: Sequence[int]) -> Counter[Layout]:
    """How often a forward of so many samples per stage asks for each product; no arithmetic is done."""
    with torch.device("meta"):
        network = networks.build(config)
        x = torch.zeros(sum(counts), network.in_channels, network.image_size, network.image_size)
        noise = torch.zeros(sum(counts))
    stage = [k for k, count in enumerate(counts) for _ in range(count)]
    with torch.no_grad(), Recorder() as recorder:
        network(x, noise, stage, **conditioning(network, len(stage)))
    return recorder.layouts


class Draw:
    """Draws the tensors of a layer, which gradients are wanted for."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype, self._generator = dtype, torch.Generator().manual_seed(0)

    def __call__(self, *size: int, std: float = 1.0) -> Tensor:
        values = torch.randn(size, generator=self._generator) * std
        return values.to(self._dtype).requires_grad_()


class Convolution:
    """A convolution; its addends are a bias alone."""

    def __init__(self, layout: Conv2dLayout, dtype: torch.dtype) -> None:
        draw, taps = Draw(dtype), layout.kernel
        self.layout = layout
        widths = [channels for channels in (layout.channels, layout.skip_channels) if any(channels)]
        self.sources = [draw(_elements(layout.counts, channels) * layout.in_pixels) for channels in widths]
        self.weights = [
            draw(o, c, taps, taps, std=(taps**2 * c) ** -0.5)
            for o, c in zip(layout.out_channels, layout.in_channels, strict=True)
        ]
        self.biases = [draw(o) for o in layout.out_channels]
        self.leaves = [*self.sources, *self.weights, *self.biases]
        self.dy = draw(_elements(layout.counts, layout.out_channels) * layout.out_pixels).detach()

    def forward(self) -> Tensor:
        layout = self.layout
        x, *skip = (
            StageBatch(values, layout.counts, channels, layout.height, layout.width)
            for values, channels in zip(
                self.sources, (layout.channels, layout.skip_channels)[: len(self.sources)], strict=True
            )
        )
        resample = None if layout.resample == "none" else layout.resample
        skip = skip[0] if skip else None
        return grouped_conv2d(x, self.weights, self.biases, skip=skip, resample=resample).values


class Linear:
    """A linear layer, its rows as vectors."""

    def __init__(self, layout: LinearLayout, dtype: torch.dtype) -> None:
        draw = Draw(dtype)
        self.layout = layout
        sides = list(zip(layout.out_features, layout.in_features, strict=True))
        self.x = draw(_elements(layout.rows, layout.in_features))
        self.weights = [draw(o, i, std=i**-0.5) for o, i in sides]
        self.biases = [draw(o) for o, _ in sides]
        self.leaves = [self.x, *self.weights, *self.biases]
        self.dy = draw(_elements(layout.rows, layout.out_features)).detach()

    def forward(self) -> Tensor:
        x = StageBatch(self.x, self.layout.rows, self.layout.in_features, 1, 1)
        return grouped_linear(x, self.weights, self.biases).values


class AttentionProducts:
    """The two products of an attention, without the softmax between them."""

    def __init__(self, layout: AttentionLayout, dtype: torch.dtype) -> None:
        draw = Draw(dtype)
        stages = zip(layout.counts, layout.heads, layout.head_dims, strict=True)
        sizes = [(n * heads, d) for n, heads, d in stages if n]
        self.stages = [
            (
                draw(batch, layout.tokens, d),
                draw(batch, layout.context, d),
                draw(batch, layout.context, d, std=d**-0.5),
            )
            for batch, d in sizes
        ]
        self.leaves = [tensor for stage in self.stages for tensor in stage]
        self.dy = draw(sum(batch * layout.tokens * d for batch, d in sizes)).detach()

    def forward(self) -> Tensor:
        return torch.cat([(q @ k.mT @ v).flatten() for q, k, v in self.stages])


PRODUCTS: dict[type, Callable] = {
    Conv2dLayout: Convolution,
    LinearLayout: Linear,
    AttentionLayout: AttentionProducts,
}


def inference(product: Convolution | Linear | AttentionProducts) -> list[Tensor]:
    """Its result alone."""
    with torch.no_grad():
        return [product.forward()]


def gradients(product: Convolution | Linear | AttentionProducts) -> list[Tensor | None]:
    """Its result and the gradients of all that goes in."""
    y = product.forward()
    return [y, *torch.autograd.grad(y, product.leaves, product.dy, allow_unused=True)]


def computed_by(way: str, function: Callable, *arguments: object) -> Function:
    """A function with a backend forced, forward and backward."""

    def run() -> object:
        with use(way):
            return function(*arguments)

    return run


class Part(NamedTuple):
    """A product of a step."""

    run: Function
    times: int


class Floor:
    """Every product of a step, as often as the step asks for it, each in the way that is faster here and now.

    Args:
        found: how often a forward asks for each.
        dtype: of all tensors.
        backward: with the gradients of inputs and weights.
    """

    LONG_ENOUGH = 0.03  # seconds of a way's calls from which on the fastest of them tells

    def __init__(self, found: Counter[Layout], dtype: torch.dtype, *, backward: bool) -> None:
        function = gradients if backward else inference
        self.parts = [
            Part(_faster(function, PRODUCTS[type(layout)](layout, dtype)), times)
            for layout, times in found.items()
        ]

    def __call__(self) -> None:
        for run, times in self.parts:
            for _ in range(times):
                run()


def _faster(function: Callable, product: Convolution | Linear | AttentionProducts) -> Function:
    if isinstance(product, AttentionProducts):
        return lambda: function(product)
    seconds: dict[Function, float] = {}
    for way in WAYS:
        run = computed_by(way, function, product)
        with suppress(BackendError):
            seconds[run] = _least_seconds(run)
    return min(seconds, key=seconds.get)


def _least_seconds(run: Function) -> float:
    calls: list[float] = []
    while sum(calls) < Floor.LONG_ENOUGH:
        calls.append(wall_clock(run))
    return min(calls)


def _elements(counts: Sequence[int], widths: Sequence[int]) -> int:
    return sum(n * width for n, width in zip(counts, widths, strict=True))

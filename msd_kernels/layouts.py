"""What is known about a call before its data: one immutable object per op, made once and passed whole.

The fields of a layout are arguments of the registered op, in this order; nothing but the layout itself spells them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

__all__ = [
    "Affine",
    "AttentionLayout",
    "Conv2dLayout",
    "GroupNormLayout",
    "Layout",
    "LinearLayout",
    "Resample2dLayout",
    "flatten_heads",
    "products",
    "resampled_size",
    "starts",
    "view_heads",
]

# How a value that belongs to a pixel of one map is found in another: at the pixel, at half its position, or as the mean
# or sum of 2×2 pixels.
SAME, HALF, MEAN, SUM = range(4)
# No tile of a kernel reaches over more rows, those of a row that is written to 2×2 pixels counted each.
MOST_ROWS = 1024
# What one layout keeps; streams, for which plans are kept apart, come and go.
MOST_DERIVED = 256

Derived = TypeVar("Derived")


class Layout(tuple):
    """What all layouts are besides tuples: they keep what is derived from them."""

    def __reduce__(self) -> tuple[type, tuple]:
        return type(self), tuple(self)

    @cached_property
    def _derived(self) -> dict[Hashable, Any]:
        return {}

    def derived(self, key: Hashable, make: Callable[[], Derived]) -> Derived:
        """``make()``, which depends on nothing but this layout and ``key``; made once. Never None."""
        kept = self._derived
        found = kept.get(key)
        if found is None:
            if len(kept) >= MOST_DERIVED:
                kept.clear()
            found = kept[key] = make()
        return found


def layout(fields: type) -> type:
    """A decorator: the NamedTuple as a :class:`Layout`, with its cached properties, which NamedTuple alone breaks."""
    members = {name: member for name, member in vars(fields).items() if name != "__slots__"}
    return type(fields.__name__, (fields, Layout), members)


@layout
class Conv2dLayout(NamedTuple):
    """Of a call of :func:`msd_kernels.grouped_conv2d`.

    Attributes:
        counts: samples per stage.
        channels, skip_channels, out_channels: per stage, of the first source, the second (0 without one), the output.
        height, width: of the sources.
        kernel: the odd side of the weights.
        resample: ``"none"``, or what happens to the sources first: ``"up"`` or ``"down"``.
    """

    counts: tuple[int, ...]
    channels: tuple[int, ...]
    skip_channels: tuple[int, ...]
    out_channels: tuple[int, ...]
    height: int
    width: int
    kernel: int
    resample: str

    @cached_property
    def stages(self) -> list[int]:
        """The stages that have samples."""
        return [stage for stage, count in enumerate(self.counts) if count]

    @property
    def taps(self) -> int:
        return self.kernel**2

    @property
    def in_pixels(self) -> int:
        return self.height * self.width

    @property
    def out_size(self) -> tuple[int, int]:
        return resampled_size(self.height, self.width, self.resample)

    @property
    def out_pixels(self) -> int:
        height, width = self.out_size
        return height * width

    @cached_property
    def in_channels(self) -> tuple[int, ...]:
        """Of both sources together."""
        return tuple(c + d for c, d in zip(self.channels, self.skip_channels, strict=True))

    @cached_property
    def weight_sizes(self) -> list[int]:
        """Elements of each stage's weight."""
        taps = self.taps
        return [size * taps for size in products(self.out_channels, self.in_channels)]

    @cached_property
    def weight_shapes(self) -> list[tuple[int, int, int, int]]:
        """Of each stage."""
        k = self.kernel
        return [(o, i, k, k) for o, i in zip(self.out_channels, self.in_channels, strict=True)]

    @cached_property
    def bias_shapes(self) -> list[tuple[int]]:
        return [(o,) for o in self.out_channels]

    @cached_property
    def sample_sizes(self) -> list[int]:
        """Of each stage's biases of single samples."""
        return products(self.counts, self.out_channels)

    @cached_property
    def out_sizes(self) -> list[int]:
        """Of each stage's output."""
        pixels = self.out_pixels
        return [size * pixels for size in self.sample_sizes]

    def source_sizes(self, channels: Sequence[int]) -> list[int]:
        """Of each stage's part of a source."""
        pixels = self.in_pixels
        return [size * pixels for size in products(self.counts, channels)]

    def offsets(self, channels: Sequence[int], pixels: int) -> list[int]:
        """The first element of each stage in a flat buffer of ``[n, pixels, channels]`` segments."""
        return starts(size * pixels for size in products(self.counts, channels))

    @cached_property
    def convolves_first(self) -> bool:
        """A 1×1 convolution commutes with nearest up-sampling, so it runs on the four times smaller map."""
        return self.kernel == 1 and self.resample == "up"

    @cached_property
    def grid(self) -> tuple[int, int]:
        """Height and width of the map that the forward product and the weight gradient run over."""
        return (self.height, self.width) if self.convolves_first else self.out_size

    @cached_property
    def source_gather(self) -> int:
        """How a value of that grid is found in the sources."""
        return SAME if self.convolves_first else {"none": SAME, "up": HALF, "down": MEAN}[self.resample]

    @cached_property
    def source_grid(self) -> tuple[int, int]:
        """Height and width of the map that the product of the input gradients runs over."""
        return self.out_size if self.resample == "down" else (self.height, self.width)

    @cached_property
    def flops(self) -> int:
        """Of the forward pass: two per multiply-add. The gradients of the weights need as many.

        As of a convolution of resampled sources, also where it runs on the smaller map.
        """
        return sum(self.source_flops(self.in_channels))

    def source_flops(self, channels: Sequence[int]) -> list[int]:
        """Of each stage's products with a source of so many channels, as of those for its gradient."""
        taken = zip(self.counts, channels, self.out_channels, strict=True)
        return [2 * self.out_pixels * self.taps * n * c * o for n, c, o in taken]

    @cached_property
    def largest_local_offset(self) -> int:
        """The largest distance inside one image, one weight or the rows of one tile."""
        pixels = max(self.in_pixels, self.out_pixels)
        widest = max(*self.channels, *self.skip_channels, *self.out_channels)
        return max(pixels * widest, MOST_ROWS * widest, *self.weight_sizes)

    @cached_property
    def most_pixels(self) -> int:
        """Of a stage's samples together, in the larger of both maps."""
        return max(self.counts, default=0) * max(self.in_pixels, self.out_pixels)


class Affine(NamedTuple):
    """The parameters of a GroupNorm, of all stages; None stands for 1 or 0.

    Attributes:
        weight, bias: one value per channel.
        scale, shift: one value per sample and channel.
    """

    weight: Tensor | None = None
    bias: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None


@layout
class GroupNormLayout(NamedTuple):
    """Of a call of :func:`msd_kernels.group_norm`.

    Attributes:
        counts: samples per stage; a dense tensor is one stage.
        channels, skip_channels, groups: per stage; channels of the first source, and of the second (0 without one).
        spatial: pixels.
        channels_last: whether the channels lie innermost.
        eps: added to the variance.
        silu: whether a SiLU follows.
        dropout: probability that an element of the result is 0.
    """

    counts: tuple[int, ...]
    channels: tuple[int, ...]
    skip_channels: tuple[int, ...]
    groups: tuple[int, ...]
    spatial: int
    channels_last: bool
    eps: float
    silu: bool
    dropout: float = 0.0

    @cached_property
    def sizes(self) -> GroupNormLayout:
        """What a launch is planned from."""
        return self._replace(eps=0.0, silu=False, dropout=0.0)

    @property
    def in_channels(self) -> tuple[int, ...]:
        """Of both sources together, and of the output."""
        return tuple(c + d for c, d in zip(self.channels, self.skip_channels, strict=True))

    @property
    def has_skip(self) -> bool:
        """Whether there is a second source."""
        return any(self.skip_channels)

    @cached_property
    def joined(self) -> GroupNormLayout:
        """Of the same call on one source that holds the channels of both."""
        return self._replace(channels=self.in_channels, skip_channels=(0,) * len(self.channels))

    @cached_property
    def widest_group(self) -> int:
        """Channels of the largest group."""
        return max(c // g for c, g in zip(self.in_channels, self.groups, strict=True))

    @cached_property
    def sample_sizes(self) -> list[int]:
        """Samples times channels, per stage."""
        return products(self.counts, self.in_channels)

    @cached_property
    def weight_shapes(self) -> list[tuple[int]]:
        """Of each stage's weight, and of its bias."""
        return [(c,) for c in self.in_channels]

    @cached_property
    def stat_sizes(self) -> list[int]:
        """Means of each stage."""
        return products(self.counts, self.groups)

    @cached_property
    def out_sizes(self) -> list[int]:
        """Elements of each stage's output."""
        return self.source_sizes(self.in_channels)

    def source_sizes(self, channels: Sequence[int]) -> list[int]:
        """Of each stage's part of a source."""
        return [size * self.spatial for size in products(self.counts, channels)]

    def planes(self, x: Tensor, channels: Sequence[int] | None = None) -> list[Tensor]:
        """Views of the stages, ``[n, C, pixels]``, of a flat buffer of so many channels, or of the output's."""
        n, spatial = self.counts, self.spatial
        channels = self.in_channels if channels is None else channels
        return [
            part.view(n[s], spatial, c).transpose(1, 2) if self.channels_last else part.view(n[s], c, spatial)
            for s, (part, c) in enumerate(zip(x.split(self.source_sizes(channels)), channels, strict=True))
        ]


@layout
class AttentionLayout(NamedTuple):
    """Of a call of :func:`msd_kernels.attention`.

    Attributes:
        counts: samples per stage; dense tensors are one stage.
        heads, head_dims: per stage.
        tokens: of the queries and the output.
        context: tokens of the keys and values.
        order: how the tensors lie, see :func:`view_heads`; with a "p" the first tensor holds queries, keys and values.
        scale: the factor on the scores, None for 1 / sqrt(head dimension).
    """

    counts: tuple[int, ...]
    heads: tuple[int, ...]
    head_dims: tuple[int, ...]
    tokens: int
    context: int
    order: str
    scale: float | None

    @property
    def stages(self) -> list[int]:
        """The stages that have samples."""
        return [stage for stage, count in enumerate(self.counts) if count]

    @property
    def packed(self) -> bool:
        return "p" in self.order

    @property
    def out_order(self) -> str:
        """Of the output, which lies as one part of a packed tensor does."""
        return self.order.replace("p", "")

    @property
    def channels(self) -> list[int]:
        """Of the output, per stage."""
        return products(self.heads, self.head_dims)

    @property
    def log_sum_sizes(self) -> list[int]:
        """Log-sum-exps of each stage: one per sample, head and token."""
        return [size * self.tokens for size in products(self.counts, self.heads)]

    @property
    def out_sizes(self) -> list[int]:
        """Elements of each stage's output."""
        return products(self.log_sum_sizes, self.head_dims)

    @property
    def product_flops(self) -> int:
        """Of one product of queries and keys, and of every other that attention takes: two per multiply-add."""
        return 2 * self.context * sum(self.out_sizes)

    def scale_of(self, stage: int) -> float:
        """The factor on the scores of one stage."""
        return self.head_dims[stage] ** -0.5 if self.scale is None else self.scale

    def inputs(self, q: Tensor | None, k: Tensor | None, v: Tensor | None) -> list[tuple[Tensor | None, ...]]:
        """Views of each stage's queries, keys and values as ``[n, h, t, d]``.

        Serves gradients, too; one that is None is None in every stage.
        """
        if self.packed:
            return [view.unbind(0) for view in self._views(q, self.tokens, self.order)]
        lengths = ((q, self.tokens), (k, self.context), (v, self.context))
        return list(zip(*(self._views(t, length, self.order) for t, length in lengths), strict=True))

    def outputs(self, y: Tensor) -> list[Tensor]:
        """Views of each stage's output, or of its cotangent, as ``[n, h, t, d]``."""
        return self._views(y, self.tokens, self.out_order)

    def _views(self, flat: Tensor | None, tokens: int, order: str) -> list[Tensor | None]:
        if flat is None:
            return [None] * len(self.counts)
        parts = 3 if "p" in order else 1
        stages = list(zip(self.counts, self.heads, self.head_dims, strict=True))
        segments = flat.split([parts * n * tokens * h * d for n, h, d in stages])
        return [
            view_heads(part, n, tokens, h, d, order) for part, (n, h, d) in zip(segments, stages, strict=True)
        ]


@layout
class LinearLayout(NamedTuple):
    """Of a call of :func:`msd_kernels.grouped_linear`.

    Attributes:
        rows: per stage; samples times pixels.
        in_features, out_features: per stage.
    """

    rows: tuple[int, ...]
    in_features: tuple[int, ...]
    out_features: tuple[int, ...]

    @cached_property
    def in_sizes(self) -> list[int]:
        """Elements of each stage's input."""
        return products(self.rows, self.in_features)

    @cached_property
    def out_sizes(self) -> list[int]:
        """Of each stage's output."""
        return products(self.rows, self.out_features)

    @cached_property
    def weight_shapes(self) -> list[tuple[int, int]]:
        """Of each stage."""
        return list(zip(self.out_features, self.in_features, strict=True))

    @cached_property
    def bias_shapes(self) -> list[tuple[int]]:
        return [(o,) for o in self.out_features]

    @cached_property
    def flops(self) -> int:
        """Of the forward pass: two per multiply-add. Each gradient of a factor needs as many."""
        return sum(self.stage_flops)

    @cached_property
    def stage_flops(self) -> list[int]:
        """The part of each stage."""
        stages = zip(self.rows, self.in_features, self.out_features, strict=True)
        return [2 * n * i * o for n, i, o in stages]

    @cached_property
    def conv2d(self) -> Conv2dLayout:
        """The convolution that this is: of kernel 1, on maps of one pixel."""
        return Conv2dLayout(
            self.rows, self.in_features, (0,) * len(self.rows), self.out_features, 1, 1, 1, "none"
        )

    def inputs(self, x: Tensor) -> list[Tensor]:
        """Each stage's part ``[rows, I]`` of the flat input."""
        parts = x.split(self.in_sizes)
        return [part.view(n, i) for part, n, i in zip(parts, self.rows, self.in_features, strict=True)]

    def outputs(self, y: Tensor) -> list[Tensor]:
        """Each stage's part ``[rows, O]`` of what lies as the output."""
        parts = y.split(self.out_sizes)
        return [part.view(n, o) for part, n, o in zip(parts, self.rows, self.out_features, strict=True)]


@layout
class Resample2dLayout(NamedTuple):
    """Of a call of :func:`msd_kernels.resample2d`.

    Downward it correlates with ``taps``, gain included, at ``stride``; upward it is the adjoint of that. A downward
    pass may leave the last row and column out, so that its input's size does not follow from its output's.

    Attributes:
        taps: the filter of either axis.
        upward: whether the call spreads elements instead of collecting them.
        stride: 1 or 2.
        counts: samples per stage; a dense tensor is one stage.
        channels: per stage.
        height, width: of the input.
        out_height, out_width: of the output.
        channels_last: whether the channels lie innermost, as they do in every StageBatch.
    """

    taps: tuple[float, ...]
    upward: bool
    stride: int
    counts: tuple[int, ...]
    channels: tuple[int, ...]
    height: int
    width: int
    out_height: int
    out_width: int
    channels_last: bool

    @cached_property
    def sizes(self) -> Resample2dLayout:
        """What a launch is planned from."""
        return self._replace(taps=(), upward=False, stride=1)

    @cached_property
    def adjoint(self) -> Resample2dLayout:
        """Of the gradient: the op is linear, and its adjoint is the same op in the other direction."""
        return self._replace(
            upward=not self.upward,
            height=self.out_height,
            width=self.out_width,
            out_height=self.height,
            out_width=self.width,
        )

    @cached_property
    def out_elements(self) -> int:
        """Of the output, all stages together."""
        return sum(products(self.counts, self.channels)) * self.out_height * self.out_width

    def planes(self, x: Tensor) -> list[Tensor]:
        """Views of the input's stages, ``[n, H, W, C]``, or ``[n, C, H, W]`` where channels do not lie innermost."""
        height, width = self.height, self.width
        parts = x.split([size * height * width for size in products(self.counts, self.channels)])
        return [
            part.view(n, height, width, c) if self.channels_last else part.view(n, c, height, width)
            for part, n, c in zip(parts, self.counts, self.channels, strict=True)
        ]


def resampled_size(height: int, width: int, resample: str) -> tuple[int, int]:
    """Height and width after ``"none"``, ``"up"`` or ``"down"``."""
    if resample == "up":
        return 2 * height, 2 * width
    return (height // 2, width // 2) if resample == "down" else (height, width)


# A memory order names the axes of a flat buffer, the slowest first: n samples, t tokens, h heads, d head dimension, and
# in a packed buffer p, the three parts q, k and v.


def view_heads(flat: Tensor, n: int, tokens: int, heads: int, head_dim: int, order: str) -> Tensor:
    """A view of a stage's segment as ``[n, h, t, d]``, or ``[p, n, h, t, d]`` where it is packed."""
    sizes = {"n": n, "t": tokens, "h": heads, "d": head_dim, "p": 3}
    axes = "pnhtd" if "p" in order else "nhtd"
    return flat.view([sizes[axis] for axis in order]).permute([order.index(axis) for axis in axes])


def flatten_heads(x: Tensor, order: str) -> Tensor:
    """The inverse of :func:`view_heads`: a view where ``x`` already lies in that order without gaps, else a copy."""
    axes = "pnhtd" if "p" in order else "nhtd"
    return x.permute([axes.index(axis) for axis in order]).reshape(-1).contiguous()


def products(a: Sequence[int], b: Sequence[int]) -> list[int]:
    """Of one factor per stage each."""
    return [i * j for i, j in zip(a, b, strict=True)]


def starts(sizes) -> list[int]:
    """The first element of each of several consecutive blocks."""
    return list(accumulate(sizes, initial=0))[:-1]

"""The packed stage batch: one flat buffer for a batch whose samples belong to different stages."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from operator import index

import torch
from torch import Tensor

from msd_kernels import containers

__all__ = ["StageBatch"]

# Elements of batches by their layout.
_totals: dict[tuple, int] = {}
MOST_TOTALS = 16384
INTEGERS = frozenset((int,))


@dataclass(frozen=True, eq=False)
class StageBatch:
    """A feature map of a mixed batch, sorted by stage, without padding.

    ``values`` is ONE flat buffer. It holds stage after stage; the segment of stage ``s`` is a dense NHWC block
    ``[counts[s], height, width, channels[s]]``. Stages may have different channel counts, and a stage without
    samples (``counts[s] == 0``) is normal. What is elementwise is one ordinary call on ``values``::

        y = x.with_values(x.values * 0.5)

    PyTorch's tools take it for the container that it is: a pytree whose one leaf is ``values``, and a dataclass.
    Forward hooks see it as it is. A full backward hook never fires on a module that returns one, of which PyTorch
    warns: give ``y.values.register_hook`` what is to see the gradient. ``torch.utils.checkpoint`` is right with
    ``use_reentrant=False``; with True it is refused where it takes a StageBatch, and must not return one.

    Args:
        values: flat tensor of ``sum(counts[s] * height * width * channels[s])`` elements; one with gaps is copied.
        counts: samples per stage, known on the host.
        channels: channels per stage.
        height, width: spatial size, the same for all stages. Vectors per sample have ``height = width = 1``.

    Raises:
        TypeError: ``values`` is not a tensor, or another field holds what is no integer.
        ValueError: ``values`` is not flat or its size does not follow from the other fields.
    """

    values: Tensor
    counts: tuple[int, ...]
    channels: tuple[int, ...]
    height: int
    width: int

    checked = True  # by the constructor, which the functions that tools map over containers go around

    def __post_init__(self) -> None:
        if type(self.counts) is not tuple or type(self.channels) is not tuple:
            object.__setattr__(self, "counts", tuple(self.counts))
            object.__setattr__(self, "channels", tuple(self.channels))
        if not torch.compiler.is_compiling() and not INTEGERS.issuperset(
            map(type, (*self.counts, *self.channels, self.height, self.width))
        ):
            self._make_integers()
        if not isinstance(self.values, Tensor):
            raise TypeError(f"StageBatch: values must be a tensor, got {type(self.values).__name__}")
        total = _total(*self.layout)
        values, shape = fixed_shape(self.values)
        if values is not self.values:
            object.__setattr__(self, "values", values)
        if shape != (total,):
            raise ValueError(
                f"StageBatch: values must be flat with {total} elements for counts={self.counts}, "
                f"channels={self.channels}, height={self.height}, width={self.width}, "
                f"got shape {tuple(self.values.shape)}"
            )
        if not self.values.is_contiguous():  # kernels read one dense piece of memory
            object.__setattr__(self, "values", self.values.contiguous())

    def _make_integers(self) -> None:
        """Turns what stands for integers, as NumPy's do, into those: remembered calls are told apart by equality."""
        sizes = (*self.counts, *self.channels, self.height, self.width)
        if torch.jit.is_tracing() and any(isinstance(size, Tensor) for size in sizes):
            raise TypeError(
                "StageBatch: counts, channels, height and width must be integers, got tensors; torch.jit.trace, which "
                "makes tensors of sizes, would keep them as constants: use StageBatch.from_dense or torch.export"
            )
        try:
            counts, channels = (tuple(map(as_integer, sizes)) for sizes in (self.counts, self.channels))
            layout = (counts, channels, as_integer(self.height), as_integer(self.width))
        except TypeError:
            raise TypeError(
                f"StageBatch: counts, channels, height and width must be integers, got counts={self.counts}, "
                f"channels={self.channels}, height={self.height}, width={self.width}"
            ) from None
        for name, value in zip(("counts", "channels", "height", "width"), layout, strict=True):
            object.__setattr__(self, name, value)

    @staticmethod
    def from_segments(segments: Sequence[Tensor]) -> StageBatch:
        """Packs one ``[n_s, C_s, H, W]`` tensor per stage, in any memory format, ``n_s`` may be 0.

        Raises:
            TypeError: an entry is not a tensor, or dtypes or devices differ.
            ValueError: no segments, an entry that is not 4-D, or spatial sizes that differ.
        """
        segments = list(segments)
        if not segments:
            raise ValueError("StageBatch: from_segments needs at least one segment, got none")
        for stage, segment in enumerate(segments):
            if not isinstance(segment, Tensor):
                raise TypeError(
                    f"StageBatch: segment of stage {stage} must be a tensor, got {type(segment).__name__}"
                )
        segments, shapes = map(list, zip(*map(fixed_shape, segments), strict=True))
        for stage, segment in enumerate(segments):
            if segment.dim() != 4:
                raise ValueError(
                    f"StageBatch: segment of stage {stage} must be [n, C, H, W], got {tuple(segment.shape)}"
                )
            if shapes[stage][2:] != shapes[0][2:]:
                raise ValueError(
                    f"StageBatch: segment of stage {stage} must be [n, C, {', '.join(map(str, shapes[0][2:]))}]"
                    f" like stage 0, got {tuple(segment.shape)}"
                )
            if segment.dtype != segments[0].dtype or segment.device != segments[0].device:
                raise TypeError(
                    f"StageBatch: segment of stage {stage} is {segment.dtype} on {segment.device}, "
                    f"stage 0 is {segments[0].dtype} on {segments[0].device}"
                )
        flat = [segment.permute(0, 2, 3, 1).reshape(-1) for segment in segments]
        return StageBatch(
            flat[0] if len(flat) == 1 else torch.cat(flat),
            tuple(shape[0] for shape in shapes),
            tuple(shape[1] for shape in shapes),
            *shapes[0][2:],
        )

    @staticmethod
    def from_dense(x: Tensor, counts: Sequence[int] | None = None) -> StageBatch:
        """Views a dense ``[B, C, H, W]`` or ``[B, C]`` tensor, its samples in stage order, as a stage batch.

        No copy where ``x`` is channels_last (or ``[B, C]``). ``counts`` defaults to one stage.

        Raises:
            TypeError: ``x`` is not a tensor.
            ValueError: another rank, or counts that do not sum up to B.
        """
        if not isinstance(x, Tensor):
            raise TypeError(f"StageBatch: from_dense takes a tensor, got {type(x).__name__}")
        if x.dim() not in (2, 4):
            raise ValueError(
                f"StageBatch: from_dense takes [B, C, H, W] or [B, C], got shape {tuple(x.shape)}"
            )
        x, (batch, channels, *size) = fixed_shape(x)
        counts = (batch,) if counts is None else tuple(counts)
        if sum(counts) != batch:
            raise ValueError(
                f"StageBatch: counts must sum up to the batch size {batch}, got {counts} (sum {sum(counts)})"
            )
        height, width = size or (1, 1)
        values = x.permute(0, 2, 3, 1) if size else x
        return StageBatch(values.reshape(-1), counts, (channels,) * len(counts), height, width)

    @property
    def layout(self) -> tuple[tuple[int, ...], tuple[int, ...], int, int]:
        """All but the values: counts, channels, height and width."""
        return self.counts, self.channels, self.height, self.width

    def fits(self) -> bool:
        """Whether the values are as many as the rest says."""
        return self.values.shape == (_total(*self.layout),)

    @property
    def num_stages(self) -> int:
        return len(self.counts)

    @property
    def num_samples(self) -> int:
        return sum(self.counts)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Elements per stage."""
        return _sizes(*self.layout)

    @property
    def offsets(self) -> tuple[int, ...]:
        """The first element of each stage in ``values``, and the total at the end."""
        return tuple(accumulate(self.sizes, initial=0))

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        return self.values.device

    def segments(self) -> list[Tensor]:
        """Each stage as a ``[n_s, C_s, H, W]`` channels_last view, without a copy."""
        return [
            part.view(n, self.height, self.width, c).permute(0, 3, 1, 2)
            for part, n, c in zip(self.values.split(self.sizes), self.counts, self.channels, strict=True)
        ]

    def dense(self) -> Tensor:
        """All samples as one ``[B, C, H, W]`` channels_last view; every stage must have the same channels.

        Raises:
            ValueError: channel counts differ.
        """
        if len(set(self.channels)) > 1:
            raise ValueError(f"StageBatch: dense needs the same channels in every stage, got {self.channels}")
        return self.values.view(-1, self.height, self.width, self.channels[0]).permute(0, 3, 1, 2)

    def with_values(self, values: Tensor) -> StageBatch:
        """A StageBatch of this layout over another flat buffer of this size."""
        return StageBatch(values, self.counts, self.channels, self.height, self.width)

    def restage(self, counts: Sequence[int]) -> StageBatch:
        """These samples cut into other stages, without a copy; every stage must have the same channels.

        Raises:
            ValueError: channel counts differ, or ``counts`` do not sum up to the number of samples.
        """
        return StageBatch.from_dense(self.dense(), counts)

    def map(self, function: Callable[[Tensor], Tensor]) -> StageBatch:
        """Applies an elementwise function to the flat buffer."""
        return self.with_values(function(self.values))

    def to(self, *args, **kwargs) -> StageBatch:
        """``torch.Tensor.to`` on the flat buffer."""
        return self.with_values(self.values.to(*args, **kwargs))

    def detach(self) -> StageBatch:
        """A StageBatch of these values, through which no gradient flows."""
        return self.with_values(self.values.detach())

    def pin_memory(self) -> StageBatch:
        """A copy of this StageBatch in pinned memory, as a ``DataLoader`` with ``pin_memory=True`` asks for."""
        return self.with_values(self.values.pin_memory())

    @staticmethod
    def concatenate(first: StageBatch, second: StageBatch) -> StageBatch:
        """Per stage the channels of ``first``, then those of ``second``: ``[n_s, C_s + D_s, H, W]``, a copy.

        Raises:
            TypeError: another kind than a StageBatch.
            ValueError: counts or spatial sizes differ.
        """
        for batch in (first, second):
            if not isinstance(batch, StageBatch):
                raise TypeError(f"StageBatch: concatenate takes two StageBatches, got {type(batch).__name__}")
        if (first.counts, first.height, first.width) != (second.counts, second.height, second.width):
            raise ValueError(
                f"StageBatch: concatenate needs the same counts and size, got {first.counts} at "
                f"{first.height}x{first.width} and {second.counts} at {second.height}x{second.width}"
            )
        pairs = zip(first.segments(), second.segments(), strict=True)
        return StageBatch.from_segments([torch.cat(pair, dim=1) for pair in pairs])

    def __setstate__(self, state: dict) -> None:
        """Of a copy or a pickle, whose fields must fit each other as any others."""
        for name, value in state.items():
            object.__setattr__(self, name, value)
        self.__post_init__()


def _is_plain(batch: StageBatch) -> bool:
    """Whether the constructor would take these fields: a plain tensor of the size that they need."""
    return type(batch.values) in (Tensor, torch.nn.Parameter) and batch.fits()


containers.register(StageBatch, ("values",), differentiable=True, complete=_is_plain)


def fixed_shape(x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """``x`` and its shape. What ``torch.jit.trace`` records of it refuses another shape than the example's.

    A trace makes a tensor of each size. A layout of integers cannot follow those and stays the example's; other shapes
    of as many elements would be read by it.
    """
    if not x.dim() or not isinstance(x.shape[0], Tensor):
        return x, x.shape
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        shape = tuple(int(size) for size in x.shape)
    for dim, size in enumerate(shape):
        (x,) = x.split_with_sizes([size], dim)
    return x, shape


def _total(*layout) -> int:
    """The elements of a layout, remembered: networks make the same batches over and over."""
    if torch.compiler.is_compiling():
        return _elements_of_batch(*layout)
    total = None
    with suppress(TypeError):  # a layout that cannot be hashed, as its sizes are symbols
        total = _totals.get(layout)
    if total is None:
        total = _elements_of_batch(*layout)
        with suppress(TypeError):
            if len(_totals) >= MOST_TOTALS:
                _totals.clear()
            _totals[layout] = total
    return total


def as_integer(value) -> int | torch.SymInt:
    """What stands for an integer, as NumPy's do, as one; TypeError for the rest."""
    return value if isinstance(value, torch.SymInt) else index(value)


def _elements_of_batch(counts: tuple[int, ...], channels: tuple[int, ...], height: int, width: int) -> int:
    """The elements of a stage batch, whose layout is checked."""
    if len(counts) != len(channels) or not counts:
        raise ValueError(
            f"StageBatch: counts and channels must name the same stages, at least one, "
            f"got counts={counts} and channels={channels}"
        )
    if min(counts) < 0 or min(channels) < 1 or height < 1 or width < 1:
        raise ValueError(
            f"StageBatch: counts must be >= 0, channels, height and width >= 1, got counts={counts}, "
            f"channels={channels}, height={height}, width={width}"
        )
    return sum(_sizes(counts, channels, height, width))


def _sizes(counts: tuple[int, ...], channels: tuple[int, ...], height: int, width: int) -> tuple[int, ...]:
    pixels = height * width
    return tuple(n * pixels * c for n, c in zip(counts, channels, strict=True))

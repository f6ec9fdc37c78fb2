"""How one parameter of a network here is called in the reference, and how the reference lays it out."""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from multistage_diffusion.networks.layers import OnStages, StageModule
from multistage_diffusion.official.pickles import shown

View = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Entry:
    """One parameter of one layer.

    Attributes:
        name: the reference's name; ``{stage}`` stands for the number of the decoder. Or stage -> name.
        module, parameter: where it is here.
        view: a stage's tensor here -> the reference's, as a view, so that it can be written to.
        joined: the reference has the view's first two dimensions as one, which no view can show.
    """

    name: str | Callable[[int], str]
    module: StageModule
    parameter: str
    view: View = lambda tensor: tensor
    joined: bool = False

    def stages(self) -> Iterator[tuple[int, Tensor]]:
        """(number of the stage, its tensor)."""
        holder = getattr(self.module, self.parameter)
        return zip(holder.stage_ids, holder.tensors(), strict=True)

    def named(self, stage: int) -> str:
        return self.name(stage) if callable(self.name) else self.name.format(stage=stage)


@dataclass(frozen=True)
class Family:
    """How one family's reference maps to a network here.

    Attributes:
        build: the reference constructor's arguments -> network.
        entries: network -> an entry for every parameter.
        unified: (pattern, replacement) that make of a name in a checkpoint of the family's original, unified network
            the one in a checkpoint of a multi-stage network of one stage; other names stay as they are. Or a function
            of the network that returns a function of the name.
        constants: network -> names and values of what the reference saves and nobody trains.
        sizes: arguments of a network that a checkpoint shows, with the name of the matrix and the dimension that do; 0
            without the matrix.
        outside: arguments of the reference's that are not those of its constructor, with the matrix that shows them.
        constants_matter: whether the network computes with the constants, so that others do not fit it.
    """

    build: Callable[[Mapping[str, object]], nn.Module]
    entries: Callable[[nn.Module], Iterator[Entry]]
    unified: Sequence[tuple[str, str]] | Callable[[nn.Module], Callable[[str], str]]
    constants: Callable[[nn.Module], Iterable[tuple[str, Tensor]]] = lambda network: ()
    sizes: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    outside: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    constants_matter: bool = True

    def unified_name(self, network: nn.Module) -> Callable[[str], str]:
        """What renames the parameters of a checkpoint of the original, unified network."""
        if callable(self.unified):
            return self.unified(network)

        def rename(name: str) -> str:
            for pattern, replacement in self.unified:
                name = re.sub(pattern, replacement, name)
            return name

        return rename


@dataclass(frozen=True)
class Place:
    """Where a tensor of the reference lies here: a view of a parameter or of its gradient; see :class:`Entry`."""

    view: Tensor
    joined: bool

    @property
    def shape(self) -> torch.Size:
        """The reference's."""
        return self.view.flatten(0, 1).shape if self.joined else self.view.shape

    def read(self) -> Tensor:
        """A contiguous copy in the reference's shape."""
        return self.view.clone(memory_format=torch.contiguous_format).view(self.shape)

    def write(self, tensor: Tensor) -> None:
        self.view.copy_(tensor.reshape(self.view.shape))


def tensors(entries: Iterable[Entry], *, gradients: bool = False) -> Iterator[tuple[str, Place]]:
    """(reference name, place of the parameter or of its gradient) for every stage of every entry."""
    for entry in entries:
        for stage, tensor in entry.stages():
            values = tensor.grad if gradients else tensor.detach()
            if values is not None:
                yield entry.named(stage), Place(entry.view(values), entry.joined)


def weights(name: str, module: StageModule | OnStages | None, view: View | None = None) -> Iterator[Entry]:
    """Entries ``name.weight`` (seen through ``view``) and ``name.bias`` of a layer; none where it is None."""
    if module is None:
        return
    if isinstance(module, OnStages):
        module = module.module
    yield Entry(f"{name}.weight", module, "weight", *([view] if view else []))
    if module.bias is not None:
        yield Entry(f"{name}.bias", module, "bias")


def interleaved(name: str, module: StageModule, parts: int) -> Iterator[Entry]:
    """Entries of a layer whose outputs are [parts, C] here and [C, parts] in the reference."""
    for parameter in ("weight", "bias"):
        yield Entry(
            f"{name}.{parameter}",
            module,
            parameter,
            lambda tensor: tensor.unflatten(0, (parts, -1)).transpose(0, 1),
            joined=True,
        )


def part(index: int, parts: int) -> View:
    """The view of one of several equal parts of a tensor's first dimension."""
    return lambda tensor: tensor.chunk(parts, dim=0)[index]


class Arguments:
    """Reads a reference constructor's arguments one by one, and refuses what is left over."""

    def __init__(self, family: str, config: Mapping[str, object]) -> None:
        self.family, self.rest = family, dict(config)

    def __contains__(self, name: str) -> bool:
        return name in self.rest

    def take(self, name: str, default: object = None) -> object:
        return self.rest.pop(name, default)

    def renamed(self, names: Mapping[str, str]) -> dict[str, object]:
        """The arguments that were given, of ``names`` (theirs -> ours), under our names."""
        return {ours: self.rest.pop(theirs) for theirs, ours in names.items() if theirs in self.rest}

    def fixed(self, values: Mapping[str, object]) -> None:
        """Raises ValueError unless each of these arguments is absent or has this value."""
        for name, value in values.items():
            given = self.rest.pop(name, value)
            if given != value:
                raise ValueError(
                    f"official: {self.family} networks with {name}={reprlib.repr(given)} are not supported, only "
                    f"{value!r}"
                )

    def ignored(self, *names: str) -> None:
        """Drops arguments that change no number."""
        for name in names:
            self.rest.pop(name, None)

    def finish(self, own: Mapping[str, object], size: str = "image_size") -> None:
        """Raises ValueError for arguments left over, and unless there are an image size and one stage per decoder.

        Args:
            own: what has been read, under our names.
            size: their name of the image size.
        """
        decoder_widths, stages = own["decoder_widths"], self.take("stage_interval")
        number = self.take("stage_num")
        if self.rest:
            raise ValueError(
                f"official: unknown arguments for {self.family}: {', '.join(map(shown, sorted(self.rest)))}"
            )
        if isinstance(stages, str):
            try:
                stages = json.loads(stages.replace("inf", "Infinity"))
            except (ValueError, RecursionError):
                raise ValueError(f"official: stage_interval {shown(stages)} is no list of stages") from None
        if stages is not None and len(stages) != len(decoder_widths):
            raise ValueError(
                f"official: stage_interval names {len(stages)} stages, but {len(decoder_widths)} decoder widths "
                f"were given: {list(decoder_widths)}"
            )
        if "image_size" not in own:
            raise ValueError(f"official: {self.family} needs the argument {size}")
        if number not in (None, len(decoder_widths)):
            raise ValueError(f"official: {self.family} got stage_num={number} for de_nfs={decoder_widths}")


def separable_filter(taps: Sequence[float]) -> Tensor:
    """The two-dimensional kernel of a FIR filter, with sum 1, as ``[1, 1, taps, taps]``."""
    taps = torch.tensor(taps, dtype=torch.float32)
    return (torch.outer(taps, taps) / taps.sum() ** 2)[None, None]

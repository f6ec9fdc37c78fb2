"""Settings that say themselves what they may be: the same description checks values, reads text and makes an option.

A kind of setting has ``problem(value)``, which says what is wrong with a value, and a ``metavar``; called with a text,
it returns the value or raises argparse.ArgumentTypeError. Importing this module is quick: the command line does.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from multistage_diffusion.common.checks import is_number

NONE = "none"  # how the command line says None


@dataclass(frozen=True)
class Number:
    """A number that is at least ``low`` or greater than ``above``, and at most ``high`` or less than ``below``.

    Attributes:
        is_whole: a whole number.
        infinite: may be infinite.
        unit: the command line counts in so many.
    """

    low: float | None = None
    above: float | None = None
    high: float | None = None
    below: float | None = None
    is_whole: bool = False
    infinite: bool = False
    unit: int = 1

    @property
    def metavar(self) -> str:
        return "N" if self.is_whole and self.unit == 1 else "X"

    def problem(self, value: object) -> str:
        if not is_number(value) or (self.is_whole and not (isinstance(value, int) or value.is_integer())):
            return "must be a whole number" if self.is_whole else "must be a number"
        if self.low is not None and not value >= self.low:
            return f"must be at least {self.low}"
        if self.above is not None and not value > self.above:
            return f"must be above {self.above}"
        if self.high is not None and value > self.high:
            return f"must be at most {self.high}"
        if self.below is not None and not value < self.below:
            return f"must be below {self.below}"
        if isinstance(value, float) and (math.isnan(value) or (math.isinf(value) and not self.infinite)):
            return "must be finite"
        return ""

    def __call__(self, text: str) -> float:
        kind = int if self.is_whole and self.unit == 1 else float
        try:
            value = kind(text)
        except ValueError:
            name = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {name}") from None
        counted = dataclasses.replace(self, is_whole=kind is int)
        if problem := counted.problem(value):
            raise argparse.ArgumentTypeError(f"{text} {problem}")
        if self.unit == 1:
            return value
        return round(value * self.unit) if self.is_whole else value * self.unit


def number(
    low: float | None = None, above: float | None = None, *, infinite: bool = False, unit: int = 1
) -> Number:
    """A number that is at least ``low`` or greater than ``above``; finite, unless ``infinite`` allows infinity."""
    return Number(low, above, infinite=infinite, unit=unit)


def whole(low: int, high: int | None = None, *, unit: int = 1) -> Number:
    """A whole number that is at least ``low`` and at most ``high``."""
    return Number(low, high=high, is_whole=True, unit=unit)


seed = whole(0, 2**64 - 1)  # what PyTorch's generators take


@dataclass(frozen=True)
class Several:
    """Numbers in a list, separated by commas in a text.

    Attributes:
        item: what each of them is.
        length: how many there must be; None: any number.
        may_be_empty: an empty text is an empty list.
    """

    item: Number = Number()
    length: int | None = None
    may_be_empty: bool = False
    metavar: ClassVar[str] = "LIST"

    def problem(self, value: object) -> str:
        if not isinstance(value, list | tuple) or (self.length is not None and len(value) != self.length):
            return f"must be a list of {'' if self.length is None else f'{self.length} '}numbers"
        return next(
            (f"has {item!r}, which {found}" for item in value if (found := self.item.problem(item))), ""
        )

    def __call__(self, text: str) -> tuple[float, ...]:
        parts = [part for part in text.split(",") if part.strip() or not self.may_be_empty]
        value = tuple(map(self.item, parts))
        if problem := self.problem(value):
            raise argparse.ArgumentTypeError(f"{text} {problem}")
        return value


@dataclass(frozen=True)
class Choice:
    """One of several names."""

    names: tuple[str, ...]
    metavar: ClassVar[None] = None

    def problem(self, value: object) -> str:
        return "" if value in self.names else f"must be one of {', '.join(self.names)}"

    def __call__(self, text: str) -> str:
        return text  # argparse compares it with the names


@dataclass(frozen=True)
class Instance:
    """An object of a type, which only a text can be on the command line."""

    type: type
    name: str
    metavar: str | None = None

    def problem(self, value: object) -> str:
        return "" if isinstance(value, self.type) else f"must be {self.name}"

    def __call__(self, text: str) -> str:
        return text


Flag = Instance(bool, "true or false")


@dataclass(frozen=True)
class Setting:
    """One setting.

    Attributes:
        kind: what it may be.
        help: what it means.
        group: of the command's help; None: it has no option.
        option: of the command line; default: the setting's own name.
        optional: it may be None.
    """

    kind: Number | Several | Choice | Instance
    help: str
    group: str | None = None
    option: str | None = None
    optional: bool = False

    def problem(self, value: object) -> str:
        """What is wrong with a value; empty where nothing is."""
        return "" if value is None and self.optional else self.kind.problem(value)

    def parse(self, text: str) -> object:
        """The value of a text, in which "none" stays, so that it differs from an option that is not given."""
        return text if self.optional and text == NONE else self.kind(text)


def setting(
    default: object,
    kind: Number | Several | Choice | Instance,
    help: str,
    group: str | None = None,
    option: str | None = None,
):
    """A field of a dataclass that is a :class:`Setting`; optional where its type has None.

    Args:
        default: of the field; a function that makes it; or ``dataclasses.MISSING``.
    """
    how = "default_factory" if callable(default) else "default"
    return dataclasses.field(metadata={"setting": Setting(kind, help, group, option)}, **{how: default})


def settings_of(kind: type) -> dict[str, Setting]:
    """The settings of a dataclass by name."""
    return {
        field.name: dataclasses.replace(field.metadata["setting"], optional="None" in str(field.type))
        for field in dataclasses.fields(kind)
    }


def option_of(name: str, setting: Setting | None = None) -> str:
    """The option of a setting."""
    return (setting and setting.option) or "--" + name.lower().replace("_", "-")


def add_options(parser: argparse._ActionsContainer, settings: Mapping[str, Setting]) -> None:
    """An option for each of the settings, which is None where it is not given."""
    for name, one in settings.items():
        option, kind, text = option_of(name, one), one.kind, one.help
        if kind is Flag:
            parser.add_argument(option, dest=name, action="store_true", default=None, help=text)
            continue
        if isinstance(kind, Number) and kind.unit != 1:
            text = f"{text}, counted in {kind.unit:,}"
        names = (*kind.names, *([NONE] if one.optional else [])) if isinstance(kind, Choice) else None
        parser.add_argument(option, dest=name, type=one.parse, choices=names, metavar=kind.metavar, help=text)


def given(args: argparse.Namespace, settings: Mapping[str, Setting]) -> dict[str, object]:
    """The settings that were on the command line; "none" is None."""
    found = {name: getattr(args, name) for name in settings if getattr(args, name) is not None}
    return {
        name: None if value == NONE and settings[name].optional else value for name, value in found.items()
    }

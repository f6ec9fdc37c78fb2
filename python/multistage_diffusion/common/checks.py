"""Checks of arguments that several modules need. Each error begins with the name of what was called."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from operator import index


def integer(user: str, name: str, value: int, least: int) -> int:
    """``value`` as an integer; what stands for one, as NumPy's do, is turned into it.

    Raises:
        TypeError: no integer.
        ValueError: one below ``least``.
    """
    try:
        found = index(value)
    except TypeError:
        raise TypeError(f"{user}: {name} must be an integer, got {value!r}") from None
    if found < least:
        raise ValueError(f"{user}: {name}={found} must be at least {least}")
    return found


def is_number(value: object) -> bool:
    """Whether a value, such as one out of JSON, is a number; True and False are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def one_of(user: str, name: str, value: object, allowed: Collection[str]) -> None:
    """Raises ValueError for a value that is none of the names allowed."""
    if value not in tuple(allowed):
        raise ValueError(f"{user}: {name} must be one of {', '.join(allowed)}, got {value!r}")


def are_shares(values: Sequence[float]) -> bool:
    """Whether numbers are shares of a whole: none negative or NaN, with the sum 1."""
    return all(value >= 0 for value in values) and math.isclose(math.fsum(values), 1, abs_tol=1e-6)

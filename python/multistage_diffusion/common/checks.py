"""Checks of arguments that several modules need. Each error begins with the name of what was called."""

from __future__ import annotations

import math
from collections.abc import Sequence
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


def are_shares(values: Sequence[float]) -> bool:
    """Whether numbers are shares of a whole: none negative or NaN, with the sum 1."""
    return all(value >= 0 for value in values) and math.isclose(math.fsum(values), 1, abs_tol=1e-6)

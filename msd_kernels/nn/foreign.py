"""Classes of other libraries, found without importing them, and classes of ours in front of them."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any


class Replaced:
    """In front of a class of somebody else's, as the class of a module that is still one of theirs.

    :func:`in_front` makes such classes; copies and pickles of their modules know the two that they were made of.
    """

    original: type

    def __reduce_ex__(self, protocol: int) -> tuple:
        return _rebuilt, (type(self).__mro__[1], self.original), dict(vars(self))


@cache
def in_front(kind: type[Replaced], original: type) -> type:
    """The subclass of ``original`` whose methods are first those of ``kind``."""
    return type(f"{kind.__name__}Of{original.__name__}", (kind, original), {"original": original})


def _rebuilt(kind: type[Replaced], original: type) -> Any:
    made = in_front(kind, original)
    return made.__new__(made)


# The modules that bring a class's source with them, as EDM's network pickles do, are named so.
PICKLED_SOURCES = "_imported_module_"


def classes(name: str, modules: Sequence[str]) -> Iterator[type]:
    """The classes of that name in those of the modules that somebody has imported."""
    for module in modules:
        found = getattr(sys.modules.get(module), name, None)
        if isinstance(found, type):
            yield found


def modules_of_pickles() -> list[str]:
    """Those that EDM's network pickles have brought."""
    return [name for name in list(sys.modules) if name.startswith(PICKLED_SOURCES)]

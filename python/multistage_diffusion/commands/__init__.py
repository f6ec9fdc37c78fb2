"""The subcommands of ``msd``, one module each.

A module here that does not begin with an underscore is a subcommand. It has

    add_parser(subparsers) -> parser     adds its arguments; must not import torch, so that --help is quick
    run(args) -> int | None              does the work; returns an exit code, None for success

and raises ValueError for bad input. ``--debug`` is added by ``cli.py``.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType


def load_commands() -> list[ModuleType]:
    """The modules of all subcommands, by name."""
    names = sorted(info.name for info in pkgutil.iter_modules(__path__) if not info.name.startswith("_"))
    return [importlib.import_module(f"{__name__}.{name}") for name in names]

"""FLOP formulas of the registered ops, for ``torch.utils.flop_counter.FlopCounterMode``: two per multiply-add.

That module imports Triton, and a counter copies all formulas when it is made. So they are registered when somebody
imports it, and not before.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["FORMULAS", "Formula", "register"]

COUNTER = "torch.utils.flop_counter"


class Formula:
    """The FLOPs of a call of an op, by the arguments that the dispatcher gives it, with shapes in the place of tensors.

    Attributes:
        settings: what counts of those arguments: the layout, and what follows it.
        count: the FLOPs by those.
    """

    def __init__(self, settings: Callable[[Sequence[Any]], Sequence[Any]], count: Callable[..., int]) -> None:
        self.settings = settings
        self.count = count

    def __call__(self, *args: Any, out_shape: Any = None) -> int:
        return self.count(*self.settings(args))


# By the ops as they are below ``torch.ops``.
FORMULAS: dict[Any, Formula] = {}


def register(op: Any, formula: Formula) -> None:
    """Gives PyTorch's counter a formula, at once or as soon as it is imported."""
    FORMULAS[op] = formula
    if COUNTER in sys.modules:
        _give({op: formula})
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _give(formulas: dict[Any, Formula]) -> None:
    """To PyTorch's counter. A PyTorch that takes them in another way must not fail to import its own module."""
    try:
        from torch.utils.flop_counter import register_flop_formula

        for op, formula in formulas.items():
            register_flop_formula(op)(formula)
    except Exception as error:
        warnings.warn(
            f"msd_kernels: this PyTorch's FlopCounterMode counts none of its ops: {error}", stacklevel=2
        )


class _Finder(MetaPathFinder):
    """Finds the counter's module as the other finders do, and leaves as soon as it is imported."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != COUNTER:
            return None
        others = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((found for found in others if found is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self)
        return spec


class _Loader(Loader):
    """Another loader, after which the formulas are registered."""

    def __init__(self, loader: Loader, finder: _Finder) -> None:
        self._loader = loader
        self._finder = finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        if self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)
        _give(FORMULAS)

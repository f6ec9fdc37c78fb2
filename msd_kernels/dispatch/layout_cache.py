"""The one cache of calls: equal layouts are one object, which keeps what is derived from it.

A step repeats its calls, and checking one takes longer than looking it up. What follows from a layout (the backend, a
launch's plan, its form in the compiled kernels) hangs on the layout itself, see ``layouts.Layout.derived``.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter

from msd_kernels import _private
from msd_kernels.layouts import Layout

__all__ = ["LAYOUTS", "PLAIN", "LayoutCache"]

SomeLayout = TypeVar("SomeLayout", bound=Layout)

# Types of tensors that nobody has overridden, and of an absent one.
PLAIN = frozenset((Tensor, Parameter, type(None)))


class LayoutCache:
    """The layouts of calls that passed their checks.

    A call is known by its op, by what checks look at in its tensors (shapes, dtypes, devices, strides of the first) and
    by its settings. Nothing is remembered while compiling or tracing or under a mode, where sizes may be symbolic.
    """

    MOST = 16384

    def __init__(self) -> None:
        self._of_calls: dict[Hashable, Layout] = {}
        self._same: dict[Hashable, Layout] = {}

    def clear(self) -> None:
        """Forgets all calls, and with them what was derived from their layouts."""
        self._of_calls.clear()
        self._same.clear()

    def find(
        self,
        op: str,
        check: Callable[[], SomeLayout],
        tensors: Sequence[Tensor | None],
        settings: tuple,
    ) -> SomeLayout:
        """``check()``, which looks at ``tensors`` and ``settings``, or what it has returned for such a call.

        Settings that are equal must mean the same: no integers that may be floats.
        """
        if _is_observed() or tensors[0] is None or not PLAIN.issuperset(map(type, tensors)):
            return check()
        key = (
            op,
            tensors[0].stride(),
            settings,
            *[None if t is None else (t.shape, t.dtype, t.device) for t in tensors],
        )
        layout = None
        with suppress(TypeError):  # settings that cannot be hashed, like lists
            layout = self._of_calls.get(key)
        if layout is None:
            layout = self.same(check())
            with suppress(TypeError):
                _keep(self._of_calls, key, layout, self.MOST)
        return layout

    def same(self, layout: SomeLayout) -> SomeLayout:
        """The first layout that is equal to this one; itself where its sizes are symbols."""
        if _is_observed():
            return layout
        key = type(layout), layout
        try:
            found = self._same.get(key)
        except TypeError:  # symbols have no hash
            return layout
        return _keep(self._same, key, layout, self.MOST) if found is None else found


def _is_observed() -> bool:
    return torch.compiler.is_compiling() or _private.dispatch_modes() or _private.is_tracing()


def _keep(cache: dict, key: Hashable, layout: SomeLayout, most: int) -> SomeLayout:
    if len(cache) >= most:
        cache.clear()
    cache[key] = layout
    return layout


LAYOUTS = LayoutCache()

"""Spares Triton's interpreter work that it repeats without need: the same results and errors in a third of the time.

A profile of a training step of a tiny network: over a third of it looked, at each call of a device function, for what
was replaced already, and a quarter checked integers for overflow by a dozen interpreted operations.
"""

from __future__ import annotations

import functools
import operator

import numpy as np


class IntegerOverflow(AssertionError):
    """An integer of a kernel leaves its type."""


class _Replaced:
    """What the interpreter has put in the place of the language's functions, until it puts those back."""

    def __init__(self, scope, modules: frozenset[int], replaced: set[int]) -> None:
        self._scope, self._modules, self._replaced = scope, modules, replaced

    def restore(self) -> None:
        self._scope.restore()
        self._replaced -= self._modules


class _Nothing:
    """Of a function whose language is replaced already."""

    @staticmethod
    def restore() -> None:
        pass


@functools.cache
def install() -> None:
    """For the rest of the process."""
    import triton.language as tl
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    patch, languages, replaced = interpreter._patch_lang, (tl, tl.core), set()
    look_up, numpy_types = interpreter._get_np_dtype, {}
    operations = {"add": operator.add, "sub": operator.sub, "mul": operator.mul}

    @functools.cache
    def modules_of(function) -> frozenset[int]:
        return frozenset(id(v) for v in function.__globals__.values() if any(v is each for each in languages))

    def patch_once(function):
        modules = modules_of(function)
        new = modules - replaced
        if modules and not new:
            return _Nothing
        replaced.update(new)
        return _Replaced(patch(function), new, replaced)

    def check_overflow(self, lhs, rhs, operation) -> None:
        kind = lhs.type.scalar
        if kind.int_bitwidth >= 64:
            return
        with np.errstate(over="ignore"):
            exact = operations[operation.__name__](
                lhs.handle.data.astype(np.int64), rhs.handle.data.astype(np.int64)
            )
        if (exact > kind.get_int_max_value()).any() or (exact < kind.get_int_min_value()).any():
            raise IntegerOverflow(f"{kind} overflows in {operation.__name__}")

    def numpy_type(kind):
        """Looked up once for each scalar: the interpreter writes its whole table for every look."""
        if isinstance(kind, (tl.block_type, tl.pointer_type)):
            return look_up(kind) if isinstance(kind.scalar, tl.pointer_type) else numpy_type(kind.scalar)
        if kind.name not in numpy_types:
            numpy_types[kind.name] = look_up(kind)
        return numpy_types[kind.name]

    interpreter._patch_lang = patch_once
    interpreter._get_np_dtype = numpy_type
    TritonSemantic.binary_op_sanitize_overflow_impl = check_overflow

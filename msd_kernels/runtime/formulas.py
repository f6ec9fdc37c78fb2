"""Integers that follow from the counts of a call: formulas, found once per shapes and evaluated for each new counts.

A plan is arithmetic on a layout. Done on a layout whose counts are :class:`Linear`, the same arithmetic gives formulas:
sums of variables, which are the counts and the quotients, maxima and minima of such sums. Evaluating them takes a
microsecond in C++ (``csrc/formulas.h``); where the extension was not built, Python does it (:class:`Formulas`).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import cache

from msd_kernels.runtime.extension import load

# Factors by variable. Variable 0 is 1, the counts follow, and then the result of each step.
Terms = Sequence[tuple[int, int]]

_OPERATIONS = {"+": operator.add, "//": operator.floordiv, "max": max, "min": min}
# A longer sum becomes a variable, so that the sums of which it is a part stay short.
_LONGEST_SUM = 8


class Formulas:
    """Compiled formulas, where there is no compiler.

    Args:
        steps: operation and both operands of each variable that is not linear in those before it.
        outputs: what is evaluated.
    """

    def __init__(self, steps: Sequence[tuple[str, Terms, Terms]], outputs: Sequence[Terms]) -> None:
        self._steps, self._outputs = steps, outputs

    def __call__(self, counts: tuple[int, ...]) -> tuple[int, ...]:
        variables = [1, *counts]

        def value(terms: Terms) -> int:
            return sum(factor * variables[variable] for variable, factor in terms)

        for operation, left, right in self._steps:
            variables.append(_OPERATIONS[operation](value(left), value(right)))
        return tuple(value(terms) for terms in self._outputs)


class Linear:
    """An integer that is linear in the variables of a :class:`Recording`."""

    __slots__ = ("recording", "terms")

    def __init__(self, recording: Recording, terms: dict[int, int]) -> None:
        self.recording, self.terms = recording, terms

    def __add__(self, other: Linear | int) -> Linear:
        terms = dict(self.terms)
        for variable, factor in terms_of(other):
            terms[variable] = terms.get(variable, 0) + factor
        if len(terms) > _LONGEST_SUM:
            return self.recording.step("+", self, other)
        return Linear(self.recording, terms)

    __radd__ = __add__

    def __mul__(self, factor: int) -> Linear | int:
        return Linear(self.recording, {v: f * factor for v, f in self.terms.items()}) if factor else 0

    __rmul__ = __mul__

    def __neg__(self) -> Linear:
        return self * -1

    def __floordiv__(self, divisor: Linear | int) -> Linear:
        return self.recording.step("//", self, divisor)

    def __rfloordiv__(self, dividend: int) -> Linear | int:
        return self.recording.step("//", dividend, self) if dividend else 0


class Recording:
    """The variables of one layout's formulas.

    Attributes:
        counts: one variable per stage that has samples; 0 stays 0, because a plan leaves out such stages.
        steps: the variables that are not linear in those before them.
    """

    def __init__(self, counts: Sequence[int]) -> None:
        self.counts = tuple(Linear(self, {1 + stage: 1}) if n else 0 for stage, n in enumerate(counts))
        self.steps: list[tuple[str, Terms, Terms]] = []

    def step(self, operation: str, left: Linear | int, right: Linear | int) -> Linear:
        self.steps.append((operation, terms_of(left), terms_of(right)))
        return Linear(self, {len(self.counts) + len(self.steps): 1})


def terms_of(number: Linear | int) -> Terms:
    return list(number.terms.items()) if isinstance(number, Linear) else [(0, number)] if number else []


def maximum(a: Linear | int, b: Linear | int) -> Linear | int:
    return _either("max", a, b)


def minimum(a: Linear | int, b: Linear | int) -> Linear | int:
    return _either("min", a, b)


def _either(operation: str, a: Linear | int, b: Linear | int) -> Linear | int:
    found = next((number for number in (a, b) if isinstance(number, Linear)), None)
    return found.recording.step(operation, a, b) if found else _OPERATIONS[operation](a, b)


def compiled(outputs: Sequence[Linear | int]) -> Callable[[Sequence[int]], tuple[int, ...]]:
    """The outputs as a function of the counts."""
    recordings = (output.recording for output in outputs if isinstance(output, Linear))
    steps = next((recording.steps for recording in recordings), [])
    return implementation()(list(steps), [terms_of(output) for output in outputs])


@cache
def implementation() -> type:
    """The compiled class, or :class:`Formulas` where the extension was not built."""
    return getattr(load("cpu").module, "Formulas", Formulas)

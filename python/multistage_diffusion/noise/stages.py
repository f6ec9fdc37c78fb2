"""Stages: the noise levels cut into a few sets, each denoised by its own decoder (arXiv 2312.09181)."""

from __future__ import annotations

import itertools
import json
import math
import reprlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from multistage_diffusion.common.atomic_files import replacing

Interval = tuple[float, float]

# What the stages of each named variable must cover together, where no other domain is given.
DOMAINS = {"sigma": (0.0, math.inf), "t": (0.0, 1.0), "step": (0.0, 1000.0)}

# More than any model has; each stage is a decoder.
MOST_STAGES, MOST_INTERVALS = 1000, 10_000

EDM_BOUNDARIES = (0.0, 2.5103, 7.6577, math.inf)


class StagesError(ValueError):
    """The stages do not cut the noise levels into disjoint sets that cover all of them."""


class Stages:
    """A partition of the noise levels into stages.

    Every stage is a union of intervals, open below and closed above: (low, high]. The lowest noise level of
    all (sigma = 0) belongs to the stage that begins there. Stage ids count from 0, in the order given;
    stage 0 is by convention the one of the lowest noise.

    Args:
        intervals: for each stage its intervals ``[(low, high), ...]``.
        variable: what the numbers measure: ``"sigma"``, ``"t"`` or ``"step"``. Any other name is allowed, and then the
            stages may begin and end anywhere.
        domain: the lowest and the highest value, which the stages must cover, as the schedule has them that they are
            meant for (``Schedule.domain``); default: 0 to inf for sigma, 0 to 1 for t, 0 to 1000 for step.

    Raises:
        StagesError: (a ValueError) for an empty stage, decreasing ends, overlaps, gaps, and cuts outside of the domain;
            names stage and numbers.
    """

    def __init__(
        self,
        intervals: Sequence[Sequence[Interval]],
        variable: str = "sigma",
        domain: Interval | None = None,
    ):
        self.variable = str(variable)
        self.intervals = tuple(
            _checked_intervals(k, stage)
            for k, stage in enumerate(_items(intervals, "stages must be a list of stages", MOST_STAGES))
        )
        if not self.intervals:
            raise StagesError("stages: at least one stage is needed, none was given")
        if (pieces := sum(map(len, self.intervals))) > MOST_INTERVALS:
            raise StagesError(f"stages: at most {MOST_INTERVALS} intervals are allowed, got {pieces}")
        pieces = sorted((low, high, k) for k, stage in enumerate(self.intervals) for low, high in stage)
        _check_partition(pieces, DOMAINS.get(self.variable) if domain is None else _ends(domain))
        self._low = pieces[0][0]
        self._uppers = np.array([high for _, high, _ in pieces], dtype=np.float64)
        self._owners = np.array([k for _, _, k in pieces], dtype=np.int64)

    # ------------------------------------------------------------------ construction

    @classmethod
    def edm(cls) -> Stages:
        """The three stages of the published EDM models: boundaries 0, 2.5103, 7.6577, inf."""
        return cls.from_boundaries(EDM_BOUNDARIES)

    @classmethod
    def single(cls, variable: str = "sigma", domain: Interval | None = None) -> Stages:
        """One stage that holds every noise level: the unified (ordinary) diffusion model."""
        interval = DOMAINS.get(variable, (0.0, math.inf)) if domain is None else domain
        return cls([[interval]], variable, domain)

    @classmethod
    def from_boundaries(
        cls, boundaries: Iterable[float], variable: str = "sigma", domain: Interval | None = None
    ) -> Stages:
        """Stage k is (boundaries[k], boundaries[k + 1]]."""
        rule = "boundaries must be a list of numbers"
        edges = [_number(b) for b in _items(boundaries, rule, MOST_STAGES + 1)]
        if len(edges) < 2:
            raise StagesError(f"stages: at least two boundaries are needed, got {edges}")
        return cls([[pair] for pair in itertools.pairwise(edges)], variable, domain)

    @classmethod
    def from_json(cls, description: dict) -> Stages:
        """The inverse of ``to_json``; also reads ``{"boundaries": [0, 2.5, "inf"]}``."""
        if not isinstance(description, dict) or not {"stages", "boundaries"} & set(description):
            raise StagesError(
                f'stages: expected an object with "stages" or "boundaries", got {reprlib.repr(description)}'
            )
        variable = description.get("variable", "sigma")
        if not isinstance(variable, str):
            raise StagesError(f"stages: variable must be a name such as sigma, got {reprlib.repr(variable)}")
        domain = description.get("domain")
        if "stages" in description:
            return cls(description["stages"], variable, domain)
        return cls.from_boundaries(description["boundaries"], variable, domain)

    @classmethod
    def load(cls, path: str | Path) -> Stages:
        """Reads a ``stages.json``. Raises StagesError with the path if it does not describe stages."""
        path = Path(path)
        try:
            return cls.from_json(json.loads(path.read_text()))
        except OSError as error:
            raise StagesError(f"stages: cannot read {path}: {error.strerror or error}") from error
        except RecursionError:
            raise StagesError(f"{path}: is no description of stages: its lists are nested too deep") from None
        except ValueError as error:  # broken JSON and StagesError
            raise StagesError(f"{path}: {error}") from error

    def to_json(self) -> dict:
        """A JSON-able description; infinities are written as "inf" and "-inf", which strict JSON readers accept."""
        stages = [
            [[_json_number(low), _json_number(high)] for low, high in stage] for stage in self.intervals
        ]
        found = {"variable": self.variable, "stages": stages}
        if self.domain != DOMAINS.get(self.variable, self.domain):
            found["domain"] = [_json_number(end) for end in self.domain]
        return found

    def save(self, path: str | Path) -> None:
        """Writes ``stages.json``; missing folders are made, and an error leaves a file that was there as it was."""
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(self.to_json(), indent=2) + "\n")

    # ------------------------------------------------------------------ use

    def assign(self, sigma):
        """The stage of each noise level.

        Compared in float64: a float64 value equal to a boundary belongs to the stage below it, exactly.
        float32 values are compared as they are, which is not the decimal number they were rounded from.

        Args:
            sigma: float, array or tensor of any shape. A tensor on an accelerator is copied to the host,
                which waits for the device: keep noise levels on the host.

        Returns:
            int for a number, int64 array for an array, int64 CPU tensor for a tensor.

        Raises:
            ValueError: a value is NaN, negative or outside of all stages; names the value.
        """
        if isinstance(sigma, torch.Tensor):
            return torch.from_numpy(self._assign(sigma.detach().to("cpu", torch.float64).numpy()))
        values = np.asarray(sigma, dtype=np.float64)
        stage = self._assign(values)
        return int(stage) if values.ndim == 0 else stage

    def _assign(self, values: np.ndarray) -> np.ndarray:
        bad = ~((values >= self._low) & (values <= self._uppers[-1]))  # also catches NaN
        if bad.any():
            first = float(values[bad].flat[0])
            raise ValueError(
                f"stages: {self.variable}={first} belongs to no stage; "
                f"stages cover {_text(self._low)} to {_text(self._uppers[-1])}"
            )
        piece = np.searchsorted(self._uppers, values, side="left")
        return np.asarray(self._owners[piece])

    def probabilities(self, distribution) -> tuple[float, ...]:
        """The exact probability of each stage.

        Args:
            distribution: has ``mass(low, high) -> float``, as ``schedules.LogNormal``.
        """
        return tuple(math.fsum(distribution.mass(low, high) for low, high in s) for s in self.intervals)

    def describe(self, stage: int) -> str:
        """The intervals of a stage in words, such as ``(0, 2.5103]``."""
        return " ∪ ".join(_span(low, high) for low, high in self.intervals[stage])

    def require_variable(self, variable: str, user: str) -> None:
        """Raises StagesError, in the name of ``user``, unless these stages cut that variable."""
        if self.variable != variable:
            raise StagesError(f"{user}: needs stages of {variable!r}, got stages of {self.variable!r}")

    @property
    def domain(self) -> Interval:
        """The lowest and the highest value of all stages."""
        return self._low, float(self._uppers[-1])

    @property
    def num_stages(self) -> int:
        return len(self.intervals)

    def __len__(self) -> int:
        return len(self.intervals)

    def __eq__(self, other) -> bool:
        if not isinstance(other, Stages):
            return NotImplemented
        return (self.variable, self.intervals) == (other.variable, other.intervals)

    def __hash__(self) -> int:
        return hash((self.variable, self.intervals))

    def __repr__(self) -> str:
        return f"Stages({', '.join(map(self.describe, range(len(self))))}; {self.variable})"


def _text(value: float) -> str:
    return f"{value:.10g}"


def _span(low: float, high: float) -> str:
    return f"({_text(low)}, {_text(high)}]"


def _json_number(value: float):
    return str(value) if math.isinf(value) else value


def _items(values, rule: str, most: int = MOST_INTERVALS) -> list:
    """The items of a list, or of anything like one; raises StagesError with the rule for all else, and for too many."""
    try:
        items = (
            list(itertools.islice(values, most + 1)) if not isinstance(values, str | bytes | dict) else None
        )
    except TypeError:
        items = None
    if items is None:
        raise StagesError(f"stages: {rule}, got {reprlib.repr(values)}")
    if len(items) > most:
        raise StagesError(f"stages: {rule}, with at most {most} entries, got more")
    return items


def _number(value) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise StagesError(f"stages: {reprlib.repr(value)} is not a number") from None


def _ends(interval, rule: str = "domain must be a pair (low, high)") -> Interval:
    ends = _items(interval, rule)
    if len(ends) != 2:
        raise StagesError(f"stages: {rule}, got {reprlib.repr(interval)}")
    return _number(ends[0]), _number(ends[1])


def _checked_intervals(stage: int, intervals: Sequence[Interval]) -> tuple[Interval, ...]:
    """The intervals of one stage, sorted, neighbours merged."""
    merged: list[Interval] = []
    pairs = []
    for interval in _items(intervals, f"stage {stage} must be a list of intervals (low, high)"):
        low, high = _ends(interval, f"stage {stage}: an interval is a pair (low, high)")
        if not low < high:
            raise StagesError(
                f"stages: stage {stage} has the interval {_span(low, high)}; "
                "its lower end must lie below its upper end"
            )
        pairs.append((low, high))
    if not pairs:
        raise StagesError(f"stages: stage {stage} is empty: it has no interval")
    for low, high in sorted(pairs):
        if merged and merged[-1][1] == low:
            merged[-1] = (merged[-1][0], high)
        else:
            merged.append((low, high))
    return tuple(merged)


def _check_partition(pieces: list[tuple[float, float, int]], domain: Interval | None) -> None:
    """Raises StagesError unless the sorted pieces follow each other seamlessly and fill the domain."""
    for (low_a, high_a, a), (low_b, high_b, b) in itertools.pairwise(pieces):
        named = f"{_span(low_a, high_a)} of stage {a} and {_span(low_b, high_b)} of stage {b}"
        if low_b < high_a:
            raise StagesError(f"stages: {named} overlap")
        if low_b > high_a:
            raise StagesError(f"stages: gap: {_span(high_a, low_b)} is in no stage, between {named}")
    if domain is None:
        return
    (low, _, first), (_, high, last) = pieces[0], pieces[-1]
    if (low, high) != domain:
        raise StagesError(
            f"stages: together they must cover {_text(domain[0])} to {_text(domain[1])}, "
            f"but stage {first} begins at {_text(low)} and stage {last} ends at {_text(high)}"
        )

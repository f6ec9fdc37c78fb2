"""Cutting the noise levels into stages."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from multistage_diffusion.clustering.similarity import Similarity
from multistage_diffusion.common.checks import integer
from multistage_diffusion.noise.schedules import Schedule
from multistage_diffusion.noise.stages import Stages


@dataclass(frozen=True)
class Split:
    """Stages of noise levels, from low to high noise.

    Attributes:
        starts: index of each stage's first level in the grid; ``starts[0] == 0``.
        num_levels: levels of the grid.
        objective: the sum over the stages of the mean similarity within, at most one per stage; a stage's
            pairs include each level with itself.
        cuts: the noise levels between the stages, or None where the grid's are not known.
    """

    starts: tuple[int, ...]
    num_levels: int
    objective: float
    cuts: tuple[float, ...] | None

    @property
    def num_stages(self) -> int:
        return len(self.starts)

    @property
    def mean_similarity(self) -> float:
        """The objective per stage."""
        return self.objective / len(self.starts)

    def levels(self, stage: int) -> range:
        """The indices of a stage's levels in the grid."""
        return range(self.starts[stage], (*self.starts, self.num_levels)[stage + 1])

    def stages(self, schedule: Schedule | None = None) -> Stages:
        """The stages by sigma, or by the variable of a schedule.

        Raises:
            ValueError: the noise levels are not known, or a stage lies between two neighbouring steps of the schedule.
        """
        if self.cuts is None:
            raise ValueError("split: the noise levels of the matrix are not known; give split a Similarity")
        if schedule is None:
            return Stages.from_boundaries((0.0, *self.cuts, math.inf))
        low, high = schedule.domain
        edges = (low, *schedule.cut(list(self.cuts)).tolist(), high)
        for stage, (first, last) in enumerate(itertools.pairwise(edges)):
            if not (first < last and schedule.holds(first, last)):
                raise ValueError(
                    f"split: stage {stage} of {self.num_stages} would be ({first:g}, {last:g}] in {schedule.variable} "
                    f"of {schedule.name}, which is empty; take fewer stages or more levels in each (min_levels)"
                )
        return Stages.from_boundaries(edges, schedule.variable, schedule.domain)


def split(similarity: Similarity | Tensor, num_stages: int = 3, *, min_levels: int = 1) -> Split:
    """The stages with the largest sum of mean similarities, exactly (arXiv 2312.09181).

    Maximises sum_k 1/|S_k|² sum_{i,j in S_k} S_ij over all contiguous stages S_k, by dynamic programming in
    O(num_stages L²). Of equally good splits, the one whose last stage is longest, then the one before it.
    Cuts lie half-way, in ln sigma, between neighbouring levels.

    Args:
        similarity: from :func:`similarity_matrix` or :func:`gradient_similarity`, or a bare ``[L, L]``
            matrix.
        num_stages: at least 1.
        min_levels: levels that each stage must hold. A stage of one level has the best possible similarity,
            1, so that one or two levels are cut off where the similarity changes fast; more per stage keep
            this from happening.

    Raises:
        TypeError: numbers of stages or levels that are no integers.
        ValueError: a matrix that is not square or holds NaN, or more stages than there are levels for.
    """
    matrix, sigmas = _parts(similarity)
    num_levels = matrix.shape[0]
    num_stages = integer("split", "num_stages", num_stages, 1)
    min_levels = integer("split", "min_levels", min_levels, 1)
    if num_stages * min_levels > num_levels:
        raise ValueError(
            f"split: num_stages={num_stages} with min_levels={min_levels} each do not fit the {num_levels} "
            "noise levels"
        )
    mean_within = _mean_within(matrix)
    index = torch.arange(num_levels + 1)
    allowed = mean_within.masked_fill(index[None] - index[:, None] < min_levels, -math.inf)
    best = allowed[0].clone()  # best[end]: the best value of levels [0, end) in the stages so far
    choices = []
    for _ in range(num_stages - 1):
        candidates = best[:, None] + allowed  # [start of the last stage, end]
        best, start = candidates.max(dim=0)
        choices.append(start)
    starts, end = [], num_levels
    for start in reversed(choices):
        end = int(start[end])
        starts.append(end)
    return _split_at((0, *reversed(starts)), mean_within, sigmas)


def sweep(similarity: Similarity | Tensor, max_stages: int = 6, *, min_levels: int = 1) -> list[Split]:
    """The best split for 1, 2, ... ``max_stages`` stages, as far as the levels last, for a person to choose
    from. Raises as ``split``."""
    max_stages = integer("sweep", "max_stages", max_stages, 1)
    min_levels = integer("sweep", "min_levels", min_levels, 1)
    most = min(max_stages, _parts(similarity)[0].shape[0] // min_levels)
    return [split(similarity, num_stages, min_levels=min_levels) for num_stages in range(1, most + 1)]


def split_from_ends(similarity: Similarity, level: float = 0.9) -> Split:
    """The paper's three stages, from the two ends (arXiv 2312.09181).

    The first stage holds the noise levels whose similarity to the lowest one has not yet fallen below
    ``level``, the last stage those from which on the similarity to the highest one stays at least ``level``;
    the second what lies between. The cuts are where the similarities cross the level, interpolated in ln
    sigma, to six digits: they do not depend on how the work was shared.

    Raises:
        TypeError: a bare matrix, without its noise levels.
        ValueError: a level outside of (0, 1), or at which the first and the last stage leave no room between
            them.
    """
    if not 0 < level < 1:
        raise ValueError(f"split_from_ends: level={level} must lie within 0 and 1")
    matrix, sigmas = _parts_with_levels("split_from_ends", similarity)
    log_sigma = sigmas.log()
    low = _crossing(log_sigma, matrix[0], level)
    high = _crossing(log_sigma.flip(0), matrix[-1].flip(0), level)
    if not low < high:
        raise ValueError(
            f"split_from_ends: at level={level} the first stage reaches up to sigma={math.exp(low):.4g} and the "
            f"last one down to sigma={math.exp(high):.4g}, which leaves no stage between them; "
            "try a higher level"
        )
    cuts = tuple(float(f"{math.exp(cut):.6g}") for cut in (low, high))
    return _split_by_cuts(cuts, matrix, sigmas)


def split_uniformly(similarity: Similarity, schedule: Schedule, num_stages: int, by: str = "t") -> Split:
    """Stages of equal length between the ends of the grid: a baseline that looks at no data.

    Args:
        by: ``"t"`` for the schedule's own variable, ``"log_snr"`` for the logarithm of the signal-to-noise
            ratio.

    Raises:
        TypeError: a bare matrix, without its noise levels, or a number of stages that is no integer.
        ValueError: an unknown ``by``, no stage, or stages so short that one holds no level of the grid.
    """
    matrix, sigmas = _parts_with_levels("split_uniformly", similarity)
    num_stages = integer("split_uniformly", "num_stages", num_stages, 1)
    to, back = _scale(schedule, by)
    ends = to(sigmas[[0, -1]])
    cuts = back(torch.linspace(*ends.tolist(), num_stages + 1, dtype=torch.float64)[1:-1])
    return _split_by_cuts(cuts.tolist(), matrix, sigmas)


def _scale(schedule: Schedule, by: str) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    if by == "t":
        return schedule.value, schedule.sigma
    if by == "log_snr":
        return torch.log, torch.exp
    raise ValueError(f"split_uniformly: by must be 't' or 'log_snr', got {by!r}")


def _parts(similarity: Similarity | Tensor) -> tuple[Tensor, Tensor | None]:
    """The matrix, checked, in float64, and the noise levels where they are known."""
    known = isinstance(similarity, Similarity)
    matrix = torch.as_tensor(similarity.matrix if known else similarity, dtype=torch.float64)
    if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1] or matrix.shape[0] < 1:
        raise ValueError(f"split: the similarity matrix must be square, got shape {list(matrix.shape)}")
    if not bool(matrix.isfinite().all()):
        raise ValueError("split: the similarity matrix holds values that are NaN or infinite")
    return matrix, similarity.sigmas if known else None


def _parts_with_levels(user: str, similarity: Similarity) -> tuple[Tensor, Tensor]:
    """The same for what does not work without the noise levels."""
    if not isinstance(similarity, Similarity):
        raise TypeError(
            f"{user}: needs a Similarity, which knows its noise levels, got {type(similarity).__name__}"
        )
    return _parts(similarity)


def _mean_within(matrix: Tensor) -> Tensor:
    """``[L + 1, L + 1]``: entry [i, j] is the mean of the block of levels i to j - 1, -inf where that is
    empty."""
    num_levels = matrix.shape[0]
    sums = matrix.new_zeros(num_levels + 1, num_levels + 1)
    sums[1:, 1:] = matrix.cumsum(0).cumsum(1)
    corner = sums.diagonal()
    index = torch.arange(num_levels + 1)
    length = index[None] - index[:, None]
    blocks = corner[None] - sums - sums.T + corner[:, None]
    return torch.where(length > 0, blocks / length.clamp(min=1).square(), -math.inf)


def _split_at(starts: tuple[int, ...], mean_within: Tensor, sigmas: Tensor | None, cuts=None) -> Split:
    num_levels = mean_within.shape[0] - 1
    ends = (*starts[1:], num_levels)
    objective = math.fsum(float(mean_within[i, j]) for i, j in zip(starts, ends, strict=True))
    if cuts is None and sigmas is not None:
        cuts = tuple(math.sqrt(float(sigmas[i - 1] * sigmas[i])) for i in starts[1:])
    return Split(starts, num_levels, objective, cuts)


def _split_by_cuts(cuts: Sequence[float], matrix: Tensor, sigmas: Tensor) -> Split:
    starts = (0, *torch.searchsorted(sigmas, torch.tensor(cuts, dtype=torch.float64), right=True).tolist())
    if any(a >= b for a, b in zip(starts, (*starts[1:], len(sigmas)), strict=True)):
        raise ValueError(
            f"split: the cuts {[round(c, 6) for c in cuts]} leave a stage without a level of the grid"
        )
    return _split_at(starts, _mean_within(matrix), sigmas, tuple(cuts))


def _crossing(position: Tensor, values: Tensor, level: float) -> float:
    """Where ``values``, which begin with 1, first fall below ``level``; their last position if they never
    do."""
    below = (values < level).nonzero()
    if len(below) == 0:
        return float(position[-1])
    i = int(below[0])
    share = (values[i - 1] - level) / (values[i - 1] - values[i])
    return float(torch.lerp(position[i - 1], position[i], share))

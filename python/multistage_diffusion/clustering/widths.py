"""How wide each stage's decoder should be."""

from __future__ import annotations

from collections.abc import Sequence

from multistage_diffusion.clustering.similarity import Similarity
from multistage_diffusion.clustering.splits import Split
from multistage_diffusion.common.checks import are_shares, integer

MOST_CHANNELS = 2**31


def suggest_widths(
    similarity: Similarity,
    split: Split,
    budget: float,
    *,
    shares: Sequence[float] | None = None,
    multiple: int = 16,
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Channels of each stage's decoder, by a rule: compute in proportion to difficulty, within a budget.

    A stage's difficulty is the share of the data's variance that its optimal denoiser has to restore,
    averaged over its noise levels (``Similarity.restored``): about 1 where it must reproduce an image, 0
    where the mean of all images is the best answer. The compute of a decoder grows with the square of its
    width, so::

        width_k = c sqrt(difficulty_k),    sum_k share_k width_k² = budget²

    rounded to a multiple, and at least that.

    Args:
        budget: the width of a single decoder whose compute the stages may use on average.
        shares: how often each stage is evaluated, summing up to 1; default: all alike.
        multiple: what the widths are multiples of.

    Returns:
        The widths, and the difficulties.

    Raises:
        TypeError: a multiple that is no integer.
        ValueError: a similarity that does not know the restored variance, or of which the stages restore none; shares
            that do not fit; a budget that is not positive, or that no tensor has.
    """
    if similarity.restored is None:
        raise ValueError("suggest_widths: needs a similarity that comes from the optimal denoiser")
    shares = [1 / split.num_stages] * split.num_stages if shares is None else list(shares)
    if len(shares) != split.num_stages or not are_shares(shares):
        raise ValueError(
            f"suggest_widths: shares must be {split.num_stages} numbers >= 0 with sum 1, got {shares}"
        )
    if not 0 < budget < MOST_CHANNELS:
        raise ValueError(f"suggest_widths: budget={budget} must be positive and below {MOST_CHANNELS}")
    multiple = integer("suggest_widths", "multiple", multiple, 1)
    difficulty = [float(similarity.restored[list(split.levels(k))].mean()) for k in range(split.num_stages)]
    mean_difficulty = sum(p * d for p, d in zip(shares, difficulty, strict=True))
    if not mean_difficulty > 0:
        raise ValueError(f"suggest_widths: no stage restores any variance, of difficulties {difficulty}")
    scale = budget / mean_difficulty**0.5
    widths = (max(1, round(scale * d**0.5 / multiple)) * multiple for d in difficulty)
    return tuple(widths), tuple(difficulty)

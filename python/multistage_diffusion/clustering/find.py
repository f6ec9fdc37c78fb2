"""The paper's first step in one call: from images to stages (arXiv 2312.09181)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from multistage_diffusion.clustering.gradients import gradient_similarity
from multistage_diffusion.clustering.similarity import (
    THRESHOLD,
    Similarity,
    similarity_matrix,
    standard_error,
)
from multistage_diffusion.clustering.splits import Split, split, split_from_ends, split_uniformly
from multistage_diffusion.common.checks import integer, one_of
from multistage_diffusion.data.images import ImageData
from multistage_diffusion.noise.preconditioning import Preconditioner
from multistage_diffusion.noise.schedules import SCHEDULES, Schedule
from multistage_diffusion.noise.stages import Stages

METHODS = ("optimal", "ends", "uniform-t", "uniform-log-snr", "gradient")
SEARCHED = ("optimal", "gradient")  # these look for the best split
RESAMPLES = 200
INTERVAL = 0.95


@dataclass(frozen=True)
class Rule:
    """How stages are cut.

    Attributes:
        stages: how many.
        method: "ends": the paper's rule for three stages; "optimal": the best split; "uniform-t", "uniform-log-snr":
            equal lengths in the schedule's variable or in log-SNR; "gradient": the best split by the gradients of a
            trained model. Default: "ends" for three stages, else "optimal".
        level: similarity at which "ends" cuts; default: 0.9.
        min_levels: levels of the grid in each stage, for "optimal" and "gradient"; default: 1.
        grid: noise levels that are compared.

    Raises:
        TypeError: numbers of stages or levels that are no integers.
        ValueError: an unknown method, or settings that do not go together.
    """

    stages: int = 3
    method: str | None = None
    level: float | None = None
    min_levels: int | None = None
    grid: int = 21

    def __post_init__(self):
        def fill(name: str, value) -> None:
            object.__setattr__(self, name, value)

        fill("stages", integer("find_stages", "stages", self.stages, 1))
        if self.method is None:
            fill("method", "ends" if self.stages == 3 else "optimal")
        method = self.method
        one_of("find_stages", "method", method, METHODS)
        if method == "ends" and self.stages != 3:
            raise ValueError(f"find_stages: method ends gives three stages, not stages={self.stages}")
        if method != "ends" and self.level is not None:
            raise ValueError(f"find_stages: level is for method ends, not {method}")
        if method == "ends":
            fill("level", 0.9 if self.level is None else self.level)
            if self.level >= 1:
                raise ValueError(f"find_stages: level={self.level:g} must be below 1")
        if self.min_levels is not None and method not in SEARCHED:
            raise ValueError(f"find_stages: min_levels is for methods {' and '.join(SEARCHED)}, not {method}")
        fill("min_levels", integer("find_stages", "min_levels", self.min_levels or 1, 1))
        if (least := self.stages * self.min_levels) > self.grid:
            raise ValueError(f"find_stages: grid={self.grid} is too small: these stages need {least} levels")

    def __call__(self, similarity: Similarity, schedule: Schedule) -> Split:
        """The stages. Raises ValueError where the rule finds none."""
        if self.method == "ends":
            return split_from_ends(similarity, self.level)
        if self.method in SEARCHED:
            return split(similarity, self.stages, min_levels=self.min_levels)
        by = self.method.removeprefix("uniform-").replace("-", "_")
        return split_uniformly(similarity, schedule, self.stages, by)


@dataclass(frozen=True)
class FoundStages:
    """What :func:`find_stages` found.

    Attributes:
        stages: in sigma.
        similarity: of all pairs of noise levels.
        confidence: for each cut the ends, in sigma, between which it lies in 95 % of the resamplings of the images in
            which the rule found stages; NaN where it did in fewer than half, or only one image was compared.
        split: the stages as parts of the grid of noise levels; ``split.stages(schedule)`` has them in the schedule's
            variable.
        rule: how they were cut.
        schedule: whose noise levels were compared.
    """

    stages: Stages
    similarity: Similarity
    confidence: tuple[tuple[float, float], ...]
    split: Split
    rule: Rule
    schedule: Schedule


def find_stages(
    images: ImageData | Tensor,
    schedule: str | Schedule = "edm",
    stages: int = 3,
    *,
    method: str | None = None,
    level: float | None = None,
    min_levels: int | None = None,
    grid: int = 21,
    samples: int = 20,
    form: str = "x0",
    measure: str = "pixels",
    threshold: float = THRESHOLD,
    sigma_units: tuple[float, float] = (-1.0, 1.0),
    seed: int = 0,
    denoiser: Preconditioner | None = None,
    device: torch.device | str = "cpu",
    group: dist.ProcessGroup | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> FoundStages:
    """Finds the stages of a data set: noise levels whose optimal denoisers agree.

    Args:
        images: ``[N, C, H, W]`` as ``ImageData`` takes them, or one.
        schedule: whose noise levels are compared: a key of ``schedules.SCHEDULES``, or a schedule.
        stages, method, level, min_levels, grid: see :class:`Rule`.
        samples: images compared.
        form, measure, threshold, group, progress: see :func:`similarity_matrix`.
        sigma_units: the range of the data that sigma is meant for; in [0, 1] the same sigma is twice the noise.
        seed: of images and noise.
        denoiser: a trained unified model, on ``device``, for method "gradient".
        device: where the denoisers are computed.

    Raises:
        TypeError: numbers that are no integers.
        ValueError: settings that are unknown, out of range or do not go together; images that are none, or with which
            the rule finds no stages.
    """
    rule = Rule(stages, method, level, min_levels, grid)
    if (rule.method == "gradient") != (denoiser is not None):
        raise ValueError("find_stages: method gradient and denoiser go together")
    if not isinstance(schedule, Schedule):
        one_of("find_stages", "schedule", schedule, SCHEDULES)
        schedule = SCHEDULES[schedule]()
    data = images if isinstance(images, ImageData) else ImageData(images)
    sigmas = schedule.sigma(schedule.grid(rule.grid))
    if denoiser is not None:
        similarity = _by_gradients(denoiser, data, sigmas, samples, sigma_units, seed, device, progress)
    else:
        data_range = data.value_range if data.images.is_floating_point() else (-1.0, 1.0)
        if data_range is None:  # latents
            data_range = tuple(float(end) for end in torch.aminmax(data.images))
            sigma_units = data_range
        scale = (data_range[1] - data_range[0]) / (sigma_units[1] - sigma_units[0])
        similarity = similarity_matrix(
            data.images,
            sigmas * scale,
            num_samples=samples,
            form=form,
            measure=measure,
            threshold=threshold,
            data_range=data_range,
            seed=seed,
            device=device,
            group=group,
            progress=progress,
        )
        similarity = replace(similarity, sigmas=sigmas)
    found = rule(similarity, schedule)
    return FoundStages(
        found.stages(),
        similarity,
        confidence(similarity, rule, schedule, found, seed=seed),
        found,
        rule,
        schedule,
    )


def confidence(
    similarity: Similarity,
    rule: Rule,
    schedule: Schedule,
    found: Split,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[tuple[float, float], ...]:
    """Where the rule cuts in 95 % of the bootstrap's resamplings of the images; see :class:`FoundStages`."""
    unknown = tuple((float("nan"), float("nan")) for _ in found.cuts)
    scores = similarity.scores
    if scores is None or len(scores) < 2:
        return unknown
    generator = torch.Generator().manual_seed(seed)
    cuts = []
    for _ in range(resamples):
        chosen = scores[torch.randint(len(scores), (len(scores),), generator=generator)]
        again = Similarity(similarity.sigmas, chosen.mean(0), standard_error(chosen))
        try:
            cuts.append(rule(again, schedule).cuts)
        except ValueError:  # no stages in these
            continue
    if len(cuts) < resamples / 2:
        return unknown
    ends = torch.tensor([(1 - INTERVAL) / 2, (1 + INTERVAL) / 2], dtype=torch.float64)
    found_ends = torch.tensor(cuts, dtype=torch.float64).quantile(ends, dim=0)
    return tuple((low, high) for low, high in found_ends.T.tolist())


def _by_gradients(denoiser, data, sigmas, samples, sigma_units, seed, device, progress) -> Similarity:
    if tuple(sigma_units) != (-1.0, 1.0):
        raise ValueError(
            "find_stages: method gradient: the model's data are in [-1, 1]; leave sigma_units out"
        )
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[:samples]
    parameters = [p.requires_grad_(True) for p in denoiser.eval().parameters()]
    images = data.sample(order).to(device)
    return gradient_similarity(denoiser, parameters, images, sigmas, seed=seed, progress=progress)

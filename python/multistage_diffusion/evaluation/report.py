"""Quality of samples: Fréchet distance, improved precision and recall, and KID, each with its error."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields

import torch
from torch import Tensor

from multistage_diffusion.common.checks import integer
from multistage_diffusion.evaluation.distances import Statistics, frechet_distance, kernel_distance
from multistage_diffusion.evaluation.features import Features, Images, extract
from multistage_diffusion.evaluation.neighbours import precision, radii, recall

# Half the width of a 95 % interval in standard errors.
NORMAL = 1.96


@dataclass(frozen=True)
class Figure:
    """One figure of an evaluation.

    Attributes:
        value: of all images.
        images: how many they are.
        bias: by how much the value is higher than it would be of endless images, None where nothing was resampled.
        error: its standard error for other images of the same model, None where nothing was resampled.
    """

    value: float
    images: int
    bias: float | None
    error: float | None

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 %, around the value."""
        if self.error is None:
            return None
        return self.value - NORMAL * self.error, self.value + NORMAL * self.error


class Evaluation(dict[str, float]):
    """The values by name, ``"frechet"``, ``"precision"``, ``"recall"`` and ``"kid"``; their errors are in ``figures``.

    Attributes:
        figures: a :class:`Figure` for each.
        reference_images: how many images they were compared with, None for statistics that do not say.
    """

    def __init__(self, figures: dict[str, Figure], reference_images: int | None) -> None:
        super().__init__({name: figure.value for name, figure in figures.items()})
        self.figures, self.reference_images = figures, reference_images

    @property
    def intervals(self) -> dict[str, tuple[float, float] | None]:
        return {name: figure.interval for name, figure in self.figures.items()}

    def report(self) -> dict:
        """All of it as plain numbers, for JSON."""
        figures = {
            name: {**asdict(figure), "interval": figure.interval} for name, figure in self.figures.items()
        }
        return {"figures": figures, "reference_images": self.reference_images}

    @staticmethod
    def of_report(report: dict) -> Evaluation:
        """What :meth:`report` was made of, read from JSON."""
        names = [field.name for field in fields(Figure)]
        figures = {
            name: Figure(*(entry[name] for name in names)) for name, entry in report["figures"].items()
        }
        return Evaluation(figures, report["reference_images"])

    def __str__(self) -> str:
        lines = [f"{'':<10} {'value':>10} {'95 % interval':>23} {'bias':>10}"]
        for name, figure in self.figures.items():
            low_high = "" if figure.interval is None else "{:.4g} to {:.4g}".format(*figure.interval)
            bias = "" if figure.bias is None else f"{figure.bias:.2g}"
            lines.append(f"{name:<10} {figure.value:>10.4g} {low_high:>23} {bias:>10}")
        return "\n".join(lines)


def evaluate(
    images: Images,
    against: Images | Statistics,
    features: Features,
    *,
    k: int = 3,
    resamples: int = 20,
    seed: int = 0,
    batch_size: int = 64,
) -> Evaluation:
    """Compares generated images with real ones by their features.

    - ``frechet``: squared Fréchet distance of the Gaussians fitted to them, covariances with N - 1.
    - ``precision``, ``recall``: the share of samples within the k-th neighbour's distance of a real image, and the
      reverse.
    - ``kid``: the unbiased squared maximum mean discrepancy with a cubic kernel; its standard error is its own.

    The errors of the others come from halves of the images, drawn ``resamples`` times without repetition, for two equal
    features would have no distance: their spread is that of all images, and where a bias falls as 1/N, the mean of the
    halves less the value is the bias of the value. The real images are taken as they are.

    Args:
        images: the samples, ``[N, C, H, W]``, an ``ImageData`` or an iterable of batches; N at least the number of
            features, and more than k. They reach ``features`` as given.
        against: the real images alike, or :class:`Statistics` of their features, which give the Fréchet distance alone.
        features: maps a batch to ``[n, D]``; :func:`load_features` finds one by name.
        k: which neighbour's distance counts.
        resamples: how many halves; 0 leaves errors and biases out.
        seed: of the halves.
        batch_size: images per call of ``features``.

    Raises:
        TypeError: arguments of a wrong kind.
        ValueError: too few images, images that differ in size, values or features that are NaN or infinite, features of
            a wrong shape.
    """
    k = integer("evaluate", "k", k, 1)
    batch_size = integer("evaluate", "batch_size", batch_size, 1)
    _check_few(images, "images", k)
    if not isinstance(against, Statistics):
        _check_few(against, "against", k)
    found = extract(images, features, batch_size=batch_size)
    if not isinstance(against, Statistics):
        against = extract(against, features, name="against", batch_size=batch_size)
    return compare(found, against, k=k, resamples=resamples, seed=seed)


def compare(
    found: Tensor, real: Tensor | Statistics, *, k: int = 3, resamples: int = 20, seed: int = 0
) -> Evaluation:
    """As :func:`evaluate`, of features ``[N, D]`` and ``[M, D]`` that :func:`extract` has computed."""
    k, resamples = integer("evaluate", "k", k, 1), integer("evaluate", "resamples", resamples, 0)
    sizes = [len(found[0]), len(real.mean) if isinstance(real, Statistics) else len(real[0])]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"evaluate: images have {sizes[0]} features and against has {sizes[1]}; these must be equal"
        )
    _require_enough(found, "images", k)
    halves = _halves(len(found), resamples, k, seed)
    if isinstance(real, Statistics):
        return Evaluation({"frechet": _frechet(found, real, halves)}, real.count)
    _require_enough(real, "against", k)
    distance = kernel_distance(found, real)
    figures = {
        "frechet": _frechet(found, Statistics.of(real), halves),
        **_neighbours(found, real, k, halves),
        "kid": Figure(distance.value, len(found), 0.0, distance.error),
    }
    return Evaluation(figures, len(real))


def _check_few(images: Images, name: str, k: int) -> None:
    """Refuses too few before anything is computed, where their number is known."""
    count = getattr(images, "num_images", None)
    if count is None and isinstance(images, Tensor) and images.dim() == 4:
        count = len(images)
    if count is not None:
        _require_more(count, name, k)


def _require_more(count: int, name: str, k: int) -> None:
    if count <= k:
        raise ValueError(f"evaluate: {name} must be more than {k} images for k={k}, got {count}")


def _require_enough(features: Tensor, name: str, k: int) -> None:
    count, size = features.shape
    _require_more(count, name, k)
    if count < size:
        raise ValueError(
            f"evaluate: {name} must be at least as many as features ({size}), got {count}: no covariance follows from "
            "fewer; take more images, or features that are fewer"
        )


def _halves(count: int, resamples: int, k: int, seed: int) -> list[Tensor]:
    """The indices of halves of the images; none where a half has too few."""
    if count // 2 <= k:
        return []
    generator = torch.Generator().manual_seed(seed)
    return [torch.randperm(count, generator=generator)[: count // 2] for _ in range(resamples)]


def _figure(value: float, images: int, of_halves: list[float]) -> Figure:
    if len(of_halves) < 2:
        return Figure(value, images, None, None)
    values = torch.tensor(of_halves, dtype=torch.float64)
    return Figure(value, images, float(values.mean()) - value, float(values.std()))


def _frechet(found: Tensor, reference: Statistics, halves: list[Tensor]) -> Figure:
    def distance(features: Tensor) -> float:
        return frechet_distance(Statistics.of(features), reference)

    return _figure(distance(found), len(found), [distance(found[half]) for half in halves])


def _neighbours(found: Tensor, real: Tensor, k: int, halves: list[Tensor]) -> dict[str, Figure]:
    inside = precision(found, real, radii(real, k)).double()

    def recall_of(features: Tensor) -> float:
        return float(recall(features, real, k).double().mean())

    return {
        "precision": _figure(
            float(inside.mean()), len(found), [float(inside[half].mean()) for half in halves]
        ),
        "recall": _figure(recall_of(found), len(found), [recall_of(found[half]) for half in halves]),
    }

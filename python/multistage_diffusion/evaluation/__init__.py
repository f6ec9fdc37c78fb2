"""How good samples are: distances of their features to those of real images, each with its error."""

from multistage_diffusion.evaluation.distances import Statistics, frechet_distance, kernel_distance
from multistage_diffusion.evaluation.features import extract, load_features
from multistage_diffusion.evaluation.neighbours import nearest, precision, radii, recall
from multistage_diffusion.evaluation.report import Evaluation, Figure, compare, evaluate

__all__ = [
    "Evaluation",
    "Figure",
    "Statistics",
    "compare",
    "evaluate",
    "extract",
    "frechet_distance",
    "kernel_distance",
    "load_features",
    "nearest",
    "precision",
    "radii",
    "recall",
]

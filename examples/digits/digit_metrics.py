"""How good generated digits are: the share a classifier is sure of, and the Fréchet distance to real digits."""

from __future__ import annotations

import math

import numpy as np
import torch

from digit_classifier import (
    NUM_DIGITS,
    DigitClassifier,
    all_images,
    check_digit_images,
    digit_classifier,
    digit_halves,
)
from multistage_diffusion.data.images import DIGITS_IMAGE_SIZE


def evaluate_digits(
    samples: torch.Tensor, *, classifier: DigitClassifier | None = None, seed: int = 0
) -> dict[str, int | float | list[int]]:
    """Judge generated digits against the real ones.

    Args:
        samples: `[N, 1, 16, 16]` floating point, N at least 2, black at -1 and white at 1; values beyond are
            clamped.
        classifier: judge of images of another size, from `digit_classifier(image_size=...)`.
        seed: of the classifier, where none is given, and of the noise and held-out digits to compare with.

    Returns:
        `num_samples`: N.
        `confident_share`: share of samples labelled with a probability of at least 0.9;
            `confident_held_out` and `confident_noise` are the same for real digits the classifier has not
            seen, and for Gaussian noise.
        `frechet_samples`: Fréchet distance of the samples' features to those of the reference half of the
            real digits; `frechet_held_out` and `frechet_noise` are the same for held-out digits and for
            Gaussian noise. Its unit depends on the classifier: compare only what one classifier judged.
        `classifier_accuracy`: on the held-out half.
        `class_histogram`: how many samples have each digit, 0 to 9, as their most probable one; sums to N.

    The distance falls as the number of images grows, so held-out digits and noise are compared in the same
    number as the samples (of held-out digits, 899 at most). The classifier was trained on the reference half:
    samples that copy it come out closer than held-out digits do.

    Raises:
        TypeError, ValueError: samples of another dtype, shape or size, fewer than 2, or not finite.
        ImportError: scikit-learn, which holds the digits, is not installed.
    """
    size = DIGITS_IMAGE_SIZE if classifier is None else classifier.image_size
    check_digit_images(samples, size)
    if len(samples) < 2:
        raise ValueError(f"evaluate_digits: samples must be at least 2, got {len(samples)}")
    classifier = digit_classifier(seed, size) if classifier is None else classifier
    generator = torch.Generator().manual_seed(seed)
    reference, held_out = digit_halves(size)
    chosen = torch.randperm(held_out.num_images, generator=generator)[: len(samples)]
    held_out_images = held_out.sample(chosen)
    noise = torch.randn(len(samples), 1, size, size, generator=generator)
    reference_features = classifier.features(all_images(reference))

    def distance(images: torch.Tensor) -> float:
        return frechet_distance(classifier.features(images), reference_features)

    labels = classifier.probabilities(samples).argmax(1)
    return {
        "num_samples": len(samples),
        "confident_share": classifier.confident_share(samples),
        "confident_held_out": classifier.confident_share(held_out_images),
        "confident_noise": classifier.confident_share(noise),
        "frechet_samples": distance(samples),
        "frechet_held_out": distance(held_out_images),
        "frechet_noise": distance(noise),
        "classifier_accuracy": classifier.accuracy,
        "class_histogram": labels.bincount(minlength=NUM_DIGITS).tolist(),
    }


def frechet_distance(features_a: torch.Tensor | np.ndarray, features_b: torch.Tensor | np.ndarray) -> float:
    """Squared Fréchet distance of the Gaussians fitted to two sets of features (FID, arXiv 1706.08500).

        |mean_a - mean_b|² + tr(C_a + C_b - 2 (C_a^½ C_b C_a^½)^½)

    Computed in float64. The trace of the last term is the sum of the singular values of C_a^½ C_b^½, and both
    square roots come from eigenvalues of symmetric matrices, so singular covariances (fewer vectors than
    features, features that never vary) are no trouble.

    Args:
        features_a, features_b: `[N, D]` and `[M, D]`, N and M at least 2. Covariances divide by
            N - 1 and M - 1.

    Returns:
        The distance in squared feature units, never negative.

    Raises:
        TypeError: complex features.
        ValueError: another rank, no feature, different D, fewer than 2 vectors, or values that are not finite or whose
            squares are not.
    """
    a = _feature_matrix(features_a, "features_a")
    b = _feature_matrix(features_b, "features_b")
    if a.shape[1] != b.shape[1]:
        raise ValueError(
            f"frechet_distance: features_a has {a.shape[1]} features, features_b has {b.shape[1]}; "
            "they must be equally many"
        )
    cov_a, cov_b = _covariance(a), _covariance(b)
    mean_term = (a.mean(0) - b.mean(0)).square().sum()
    if not math.isfinite(float(mean_term + cov_a.abs().sum() + cov_b.abs().sum())):
        raise ValueError("frechet_distance: the features are too large, their squares overflow float64")
    cross = torch.linalg.svdvals(_symmetric_sqrt(cov_a) @ _symmetric_sqrt(cov_b)).sum()
    return max(0.0, float(mean_term + cov_a.trace() + cov_b.trace() - 2 * cross))


def _feature_matrix(features: torch.Tensor | np.ndarray, name: str) -> torch.Tensor:
    if isinstance(features, np.ndarray):
        features = np.ascontiguousarray(features)  # PyTorch takes no negative strides
    matrix = torch.as_tensor(features).detach()
    if matrix.is_complex():
        raise TypeError(f"frechet_distance: {name} must be real, got {matrix.dtype}")
    if matrix.ndim != 2 or len(matrix) < 2 or matrix.shape[1] < 1:
        raise ValueError(
            f"frechet_distance: {name} must be [N, D] with N at least 2 and D at least 1, "
            f"got shape {list(matrix.shape)}"
        )
    matrix = matrix.to("cpu", torch.float64)
    if not matrix.isfinite().all():
        raise ValueError(f"frechet_distance: {name} holds values that are NaN or infinite")
    return matrix


def _covariance(features: torch.Tensor) -> torch.Tensor:
    centred = features - features.mean(0)
    return centred.T @ centred / (len(features) - 1)


def _symmetric_sqrt(matrix: torch.Tensor) -> torch.Tensor:
    """Square root of a symmetric positive semidefinite matrix; eigenvalues lost in rounding become zero."""
    values, vectors = torch.linalg.eigh(matrix)
    rounding = torch.finfo(matrix.dtype).eps * len(values) * values[-1].abs()
    roots = torch.where(values > rounding, values, 0.0).sqrt()
    return (vectors * roots) @ vectors.T

"""How good generated digits are: the share a classifier is sure of, and the Fréchet distance to real digits."""

from __future__ import annotations

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
from multistage_diffusion.evaluation import Statistics, frechet_distance


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
    reference_statistics = Statistics.of(classifier.features(all_images(reference)))

    def distance(images: torch.Tensor) -> float:
        return frechet_distance(Statistics.of(classifier.features(images)), reference_statistics)

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

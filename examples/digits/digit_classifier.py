"""A classifier of digits, trained in seconds on half of the digits of scikit-learn.

Beside the ten digits it has an eleventh class, trained on noise, blends and scrambled digits, so that what is no digit
gets no confident label.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import nn

from multistage_diffusion.data.images import DIGITS_IMAGE_SIZE, ImageData, load_images

NUM_DIGITS = 10
CONFIDENCE = 0.9  # a label counts as confident from this probability on
FEATURES = 48

_REJECT = NUM_DIGITS  # the class of what is no digit
_STEPS = 400
_DIGITS_PER_STEP = 96
_REJECTS_PER_STEP = 48
_LABEL_SMOOTHING = 0.005
_PEAK_LEARNING_RATE = 4e-3
_SPLIT_SEED = 0
_INFERENCE_BATCH = 1024


@dataclass(frozen=True)
class DigitClassifier:
    """A trained classifier of digits; `digit_classifier` makes one.

    Attributes:
        network: maps `[N, 1, S, S]` to `[N, 11]` logits: ten digits, and "no digit".
        image_size: S, height and width of the images it takes, in pixels.
        accuracy: share of the held-out real digits it labels correctly, 0 to 1.
    """

    network: nn.Module
    image_size: int
    accuracy: float

    def probabilities(self, images: torch.Tensor) -> torch.Tensor:
        """Probability of each digit, `[N, 10]` float32; a row sums to 1 less the probability of "no digit".

        Args:
            images: `[N, 1, S, S]` floating point, black at -1 and white at 1; values beyond are clamped.

        Raises:
            TypeError, ValueError: images of another dtype, shape or size, or with values that are not finite.
        """
        return self._apply(lambda batch: self.network(batch).softmax(1)[:, :NUM_DIGITS], images)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """The last hidden layer, `[N, 48]` float32; takes what `probabilities` takes."""
        return self._apply(self.network.features, images)

    def confident_share(self, images: torch.Tensor) -> float:
        """Share of images, 0 to 1, in which some digit has a probability of at least 0.9."""
        return float((self.probabilities(images).amax(1) >= CONFIDENCE).float().mean())

    @torch.no_grad()
    def _apply(self, function, images: torch.Tensor) -> torch.Tensor:
        check_digit_images(images, self.image_size)
        images = images.detach().to("cpu", torch.float32).clamp(-1, 1)
        return torch.cat([function(batch) for batch in images.split(_INFERENCE_BATCH)])


def digit_classifier(seed: int = 0, image_size: int = DIGITS_IMAGE_SIZE) -> DigitClassifier:
    """Train a small network to tell digits from each other, and from what is no digit.

    It sees the reference half of the real digits, shifted, turned, scaled, softened and slightly noisy,
    under the digits' labels; and under "no digit" Gaussian, uniform and smooth noise, digits with shuffled
    pixels or drowned in noise, and blurred blends of two digits.

    The result is kept: a second call with the same arguments returns the same object. Training runs in one
    thread, so that the same seed gives the same classifier whatever the number of cores. PyTorch's global
    generator is left alone.

    Args:
        seed: of the initial weights and of all that is drawn in training.
        image_size: height and width in pixels, a multiple of 4 from 8 to 32. Time grows with its square.

    Raises:
        ValueError: another image size.
        ImportError: scikit-learn, which holds the digits, is not installed.
    """
    if image_size % 4 or not 8 <= image_size <= 32:
        raise ValueError(
            f"digit_classifier: image_size must be a multiple of 4 from 8 to 32, got {image_size}"
        )
    return _trained_classifier(seed, image_size)


def digit_halves(image_size: int = DIGITS_IMAGE_SIZE) -> tuple[ImageData, ImageData]:
    """The real digits in two fixed halves: the reference, 898 images that train the classifier, and the
    held-out half, 899 images.
    """
    return load_images("digits", image_size=image_size).split(0.5, _SPLIT_SEED)


class _DigitNetwork(nn.Module):
    def __init__(self, image_size: int):
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(1, 24, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(24, 48, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(48, 64, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
        )
        self.embedding = nn.Linear(64 * (image_size // 4) ** 2, FEATURES)
        self.head = nn.Linear(FEATURES, NUM_DIGITS + 1)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        return self.embedding(self.convolutions(images)).relu()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(images))


@contextmanager
def _one_thread():
    """PyTorch on one thread: sums keep their order, and small layers never wait for a core that is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@lru_cache(maxsize=4)
@_one_thread()
@torch.inference_mode(False)
@torch.enable_grad()
def _trained_classifier(seed: int, image_size: int) -> DigitClassifier:
    reference, held_out = digit_halves(image_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _DigitNetwork(image_size)
    _train(network, all_images(reference), reference.labels, torch.Generator().manual_seed(seed))
    network.requires_grad_(False).eval()
    classifier = DigitClassifier(network, image_size, accuracy=math.nan)
    predicted = classifier.probabilities(all_images(held_out)).argmax(1)
    accuracy = float((predicted == held_out.labels).float().mean())
    return DigitClassifier(network, image_size, accuracy)


def _train(
    network: nn.Module, images: torch.Tensor, labels: torch.Tensor, generator: torch.Generator
) -> None:
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _PEAK_LEARNING_RATE, total_steps=_STEPS)
    reject_labels = torch.full((_REJECTS_PER_STEP,), _REJECT)
    for _ in range(_STEPS):
        index = torch.randint(len(images), (_DIGITS_PER_STEP,), generator=generator)
        digits = _augmented(images[index], generator)
        rejects = _rejects(images, labels, _REJECTS_PER_STEP, generator)
        logits = network(torch.cat([digits, rejects]))
        targets = torch.cat([labels[index], reject_labels])
        loss = F.cross_entropy(logits, targets, label_smoothing=_LABEL_SMOOTHING)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def _augmented(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Digits turned by up to 12 degrees, slanted, scaled by 10 %, shifted by a tenth, soft and noisy."""
    num = len(images)
    angle = _uniform(generator, num, -math.radians(12), math.radians(12))
    slant = _uniform(generator, num, -0.15, 0.15)
    scale = _uniform(generator, num, 0.9, 1.1)
    shift_x, shift_y = (_uniform(generator, num, -0.19, 0.19) for _ in range(2))  # the image spans -1..1
    cos, sin = scale * angle.cos(), scale * angle.sin()
    affine = torch.stack([cos, slant - sin, shift_x, sin, cos, shift_y], 1).view(num, 2, 3)
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    moved = F.grid_sample(images + 1, grid, align_corners=False) - 1  # what moves in is black
    softened = _blurred(moved, _uniform(generator, num, 0.1, 0.7) * images.shape[-1] / 16)
    return _noisy(softened, _uniform(generator, num, 0, 0.15), generator).clamp(-1, 1)


def _rejects(
    images: torch.Tensor, labels: torch.Tensor, num: int, generator: torch.Generator
) -> torch.Tensor:
    """`[num, 1, S, S]` images that are no digits, a sixth of each kind."""
    each, size = num // 6, images.shape[-1]
    black = images.new_full((each, 1, size, size), -1)
    grey = _uniform(generator, each, -0.7, 0.7).view(-1, 1, 1, 1).expand_as(black)
    gaussian = _noisy(grey, _uniform(generator, each, 0.2, 1.5), generator)
    uniform = torch.rand(black.shape, generator=generator) * 2 - 1
    smooth = _smooth_noise(each, size, generator)
    shuffled = _drawn(images, each, generator).flatten(1)
    shuffled = shuffled[:, torch.randperm(size * size, generator=generator)].view_as(black)
    drowned = _noisy(_drawn(images, each, generator), _uniform(generator, each, 0.7, 2), generator)
    blends = _blends(images, labels, num - 5 * each, generator)
    return torch.cat([gaussian, uniform, smooth, shuffled, drowned, blends]).clamp(-1, 1)


def _smooth_noise(num: int, size: int, generator: torch.Generator) -> torch.Tensor:
    """Noise with the contrast of digits, and blurred to the width of their strokes, more or less."""
    noise = torch.randn(num, 1, size, size, generator=generator)
    noise = _blurred(noise, _uniform(generator, num, 0.4, 2) * size / 16)
    noise = noise / noise.std((1, 2, 3), keepdim=True)
    return 0.8 * noise - _uniform(generator, num, 0, 0.4).view(-1, 1, 1, 1)


def _blends(images: torch.Tensor, labels: torch.Tensor, num: int, generator: torch.Generator) -> torch.Tensor:
    """Blurred weighted means of two different digits."""
    first, second = torch.randint(len(images), (2, 4 * num), generator=generator)
    differ = (labels[first] != labels[second]).nonzero()[:num, 0]
    first, second = first[differ], second[differ]
    weight = _uniform(generator, len(differ), 0.3, 0.7).view(-1, 1, 1, 1)
    radius = _uniform(generator, len(differ), 0.3, 1.5) * images.shape[-1] / 16
    return _blurred(weight * images[first] + (1 - weight) * images[second], radius)


def _blurred(images: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """Gaussian blur of `[N, 1, S, S]` with a standard deviation of `radius` `[N]` pixels for each image.

    One matrix per image blurs its columns, and transposed its rows; at the border the weights still sum to 1.
    """
    pixel = torch.arange(images.shape[-1])
    distance = (pixel[:, None] - pixel) / radius.view(-1, 1, 1, 1)
    weights = torch.softmax(-0.5 * distance.square(), -1)
    return weights @ images @ weights.mT


def _noisy(images: torch.Tensor, sigma: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return images + sigma.view(-1, 1, 1, 1) * torch.randn(images.shape, generator=generator)


def _drawn(images: torch.Tensor, num: int, generator: torch.Generator) -> torch.Tensor:
    return images[torch.randint(len(images), (num,), generator=generator)]


def _uniform(generator: torch.Generator, num: int, low: float, high: float) -> torch.Tensor:
    return low + (high - low) * torch.rand(num, generator=generator)


def all_images(data: ImageData) -> torch.Tensor:
    return data.sample(torch.arange(data.num_images))


def check_digit_images(images: torch.Tensor, image_size: int) -> None:
    if not isinstance(images, torch.Tensor) or not images.is_floating_point():
        given = images.dtype if isinstance(images, torch.Tensor) else type(images).__name__
        raise TypeError(f"digit metrics: images must be a floating-point tensor in [-1, 1], got {given}")
    if images.ndim != 4 or images.shape[0] == 0 or images.shape[1] != 1:
        raise ValueError(
            f"digit metrics: images must be [N, 1, {image_size}, {image_size}], "
            f"got shape {list(images.shape)}"
        )
    if images.shape[2:] != (image_size, image_size):
        raise ValueError(
            f"digit metrics: images must be {image_size}x{image_size}, "
            f"got {images.shape[2]}x{images.shape[3]}; "
            "for another square size, pass classifier=digit_classifier(image_size=...)"
        )
    finite = images.isfinite().flatten(1).all(1)
    if not finite.all():
        raise ValueError(
            f"digit metrics: {int((~finite).sum())} of {len(images)} images hold NaN or infinite values"
        )

"""Non-leaking augmentation: what the labels say is what was done, and nothing is done unannounced."""

from __future__ import annotations

import math

import pytest
import torch

from multistage_diffusion.data.augmentation import LABELS, Augmentation, transform


def blob(size: int = 32, x: float = 0.0, y: float = 0.0) -> torch.Tensor:
    """``[1, 1, size, size]``: a smooth spot at (x, y), in pixels from the centre; what interpolation changes little."""
    coordinate = torch.arange(size, dtype=torch.float64) + 0.5 - size / 2
    distance = (coordinate[None, :] - x) ** 2 + (coordinate[:, None] - y) ** 2
    return torch.exp(-distance / 18)[None, None]


def matrix(a=1.0, b=0.0, c=0.0, d=1.0, x=0.0, y=0.0) -> torch.Tensor:
    return torch.tensor([[[a, b, x], [c, d, y], [0, 0, 1]]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("inverse", "expected"),
    [
        (matrix(), blob(x=5, y=2)),
        (matrix(x=-3, y=4), blob(x=8, y=-2)),
        (matrix(a=0, b=-1, c=1, d=0), blob(x=2, y=-5)),
        (matrix(a=-1, d=-1), blob(x=-5, y=-2)),
    ],
    ids=["identity", "translation", "quarter turn", "half turn"],
)
def test_transform_moves_the_image_as_the_matrix_says(inverse, expected):
    # Interpolation at twice the resolution between filters; the identity itself costs 0.004 of a spot of height 1.
    torch.testing.assert_close(transform(blob(x=5, y=2), inverse), expected, rtol=0, atol=0.01)


def test_transform_continues_the_image_as_its_mirror_image():
    image = torch.linspace(0, 1, 32, dtype=torch.float64).expand(1, 1, 32, 32).contiguous()
    moved = transform(image, matrix(x=-8))  # content moves 8 pixels to the right
    # Column 8 shows the old column 0, column 8 - k its mirror image, column k. The filters see the kink of the mirror.
    torch.testing.assert_close(moved[0, 0, 16, 2:7], image[0, 0, 16, 2:7].flip(0), rtol=0, atol=0.005)


def test_images_without_augmentation_are_unchanged_and_labelled_zero():
    images = torch.randn(64, 3, 8, 8)
    augmented, labels = Augmentation(p=0.0)(images, torch.Generator().manual_seed(0))
    assert labels.shape == (64, len(LABELS))
    flipped = labels[:, 0] == 1
    assert 16 < flipped.sum() < 48  # 32 expected, standard deviation 4
    assert torch.equal(augmented[flipped], images[flipped].flip(3))
    assert torch.equal(augmented[~flipped], images[~flipped])
    assert not labels[:, 1:].any()


def test_labels_tell_what_was_done():
    images = blob(x=5, y=2).expand(512, -1, -1, -1).float()
    augmentation = Augmentation(p=0.5)
    augmented, labels = augmentation(images, torch.Generator().manual_seed(1))
    x_flip, y_flip, scale, cos_less_1, sin, a_cos, a_sin, x, y = labels.double().T
    # Images that were moved little: others lose their spot over the border, or get its mirror image.
    kept = (a_cos == 0) & (a_sin == 0) & (x.abs() < 0.5) & (y.abs() < 0.5) & (scale.abs() < 0.5)
    assert kept.sum() > 50
    point = torch.stack([5 * (1 - 2 * x_flip), 2 * (1 - 2 * y_flip)])
    cos = cos_less_1 + 1
    point = torch.stack([cos * point[0] + sin * point[1], -sin * point[0] + cos * point[1]])
    point = point * torch.exp2(
        augmentation.scale_std * scale
    ) + 32 * augmentation.translation_std * torch.stack([x, y])
    coordinate = torch.arange(32, dtype=torch.float64) + 0.5 - 16
    inside = kept & (point.abs() < 6).all(dim=0)
    weights = augmented[inside].double().clamp_min(0.2) - 0.2  # without its mirror image in the corners
    total = weights.sum(dim=(1, 2, 3))
    found_x = (weights.sum(dim=(1, 2)) * coordinate).sum(dim=1) / total
    found_y = (weights.sum(dim=(1, 3)) * coordinate).sum(dim=1) / total
    # The centre of mass of a spot of a few pixels, whose tail may touch the border.
    torch.testing.assert_close(torch.stack([found_x, found_y]), point[:, inside], rtol=0, atol=0.2)


def test_each_kind_is_drawn_with_its_probability_and_spread():
    count = 4096
    _, labels = Augmentation(p=0.12)(torch.zeros(count, 1, 2, 2), torch.Generator().manual_seed(2))
    rate = (labels != 0).double().mean(dim=0)
    expected = torch.tensor([0.5, 0.06, *[0.12] * 7], dtype=torch.float64)
    deviation = (expected * (1 - expected) / count).sqrt()
    assert ((rate - expected).abs() < 4 * deviation).all()
    scale = labels[labels[:, 2] != 0, 2]
    assert abs(scale.std().item() - 1) < 4 / math.sqrt(2 * len(scale))


def test_the_same_seed_gives_the_same_bits():
    images = torch.randn(16, 3, 8, 8)
    first, second = (Augmentation(p=0.9)(images, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert not torch.equal(first[0], Augmentation(p=0.9)(images, torch.Generator().manual_seed(4))[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dtype_and_shape_are_kept(dtype):
    images = torch.randn(8, 3, 6, 10).to(dtype)
    augmented, labels = Augmentation(p=1.0)(images, torch.Generator().manual_seed(5))
    assert augmented.dtype == dtype
    assert augmented.shape == images.shape
    assert augmented.isfinite().all()
    assert labels.dtype == torch.float32


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Augmentation(p=1.5), r"p=1\.5 must lie in 0\.\.1"),
        (lambda: Augmentation(scale_std=-1), r"scale_std=-1 must be at least 0"),
        (lambda: Augmentation()(torch.zeros(3, 8, 8), torch.Generator()), r"got torch\.float32 \[3, 8, 8\]"),
        (
            lambda: Augmentation()(torch.zeros(1, 1, 8, 8, dtype=torch.uint8), torch.Generator()),
            r"got torch\.uint8",
        ),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()

"""Non-leaking augmentation: the network is told what was done to each image (EDM, arXiv 2206.00364, appendix F.2).

Images are flipped, scaled, rotated, stretched and moved at random, and nine numbers say how. In sampling all nine are
0, which means an image as it is in the data set.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from msd_kernels import resample2d
from multistage_diffusion.common.transfer import host_to_device

__all__ = ["LABELS", "Augmentation"]

LABELS = (
    "x flip",
    "y flip",
    "log scale",
    "cos(rotation) - 1",
    "sin(rotation)",
    "log anisotropy * cos(direction)",
    "log anisotropy * sin(direction)",
    "x translation",
    "y translation",
)
# Half-band low-pass filter, sinc with a Hann window: for the supersampling around the interpolation.
FILTER = tuple(
    math.sin(math.pi * t / 2) / (math.pi * t / 2) * math.cos(math.pi * t / 9) ** 2
    for t in (k - 3.5 for k in range(8))
)
MARGIN = 4  # pixels beyond the image that the filter of the way back sees


@dataclass(frozen=True)
class Augmentation:
    """Draws and applies augmentations.

    Every kind is enabled for each image on its own with probability ``p``; the x flip always is, and then happens for
    half of the images.

    Attributes:
        p: probability of each kind of augmentation; 0.12 for CIFAR-10.
        scale_std: of log2 of the scale.
        anisotropy_std: of log2 of the stretching.
        translation_std: in fractions of the image's width and height.
    """

    p: float = 0.12
    scale_std: float = 0.2
    anisotropy_std: float = 0.2
    translation_std: float = 0.125

    def __post_init__(self) -> None:
        if not 0 <= self.p <= 1:
            raise ValueError(f"Augmentation: p={self.p} must lie in 0..1")
        for name in ("scale_std", "anisotropy_std", "translation_std"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"Augmentation: {name}={getattr(self, name)} must be at least 0")

    def __call__(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Augments a batch.

        Args:
            images: ``[B, C, H, W]``, floating, H and W at least 2.
            generator: on the host: what is done to which image is known there, and the device need not be waited for.

        Returns:
            The images, in their dtype and on their device, and the labels ``[B, 9]`` in float32 (see ``LABELS``).
            Images to which nothing was done are unchanged, bit by bit.
        """
        return self.apply(images, self.draw(images.shape[0], generator))

    def apply(self, images: Tensor, draws: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """As a call, with what ``draw`` has drawn, or the entries of these images alone."""
        if images.dim() != 4 or not images.is_floating_point() or min(images.shape[2:]) < 2:
            raise ValueError(
                f"Augmentation: images must be floating [B, C, H, W], H and W at least 2, "
                f"got {images.dtype} {list(images.shape)}"
            )
        labels = torch.stack(
            [
                draws["x_flip"],
                draws["y_flip"],
                draws["scale"],
                draws["rotation"].cos() - 1,
                draws["rotation"].sin(),
                draws["anisotropy"] * draws["direction"].cos(),
                draws["anisotropy"] * draws["direction"].sin(),
                draws["x_translation"],
                draws["y_translation"],
            ],
            dim=1,
        )
        for name, axis in (("x_flip", 3), ("y_flip", 2)):
            images = _replace(images, draws[name] != 0, lambda part, axis=axis: part.flip(axis))
        matrices = self._inverse_matrices(draws, *images.shape[2:])
        moved = (matrices != torch.eye(3, dtype=matrices.dtype)).flatten(1).any(dim=1)
        images = _replace(images, moved, lambda part: transform(part, matrices[moved]))
        return images, host_to_device(labels, images.device, torch.float32)

    def draw(self, batch: int, generator: torch.Generator) -> dict[str, Tensor]:
        """What is done to each of ``batch`` images, in units of the standard deviations; float64 on the host."""

        def uniform(low: float, high: float) -> Tensor:
            return low + (high - low) * torch.rand(batch, generator=generator, dtype=torch.float64)

        def normal() -> Tensor:
            return torch.randn(batch, generator=generator, dtype=torch.float64)

        def with_probability(*values: Tensor) -> tuple[Tensor, ...]:
            enabled = uniform(0, 1) < self.p
            return tuple(torch.where(enabled, value, torch.zeros_like(value)) for value in values)

        x_flip = (uniform(0, 1) < 0.5).double()
        (y_flip,) = with_probability((uniform(0, 1) < 0.5).double())
        (scale,) = with_probability(normal())
        (rotation,) = with_probability(uniform(-math.pi, math.pi))
        anisotropy, direction = with_probability(normal(), uniform(-math.pi, math.pi))
        x_translation, y_translation = with_probability(normal(), normal())
        return {
            "x_flip": x_flip,
            "y_flip": y_flip,
            "scale": scale,
            "rotation": rotation,
            "anisotropy": anisotropy,
            "direction": direction,
            "x_translation": x_translation,
            "y_translation": y_translation,
        }

    def _inverse_matrices(self, draws: dict[str, Tensor], height: int, width: int) -> Tensor:
        """``[B, 3, 3]``: from a point of the augmented image to one of the original, in pixels from the centre."""
        zero = torch.zeros_like(draws["scale"])
        shrink = torch.exp2(-self.scale_std * draws["scale"])
        stretch = torch.exp2(-self.anisotropy_std * draws["anisotropy"])
        return (
            _matrices(shrink, zero, zero, shrink)
            @ _rotations(draws["rotation"])
            @ _rotations(-draws["direction"])
            @ _matrices(stretch, zero, zero, 1 / stretch)
            @ _rotations(draws["direction"])
            @ _matrices(
                zero + 1,
                zero,
                zero,
                zero + 1,
                -draws["x_translation"] * self.translation_std * width,
                -draws["y_translation"] * self.translation_std * height,
            )
        )


def transform(images: Tensor, inverse: Tensor) -> Tensor:
    """Resamples each image by its own affine map; beyond its borders an image goes on as its mirror image.

    Args:
        images: ``[B, C, H, W]``.
        inverse: ``[B, 3, 3]``, from a point of the result to one of ``images``, in pixels from the centre, x first.
    """
    height, width = images.shape[2:]
    pad_y, pad_x = height - 1, width - 1
    wide = F.pad(images, (pad_x, pad_x, pad_y, pad_y), mode="reflect")
    wide = resample2d(wide, FILTER, up=2)
    into = torch.tensor([width / 2 + pad_x, height / 2 + pad_y, 1], dtype=inverse.dtype)
    out_of = torch.tensor([width / 2 + MARGIN, height / 2 + MARGIN, 1], dtype=inverse.dtype)
    theta = (inverse * out_of / into[:, None])[:, :2]  # grid_sample counts from -1 to 1
    size = (images.shape[0], images.shape[1], 2 * (height + 2 * MARGIN), 2 * (width + 2 * MARGIN))
    grid = F.affine_grid(host_to_device(theta, images.device, images.dtype), size, align_corners=False)
    moved = F.grid_sample(wide, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    moved = resample2d(moved, FILTER, down=2)
    return moved[:, :, MARGIN:-MARGIN, MARGIN:-MARGIN]


def _replace(images: Tensor, selected: Tensor, change) -> Tensor:
    """``change`` applied to the images selected on the host."""
    index = selected.nonzero()[:, 0]
    if not len(index):
        return images
    index = host_to_device(index, images.device)
    return images.index_copy(0, index, change(images.index_select(0, index)).to(images.dtype))


def _matrices(
    a: Tensor, b: Tensor, c: Tensor, d: Tensor, x: Tensor | None = None, y: Tensor | None = None
) -> Tensor:
    """``[[a, b, x], [c, d, y], [0, 0, 1]]`` for every image."""
    zero = torch.zeros_like(a)
    rows = ((a, b, zero if x is None else x), (c, d, zero if y is None else y), (zero, zero, zero + 1))
    return torch.stack([torch.stack(row, dim=1) for row in rows], dim=1)


def _rotations(angle: Tensor) -> Tensor:
    return _matrices(angle.cos(), -angle.sin(), angle.sin(), angle.cos())

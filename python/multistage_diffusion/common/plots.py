"""Pictures: grids of samples, and the look of all plots."""

from __future__ import annotations

import math
import os
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from multistage_diffusion.common.atomic_files import replacing

_CELL_PIXELS = 64  # small images are enlarged to about this size
_GAP_PIXELS = 2
_GAP_GREY = 128

# Okabe and Ito's colours, which the colour-blind can tell apart; the yellow is too faint on white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
INK = "#222222"
FAINT = "#8A8A8A"
_STYLE = {
    "font.family": "sans-serif",
    "font.size": 10.5,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.labelsize": 11,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 12,
    "axes.titlepad": 10,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "xtick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.color": FAINT,
    "ytick.labelcolor": INK,
}
_DOTS_PER_INCH = 160


def save_sample_grid(
    images: torch.Tensor, path: str | os.PathLike, columns: int | None = None, scale: int | None = None
) -> Path:
    """Write a batch of images as one PNG, row by row, small images enlarged pixel by pixel.

    Args:
        images: `[B, C, H, W]` floating point in [-1, 1]; values beyond are clamped. C is 1 (grey) or 3 (RGB).
        path: the PNG to write; missing folders are made.
        columns: images per row; where None, as many as make the grid about square.
        scale: pixels of the PNG per pixel of an image; where None, what brings the longer side to about 64.

    Returns:
        The path written.

    Raises:
        TypeError: images that are no floating-point tensor.
        ValueError: images of another rank or channel count, none at all, values that are not finite;
            columns or scale below 1; a path that does not end in .png.
    """
    _check_grid_images(images)
    batch, channels, height, width = images.shape
    columns = math.ceil(math.sqrt(batch)) if columns is None else columns
    scale = max(1, round(_CELL_PIXELS / max(height, width))) if scale is None else scale
    for name, value in (("columns", columns), ("scale", scale)):
        if value < 1:
            raise ValueError(f"save_sample_grid: {name} must be at least 1, got {value}")
    path = output_path(path, "save_sample_grid", (".png",))
    columns = min(columns, batch)
    rows = math.ceil(batch / columns)

    pixels = (images.detach().to("cpu", torch.float32).clamp(-1, 1) + 1).mul(127.5).round().to(torch.uint8)
    pixels = pixels.repeat_interleave(scale, 2).repeat_interleave(scale, 3).permute(0, 2, 3, 1).numpy()
    cell_height, cell_width = height * scale + _GAP_PIXELS, width * scale + _GAP_PIXELS
    grid_shape = (rows * cell_height + _GAP_PIXELS, columns * cell_width + _GAP_PIXELS, channels)
    grid = np.full(grid_shape, _GAP_GREY, np.uint8)
    for number, image in enumerate(pixels):
        top = number // columns * cell_height + _GAP_PIXELS
        left = number % columns * cell_width + _GAP_PIXELS
        grid[top : top + height * scale, left : left + width * scale] = image

    from PIL import Image

    with replacing(path) as temporary:
        Image.fromarray(grid[..., 0] if channels == 1 else grid).save(temporary)
    return path


@contextmanager
def saved_axes(path: Path, *, width: float, height: float):
    """Axes of a new figure, saved to `path` as a whole at the end; sizes in inches. Leaves pyplot alone."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), dpi=_DOTS_PER_INCH, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure.add_subplot()
        with replacing(path) as temporary:
            figure.savefig(temporary)


def output_path(path: str | os.PathLike, function: str, suffixes: tuple[str, ...]) -> Path:
    path = Path(path)
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"{function}: path must end in {' or '.join(suffixes)}, got {path}")
    return path


def _check_grid_images(images: torch.Tensor) -> None:
    if not isinstance(images, torch.Tensor) or not images.is_floating_point():
        given = images.dtype if isinstance(images, torch.Tensor) else type(images).__name__
        raise TypeError(f"save_sample_grid: images must be a floating-point tensor in [-1, 1], got {given}")
    if images.ndim != 4 or images.shape[1] not in (1, 3) or images.numel() == 0:
        raise ValueError(
            "save_sample_grid: images must be [B, C, H, W] with C 1 (grey) or 3 (RGB) and none of them 0, "
            f"got shape {list(images.shape)}"
        )
    finite = images.isfinite().flatten(1).all(1)
    if not finite.all():
        raise ValueError(
            f"save_sample_grid: {int((~finite).sum())} of {len(images)} images hold NaN or infinite values"
        )

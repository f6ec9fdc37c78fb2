"""Pictures of a run: grids of samples, loss curves, and bars of speed ratios."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from multistage_diffusion.common.atomic_files import replacing
from multistage_diffusion.training.run_log import RunLog

_CELL_PIXELS = 64  # small images are enlarged to about this size
_GAP_PIXELS = 2
_GAP_GREY = 128

# Okabe and Ito's colours, which the colour-blind can tell apart; the yellow is too faint on white.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_LINE_STYLES = ("-", "--", ":", "-.")
_INK = "#222222"
_FAINT = "#8A8A8A"
_STYLE = {
    "font.family": "sans-serif",
    "font.size": 10.5,
    "text.color": _INK,
    "axes.edgecolor": _FAINT,
    "axes.labelcolor": _INK,
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
    "xtick.color": _FAINT,
    "xtick.labelcolor": _INK,
    "ytick.color": _FAINT,
    "ytick.labelcolor": _INK,
}
_DOTS_PER_INCH = 160
_PLOT_SUFFIXES = (".png", ".svg", ".pdf")
_SMOOTHING = 1.25  # a smoothed point is the mean over the steps from step / 1.25 to step * 1.25
_MAX_POINTS = 1500


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
            raise ValueError(f"save_sample_grid: {name} must be at least 1, given {value}")
    path = _output_path(path, "save_sample_grid", (".png",))
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


def plot_loss(log_path: str | os.PathLike, path: str | os.PathLike) -> Path:
    """Draw the loss of a training log, overall and for each stage, on logarithmic axes.

    Faint points are the values as logged; a line is their mean from step / 1.25 to step * 1.25.

    Args:
        log_path: a log of JSON lines: `step` (a number), `loss` (a number), `loss_stage` (a list of a number
            or null for each stage). Lines that are no JSON object, missing keys, null and values that are not finite
            are skipped; so are steps and losses of zero or less, which these axes cannot show.
        path: the .png, .svg or .pdf to write; missing folders are made.

    Returns:
        The path written.

    Raises:
        ValueError: no log there, nothing to draw, or another suffix.
    """
    try:
        curves = _loss_curves(RunLog(log_path).read())
    except OSError as error:
        raise ValueError(f"plot_loss: the log {log_path} cannot be read: {error}") from error
    if not curves:
        raise ValueError(f"plot_loss: {log_path} holds no positive loss at a positive step")
    path = _output_path(path, "plot_loss", _PLOT_SUFFIXES)
    with _plot(path, width=7.2, height=4.3) as axes:
        for curve in curves:
            _draw_curve(axes, curve)
        axes.set(xscale="log", yscale="log", xlabel="Training step", ylabel="Loss")
        _plain_log_ticks(axes.xaxis, axes.get_xlim())
        _plain_log_ticks(axes.yaxis, axes.get_ylim())
        axes.grid(True, which="major")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=min(len(curves), 5), handlelength=1.6)
    return path


def plot_bars(
    rows: Sequence[tuple[str, float, float | None]],
    path: str | os.PathLike,
    *,
    title: str | None = None,
    xlabel: str = "Speed ratio (above 1 is faster)",
) -> Path:
    """Draw speed ratios as horizontal bars, with a line at 1.0: blue bars are above it, orange ones below.

    Args:
        rows: `(name, ratio, spread)` from top to bottom; `spread` is half the length of the error bar, in
            units of the ratio, or None.
        path: the .png, .svg or .pdf to write; missing folders are made.
        title, xlabel: texts of the plot.

    Returns:
        The path written.

    Raises:
        ValueError: no rows, a ratio that is not positive and finite, a spread that is negative or not finite,
            or another suffix.
    """
    _check_bars(rows)
    path = _output_path(path, "plot_bars", _PLOT_SUFFIXES)
    names, ratios, spreads = zip(*rows, strict=True)
    colors = [_COLORS[0] if ratio >= 1 else _COLORS[1] for ratio in ratios]
    with _plot(path, width=7.2, height=1.1 + 0.36 * len(rows)) as axes:
        positions = range(len(rows))
        axes.barh(positions, ratios, height=0.62, color=colors, zorder=2)
        for position, ratio, spread in zip(positions, ratios, spreads, strict=True):
            text = f"{ratio:.2f}×"
            if spread:
                axes.errorbar(ratio, position, xerr=spread, color=_INK, lw=1.1, capsize=3, zorder=3)
                text += f" ± {spread:.2f}"
            axes.text(1.02, position, text, transform=axes.get_yaxis_transform(), va="center_baseline")
        axes.axvline(1.0, color=_INK, lw=1.2, zorder=4)
        axes.set_yticks(positions, names)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        ends = [ratio + (spread or 0) for ratio, spread in zip(ratios, spreads, strict=True)]
        axes.set_xlim(0, 1.04 * max(*ends, 1.0))
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.grid(True, axis="x", zorder=0)
        axes.set_xlabel(xlabel)
        if title is not None:
            axes.set_title(title)
    return path


@dataclass(frozen=True)
class _Curve:
    stage: int | None  # None is the overall loss
    steps: np.ndarray
    losses: np.ndarray


def _loss_curves(records: list[dict]) -> list[_Curve]:
    """The overall curve and one for each stage, without those that have no point to draw."""
    points: dict[int | None, list[tuple[float, float]]] = {None: []}
    for record in records:
        step = record.get("step")
        if not _positive(step):
            continue
        per_stage = record.get("loss_stage")
        losses = {
            None: record.get("loss"),
            **dict(enumerate(per_stage if isinstance(per_stage, list) else [])),
        }
        for stage, loss in losses.items():
            if _positive(loss):
                points.setdefault(stage, []).append((step, loss))
    stages = [None, *sorted(stage for stage in points if stage is not None)]
    return [_Curve(stage, *np.array(sorted(points[stage])).T) for stage in stages if points[stage]]


def _positive(value: object) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and 0 < value <= sys.float_info.max


def _draw_curve(axes, curve: _Curve) -> None:
    if curve.stage is None:
        look = {"color": _INK, "lw": 2.4, "zorder": 4, "label": "all stages"}
    else:
        style = _LINE_STYLES[curve.stage // len(_COLORS) % len(_LINE_STYLES)]
        color = _COLORS[curve.stage % len(_COLORS)]
        look = {"color": color, "ls": style, "lw": 1.8, "zorder": 3, "label": f"stage {curve.stage}"}
    shown = _thinned(curve.steps)
    axes.plot(
        curve.steps[shown], curve.losses[shown], ".", ms=3.5, mew=0, color=look["color"], alpha=0.25, zorder=2
    )
    marker = "o" if len(curve.steps) == 1 else None
    axes.plot(curve.steps[shown], _smoothed(curve.steps, curve.losses, shown), marker=marker, **look)


def _smoothed(steps: np.ndarray, losses: np.ndarray, shown: np.ndarray) -> np.ndarray:
    """At the points `shown`: means over windows that are equally wide, and centred, on a logarithmic axis.

    `steps` ascends. Each window is added up on its own: differences of running sums would lose what is small beside
    an early loss of 1e20.
    """
    first = np.searchsorted(steps, steps[shown] / _SMOOTHING, side="left")
    end = np.searchsorted(steps, steps[shown] * _SMOOTHING, side="right")
    return np.array([losses[a:b].mean() for a, b in zip(first, end, strict=True)])


def _thinned(steps: np.ndarray) -> np.ndarray:
    """Indices of at most about 1500 points, evenly spread on a logarithmic axis."""
    if len(steps) <= _MAX_POINTS:
        return np.arange(len(steps))
    targets = np.geomspace(steps[0], steps[-1], _MAX_POINTS)
    return np.unique(np.searchsorted(steps, targets).clip(max=len(steps) - 1))


def _plain_log_ticks(axis, limits: tuple[float, float]) -> None:
    """Ticks written as plain numbers: at 1, 2 and 5 in each decade of a short axis, else at the decades."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    short = math.log10(limits[1] / limits[0]) < 2.5
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if short else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


@contextmanager
def _plot(path: Path, *, width: float, height: float):
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


def _output_path(path: str | os.PathLike, function: str, suffixes: tuple[str, ...]) -> Path:
    path = Path(path)
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"{function}: path must end in {' or '.join(suffixes)}, given {path}")
    return path


def _check_grid_images(images: torch.Tensor) -> None:
    if not isinstance(images, torch.Tensor) or not images.is_floating_point():
        given = images.dtype if isinstance(images, torch.Tensor) else type(images).__name__
        raise TypeError(f"save_sample_grid: images must be a floating-point tensor in [-1, 1], given {given}")
    if images.ndim != 4 or images.shape[1] not in (1, 3) or images.numel() == 0:
        raise ValueError(
            "save_sample_grid: images must be [B, C, H, W] with C 1 (grey) or 3 (RGB) and none of them 0, "
            f"given shape {list(images.shape)}"
        )
    finite = images.isfinite().flatten(1).all(1)
    if not finite.all():
        raise ValueError(
            f"save_sample_grid: {int((~finite).sum())} of {len(images)} images hold NaN or infinite values"
        )


def _check_bars(rows: Sequence[tuple[str, float, float | None]]) -> None:
    if not rows:
        raise ValueError("plot_bars: rows must hold at least one (name, ratio, spread), given none")
    for name, ratio, spread in rows:
        if not _positive(ratio):
            raise ValueError(f"plot_bars: the ratio of {name!r} must be positive and finite, given {ratio}")
        if spread is not None and not (math.isfinite(spread) and spread >= 0):
            raise ValueError(f"plot_bars: the spread of {name!r} must be 0 or more, or None, given {spread}")

"""The loss curves of a run."""

from __future__ import annotations

import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from multistage_diffusion.common.checks import is_number
from multistage_diffusion.common.plots import COLORS, INK, output_path, saved_axes
from multistage_diffusion.training.run_log import RunLog

_LINE_STYLES = ("-", "--", ":", "-.")
_SUFFIXES = (".png", ".svg", ".pdf")
_SMOOTHING = 1.25  # a smoothed point is the mean over the steps from step / 1.25 to step * 1.25
_MAX_POINTS = 1500


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
    path = output_path(path, "plot_loss", _SUFFIXES)
    with saved_axes(path, width=7.2, height=4.3) as axes:
        for curve in curves:
            _draw_curve(axes, curve)
        axes.set(xscale="log", yscale="log", xlabel="Training step", ylabel="Loss")
        _plain_log_ticks(axes.xaxis, axes.get_xlim())
        _plain_log_ticks(axes.yaxis, axes.get_ylim())
        axes.grid(True, which="major")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=min(len(curves), 5), handlelength=1.6)
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
    return is_number(value) and 0 < value <= sys.float_info.max


def _draw_curve(axes, curve: _Curve) -> None:
    if curve.stage is None:
        look = {"color": INK, "lw": 2.4, "zorder": 4, "label": "all stages"}
    else:
        style = _LINE_STYLES[curve.stage // len(COLORS) % len(_LINE_STYLES)]
        color = COLORS[curve.stage % len(COLORS)]
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

"""Pictures of a clustering: the similarity matrix with the cuts, and the similarity to both ends."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch

from multistage_diffusion.clustering.similarity import Similarity
from multistage_diffusion.clustering.splits import Split
from multistage_diffusion.common.plots import COLORS, FAINT, INK, output_path, saved_axes
from multistage_diffusion.noise.schedules import Schedule


def plot_matrix(
    similarity: Similarity,
    split: Split,
    path: str | os.PathLike,
    schedule: Schedule,
    *,
    title: str | None = None,
) -> Path:
    """Draws the similarity of all pairs of noise levels, and the stages as squares on the diagonal.

    Args:
        path: the .png to write; missing folders are made.
        schedule: its variable labels the rows, sigma the columns.
    """
    path = output_path(path, "plot_matrix", (".png",))
    levels = len(similarity.sigmas)
    ticks = np.arange(0, levels, max(1, round(levels / 10)))
    with saved_axes(path, width=6.4, height=5.4) as axes:
        lowest = min(0.0, float(similarity.matrix.min()))
        picture = axes.imshow(similarity.matrix.numpy(), origin="lower", cmap="Blues", vmin=lowest, vmax=1)
        for stage in range(split.num_stages):
            inside = split.levels(stage)
            axes.add_patch(_square(inside.start - 0.5, len(inside)))
            center = inside.start - 0.5 + len(inside) / 2
            axes.text(
                center, center, str(stage), color="white", ha="center", va="center", weight="bold", zorder=4
            )
        axes.set_xticks(ticks, [f"{s:.3g}" for s in similarity.sigmas[ticks].tolist()], rotation=45)
        axes.set_yticks(ticks, [f"{v:.3g}" for v in schedule.value(similarity.sigmas)[ticks].tolist()])
        axes.set(xlabel="Noise level sigma", ylabel=schedule.label())
        axes.figure.colorbar(picture, ax=axes, label="Similarity", shrink=0.9)
        if title is not None:
            axes.set_title(title)
    return path


def plot_curves(
    similarity: Similarity, split: Split, path: str | os.PathLike, *, level: float | None = None
) -> Path:
    """Draws the similarity of every noise level to the lowest and to the highest one, with a band of two
    standard errors, and the cuts as vertical lines.

    Args:
        split: with its cuts, as ``split`` of a ``Similarity`` has them.
        path: the .png to write; missing folders are made.
        level: where the three-stage rule cuts, drawn as a horizontal line.

    Raises:
        ValueError: a split of a bare matrix, whose cuts are not known.
    """
    if split.cuts is None:
        raise ValueError("plot_curves: the split's cuts are not known; give split a Similarity")
    path = output_path(path, "plot_curves", (".png",))
    sigmas = similarity.sigmas.numpy()
    with saved_axes(path, width=7.2, height=4.0) as axes:
        for row, color, label in ((0, COLORS[0], "to the lowest"), (-1, COLORS[1], "to the highest")):
            values = similarity.matrix[row].numpy()
            error = 2 * torch.nan_to_num(similarity.standard_error[row]).numpy()
            axes.fill_between(sigmas, values - error, values + error, color=color, alpha=0.2, lw=0)
            axes.plot(sigmas, values, "o-", color=color, ms=3.5, lw=1.8, label=f"similarity {label} level")
        if similarity.restored is not None:
            label = "share of variance restored"
            axes.plot(sigmas, similarity.restored.numpy(), "--", color=FAINT, lw=1.4, label=label)
        if level is not None:
            axes.axhline(level, color=FAINT, lw=1, ls=":")
        for cut in split.cuts:
            axes.axvline(cut, color=INK, lw=1.2)
            place = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
            axes.annotate(f"{cut:.3g}", (cut, 1), xytext=(0, 3), ha="center", **place)
        axes.set(xscale="log", xlabel="Noise level sigma", ylabel="Similarity")
        axes.set_ylim(min(0.0, float(similarity.matrix.min())), 1.05)
        axes.grid(True, axis="y")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1.05), ncols=2, handlelength=1.6)
    return path


def _square(corner: float, side: float):
    from matplotlib.patches import Rectangle

    return Rectangle(
        (corner, corner), side, side, fill=False, edgecolor=COLORS[1], lw=2.4, zorder=3, clip_on=False
    )

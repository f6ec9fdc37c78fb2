"""Stages as people write them."""

from __future__ import annotations

from multistage_diffusion.noise.schedules import SCHEDULES
from multistage_diffusion.noise.stages import Stages


def parse_stages(text: str, schedule: str = "edm") -> Stages:
    """The stages of "edm", "single", a stages.json, or boundaries in the schedule's variable.

    The ends of what the variable covers may be left out of the boundaries.

    Raises:
        ValueError: anything else; boundaries that are no stages (``StagesError``).
    """
    variable = SCHEDULES[schedule].variable
    if text == "edm":
        return Stages.edm()
    if text == "single":
        return Stages.single(variable)
    if text.endswith(".json"):
        return Stages.load(text)
    try:
        edges = [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(
            f'--stages {text}: give "edm", "single", a .json file, or boundaries such as 2.5103,7.6577'
        ) from None
    low, high = SCHEDULES[schedule]().domain
    edges = edges if edges[0] == low else [low, *edges]
    edges = edges if edges[-1] == high else [*edges, high]
    return Stages.from_boundaries(edges, variable)

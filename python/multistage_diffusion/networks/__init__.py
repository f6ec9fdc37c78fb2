"""The published networks, built from one set of stage-grouped layers."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from multistage_diffusion.networks.edm import EDMUNet

FAMILIES = {"edm": EDMUNet}

__all__ = ["FAMILIES", "EDMUNet", "build"]


def build(config: Mapping[str, object]) -> nn.Module:
    """Builds a network from ``{"family": name, **arguments}``, the dictionary that ``network.config`` holds.

    Raises:
        ValueError: an unknown family, or arguments that the family does not take.
    """
    arguments = dict(config)
    family = arguments.pop("family", None)
    if family not in FAMILIES:
        raise ValueError(f"build: family must be one of {', '.join(FAMILIES)}, got {family!r}")
    try:
        return FAMILIES[family](**arguments)
    except TypeError as error:
        raise ValueError(f"build: {family} does not take these arguments: {error}") from error

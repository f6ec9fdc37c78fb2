"""The published networks, built from one set of stage-grouped layers."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from multistage_diffusion.networks.edm import EDMUNet
from multistage_diffusion.networks.ldm import LDMUNet
from multistage_diffusion.networks.ncsnpp import NCSNpp
from multistage_diffusion.networks.stage_network import Features, StageNetwork, Takes
from multistage_diffusion.networks.stage_order import StageOrder
from multistage_diffusion.networks.uvit import UViT

FAMILIES = {network.family: network for network in (EDMUNet, NCSNpp, LDMUNet, UViT)}

__all__ = [
    "FAMILIES",
    "EDMUNet",
    "Features",
    "LDMUNet",
    "NCSNpp",
    "StageNetwork",
    "StageOrder",
    "Takes",
    "UViT",
    "build",
    "in_effect",
]


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


def in_effect(config: Mapping[str, object]) -> dict[str, object]:
    """What :func:`build` takes, of the saved configuration of a network that exists.

    Earlier versions took ``attn_resolutions`` that the image never has, saved them and ignored them; ``build`` refuses
    them. They are left out here, and the network is what it was. Any other configuration stays as it is.
    """
    family = config.get("family")
    return FAMILIES[family].in_effect(config) if family in tuple(FAMILIES) else dict(config)

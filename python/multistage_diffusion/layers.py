"""The stage-grouped layers, for decoders of your own: see :mod:`multistage_diffusion.networks.layers`."""

from multistage_diffusion.networks.layers import *  # noqa: F403
from multistage_diffusion.networks.layers import __all__ as __all__

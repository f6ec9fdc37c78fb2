"""The norms and blocks of other people's libraries that this one knows, by the names of their classes and attributes.

A norm is known when it normalises as ``torch.nn.GroupNorm`` does. A block is known when a SiLU follows some of its
norms: a module of the block, or a function that it calls. That its norms are left pending (:mod:`.pending`) is then
worth it, and right whatever it does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from msd_kernels.nn.foreign import classes, modules_of_pickles

EDM = "training.networks"
GUIDED = ("guided_diffusion", "improved_diffusion")
LATENT = ("ldm.modules.diffusionmodules", "sgm.modules.diffusionmodules")

# GroupNorms of their own: in float32 and back, of EDM, of k-diffusion.
FLOAT32_NORMS = ("GroupNorm32", (*(f"{p}.nn" for p in GUIDED), *(f"{p}.util" for p in LATENT)))
EDM_NORMS = ("GroupNorm", (EDM,))
# Convolutions of its own, which may resample.
EDM_CONVOLUTIONS = ("Conv2d", (EDM,))
ADAPTIVE_NORMS = ("AdaGN", ("k_diffusion.layers",))


@dataclass(frozen=True)
class Block:
    """A class of blocks.

    Attributes:
        name, modules: of the class, and where it may be.
        followed: the paths of norms and of the modules behind them, None for a function.
    """

    name: str
    modules: tuple[str, ...]
    followed: tuple[tuple[str, str | None], ...]


OUTPUT = (("conv_norm_out", "conv_act"),)
DIFFUSERS_VAE = ("diffusers.models.autoencoders.vae",)
BLOCKS = (
    Block(
        "ResnetBlock2D",
        ("diffusers.models.resnet",),
        (("norm1", "nonlinearity"), ("norm2", "nonlinearity")),
    ),
    Block("UNet2DModel", ("diffusers.models.unets.unet_2d",), OUTPUT),
    Block("UNet2DConditionModel", ("diffusers.models.unets.unet_2d_condition",), OUTPUT),
    Block("Encoder", DIFFUSERS_VAE, OUTPUT),
    Block("Decoder", DIFFUSERS_VAE, OUTPUT),
    Block("UNetBlock", (EDM,), (("norm0", None), ("norm1", None))),
    Block("DhariwalUNet", (EDM,), (("out_norm", None),)),
    Block(
        "ResBlock",
        (*(f"{p}.unet" for p in GUIDED), *(f"{p}.openaimodel" for p in LATENT)),
        (("in_layers.0", "in_layers.1"), ("out_layers.0", "out_layers.1")),
    ),
    Block("ResnetBlock", tuple(f"{p}.model" for p in LATENT), (("norm1", None), ("norm2", None))),
    Block("Encoder", tuple(f"{p}.model" for p in LATENT), (("norm_out", None),)),
    Block("Decoder", tuple(f"{p}.model" for p in LATENT), (("norm_out", None),)),
)


def known_types(name: str, modules: tuple[str, ...]) -> list[type]:
    """The classes of that name in the modules that are imported; EDM's are in those of its pickles, too."""
    return list(classes(name, [*modules, *(modules_of_pickles() if EDM in modules else ())]))


def blocks_of(model: nn.Module) -> Iterator[tuple[str, nn.Module, Block, bool]]:
    """The blocks of a model: their names, what is known of their class, and whether it is theirs or that of a base."""
    known = [(block, tuple(known_types(block.name, block.modules))) for block in BLOCKS]
    for name, module in model.named_modules():
        for block, types in known:
            if isinstance(module, types):
                yield name, module, block, type(module) in types

"""Whole models of other people, as they are and after replace_group_norm and replace_conv2d, in turns in one process.

    python benchmarks/whole_models.py [--large] [--json]
    make bench-models

diffusers' U-Net of Stable Diffusion 1.5 and its autoencoder's decoder, a U-Net built like guided diffusion's, and EDM's
for CIFAR-10: this library's network against its twin in plain PyTorch. Weights are random, nothing is downloaded.
Forward, and forward with the gradients of all weights; float32 and the 16-bit type that the processor computes in;
NCHW, as people have their models, and channels_last. Both results are compared before anything is timed.

Sizes are small, so that all of it takes a few minutes on two cores: latents of 32² (256² pixels), a decoder of 16²
latents to 128² pixels. ``--large`` takes the sizes of goal C9: latents of 64², a decoder of 32² latents.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import guided_unet
import plain_network
import torch
import whole_networks
import winograd_layers
from torch import Tensor, nn

import harness
import msd_kernels as mk
from harness import OURS
from msd_kernels.runtime.processor import computes_in
from multistage_diffusion import networks, presets

ORIGINAL = "original"
FORMATS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
# Largest norm of an error, as a share of the exact result's: some hundred layers of roundings.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.05}
RESULT = harness.RESULTS / "whole_models.local.json"


@dataclass(frozen=True)
class Model:
    """A model as it is, and the one to compare it with.

    Attributes:
        original: a module; its inputs are NCHW.
        ours: another one with the same weights, in the same format.
        inputs: what both take; the first is the images.
        notes: about what was replaced.
    """

    original: nn.Module
    ours: nn.Module
    inputs: tuple
    notes: str = ""

    def output(self, ours: bool) -> Tensor:
        y = (self.ours if ours else self.original)(*self.inputs)
        return y if isinstance(y, Tensor) else y.sample

    def gradients(self, ours: bool) -> list[Tensor]:
        module = self.ours if ours else self.original
        y = self.output(ours)
        parameters = [p for p in module.parameters() if p.requires_grad]
        found = torch.autograd.grad(y.float().square().mean(), parameters, allow_unused=True)
        return [y.detach(), *(g for g in found if g is not None)]

    @torch.no_grad()
    def forward(self, ours: bool) -> list[Tensor]:
        return [self.output(ours)]


def replaced(original: nn.Module, order: torch.memory_format, dtype: torch.dtype, *inputs) -> Model:
    """A model in an order and a dtype, and what this library makes of a copy that shares its weights."""
    original = original.to(dtype).to(memory_format=order).eval()
    ours = copy.deepcopy(original, {id(p): p for p in original.parameters()})
    norms, convolutions = mk.nn.replace_group_norm(ours), mk.nn.replace_conv2d(ours)
    images = inputs[0].to(dtype).contiguous(memory_format=order)
    rest = (t.to(dtype) if t.is_floating_point() else t for t in inputs[1:])
    notes = (
        f"{norms:d} of {norms.found} norms, {norms.fused} with their SiLU, "
        f"{convolutions:d} of {convolutions.found} convolutions"
    )
    return Model(original, ours, (images, *rest), notes)


def stable_diffusion(order: torch.memory_format, dtype: torch.dtype, large: bool) -> Model:
    """One sample; 860 million parameters."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    side = 64 if large else 32
    x, step, text = torch.randn(1, 4, side, side), torch.tensor([500]), torch.randn(1, 77, 768)
    return replaced(unet, order, dtype, x, step, text)


def autoencoder(order: torch.memory_format, dtype: torch.dtype, large: bool) -> Model:
    """The decoder of one image."""
    from diffusers import AutoencoderKL

    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    model = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, **kinds
    )
    side = 32 if large else 16
    return replaced(model.decoder, order, dtype, torch.randn(1, 4, side, side))


def guided_diffusion(order: torch.memory_format, dtype: torch.dtype, large: bool) -> Model:
    """One image of 64² pixels; ImageNet 64's widths, with one residual block per level (three with ``large``)."""
    guided_unet.as_guided_diffusion()
    model = guided_unet.GuidedUNet(blocks=3 if large else 1)
    return replaced(model, order, dtype, torch.randn(1, 3, 64, 64), torch.tensor([500]))


def edm(order: torch.memory_format, dtype: torch.dtype, large: bool) -> Model:
    """One image of CIFAR-10 (eight with ``large``), the unified network; both keep their features in channels_last."""
    ours = networks.build(presets.find("edm-cifar10").config("unified"))
    whole_networks.draw_weights(ours)
    ours = ours.to(dtype).eval()
    (plain,) = plain_network.twins(ours)
    batch = 8 if large else 1
    noise, stage = torch.zeros(batch), torch.zeros(batch, dtype=torch.long)
    x = torch.randn(batch, 3, 32, 32).to(dtype).contiguous(memory_format=order)
    return Model(plain, ours, (x, noise, stage), "msd_kernels' own network")


MODELS: dict[str, Callable[[torch.memory_format, torch.dtype, bool], Model]] = {
    "Stable Diffusion 1.5's U-Net": stable_diffusion,
    "its VAE's decoder": autoencoder,
    "guided diffusion's U-Net": guided_diffusion,
    "EDM's U-Net": edm,
}
OF_DIFFUSERS = (stable_diffusion, autoencoder)
PASSES = {"forward": Model.forward, "forward + backward": Model.gradients}


def error(found: list[Tensor], exact: list[Tensor]) -> float:
    """The norm of the difference of all tensors together, as a share of the exact ones'."""

    def norm(tensors: Iterator[Tensor]) -> float:
        return sum(t.double().square().sum().item() for t in tensors) ** 0.5

    differences = (a.double() - b.double() for a, b in zip(found, exact, strict=True))
    return norm(differences) / norm(iter(exact))


def require_alike(name: str, model: Model, dtype: torch.dtype) -> None:
    """Refuses to time results that are off; of 16 bits both are roundings of something else.

    Raises:
        AssertionError: outputs differ by more than :data:`TOLERANCE`.
    """
    found = error(model.forward(True), model.forward(False))
    if not found <= TOLERANCE[dtype]:
        raise AssertionError(f"{name}: the results differ by {found:.1e}, allowed {TOLERANCE[dtype]:.1e}")


def dtypes() -> list[torch.dtype]:
    """float32, and the first 16-bit type that this processor has products for."""
    return [torch.float32, *[t for t in (torch.bfloat16, torch.float16) if computes_in(t)][:1]]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def measured(name: str, dtype: torch.dtype, order: str, arguments: argparse.Namespace) -> Iterator[dict]:
    torch.manual_seed(0)
    model = MODELS[name](FORMATS[order], dtype, arguments.large)
    label = f"{name}, {str(dtype).removeprefix('torch.')}, {order}"
    say(f"{label}: {model.notes}")
    require_alike(label, model, dtype)
    for passes, run in PASSES.items():
        if passes not in arguments.passes:
            continue
        cases = {OURS: lambda run=run: run(model, True), ORIGINAL: lambda run=run: run(model, False)}
        timer = winograd_layers.processor_time if arguments.threads == 1 else harness.wall_clock
        race = harness.Rounds(cases, timer).run(arguments.seconds)
        say(f"    {passes}: {harness.ratio_text(race.ratio(ORIGINAL))}")
        yield {
            "model": name,
            "dtype": str(dtype).removeprefix("torch."),
            "order": order,
            "pass": passes,
            "notes": model.notes,
            **race.as_dict(),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--large", action="store_true", help="the sizes of goal C9")
    parser.add_argument("--seconds", type=float, default=6.0, help="of every race, beyond its first calls")
    parser.add_argument(
        "--threads", type=int, default=2, help="with 1 the processor's time counts, for busy machines"
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--orders", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=list(PASSES))
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--json", action="store_true", help="print what is written to the file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    facts = harness.machine_facts()  # the load, before this run adds to it
    found, skipped = [], {}
    for name, build in MODELS.items():
        if name not in arguments.models:
            continue
        try:
            if build in OF_DIFFUSERS:
                import diffusers

                facts["diffusers"] = diffusers.__version__
        except ImportError as missing:
            skipped[name] = f"needs diffusers: {missing}"
            say(f"{name}: skipped, {skipped[name]}")
            continue
        orders = ["NHWC"] if build is edm else arguments.orders
        for dtype in dtypes():
            for order in orders:
                found += measured(name, dtype, order, arguments)
    result = {**facts, "large": arguments.large, "skipped": skipped, "models": found}
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    if arguments.json:
        print(json.dumps(result))
    else:
        rows = [
            (
                f"{case['model']}, {case['dtype']}, {case['order']}, {case['pass']}",
                *(
                    f"{case[key][ORIGINAL][0] if key == 'ratio' else case[key][ORIGINAL]:.2f}"
                    for key in RATIOS
                ),
            )
            for case in found
        ]
        print(harness.table(rows, ("original / replaced", "median", "fastest")))


RATIOS = ("ratio", "ratio_of_fastest")


if __name__ == "__main__":
    main()

"""Where Winograd's convolutions pay: every 3×3 layer of a published network beside oneDNN, forward and with gradients.

    python benchmarks/winograd_layers.py PRESET [--dtype float32] [--batch 8] [--threads 2] [--seconds 0.4] [--json]

What ``msd_kernels/ops/grouped_conv2d/cpu.py`` chooses by is read from this table: a ratio above 1 says that the
compiled kernels are faster. Turns of both, results checked first; of one thread, the processor's time, which other
processes hardly disturb. Layers with the same sizes are measured once.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import harness
from harness import OURS
from msd_kernels import StageBatch, grouped_conv2d
from msd_kernels.dispatch.backends import Call, use
from msd_kernels.layouts import Conv2dLayout
from msd_kernels.ops.grouped_conv2d import cpu
from multistage_diffusion import networks, presets
from multistage_diffusion.flops import conditioning

PASSES = ("forward", "forward + backward")


class Recorder(TorchDispatchMode):
    """Collects the layouts of the convolutions that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.layouts: list[Conv2dLayout] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if "grouped_conv2d" in str(op):
            named = dict(zip((argument.name for argument in op._schema.arguments), args, strict=False))
            self.layouts.append(Conv2dLayout(*(named[field] for field in Conv2dLayout._fields)))
        return op(*args, **(kwargs or {}))


def layers(preset: str) -> list[Conv2dLayout]:
    """The 3×3 layers of a network, of one stage and one sample each, without repetitions; no arithmetic is done."""
    with torch.device("meta"):
        network = networks.build(presets.find(preset).config())
    size, stages = network.image_size, network.num_stages
    x, noise = (torch.zeros(n, device="meta") for n in ((stages, network.in_channels, size, size), (stages,)))
    with torch.no_grad(), Recorder() as recorder:
        network(x, noise, list(range(stages)), **conditioning(network, stages))
    found = {
        layout._replace(counts=(1,), channels=(c,), skip_channels=(d,), out_channels=(o,))
        for layout in recorder.layouts
        for c, d, o in zip(layout.channels, layout.skip_channels, layout.out_channels, strict=True)
        if layout.kernel == 3
    }
    return sorted(found, key=lambda layout: (-layout.height, layout.flops), reverse=False)


class Layer:
    """A layer with random tensors; its addends are a bias alone."""

    def __init__(self, layout: Conv2dLayout, batch: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)

        def leaf(*size: int, std: float = 1.0) -> torch.Tensor:
            return (torch.randn(size, generator=generator) * std).to(dtype).requires_grad_()

        (c,), (d,), (o,) = layout.channels, layout.skip_channels, layout.out_channels
        self.layout, self.batch = layout, batch
        self.leaves = [leaf(batch * width * layout.in_pixels) for width in (c, d) if width]
        self.leaves += [leaf(o, c + d, 3, 3, std=(9 * (c + d)) ** -0.5), leaf(o)]
        self.dy = leaf(batch * o * layout.out_pixels).detach()

    def forward(self) -> torch.Tensor:
        layout = self.layout
        *sources, weight, bias = self.leaves
        sizes = (layout.height, layout.width)
        x, *skip = (
            StageBatch(values, (self.batch,), channels, *sizes)
            for values, channels in zip(sources, (layout.channels, layout.skip_channels), strict=False)
        )
        resample = None if layout.resample == "none" else layout.resample
        return grouped_conv2d(x, [weight], [bias], skip=skip[0] if skip else None, resample=resample).values

    def gradients(self) -> list[torch.Tensor]:
        y = self.forward()
        return [y, *torch.autograd.grad(y, self.leaves, self.dy)]

    def inference(self) -> list[torch.Tensor]:
        with torch.no_grad():
            return [self.forward()]

    def run(self, backend: str, function: Callable) -> Callable:
        def call():
            with use(backend):
                return function()

        return call

    def compare(self, seconds: float, timer: harness.Timer) -> list[harness.Comparison]:
        dtype = self.dy.dtype
        harness.check("cpu", self.run("cpu", self.gradients)(), self.run("library", self.gradients)(), dtype)
        return [
            harness.Rounds(
                {OURS: self.run("cpu", function), "oneDNN": self.run("library", function)}, timer, 0.01
            ).run(seconds)
            for function in (self.inference, self.gradients)
        ]


def processor_time(function: harness.Function) -> float:
    start = time.thread_time()
    function()
    return time.thread_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("preset")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=0.4, help="of every layer and pass")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    dtype = getattr(torch, arguments.dtype)
    rows, found = [], []
    for layout in layers(arguments.preset):
        taken = cpu.slower(Call("grouped_conv2d", torch.device("cpu"), dtype, layout)) is None
        races = Layer(layout, arguments.batch, dtype).compare(
            arguments.seconds, processor_time if arguments.threads == 1 else harness.wall_clock
        )
        channels = (
            f"{layout.channels[0]} + {layout.skip_channels[0]}"
            if any(layout.skip_channels)
            else layout.channels[0]
        )
        size = f"{layout.height}×{layout.width} {layout.resample}, {channels} to {layout.out_channels[0]}"
        best = [f"{race.best_ratio('oneDNN'):.2f}" for race in races]
        rows.append(
            (
                size,
                *(harness.ratio_text(race.ratio("oneDNN")) for race in races),
                *best,
                "yes" if taken else "no",
            )
        )
        found.append(
            {
                **layout._asdict(),
                "taken": taken,
                **{n: r.as_dict() for n, r in zip(PASSES, races, strict=True)},
            }
        )
    if arguments.json:
        print(
            json.dumps(
                {**harness.machine_facts(), "commit": harness.commit(), **vars(arguments), "layers": found}
            )
        )
    else:
        print(harness.table(rows, ("layer", *PASSES, "fastest", "fastest", "taken")))


if __name__ == "__main__":
    main()

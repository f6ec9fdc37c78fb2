"""Where Winograd's convolutions pay: the 3×3 layers of published networks beside oneDNN, forward and with gradients.

    python benchmarks/winograd_layers.py [PRESET ...] [--batch 8 1] [--dtype float32] [--threads 2] [--json]

Without the name of a preset, one of each family. What ``msd_kernels/ops/grouped_conv2d/cpu.py`` chooses by is read from
this table: a ratio above 1 says that the compiled kernels are faster. Exit status 1 if `auto` loses to oneDNN at a
layer: if it takes the compiled kernels although they are slower by more than 3 % at batch 8, or 10 % alone; a ratio is
the better one of medians and fastest turns. Turns of both, results checked first; of one thread, the processor's time,
which other processes hardly disturb. Layers with the same sizes are measured once.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / name) for name in ("benchmarks", "", "python")]

import products  # noqa: E402
import torch  # noqa: E402

import harness  # noqa: E402
from harness import OURS, Comparison  # noqa: E402
from msd_kernels.dispatch.backends import Call  # noqa: E402
from msd_kernels.layouts import Conv2dLayout  # noqa: E402
from msd_kernels.ops.grouped_conv2d import cpu  # noqa: E402
from multistage_diffusion import presets  # noqa: E402

FAMILIES = ("edm-cifar10", "ncsnpp-cifar10", "ldm-celebahq256", "uvit-cifar10")
PASSES = {"forward": products.inference, "forward + backward": products.gradients}
ONEDNN = "oneDNN"


class Result(NamedTuple):
    """One layer.

    Attributes:
        taken: whether `auto` takes the compiled kernels.
        races: by pass.
    """

    layout: Conv2dLayout
    taken: bool
    races: dict[str, Comparison]

    def ratio(self, name: str) -> float:
        race = self.races[name]
        return max(race.ratio(ONEDNN).median, race.best_ratio(ONEDNN))

    @property
    def losses(self) -> list[str]:
        """The passes in which `auto` is slower than it may be."""
        allowed = 1.10 if self.layout.counts == (1,) else 1.03
        return [name for name in self.races if self.taken and self.ratio(name) * allowed < 1]

    @property
    def size(self) -> str:
        """As text."""
        layout = self.layout
        skip = f" + {layout.skip_channels[0]}" if any(layout.skip_channels) else ""
        sides = f"{layout.height}×{layout.width} {layout.resample}"
        return f"{layout.counts[0]}, {sides}, {layout.channels[0]}{skip} to {layout.out_channels[0]}"

    def row(self) -> tuple[str, ...]:
        medians = [harness.ratio_text(race.ratio(ONEDNN)) for race in self.races.values()]
        fastest = [f"{race.best_ratio(ONEDNN):.2f}" for race in self.races.values()]
        verdict = "loses" if self.losses else "yes" if self.taken else "no"
        return (self.size, *medians, *fastest, verdict)

    def as_dict(self) -> dict[str, object]:
        races = {name: race.as_dict() for name, race in self.races.items()}
        return {**self.layout._asdict(), "taken": self.taken, "losses": self.losses, **races}


def layers(names: Sequence[str], batch: int) -> list[Conv2dLayout]:
    """The 3×3 layers of networks, of one stage each, without repetitions."""
    found = set()
    for preset in names:
        config = presets.find(preset).config()
        for layout in products.layouts(config, (1,) * len(config["decoder_widths"])):
            if isinstance(layout, Conv2dLayout) and layout.kernel == 3:
                found |= set(of_one_stage(layout, batch))
    return sorted(found, key=lambda layout: (-layout.height, layout.flops, layout))


def of_one_stage(layout: Conv2dLayout, batch: int) -> list[Conv2dLayout]:
    """Each stage's part of a layer, with another number of samples."""
    widths = zip(layout.channels, layout.skip_channels, layout.out_channels, strict=True)
    return [
        layout._replace(counts=(batch,), channels=(c,), skip_channels=(d,), out_channels=(o,))
        for c, d, o in widths
    ]


def measure(layout: Conv2dLayout, dtype: torch.dtype, seconds: float, timer: harness.Timer) -> Result:
    """Races the compiled kernels against oneDNN, and asks what `auto` takes."""
    layer = products.Convolution(layout, dtype)

    def cases(function: Callable) -> dict[str, harness.Function]:
        ways = {OURS: "cpu", ONEDNN: "library"}
        return {name: products.computed_by(way, function, layer) for name, way in ways.items()}

    ours, library = cases(products.gradients).values()
    harness.check("cpu", ours(), library(), dtype)
    races = {
        name: harness.Rounds(cases(function), timer, 0.01).run(seconds) for name, function in PASSES.items()
    }
    taken = cpu.slower(Call("grouped_conv2d", torch.device("cpu"), dtype, layout)) is None
    return Result(layout, taken, races)


def processor_time(function: harness.Function) -> float:
    start = time.thread_time()
    function()
    return time.thread_time() - start


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("presets", nargs="*", default=list(FAMILIES), metavar="PRESET")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 1])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=0.4, help="of every layer and pass")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    timer = processor_time if options.threads == 1 else harness.wall_clock
    results = []
    for batch in options.batch:
        for layout in layers(options.presets, batch):
            result = measure(layout, getattr(torch, options.dtype), options.seconds, timer)
            results.append(result)
            print(*result.row(), sep="  ", file=sys.stderr, flush=True)
    losses = [result.size for result in results if result.losses]
    if options.json:
        found = {"machine": harness.machine_facts(), "losses": losses, **vars(options)}
        print(json.dumps({**found, "layers": [result.as_dict() for result in results]}))
    else:
        header = ("batch, layer", *PASSES, "fastest", "fastest", "taken")
        print(harness.table([result.row() for result in results], header))
        print(f"{len(results)} layers; auto loses at {len(losses)}: {'; '.join(losses) or '-'}")
    return bool(losses)


if __name__ == "__main__":
    sys.exit(main())

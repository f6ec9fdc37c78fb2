"""``msd flops``"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from multistage_diffusion.commands._options import add_command
from multistage_diffusion.common.settings import Several, whole
from multistage_diffusion.presets import SAMPLERS, TRAINABLE

EXAMPLES = """\
  msd flops --preset edm-cifar10
  msd flops --preset ldm-celebahq256 --decoder-widths 224,192,128 --json
  msd flops --preset edm-cifar10 --shares 0.4,0.3,0.3 --sampler dpm-multistep --steps 20
  msd flops runs/cifar10                             a run of msd train, or one of its checkpoints
  msd flops model.safetensors                        what msd convert wrote
  msd flops network.json --sampler ddim --steps 50   {"family": "edm", "image_size": 32, ...}
"""


def add_parser(subparsers):
    parser = add_command(
        subparsers,
        "flops",
        "Count parameters and multiply-accumulates of a network, what a training image and a sample cost, and the same "
        "for\na unified network; no weights are allocated.",
        EXAMPLES,
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "source",
        nargs="?",
        type=Path,
        metavar="MODEL",
        help="run or checkpoint folder, a file of msd convert, or JSON of a network's or a run's configuration",
    )
    source.add_argument(
        "--preset", choices=TRAINABLE, metavar="NAME", help="or one of " + ", ".join(TRAINABLE)
    )
    parser.add_argument(
        "--decoder-widths",
        type=Several(whole(1)),
        metavar="LIST",
        help="other widths, one per stage, lowest noise first",
    )
    parser.add_argument(
        "--shares",
        type=Several(),
        metavar="LIST",
        help="of the stages in training; default: the model's, else those of the schedule's distribution",
    )
    parser.add_argument("--sampler", choices=SAMPLERS, help="default: the preset's, or that of the schedule")
    parser.add_argument("--steps", type=whole(1), metavar="N", help="of the sampler")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


def run(args: argparse.Namespace) -> None:
    found = report(args)
    print(json.dumps(found, indent=2) if args.json else table(found))


def report(args: argparse.Namespace) -> dict:
    """Everything that the command prints, as JSON-able values; costs in multiply-accumulates."""
    from multistage_diffusion import costs

    model = costs.Model.of_preset(TRAINABLE[args.preset]) if args.preset else costs.Model.of_file(args.source)
    widths = {"decoder_widths": list(args.decoder_widths)} if args.decoder_widths else {}
    model = model.changed(
        network={**model.network, **widths}, shares=args.shares, sampler=args.sampler, steps=args.steps
    )
    return costs.report(model)


def table(found: dict) -> str:
    """The report as text."""
    lines = [
        f"{found['name']}: {found['title']}".removesuffix(": "),
        "",
        f"{'stage':<10}{'noise levels':<28}{'width':>6}{'parameters':>14}{'GMACs':>9}  attention's products",
    ]
    for row in found["stages"]:
        lines.append(
            _row(str(row["stage"]), row["noise_levels"], row["decoder_width"], row["parameters"], row)
        )
    lines.append(_row("shared", "all", "", found["shared"]["parameters"], found["shared"]))
    lines.append(_row("total", "", "", found["total_parameters"]))
    unified = found["unified"]
    lines.append(_row("unified", "all", unified["width"], unified["parameters"], unified))
    lines.append(_row("separate", "one network per stage", "", found["separate"]["parameters"]))
    lines += ["", "Parameters of a stage are those of its decoder, its GMACs those of the whole network."]
    if not found["published_macs_count_attention"]:
        published = _gigas([row["published_macs"] for row in found["stages"]])
        lines.append(
            f"The paper's cost leaves attention's products out: {published} GMACs, "
            f"unified {_gigas([unified['published_macs']])}."
        )
    if "reference_checkpoints" in found:
        built = found["reference_checkpoints"]
        lines.append(
            f"The reference's own checkpoints have less attention in the later decoders: {_gigas(built['macs'])} "
            f"GMACs, {' + '.join(_millions(p) for p in built['parameters'])} M, "
            f"{_millions(built['total_parameters'])} M in all."
        )
    training, sampling = found["training"], found["sampling"]
    shares = " + ".join(f"{share:.3f}" for share in training["shares"])
    evaluations = " + ".join(map(str, sampling["evaluations"]))
    lines += [
        "",
        f"training, forward and backward, stages drawn with {shares}:",
        _compared(training),
        f"sampling, {sampling['sampler']} with {sampling['steps']} steps, {evaluations} evaluations:",
        _compared(sampling),
    ]
    return "\n".join(lines)


def _row(name: str, levels: str, width, parameters: int, costs: dict | None = None) -> str:
    text = f"{name:<10}{levels:<28}{width!s:>6}{_millions(parameters):>12} M"
    if costs is not None:
        digits = 2 if costs["macs"] >= 1e8 else 5
        text += f"{costs['macs'] / 1e9:>9.{digits}f}"
        text += f"  {costs['attention_macs'] / 1e9:.{digits}f}" if "attention_macs" in costs else ""
    return text


def _compared(costs: dict) -> str:
    own, unified = costs["macs_per_image"], costs["unified_macs_per_image"]
    own_text, unified_text = (f"{macs / 1e9:.{1 if macs > 1e10 else 3}f}" for macs in (own, unified))
    return f"  {own_text} GMACs per image; unified {unified_text}, ratio {own / unified:.3f}"


def _millions(parameters: int) -> str:
    return f"{parameters / 1e6:.3f}"


def _gigas(macs: list[int]) -> str:
    return " / ".join(f"{m / 1e9:.2f}" for m in macs)

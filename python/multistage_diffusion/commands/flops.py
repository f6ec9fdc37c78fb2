"""``msd flops``"""

from __future__ import annotations

import argparse
import json

from multistage_diffusion.commands._options import add_command
from multistage_diffusion.common.checks import are_shares
from multistage_diffusion.common.settings import Several, whole
from multistage_diffusion.presets import PRESETS, SAMPLERS

EXAMPLES = """\
  msd flops --preset edm-cifar10
  msd flops --preset ldm-celebahq256 --decoder-widths 224,192,128 --json
  msd flops --preset edm-cifar10 --shares 0.4,0.3,0.3 --sampler dpm-multistep --steps 20
"""


def add_parser(subparsers):
    parser = add_command(
        subparsers,
        "flops",
        "Count parameters and multiply-accumulates of a published network; no weights are allocated.",
        EXAMPLES,
    )
    parser.add_argument("--preset", required=True, choices=PRESETS, metavar="NAME", help=", ".join(PRESETS))
    parser.add_argument(
        "--decoder-widths",
        type=Several(whole(1)),
        metavar="LIST",
        help="other widths, one per stage, lowest noise first",
    )
    parser.add_argument(
        "--shares", type=Several(), metavar="LIST", help="of the stages in training; default: as published"
    )
    parser.add_argument("--sampler", choices=SAMPLERS, help="default: that of the published results")
    parser.add_argument("--steps", type=whole(1), metavar="N", help="of the sampler")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


def run(args: argparse.Namespace) -> None:
    found = report(args)
    print(json.dumps(found, indent=2) if args.json else table(found))


def report(args: argparse.Namespace) -> dict:
    """Everything that the command prints, as JSON-able values; costs in multiply-accumulates."""
    from multistage_diffusion.flops import TRAINING, expected
    from multistage_diffusion.presets import find

    preset = find(args.preset)
    stages = preset.stages()
    if args.decoder_widths and len(args.decoder_widths) != len(stages):
        raise ValueError(
            f"--decoder-widths: one width per stage ({len(stages)}) is needed, got {args.decoder_widths}"
        )
    changes = {"decoder_widths": list(args.decoder_widths)} if args.decoder_widths else {}
    shares = args.shares or preset.stage_shares()
    if len(shares) != len(stages) or not are_shares(shares):
        given = ",".join(f"{share:g}" for share in shares)
        raise ValueError(
            f"--shares {given}: one share per stage ({len(stages)}) is needed, none negative, with the sum 1"
        )
    multistage = _count(preset.config(**changes))
    unified = _count(preset.config("unified"))
    separate = _count(preset.config("separate", **changes))
    evaluations = preset.evaluations(args.sampler, args.steps)

    def per_sample(macs) -> int:
        return sum(n * m for n, m in zip(evaluations, macs, strict=True))

    everywhere = unified.macs * len(stages)
    found = {
        "preset": preset.name,
        "title": preset.title,
        "stages": [
            {
                "stage": k,
                "noise_levels": f"{stages.variable} in {stages.describe(k)}",
                "decoder_width": preset.config(**changes)["decoder_widths"][k],
                "parameters": multistage.parameters[k],
                **_costs(multistage, k, preset.published_attention),
            }
            for k in range(len(stages))
        ],
        "shared": {"parameters": multistage.shared_parameters, "macs": multistage.shared_macs},
        "total_parameters": multistage.total_parameters,
        "unified": {
            "width": preset.unified_width,
            "parameters": unified.total_parameters,
            **_costs(unified, 0, preset.published_attention),
        },
        "separate": {"parameters": separate.total_parameters, "macs": list(separate.macs)},
        "published_macs_count_attention": preset.published_attention,
        "training": {
            "shares": list(shares),
            "macs_per_image": TRAINING * expected(multistage.macs, shares),
            "unified_macs_per_image": TRAINING * unified.macs[0],
        },
        "sampling": {
            "sampler": args.sampler or preset.sampler,
            "steps": args.steps or preset.sampler_steps,
            "evaluations": list(evaluations),
            "macs_per_image": per_sample(multistage.macs),
            "unified_macs_per_image": per_sample(everywhere),
        },
    }
    if preset.network["family"] == "ldm":
        built = _count(preset.config(**changes, reduced_attention=True))
        found["reference_checkpoints"] = {
            "parameters": list(built.parameters),
            "total_parameters": built.total_parameters,
            "macs": list(built.macs),
        }
    return found


def _count(config: dict):
    import torch

    from multistage_diffusion.flops import count
    from multistage_diffusion.networks import build

    with torch.device("meta"):
        network = build(config)
    return count(network)


def _costs(cost, stage: int, with_attention: bool) -> dict[str, int]:
    macs, attention = cost.macs[stage], cost.attention_macs[stage]
    published = macs if with_attention else macs - attention
    return {"macs": macs, "attention_macs": attention, "published_macs": published}


def table(found: dict) -> str:
    """The report as text."""
    lines = [
        f"{found['preset']}: {found['title']}",
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
        text += f"{costs['macs'] / 1e9:>9.2f}"
        text += f"  {costs['attention_macs'] / 1e9:.2f}" if "attention_macs" in costs else ""
    return text


def _compared(costs: dict) -> str:
    own, unified = costs["macs_per_image"], costs["unified_macs_per_image"]
    return f"  {own / 1e9:.1f} GMACs per image; unified {unified / 1e9:.1f}, ratio {own / unified:.3f}"


def _millions(parameters: int) -> str:
    return f"{parameters / 1e6:.3f}"


def _gigas(macs: list[int]) -> str:
    return " / ".join(f"{m / 1e9:.2f}" for m in macs)

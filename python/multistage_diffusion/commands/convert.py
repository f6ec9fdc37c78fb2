"""``msd convert``"""

from __future__ import annotations

import argparse
import json
import reprlib
from pathlib import Path

from multistage_diffusion.commands._options import add_command
from multistage_diffusion.common.atomic_files import check_replaceable
from multistage_diffusion.common.settings import Several, number, whole
from multistage_diffusion.noise import SCHEDULE_NAMES
from multistage_diffusion.presets import PRESETS, find

FAMILIES = ("edm", "ncsnpp", "ldm", "uvit")
PRECONDITIONINGS = (*SCHEDULE_NAMES, "iddpm")
USE = """\
  from multistage_diffusion import load_denoiser
  denoiser = load_denoiser("model.safetensors")  # D(x; sigma) with the file's own preconditioning and stages
  network = denoiser.network                     # also: load_network("model.safetensors")
"""
EXAMPLES = """\
  msd convert network-snapshot.pkl --family edm --out model.safetensors
  msd convert checkpoint_45.pth --family ncsnpp --preset ncsnpp-cifar10 --out model.safetensors
  msd convert last.ckpt --family ldm --config model.json --weights raw --out model.safetensors
  msd convert weights.pth --family ncsnpp --config model.json --preconditioning vp,M=4000 --out model.safetensors
  msd convert unified.pkl --family edm --start-multistage 192,128,16 --out start.safetensors
"""


def add_parser(subparsers):
    parser = add_command(
        subparsers,
        "convert",
        "Convert a checkpoint of the reference implementation. Nothing in the file is executed.",
        f"{EXAMPLES}\nread it in Python:\n{USE}",
    )
    parser.add_argument(
        "file", type=Path, metavar="FILE", help="EDM .pkl, score-SDE or U-ViT .pth, LDM .ckpt"
    )
    parser.add_argument("--family", required=True, choices=FAMILIES, help="of the network")
    parser.add_argument("--out", required=True, type=output_path, metavar="FILE", help="a .safetensors file")
    parser.add_argument(
        "--weights",
        choices=("ema", "raw"),
        default="ema",
        help="averaged weights (default) or those in training",
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--config",
        type=Path,
        metavar="JSON",
        help="the reference constructor's arguments; default: those in FILE",
    )
    source.add_argument("--preset", choices=PRESETS, metavar="NAME", help="or one of " + ", ".join(PRESETS))
    parser.add_argument(
        "--preconditioning",
        type=preconditioning,
        metavar="NAME[,CONSTANT=X,...]",
        help=f"how the network becomes a denoiser, where FILE does not say it: {', '.join(PRECONDITIONINGS)}, with its "
        "constants where they are not the usual ones; default: that of the family's published models",
    )
    parser.add_argument(
        "--stages",
        metavar="STAGES",
        help='"edm", "single", a stages.json, or boundaries such as 2.5103,7.6577 in the variable of the '
        "preconditioning; default: those in FILE or in --config, else the published ones",
    )
    parser.add_argument(
        "--start-multistage",
        type=Several(whole(1)),
        metavar="WIDTHS",
        help="make a multi-stage model of a unified one, with decoders of these widths, lowest noise first",
    )
    return parser


def output_path(text: str) -> Path:
    if not text.endswith(".safetensors"):
        raise argparse.ArgumentTypeError(f"{text} must end in .safetensors")
    return Path(text)


def preconditioning(text: str) -> dict[str, object]:
    """``vp,M=4000`` is {"schedule": "vp", "M": 4000}."""
    name, *parts = text.split(",")
    if name not in PRECONDITIONINGS:
        raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(PRECONDITIONINGS)}")
    found: dict[str, object] = {"schedule": name}
    for part in parts:
        constant, equals, value = part.partition("=")
        if not equals:
            raise argparse.ArgumentTypeError(f"{part!r} is no constant such as sigma_data=0.5")
        found[constant] = value if constant == "prediction" else _number(value)
    return found


def _number(text: str) -> float:
    try:
        return int(text)
    except ValueError:
        return number(infinite=True)(text)


def run(args: argparse.Namespace) -> None:
    from multistage_diffusion import official
    from multistage_diffusion.official import convert, denoisers

    check_replaceable(args.out, "--out")
    config = _read_config(args.config) if args.config else None
    checkpoint = convert.read(args.file, args.weights)
    network = convert.network_of(checkpoint, args.family, config, args.preset)
    if args.start_multistage:
        network, report = official.start_multistage(network, args.start_multistage)
        print(report)
    preset = find(args.preset) if args.preset else None
    kept = denoisers.denoiser(
        network, checkpoint, config, preset, args.preconditioning, _stages(args, checkpoint)
    )
    source = args.file.name.encode(errors="backslashreplace").decode()  # names of files need be no text
    notes = {"source": source, "weights": checkpoint.weights}
    convert.save_network(args.out, kept.denoiser or network, notes)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    print(
        f"{args.out}: {args.family}, {network.num_stages} stage(s), {parameters / 1e6:.3f} M parameters, "
        f"weights: {checkpoint.weights}"
    )
    print(f"denoiser: {kept.summary}")


def _stages(args: argparse.Namespace, checkpoint):
    """--stages, whose boundaries are in the variable of the preconditioning that is used."""
    from multistage_diffusion.noise.parsing import parse_stages
    from multistage_diffusion.official.denoisers import published_by, schedule_name

    if args.stages is None:
        return None
    published = find(args.preset) if args.preset else published_by(args.family)
    name = schedule_name(checkpoint.preconditioner, args.preconditioning, published)
    return parse_stages(args.stages, "edm" if name == "iddpm" else name)


def _read_config(path: Path) -> dict:
    try:
        config = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--config {path}: not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(
            f"--config {path}: needs a JSON object of constructor arguments, got {reprlib.repr(config)}"
        )
    return config

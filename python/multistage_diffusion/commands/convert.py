"""``msd convert``"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..atomic_files import check_replaceable
from ..presets import PRESETS
from ._options import add_command, wholes

FAMILIES = ("edm", "ncsnpp", "ldm", "uvit")
USE = """\
  from multistage_diffusion.convert import load_network
  network = load_network("model.safetensors")
"""
EXAMPLES = """\
  msd convert network-snapshot.pkl --family edm --out model.safetensors
  msd convert checkpoint_45.pth --family ncsnpp --preset ncsnpp-cifar10 --out model.safetensors
  msd convert last.ckpt --family ldm --config model.json --weights raw --out model.safetensors
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
        "--start-multistage",
        type=wholes,
        metavar="WIDTHS",
        help="make a multi-stage model of a unified one, with decoders of these widths, lowest noise first",
    )
    return parser


def output_path(text: str) -> Path:
    if not text.endswith(".safetensors"):
        raise argparse.ArgumentTypeError(f"{text} must end in .safetensors")
    return Path(text)


def run(args: argparse.Namespace) -> None:
    from .. import convert, official

    check_replaceable(args.out, "--out")
    config = _read_config(args.config) if args.config else None
    checkpoint = convert.read(args.file, args.weights)
    network = convert.network_of(checkpoint, args.family, config, args.preset)
    if args.start_multistage:
        network, report = official.start_multistage(network, args.start_multistage)
        print(report)
    source = args.file.name.encode(errors="backslashreplace").decode()  # names of files need be no text
    convert.save_network(args.out, network, {"source": source, "weights": checkpoint.weights})
    parameters = sum(parameter.numel() for parameter in network.parameters())
    print(
        f"{args.out}: {args.family}, {network.num_stages} stage(s), {parameters / 1e6:.3f} M parameters, "
        f"weights: {checkpoint.weights}"
    )


def _read_config(path: Path) -> dict:
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"--config {path}: not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"--config {path}: needs a JSON object of constructor arguments, got {config!r}")
    return config

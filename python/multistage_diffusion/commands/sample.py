"""``msd sample``"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from ._options import add_command, add_machine_options, number, set_up_machine, whole

EXAMPLES = """\
  msd sample --run runs/digits --out digits.png
  msd sample --run runs/digits --num 1000 --batch 250 --out digits.npz
  msd sample --run runs/digits/checkpoints/step-00002000 --seeds 3,7,20-29 --s-churn 40 --out some.png
"""


def add_parser(subparsers):
    parser = add_command(
        subparsers, "sample", "Sample images from a trained model with EDM's Heun sampler.", EXAMPLES
    )
    group = parser.add_argument_group("model")
    group.add_argument(
        "--run",
        required=True,
        type=Path,
        metavar="DIR",
        dest="source",
        help="run folder (its newest intact checkpoint), or a checkpoint folder",
    )
    group.add_argument(
        "--weights",
        choices=("ema", "network"),
        default="ema",
        help="averaged weights (default) or those in training",
    )

    group = parser.add_argument_group("samples")
    group.add_argument(
        "--out",
        required=True,
        type=output_path,
        metavar="FILE",
        help="a grid as .png, or .npz with images [N, H, W, C] (uint8) and seeds",
    )
    group.add_argument("--num", type=whole(1), metavar="N", help="number of images; default: 16")
    group.add_argument(
        "--seed",
        type=whole(0),
        default=0,
        metavar="S",
        help="seed of the first image, the others count up; default: 0",
    )
    group.add_argument(
        "--seeds",
        type=seed_list,
        metavar="LIST",
        help="seeds of the images instead of --num and --seed, such as 0-15,40",
    )
    group.add_argument(
        "--class",
        type=whole(0),
        metavar="K",
        dest="class_id",
        help="class of all images; default for a class-conditional model: the seed modulo the number of classes",
    )
    group.add_argument(
        "--batch", type=whole(1), default=64, metavar="N", help="images per network evaluation; default: 64"
    )

    group = parser.add_argument_group("sampler", "noise levels in units of the data, which is in [-1, 1]")
    group.add_argument(
        "--steps",
        type=whole(1),
        default=18,
        metavar="N",
        help="steps; 2 N - 1 network evaluations; default: 18",
    )
    group.add_argument(
        "--sigma-min",
        type=number(above=0),
        default=0.002,
        metavar="X",
        help="lowest noise level before 0; default: 0.002",
    )
    group.add_argument(
        "--sigma-max",
        type=number(above=0),
        default=80.0,
        metavar="X",
        help="noise level to start from; default: 80",
    )
    group.add_argument(
        "--rho",
        type=number(above=0),
        default=7.0,
        metavar="X",
        help="how much steps are shortened towards low noise; default: 7",
    )
    group.add_argument(
        "--s-churn",
        type=number(low=0),
        default=0.0,
        metavar="X",
        help="amount of added noise; default: 0, a deterministic sampler",
    )
    group.add_argument(
        "--s-min",
        type=number(low=0),
        default=0.0,
        metavar="X",
        help="lowest noise level at which noise is added; default: 0",
    )
    group.add_argument(
        "--s-max", type=number(low=0), default=float("inf"), metavar="X", help="highest one; default: inf"
    )
    group.add_argument(
        "--s-noise",
        type=number(low=0),
        default=1.0,
        metavar="X",
        help="standard deviation of the added noise; default: 1",
    )

    group.add_argument(
        "--precision", choices=("fp32", "bf16"), default="fp32", help="of the network; default: fp32"
    )
    add_machine_options(parser)
    return parser


def output_path(text: str) -> Path:
    path = Path(text)
    if path.suffix not in (".png", ".npz"):
        raise argparse.ArgumentTypeError(f"{text} must end in .png or .npz")
    return path


def seed_list(text: str) -> list[int]:
    """``0-3,7`` is [0, 1, 2, 3, 7]."""
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if (
            not first.strip().isdigit()
            or (dash and not last.strip().isdigit())
            or (dash and int(last) < int(first))
        ):
            raise argparse.ArgumentTypeError(f"{part!r} is neither a seed nor a range such as 0-15")
        seeds += range(int(first), int(last) + 1) if dash else [int(first)]
    return seeds


def run(args) -> None:
    import torch

    from ..checkpoints import load_model
    from ..samplers import SamplerConfig, class_labels, generate

    if args.seeds is not None and args.num is not None:
        raise ValueError("--seeds and --num exclude each other")
    seeds = args.seeds if args.seeds is not None else range(args.seed, args.seed + (args.num or 16))
    config = SamplerConfig(
        args.steps,
        args.sigma_min,
        args.sigma_max,
        args.rho,
        args.s_churn,
        args.s_min,
        args.s_max,
        args.s_noise,
    )
    device = set_up_machine(args)
    model = load_model(args.source, args.weights, device)
    network = model.denoiser.network
    conditioning = class_labels(network, seeds, args.class_id)
    start = time.monotonic()
    with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
        samples = generate(
            model.denoiser,
            seeds,
            (network.in_channels, network.image_size, network.image_size),
            config,
            batch_size=args.batch,
            device=device,
            progress=_progress if sys.stderr.isatty() else None,
            **conditioning,
        )
    seconds = time.monotonic() - start
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_samples(args.out, samples.images, seeds)
    per_stage = " / ".join(map(str, samples.evaluations_per_stage))
    print(
        f"{args.out}: {len(seeds)} images of {model.path.name} ({args.weights}), {seconds:.1f} s, "
        f"{samples.evaluations} network evaluations each (stages {per_stage})"
    )


def _progress(done: int, total: int) -> None:
    end = "\n" if done == total else ""
    print(f"\rstep {done}/{total}", end=end, file=sys.stderr, flush=True)


def write_samples(path: Path, images, seeds) -> None:
    """Writes images ``[N, C, H, W]`` in [-1, 1] as a grid (.png) or an array file (.npz)."""
    import numpy as np

    from ..plots import save_sample_grid

    if path.suffix == ".png":
        save_sample_grid(images.float(), path)
        return
    eight_bits = (images * 127.5 + 128).clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous()
    np.savez_compressed(path, images=eight_bits.numpy(), seeds=np.asarray(list(seeds)))

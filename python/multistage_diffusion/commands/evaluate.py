"""``msd evaluate``"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from multistage_diffusion.commands._options import add_command, add_machine_options, set_up_machine
from multistage_diffusion.common.settings import seed, whole

if TYPE_CHECKING:
    import torch

    from multistage_diffusion.data.images import ImageData
    from multistage_diffusion.evaluation import Evaluation, Statistics
    from multistage_diffusion.evaluation.features import Features
    from multistage_diffusion.training.checkpoints import LoadedModel

EXAMPLES = """\
  msd evaluate samples/ --against photos/ --features inception
  msd evaluate samples.npz --against cifar10-statistics.npz --features inception:weights.pth --json quality.json
  msd evaluate runs/digits --against digits --features my_package.networks:features --num 1000
  msd evaluate samples.zip --against photos.zip --features encoder.pt --save-statistics photos.npz
"""


def add_parser(subparsers):
    parser = add_command(
        subparsers,
        "evaluate",
        "Compare samples with real images: Fréchet distance, improved precision and recall, and KID, each with its\n"
        "95 % interval, and its bias: what it would be lower by of endless samples.",
        EXAMPLES,
    )
    parser.add_argument(
        "samples",
        type=Path,
        metavar="SAMPLES",
        help="a folder or .zip of images, an .npy or .npz array; or a run or checkpoint folder, which is sampled",
    )
    parser.add_argument(
        "--against",
        required=True,
        metavar="DATA",
        help="the real images, as of msd train; or .npz statistics of their features (mu, sigma), as pytorch-fid "
        "writes them, which give the Fréchet distance alone",
    )
    parser.add_argument(
        "--features",
        default="inception",
        metavar="NAME",
        help="what maps eight-bit images to features: inception[:WEIGHTS], by torch-fidelity; a TorchScript file or an "
        "exported program (.pt, .pt2); or MODULE:NAME of Python, a function or a module class, whose weights are those "
        "of NAME@FILE.safetensors; default: inception",
    )
    group = parser.add_argument_group("figures")
    group.add_argument(
        "--k", type=whole(1), default=3, metavar="N", help="neighbour of precision and recall; default: 3"
    )
    group.add_argument(
        "--resamples",
        type=whole(0),
        default=20,
        metavar="N",
        help="halves of the samples that errors and biases follow from; default: 20",
    )
    group.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    group.add_argument(
        "--save-statistics", type=Path, metavar="FILE", help="write those of the real images, for --against"
    )
    group = parser.add_argument_group("a run that is sampled")
    group.add_argument(
        "--num", type=whole(1), metavar="N", help="samples; default: as many as real images, or 10000"
    )
    group.add_argument("--seed", type=seed, metavar="S", help="of the first sample; default: 0")
    group.add_argument("--steps", type=whole(1), metavar="N", help="of the model's own sampler")
    parser.add_argument(
        "--batch", type=whole(1), default=64, metavar="N", help="images at a time; default: 64"
    )
    add_machine_options(parser)
    return parser


def run(args: argparse.Namespace) -> None:
    from multistage_diffusion.common.atomic_files import check_replaceable, replacing
    from multistage_diffusion.data.images import load_images
    from multistage_diffusion.evaluation import Statistics, compare, load_features

    device = set_up_machine(args)
    for option, path in (("--json", args.json), ("--save-statistics", args.save_statistics)):
        if path is not None:
            check_replaceable(path, option)
    features = load_features(args.features, device)
    model = _model(args, device)
    data = _against(args.against)
    if isinstance(data, Statistics):
        if args.save_statistics is not None:
            raise ValueError(f"--save-statistics: {args.against} holds statistics already")
        real, count = data, 10_000
    else:
        real, count = _features(_eight_bits(data, args.batch), features, args.against), data.num_images
        if args.save_statistics is not None:
            Statistics.of(real).save(args.save_statistics)
    if model is None:
        batches = _eight_bits(load_images(args.samples), args.batch)
    else:
        batches = _sampled(model, args, args.num or count)
    samples = _features(batches, features, str(args.samples))
    found = compare(samples, real, k=args.k, resamples=args.resamples)
    if args.json is not None:
        record = {
            "samples": str(args.samples),
            "against": args.against,
            "features": args.features,
            "k": args.k,
        }
        with replacing(args.json) as path:
            path.write_text(json.dumps({**record, **found.report()}, indent=2) + "\n")
    print(
        f"{args.samples}: {len(samples)} samples, features {args.features}, against {_name(found, args.against)}"
    )
    print(found)


def _name(found: Evaluation, against: str) -> str:
    count = found.reference_images
    return against if count is None else f"{count} images of {against}"


def _model(args: argparse.Namespace, device: torch.device) -> LoadedModel | None:
    """The model of a run or a checkpoint; None for samples that are there."""
    from multistage_diffusion.training.checkpoints import METADATA, list_checkpoints, load_model

    path = args.samples
    if (path / METADATA).is_file() or list_checkpoints(path) or list_checkpoints(path / "checkpoints"):
        model = load_model(path, device=device)
        if model.metadata["config"].get("values", "images") != "images":
            raise ValueError(f"{path}: makes latents; decode its samples to images, and evaluate those")
        return model
    for option in ("num", "seed", "steps"):
        if getattr(args, option) is not None:
            raise ValueError(f"--{option}: is for a run that is sampled, and {path} holds none")
    return None


def _against(source: str) -> ImageData | Statistics:
    import numpy as np

    from multistage_diffusion.data.images import load_images
    from multistage_diffusion.evaluation import Statistics

    path = Path(source)
    if path.suffix == ".npz" and path.is_file():
        try:
            with np.load(path, allow_pickle=False) as file:
                if "mu" in file.files:
                    return Statistics.load(path)
        except (OSError, ValueError, EOFError, AttributeError):
            pass  # the reader of images says what is wrong
    return load_images(source)


def _eight_bits(data: ImageData, size: int) -> Iterator[torch.Tensor]:
    """Batches of uint8 images, ``[n, C, H, W]``."""
    import torch

    from multistage_diffusion.data.images import eight_bits

    for indices in torch.arange(data.num_images).split(size):
        yield eight_bits(data.sample(indices))


def _sampled(model: LoadedModel, args: argparse.Namespace, count: int) -> Iterator[torch.Tensor]:
    import torch

    from multistage_diffusion.data.images import eight_bits
    from multistage_diffusion.sampling.samplers import (
        class_labels,
        default_sampler,
        generate,
        sampler_config,
        schedule_of,
    )

    denoiser = model.denoiser
    network = denoiser.network
    config = sampler_config(default_sampler(denoiser), schedule_of(denoiser), args.steps)
    shape = (network.in_channels, network.image_size, network.image_size)
    first = args.seed or 0
    for seeds in torch.arange(first, first + count).split(args.batch):
        seeds = seeds.tolist()
        found = generate(
            denoiser, seeds, shape, config, batch_size=args.batch, **class_labels(network, seeds)
        )
        if not found.images.isfinite().all():
            raise ValueError(
                f"{args.samples}: samples of seeds {seeds[0]} to {seeds[-1]} are NaN or infinite"
            )
        yield eight_bits(found.images)


def _features(batches: Iterator[torch.Tensor], features: Features, name: str) -> torch.Tensor:
    """The features of all batches, with a bar of progress on a terminal."""
    from tqdm import tqdm

    from multistage_diffusion.evaluation import extract

    with tqdm(desc=name, unit=" images", disable=not sys.stderr.isatty(), file=sys.stderr) as bar:
        return extract(batches, features, name=name, progress=lambda done: bar.update(done - bar.n))

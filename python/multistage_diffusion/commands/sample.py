"""``msd sample``"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from multistage_diffusion.commands._options import add_command, add_machine_options, set_up_machine
from multistage_diffusion.common.settings import Setting, add_options, given, option_of, seed, whole
from multistage_diffusion.sampling.table import HEUN, SAMPLERS, SETTINGS, STEPS

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from multistage_diffusion.noise.preconditioning import Preconditioner
    from multistage_diffusion.sampling.samplers import AnyConfig, Samples
    from multistage_diffusion.training.checkpoints import LoadedModel
    from multistage_diffusion.training.data_parallel import Processes

EXAMPLES = """\
  msd sample --run runs/digits --out digits.png
  msd sample --run runs/digits --num 1000 --batch 250 --out digits.npz
  msd sample --run runs/digits/checkpoints/step-00002000 --seeds 3,7,20-29 --s-churn 40 --out some.png
  msd sample --run runs/ncsnpp --sampler ddim --steps 50 --eta 1 --out ancestral.png
  msd sample --run runs/ldm --num 64 --out latents.npz
  msd sample --run runs/cifar10 --num 50000 --out samples/          again with --resume, should it be stopped

several GPUs, each with its share of the seeds:
  torchrun --nproc-per-node 8 -m -- multistage_diffusion sample --run runs/cifar10 --num 50000 --out samples.npz
"""

FILES = (".png", ".npz")
MOST_IMAGES = 10_000_000  # of one call: their seeds are a list


def add_parser(subparsers):
    parser = add_command(subparsers, "sample", "Sample images, or latents, from a trained model.", EXAMPLES)
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
        help="a grid as .png, or .npz with images [N, H, W, C] (uint8) and seeds, or DIR/ for a folder with a PNG for "
        "each, written batch by batch, and with dataset.json for their classes; for a model of latents .npz with "
        "latents [N, C, H, W] (float32) and seeds",
    )
    group.add_argument(
        "--resume",
        action="store_true",
        help="with --out DIR/: go on where the same command was stopped or killed; the files are the same",
    )
    group.add_argument("--num", type=whole(1, MOST_IMAGES), metavar="N", help="number of images; default: 16")
    group.add_argument(
        "--seed",
        type=seed,
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
    group.add_argument(
        "--batch-invariant",
        action="store_true",
        help="on the CPU: an image depends on its seed alone bit for bit, whatever --batch and the other seeds, not "
        "just to rounding; slower",
    )
    group.add_argument(
        "--precision", choices=("fp32", "bf16"), default="fp32", help="of the network; default: fp32"
    )
    _add_sampler_options(parser)
    add_machine_options(
        parser,
        cuda_graphs="replay the network from CUDA graphs: saves the host's time per launch, which small batches wait "
        "for",
    )
    return parser


def _add_sampler_options(parser) -> None:
    group = parser.add_argument_group("sampler")
    group.add_argument(
        "--sampler",
        choices=SAMPLERS,
        help=f"{'; '.join(f'{name}: {sampler.title}' for name, sampler in SAMPLERS.items())}; "
        "default: heun for a model of schedule edm, dpm-multistep for ldm, ddim for flow, else dpm-singlestep",
    )
    group.add_argument(
        "--steps",
        type=whole(1),
        metavar="N",
        help="network evaluations, 2 N - 1 of them for heun; default: 18 for heun, else 20",
    )
    add_options(group, _of_group(STEPS))
    group = parser.add_argument_group("heun", "noise levels in units of the data; images are in [-1, 1]")
    add_options(group, _of_group(HEUN))


def _of_group(group: str) -> dict[str, Setting]:
    return {name: setting for name, setting in SETTINGS.items() if setting.group == group}


def output_path(text: str) -> Path:
    path = Path(text)
    if not (text.endswith("/") or path.is_dir() or path.suffix in FILES):
        raise argparse.ArgumentTypeError(f"{text} must end in .png, .npz, or / for a folder")
    return path


def seed_list(text: str) -> list[int]:
    """``0-3,7`` is [0, 1, 2, 3, 7]."""
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if (
            not first.strip().isdecimal()
            or (dash and not last.strip().isdecimal())
            or (dash and int(last) < int(first))
        ):
            raise argparse.ArgumentTypeError(f"{part!r} is neither a seed nor a range such as 0-15")
        more = range(int(first), int(last if dash else first) + 1)
        if len(seeds) + more.stop - more.start > MOST_IMAGES:
            raise argparse.ArgumentTypeError(f"{text} are more than {MOST_IMAGES} seeds")
        seeds += more
    return seeds


def run(args) -> None:
    from multistage_diffusion.training.data_parallel import Processes

    with Processes.of_launcher() as processes:
        _sample(args, processes)


def _sample(args, processes) -> None:
    from multistage_diffusion.common.atomic_files import check_replaceable
    from multistage_diffusion.sampling.cuda_graphs import GraphedNetwork
    from multistage_diffusion.sampling.sample_folder import found_in
    from multistage_diffusion.sampling.samplers import (
        default_sampler,
        require_seeds,
        sampler_config,
        schedule_of,
    )
    from multistage_diffusion.training.checkpoints import load_model

    if args.seeds is not None and args.num is not None:
        raise ValueError("--seeds and --num exclude each other")
    seeds = args.seeds if args.seeds is not None else list(range(args.seed, args.seed + (args.num or 16)))
    settings = given(args, SETTINGS)
    # What is wrong whatever the model is shows before one is loaded.
    seeds = require_seeds(seeds, "sample")
    to_folder = args.out.suffix not in FILES
    if args.resume and not to_folder:
        raise ValueError(f"--resume: is for a folder of samples, --out DIR/, got --out {args.out}")
    if to_folder:
        processes.first_does(lambda: found_in(args.out, args.resume))
    else:
        processes.first_does(lambda: check_replaceable(args.out, "--out"))
    sampler_config(_sampler_of(settings, args.sampler), None, args.steps, **settings)
    device = set_up_machine(args)
    if args.batch_invariant and device.type != "cpu":
        raise ValueError(f"--batch-invariant: holds on the CPU, got {device}; try --device cpu")
    model = load_model(args.source, args.weights, device)
    if args.cuda_graphs:
        model.denoiser.network = GraphedNetwork(model.denoiser.network)
    sampler = _sampler_of(settings, args.sampler or default_sampler(model.denoiser))
    config = sampler_config(sampler, schedule_of(model.denoiser), args.steps, **settings)
    values = model.metadata["config"].get("values", "images")
    network = model.denoiser.network
    check_output(args.out, values, network.in_channels, model.path)
    job = _Job(args, device, model.denoiser, config, values, _progress_of(processes, to_folder))
    start = time.monotonic()
    if to_folder:
        samples = _fill_folder(job, processes, seeds, sampler, model)
    else:
        samples = job.draw(processes.deal(seeds))
        written = processes.collect(written_form(args.out, samples.images, values), len(seeds))
        if processes.is_first:
            write_samples(args.out, written, seeds, values)
    if not processes.is_first:
        return
    made = f"{args.out}: {len(seeds)} {values} of {model.path.name} ({args.weights}), {time.monotonic() - start:.1f} s"
    if samples is None:
        print(f"{made}, all of them were there")
        return
    per_stage = " / ".join(map(str, samples.evaluations_per_stage))
    print(f"{made}, {sampler}, {samples.evaluations} network evaluations each (stages {per_stage})")


@dataclass(frozen=True)
class _Job:
    """What every sample of a call has in common."""

    args: argparse.Namespace
    device: torch.device
    denoiser: Preconditioner
    config: AnyConfig
    values: str
    progress: Callable[[int, int], None] | None

    def draw(self, seeds: list[int]) -> Samples:
        import torch

        from multistage_diffusion.sampling.samplers import class_labels, generate

        network = self.denoiser.network
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.precision == "bf16"):
            return generate(
                self.denoiser,
                seeds,
                (network.in_channels, network.image_size, network.image_size),
                self.config,
                self.args.batch_invariant,
                batch_size=self.args.batch,
                device=self.device,
                progress=self.progress,
                **class_labels(network, seeds, self.args.class_id),
            )


def _fill_folder(
    job: _Job, processes: Processes, seeds: list[int], sampler: str, model: LoadedModel
) -> Samples | None:
    """Writes what is missing, batch by batch; returns the last samples, None where nothing was missing.

    A batch of which an image is missing is drawn again as a whole, so that its images are what they would have been.
    """
    from tqdm import tqdm

    from multistage_diffusion.sampling.sample_folder import SampleFolder
    from multistage_diffusion.sampling.samplers import class_labels

    args = job.args
    description = {
        "model": model.path.name,
        "checkpoint": model.metadata.get("sha256"),
        "weights": args.weights,
        "sampler": sampler,
        "settings": {name: str(value) for name, value in vars(job.config).items()},
        "seeds": [seeds[0], seeds[-1], len(seeds)],
        "class": args.class_id,
        "batch": args.batch,
        "batch_invariant": args.batch_invariant,
        "precision": args.precision,
        "processes": processes.size,
    }
    folder = processes.first_does(lambda: SampleFolder(args.out, description, resume=args.resume))
    processes.first_does(folder.remove_unfinished)
    own = processes.deal(seeds)
    samples = None
    with tqdm(
        total=len(own), unit=" images", disable=not (processes.is_first and sys.stderr.isatty())
    ) as bar:
        for start in range(0, len(own), args.batch):
            batch = own[start : start + args.batch]
            if not folder.has(batch):
                samples = job.draw(batch)
                folder.write(written_form(args.out, samples.images, job.values), batch)
            bar.update(len(batch))
    processes.largest(0)  # all have written theirs
    labels = class_labels(job.denoiser.network, seeds, args.class_id).get("class_labels")
    if labels is not None:
        processes.first_does(lambda: folder.write_labels(seeds, labels.argmax(1).tolist()))
    return samples


def _progress_of(processes: Processes, to_folder: bool) -> Callable[[int, int], None] | None:
    """What shows the steps on a terminal; a folder has a bar of images."""
    return _progress if processes.is_first and sys.stderr.isatty() and not to_folder else None


def _sampler_of(settings: dict, sampler: str | None) -> str:
    """The sampler asked for; where it is not known yet, one that takes the settings.

    Raises:
        ValueError: a setting that the sampler does not take; names the option and the samplers that do.
    """
    if sampler is None:
        fitting = (name for name, known in SAMPLERS.items() if settings.keys() <= set(known.settings))
        sampler = next(fitting, None)
    if sampler is None:
        raise ValueError(f"{', '.join(map(option_of, settings))}: no sampler takes all of these")
    for name in settings:
        if name not in SAMPLERS[sampler].settings:
            others = " or ".join(other for other, known in SAMPLERS.items() if name in known.settings)
            raise ValueError(f"{option_of(name)} is for --sampler {others}, not for {sampler}")
    return sampler


def _progress(done: int, total: int) -> None:
    end = "\n" if done == total else ""
    print(f"\rstep {done}/{total}", end=end, file=sys.stderr, flush=True)


def check_output(path: Path, values: str, channels: int, model: Path) -> None:
    """Raises ValueError if samples of this kind, of so many channels, cannot be written to a file of this kind."""
    if values == "latents" and path.suffix != ".npz":
        raise ValueError(
            f"--out {path}: {model} was trained on latents, which are no picture before the autoencoder decodes them; "
            "write them as .npz and decode its array `latents`"
        )
    if path.suffix != ".npz" and channels not in (1, 3):
        raise ValueError(
            f"--out {path}: {model} makes images of {channels} channels, a PNG has 1 or 3; write them as .npz"
        )


def written_form(path: Path, samples: Tensor, values: str = "images") -> Tensor:
    """Samples ``[N, C, H, W]`` as ``write_samples`` takes them.

    Args:
        path: where they go: .png for a grid of images, .npz for arrays, or a folder.
        samples: images in [-1, 1], or latents.
        values: "images" or "latents".

    Returns:
        For a grid and for latents float32 in the same shape, else eight bits, [N, H, W, C].

    Raises:
        ValueError: samples that are not finite, which eight bits could not tell from black.
    """
    from multistage_diffusion.data.images import eight_bits

    broken = int((~samples.float().isfinite()).flatten(1).any(1).sum())
    if broken:
        raise ValueError(
            f"{broken} of {len(samples)} {values} hold NaN or infinite values, so nothing is written; "
            "try other settings of the sampler, --precision fp32, or another checkpoint"
        )
    if path.suffix == ".png" or values == "latents":
        return samples.float()
    return eight_bits(samples).permute(0, 2, 3, 1).contiguous()


def write_samples(path: Path, written: Tensor, seeds: Sequence[int], values: str = "images") -> None:
    """Writes what ``written_form`` makes of samples: a grid, or arrays ``seeds`` and ``images`` or ``latents``.

    Missing folders are made. An error leaves a file that was there as it was.
    """
    import numpy as np

    from multistage_diffusion.common.atomic_files import replacing
    from multistage_diffusion.common.plots import save_sample_grid

    with replacing(path) as temporary:
        if path.suffix == ".png":
            save_sample_grid(written, temporary)
            return
        kind = np.int64 if max(seeds) < 2**63 else np.uint64  # left to itself NumPy takes float64 for a mix
        np.savez_compressed(temporary, **{values: written.numpy()}, seeds=np.asarray(seeds, kind))

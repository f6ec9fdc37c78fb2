"""``msd cluster``"""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from multistage_diffusion.commands._options import (
    SCHEDULE_NAMES,
    add_command,
    add_machine_options,
    number,
    seed,
    set_up_machine,
    whole,
)

EXAMPLES = """\
  msd cluster --data digits --schedule edm --measure smooth --method ends --out runs/stages
  msd cluster --data cifar10.npz --schedule vp --stages 3 --out runs/stages
  msd cluster --data cifar10.npz --method gradient --run runs/unified --out runs/by-gradient
  torchrun --nproc-per-node 2 -m multistage_diffusion cluster --data big.npy --out runs/stages
  msd train --data digits --stages runs/stages/stages.json --out runs/digits
"""

OUTPUTS = ("stages.json", "similarity.npz", "similarity.png", "curves.png")
METHODS = ("optimal", "ends", "uniform-t", "uniform-log-snr", "gradient")


def add_parser(subparsers):
    parser = add_command(
        subparsers,
        "cluster",
        "Find the stages of a data set: noise levels whose optimal denoisers agree.",
        EXAMPLES,
    )
    _add_data_options(parser)
    _add_stage_options(parser)
    _add_similarity_options(parser)
    add_machine_options(parser)
    return parser


def _add_data_options(parser) -> None:
    group = parser.add_argument_group("data and output")
    group.add_argument(
        "--data", required=True, metavar="SOURCE", help='"digits", or a folder, .zip, .npy or .npz of images'
    )
    group.add_argument(
        "--image-size", type=whole(1), metavar="N", help="pixels per side to bring the images to"
    )
    group.add_argument(
        "--out",
        required=True,
        type=Path,
        metavar="DIR",
        help=f"folder for {', '.join(OUTPUTS)}",
    )


def _add_stage_options(parser) -> None:
    group = parser.add_argument_group("stages")
    group.add_argument(
        "--schedule",
        choices=SCHEDULE_NAMES,
        default="vp",
        help="the noise levels to compare, and their names; default: vp",
    )
    group.add_argument("--stages", type=whole(1), default=3, metavar="K", help="number of stages; default: 3")
    group.add_argument(
        "--method",
        choices=METHODS,
        help="`ends`: the paper's rule for three stages (the default for three); `optimal`: the best split (the "
        "default for others); `uniform-`: equal lengths in the schedule's variable or in log-SNR; `gradient`: "
        "the best split by the gradients of a trained unified model",
    )
    group.add_argument(
        "--level",
        type=number(above=0),
        metavar="X",
        help="similarity, below 1, at which `ends` cuts; default: 0.9",
    )
    group.add_argument(
        "--min-levels",
        type=whole(1),
        metavar="N",
        help="levels of the grid in each stage, for `optimal` and `gradient`; default: 1",
    )
    group.add_argument(
        "--run",
        type=Path,
        metavar="DIR",
        dest="source",
        help="run folder or checkpoint of the model for --method gradient",
    )
    group.add_argument(
        "--variable",
        choices=("sigma", "own"),
        default="sigma",
        help="what stages.json counts in: sigma (for msd train, the default) or the schedule's own variable",
    )
    group.add_argument(
        "--budget",
        type=number(above=0),
        default=128,
        metavar="W",
        help="width of the single decoder whose compute the suggested widths may use; default: 128",
    )


def _add_similarity_options(parser) -> None:
    group = parser.add_argument_group("similarity")
    group.add_argument("--grid", type=whole(2), default=21, metavar="L", help="noise levels; default: 21")
    group.add_argument(
        "--samples", type=whole(1), default=20, metavar="N", help="images compared; default: 20"
    )
    group.add_argument("--seed", type=seed, default=0, metavar="S", help="of images and noise; default: 0")
    group.add_argument(
        "--form",
        choices=("x0", "eps"),
        default="x0",
        help="compare predicted images (default) or predicted noise",
    )
    group.add_argument(
        "--measure",
        choices=("pixels", "smooth"),
        default="pixels",
        help="the share of pixels that differ by less than a threshold (default), or one without a threshold",
    )
    group.add_argument(
        "--threshold",
        type=number(above=0),
        default=2 / 256,
        metavar="X",
        help="as a share of the data range; default: 2/256",
    )
    group.add_argument(
        "--sigma-units",
        choices=("-1,1", "0,1"),
        default="-1,1",
        help="the range of the data that sigma is meant for; in [0,1] the same sigma is twice the noise; "
        "default: -1,1",
    )


def run(args) -> None:
    from multistage_diffusion.clustering import sweep
    from multistage_diffusion.clustering.pictures import plot_curves, plot_matrix
    from multistage_diffusion.common.atomic_files import check_replaceable
    from multistage_diffusion.data.images import load_images
    from multistage_diffusion.noise import schedules

    _settle_method(args)
    for name in OUTPUTS:
        check_replaceable(args.out / name, "--out")
    schedule = schedules.SCHEDULES[args.schedule]()
    device = set_up_machine(args)
    images = load_images(args.data, image_size=args.image_size)
    with _process_group() as group:
        similarity = _similarity(args, images, schedule, device, group)
        if group is not None and group.rank() != 0:
            return
    found = _split(args, similarity, schedule)
    by_sigma, own = found.stages(), found.stages(schedule)
    stages, numbers, matrix, curves = (args.out / name for name in OUTPUTS)
    (own if args.variable == "own" else by_sigma).save(stages)
    _save_numbers(similarity, schedule, numbers)
    plot_matrix(similarity, found, matrix, schedule, title=f"{images.name}, {args.schedule}")
    plot_curves(similarity, found, curves, level=args.level)
    _print_stages(similarity, found, by_sigma, own, args.budget)
    _print_sweep(sweep(similarity, min_levels=args.min_levels))
    print(f"{args.out}: {', '.join(OUTPUTS)}")


def _settle_method(args) -> None:
    """Fills in what was left out; raises ValueError for options that do not go together."""
    if args.method is None:
        args.method = "ends" if args.stages == 3 else "optimal"
    if args.method == "ends" and args.stages != 3:
        raise ValueError(f"--method ends gives three stages, not --stages {args.stages}")
    if (args.method == "gradient") != (args.source is not None):
        raise ValueError("--method gradient and --run go together")
    if args.method == "ends":
        args.level = 0.9 if args.level is None else args.level
        if args.level >= 1:
            raise ValueError(f"--level {args.level:g} must be below 1")
    elif args.level is not None:
        raise ValueError(f"--level is for --method ends, not {args.method}")
    if args.min_levels is not None and args.method not in ("optimal", "gradient"):
        raise ValueError(f"--min-levels is for --method optimal and gradient, not {args.method}")
    args.min_levels = args.min_levels or 1
    least = args.stages * args.min_levels
    if least > args.grid:
        raise ValueError(f"--grid {args.grid} is too small: these stages need {least} levels")


def _split(args, similarity, schedule):
    from multistage_diffusion.clustering import split, split_from_ends, split_uniformly

    if args.method == "ends":
        return split_from_ends(similarity, args.level)
    if args.method.startswith("uniform-"):
        by = args.method.removeprefix("uniform-").replace("-", "_")
        return split_uniformly(similarity, schedule, args.stages, by)
    return split(similarity, args.stages, min_levels=args.min_levels)


@contextmanager
def _process_group():
    """The processes that ``torchrun`` started, or None for a single one."""
    import torch.distributed as dist

    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield None
        return
    dist.init_process_group("gloo")
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def _similarity(args, images, schedule, device, group):
    from multistage_diffusion.clustering import similarity_matrix

    sigmas = schedule.sigma(schedule.grid(args.grid))
    with _progress(group is None or group.rank() == 0) as progress:
        if args.method == "gradient":
            return _gradient_similarity(args, images, sigmas, device, progress)
        data_range = images.value_range if images.images.is_floating_point() else (-1.0, 1.0)
        units = tuple(map(float, args.sigma_units.split(",")))
        scale = (data_range[1] - data_range[0]) / (units[1] - units[0])
        similarity = similarity_matrix(
            images.images,
            sigmas * scale,
            num_samples=args.samples,
            form=args.form,
            measure=args.measure,
            threshold=args.threshold,
            data_range=data_range,
            seed=args.seed,
            device=device,
            group=group,
            progress=progress,
        )
    return replace(similarity, sigmas=sigmas)


def _gradient_similarity(args, images, sigmas, device, progress):
    import torch

    from multistage_diffusion.clustering import gradient_similarity
    from multistage_diffusion.training.checkpoints import load_model

    if args.sigma_units != "-1,1":
        raise ValueError("--method gradient: the model's data are in [-1, 1]; leave --sigma-units out")
    denoiser = load_model(args.source, "ema", device).denoiser.eval()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(args.seed))[: args.samples]
    parameters = [p.requires_grad_(True) for p in denoiser.parameters()]
    return gradient_similarity(
        denoiser, parameters, images.sample(order).to(device), sigmas, seed=args.seed, progress=progress
    )


@contextmanager
def _progress(shown: bool):
    """A callback ``(done, total)`` that moves a progress bar."""
    from tqdm import tqdm

    with tqdm(
        desc="comparing noise levels", file=sys.stderr, leave=False, disable=None if shown else True
    ) as bar:

        def move(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield move


def _save_numbers(similarity, schedule, path: Path) -> None:
    import numpy as np

    from multistage_diffusion.common.atomic_files import replacing

    arrays = {
        "sigmas": similarity.sigmas,
        "matrix": similarity.matrix,
        "standard_error": similarity.standard_error,
    }
    if similarity.restored is not None:
        arrays["restored"] = similarity.restored
    arrays[f"{schedule.name}_{schedule.variable}"] = schedule.value(similarity.sigmas)
    with replacing(path) as temporary:
        np.savez(temporary, **{name: values.numpy() for name, values in arrays.items()})


def _print_stages(similarity, found, stages, own, budget: float) -> None:
    """The stages by sigma, and in the schedule's own variable."""
    from multistage_diffusion.clustering import suggest_widths
    from multistage_diffusion.noise.levels import log_snr

    columns = {"stage": [str(k) for k in range(len(stages))]}
    columns["sigma"] = [stages.describe(k) for k in range(len(stages))]
    if own.variable != "sigma":
        columns[own.variable] = [own.describe(k) for k in range(len(stages))]
    columns["log-SNR down to"] = [f"{float(log_snr(cut)):.4g}" for cut in found.cuts] + ["-inf"]
    columns["levels"] = [str(len(found.levels(k))) for k in range(len(stages))]
    blocks = (
        similarity.matrix[inside.start : inside.stop, inside.start : inside.stop]
        for inside in map(found.levels, range(len(stages)))
    )
    columns["similarity"] = [f"{float(block.mean()):.4f}" for block in blocks]
    if similarity.restored is not None:
        widths, difficulty = suggest_widths(similarity, found, budget)
        columns["difficulty"] = [f"{d:.3f}" for d in difficulty]
        columns["width"] = [str(width) for width in widths]
    _print_table(columns)
    print(f"objective {found.objective:.4f} of at most {found.num_stages}")


def _print_sweep(splits) -> None:
    print("\nthe best splits")
    _print_table(
        {
            "stages": [str(found.num_stages) for found in splits],
            "objective": [f"{found.objective:.4f}" for found in splits],
            "per stage": [f"{found.mean_similarity:.4f}" for found in splits],
            "cuts (sigma)": [", ".join(f"{cut:.4g}" for cut in found.cuts) for found in splits],
        }
    )


def _print_table(columns: dict[str, list[str]]) -> None:
    widths = [max(map(len, (name, *cells))) for name, cells in columns.items()]
    for row in (list(columns), *zip(*columns.values(), strict=True)):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())

"""``msd cluster``"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from pathlib import Path

from multistage_diffusion.commands._options import add_command, add_machine_options, set_up_machine
from multistage_diffusion.common.settings import Choice, Setting, add_options, given, number, seed, whole
from multistage_diffusion.noise import SCHEDULE_NAMES

EXAMPLES = """\
  msd cluster --data digits --schedule edm --measure smooth --method ends --out runs/stages
  msd cluster --data cifar10.npz --schedule vp --stages 3 --out runs/stages
  msd cluster --data cifar10.npz --method gradient --run runs/unified --out runs/by-gradient
  torchrun --nproc-per-node 2 -m multistage_diffusion cluster --data big.npy --out runs/stages
  msd train --data digits --stages runs/stages/stages.json --out runs/digits
"""

OUTPUTS = ("stages.json", "similarity.npz", "similarity.png", "curves.png")
METHODS = ("optimal", "ends", "uniform-t", "uniform-log-snr", "gradient")  # of clustering.find, without torch


CUT = {
    "stages": Setting(whole(1), "number of stages; default: 3"),
    "method": Setting(
        Choice(METHODS),
        "`ends`: the paper's rule for three stages (the default for three); `optimal`: the best split (the default for "
        "others); `uniform-`: equal lengths in the schedule's variable or in log-SNR; `gradient`: the best split by "
        "the gradients of a trained unified model",
    ),
    "level": Setting(number(above=0), "similarity, below 1, at which `ends` cuts; default: 0.9"),
    "min_levels": Setting(
        whole(1), "levels of the grid in each stage, for `optimal` and `gradient`; default: 1"
    ),
    "grid": Setting(whole(2), "noise levels that are compared; default: 21"),
}
SIMILARITY = {
    "samples": Setting(whole(1), "images compared; default: 20"),
    "seed": Setting(seed, "of images and noise; default: 0"),
    "form": Setting(Choice(("x0", "eps")), "compare predicted images (default) or predicted noise"),
    "measure": Setting(
        Choice(("pixels", "smooth")),
        "the share of pixels that differ by less than a threshold (default), or one without a threshold",
    ),
    "threshold": Setting(number(above=0), "as a share of the data range; default: 2/256"),
}


def add_parser(subparsers):
    parser = add_command(
        subparsers,
        "cluster",
        "Find the stages of a data set: noise levels whose optimal denoisers agree.",
        EXAMPLES,
    )
    group = parser.add_argument_group("data and output")
    group.add_argument(
        "--data", required=True, metavar="SOURCE", help='"digits", or a folder, .zip, .npy or .npz of images'
    )
    group.add_argument(
        "--image-size", type=whole(1), metavar="N", help="pixels per side to bring the images to"
    )
    group.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help=f"folder for {', '.join(OUTPUTS)}"
    )
    group = parser.add_argument_group("stages")
    group.add_argument(
        "--schedule",
        choices=SCHEDULE_NAMES,
        default="vp",
        help="the noise levels to compare, and their names; default: vp",
    )
    add_options(group, CUT)
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
    group = parser.add_argument_group("similarity")
    add_options(group, SIMILARITY)
    group.add_argument(
        "--sigma-units",
        choices=("-1,1", "0,1"),
        default="-1,1",
        help="the range of the data that sigma is meant for; in [0,1] the same sigma is twice the noise; "
        "default: -1,1",
    )
    add_machine_options(parser)
    return parser


def run(args) -> None:
    from multistage_diffusion.clustering import Rule, find_stages, sweep
    from multistage_diffusion.clustering.pictures import plot_curves, plot_matrix
    from multistage_diffusion.common.atomic_files import check_replaceable
    from multistage_diffusion.data.images import load_images
    from multistage_diffusion.training.data_parallel import Processes

    if (args.method == "gradient") != (args.source is not None):
        raise ValueError("--method gradient and --run go together")
    cut = given(args, CUT)
    Rule(**cut)  # what is wrong with these shows before the images are loaded
    for name in OUTPUTS:
        check_replaceable(args.out / name, "--out")
    device = set_up_machine(args)
    images = load_images(args.data, image_size=args.image_size)
    with Processes.of_launcher() as processes:
        with _progress(processes.is_first) as progress:
            found = find_stages(
                images,
                args.schedule,
                sigma_units=tuple(map(float, args.sigma_units.split(","))),
                denoiser=None if args.source is None else _denoiser(args.source, device),
                device=device,
                group=processes.group,
                progress=progress,
                **cut,
                **given(args, SIMILARITY),
            )
        if not processes.is_first:
            return
    similarity, schedule = found.similarity, found.schedule
    own = found.split.stages(schedule)
    stages, numbers, matrix, curves = (args.out / name for name in OUTPUTS)
    {"own": own, "sigma": found.stages}[args.variable].save(stages)
    _save_numbers(similarity, schedule, numbers)
    plot_matrix(similarity, found.split, matrix, schedule, title=f"{images.name}, {args.schedule}")
    plot_curves(similarity, found.split, curves, level=found.rule.level)
    _print_stages(found, own, args.budget)
    _print_sweep(sweep(similarity, min_levels=found.rule.min_levels))
    print(f"{args.out}: {', '.join(OUTPUTS)}")


def _denoiser(source: Path, device):
    from multistage_diffusion.training.checkpoints import load_model

    return load_model(source, "ema", device).denoiser


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


def _print_stages(result, own, budget: float) -> None:
    """The stages by sigma, and in the schedule's own variable."""
    from multistage_diffusion.clustering import suggest_widths
    from multistage_diffusion.noise.levels import log_snr

    similarity, found, stages = result.similarity, result.split, result.stages
    columns = {"stage": [str(k) for k in range(len(stages))]}
    columns["sigma"] = [stages.describe(k) for k in range(len(stages))]
    if own.variable not in columns:
        columns[own.variable] = [own.describe(k) for k in range(len(stages))]
    columns["log-SNR down to"] = [f"{float(log_snr(cut)):.4g}" for cut in found.cuts] + ["-inf"]
    columns["cut in 95 %"] = [f"{low:.4g} to {high:.4g}" for low, high in result.confidence] + [""]
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

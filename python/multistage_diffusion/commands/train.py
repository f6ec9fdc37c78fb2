"""``msd train``"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from multistage_diffusion.commands._options import (
    SCHEDULE_NAMES,
    add_command,
    add_machine_options,
    number,
    numbers,
    seed,
    set_up_machine,
    whole,
    wholes,
)
from multistage_diffusion.presets import DIGITS, TRAINABLE, VARIANTS

EXAMPLES = """\
  msd train --data digits --out runs/digits --steps 2000
  msd train --data cifar10.zip --preset edm-cifar10 --precision bf16 --out runs/cifar10
  msd train --data cifar10.zip --preset edm-cifar10 --variant unified --out runs/unified
  msd train --out runs/cifar10 --resume
  msd train --data latents.npz --values latents --preset ldm-imagenet256 --class-conditional --out runs/ldm
  msd train --data images/ --decoder-widths 96,64,16 --stages 0.5,2,8 --stage-sampling stratified --out runs/x

several GPUs, each with its share of every batch; another number of them may go on:
  torchrun --nproc-per-node 8 -m -- multistage_diffusion train --data cifar10.zip --precision bf16 --out runs/cifar10
  torchrun --nproc-per-node 4 -m -- multistage_diffusion train --out runs/cifar10 --resume
"""

NETWORK_OPTIONS = (
    "encoder_widths",
    "decoder_widths",
    "channel_mult",
    "num_blocks",
    "attn_resolutions",
    "dropout",
    "depth",
    "num_heads",
    "patch_size",
)
DEFAULT_PRESET = "edm-cifar10"  # of training.configure, without torch


def add_parser(subparsers):
    parser = add_command(
        subparsers,
        "train",
        "Train a multi-stage diffusion model, or go on with a run that was stopped.",
        EXAMPLES,
    )
    _add_run_options(parser)
    _add_network_options(parser)
    _add_noise_options(parser)
    _add_optimizer_options(parser)
    add_machine_options(
        parser,
        cuda_graphs="replay the steps from CUDA graphs, one for each mix of stages: faster where a GPU's part of "
        "the batch is small; with --stage-sampling systematic, whose mixes are few",
    )
    return parser


def _add_run_options(parser) -> None:
    group = parser.add_argument_group("data and run")
    group.add_argument(
        "--out",
        required=True,
        type=Path,
        metavar="DIR",
        help="run folder: configuration, log, checkpoints, plots",
    )
    group.add_argument(
        "--data",
        metavar="SOURCE",
        help='"digits", or a folder, .zip, .npy or .npz of images (not needed with --resume)',
    )
    group.add_argument(
        "--values",
        choices=("images", "latents"),
        help="what an array holds: images (default), or an autoencoder's latents, used as they are",
    )
    group.add_argument(
        "--augment",
        type=probability_or_none,
        metavar="P",
        help="probability of each kind of augmentation, which an EDM network is told; 0: flips alone; "
        '"none"; default: the preset\'s',
    )
    group.add_argument(
        "--image-size",
        type=whole(1),
        metavar="N",
        help="pixels per side to bring the images to; default: as they are",
    )
    group.add_argument(
        "--resume",
        action="store_true",
        help="go on from the newest intact checkpoint; other options default to those of the run",
    )
    group.add_argument("--seed", type=seed, metavar="S", help="of everything random; default: 0")
    length = group.add_mutually_exclusive_group()
    length.add_argument("--steps", type=whole(1), metavar="N", help="optimizer steps")
    length.add_argument("--kimg", type=number(above=0), metavar="X", help="the same in thousands of images")
    group.add_argument(
        "--checkpoint-every",
        type=whole(1),
        metavar="N",
        help="steps between checkpoints; default: the preset's",
    )
    group.add_argument(
        "--keep-checkpoints", type=whole(1), metavar="N", help="newest checkpoints that are kept; default: 2"
    )
    group.add_argument(
        "--log-every", type=whole(1), metavar="N", help="steps between log records; default: the preset's"
    )
    group.add_argument(
        "--sample-every",
        type=whole_or_none,
        metavar="N",
        help='steps between sample grids; "none" (default): no grids',
    )


def _add_network_options(parser) -> None:
    group = parser.add_argument_group("network")
    group.add_argument(
        "--preset",
        choices=TRAINABLE,
        metavar="NAME",
        help=f"start from these settings: {', '.join(TRAINABLE)}; default: {DIGITS.name} for the digits, "
        f"else {DEFAULT_PRESET}",
    )
    group.add_argument(
        "--variant",
        choices=VARIANTS,
        help="of the preset: multistage (default), one decoder for all noise levels, or a whole network per stage; "
        "all are trained on the same noise levels unless asked otherwise",
    )
    group.add_argument(
        "--encoder-widths",
        "--encoder-width",
        type=wholes,
        metavar="LIST",
        help="base width of the shared encoder, or one per stage for separate networks",
    )
    group.add_argument(
        "--decoder-widths",
        type=wholes,
        metavar="LIST",
        help="base width of each stage's decoder, lowest noise first; one: unified",
    )
    group.add_argument(
        "--channel-mult",
        type=wholes,
        metavar="LIST",
        help="multiple of the base width at each resolution, finest first",
    )
    group.add_argument("--num-blocks", type=whole(1), metavar="N", help="residual blocks per resolution")
    group.add_argument(
        "--attn-resolutions",
        type=wholes,
        metavar="LIST",
        help="pixels per side at which there is attention: the image size, its half and so on; an empty text: none",
    )
    group.add_argument("--dropout", type=number(low=0), metavar="P", help="dropout probability")
    group.add_argument("--depth", type=whole(3), metavar="N", help="transformer blocks of a uvit")
    group.add_argument("--num-heads", type=whole(1), metavar="N", help="attention heads of a uvit")
    group.add_argument("--patch-size", type=whole(1), metavar="N", help="pixels per side of a uvit's token")
    group.add_argument(
        "--class-conditional",
        action="store_true",
        default=None,
        help="give the network the labels of the images",
    )


def _add_noise_options(parser) -> None:
    group = parser.add_argument_group(
        "stages and noise levels", "sigma is in units of the data, which is in [-1, 1]"
    )
    group.add_argument(
        "--schedule",
        choices=SCHEDULE_NAMES,
        help="how noise levels are drawn and told to the network; default: the preset's",
    )
    group.add_argument(
        "--prediction",
        choices=("epsilon", "x0", "v"),
        help="what the network predicts, where the schedule is not edm; default: epsilon, or v for flow",
    )
    group.add_argument(
        "--stages",
        metavar="STAGES",
        help='"edm", "single", a stages.json, or boundaries such as 2.5103,7.6577 in the variable of the '
        "schedule, whose ends are understood",
    )
    group.add_argument(
        "--stage-sampling",
        choices=("mixed", "stratified", "systematic"),
        help="draw noise levels from the schedule's distribution, each on its own (mixed) or evenly spaced "
        "(systematic: less variance, few mixes of stages), or draw the stages in given shares (stratified); "
        "default: the preset's",
    )
    group.add_argument(
        "--stage-shares",
        type=numbers,
        metavar="LIST",
        dest="stage_probabilities",
        help="of stratified sampling; default: all the same",
    )
    group.add_argument(
        "--importance-weights",
        action="store_true",
        default=None,
        help="of stratified sampling: keep the expected loss of mixed sampling",
    )
    group.add_argument(
        "--p-mean",
        type=float,
        dest="P_mean",
        metavar="X",
        help="mean of ln sigma, of schedules edm and flow; default: the preset's, 0 for flow",
    )
    group.add_argument(
        "--p-std",
        type=number(above=0),
        dest="P_std",
        metavar="X",
        help="its standard deviation; default: the preset's, 1 for flow",
    )
    group.add_argument(
        "--shift",
        type=number(above=0),
        metavar="X",
        help="of schedule flow: multiplies sigma, so that more times lie where there is more noise; default: 1",
    )
    group.add_argument(
        "--time-sampling",
        choices=("logit-normal", "uniform"),
        help="of schedule flow: how times are drawn; default: logit-normal",
    )
    group.add_argument(
        "--sigma-data",
        type=number(above=0),
        metavar="X",
        help="standard deviation of the data, of schedule edm; default: the preset's",
    )


def _add_optimizer_options(parser) -> None:
    group = parser.add_argument_group("optimisation")
    group.add_argument("--batch", type=whole(1), dest="batch_size", metavar="N", help="images per step")
    group.add_argument(
        "--accumulate",
        type=whole(1),
        metavar="N",
        help="split the batch into N parts to save memory; default: 1",
    )
    group.add_argument(
        "--lr", type=number(above=0), metavar="X", help="learning rate of Adam; default: the preset's"
    )
    group.add_argument(
        "--warmup-kimg", type=number(low=0), metavar="X", help="thousands of images over which the rate grows"
    )
    group.add_argument(
        "--weight-decay",
        type=number(low=0),
        metavar="X",
        help="of AdamW, as a share of the rate; default: the preset's",
    )
    group.add_argument("--lr-decay", choices=("constant", "cosine"), help="default: the preset's")
    group.add_argument(
        "--gradient-clip",
        type=number(above=0, infinite=True),
        metavar="X",
        help="largest norm of the gradient; default: the preset's",
    )
    group.add_argument(
        "--ema-kimg",
        type=number(low=0),
        metavar="X",
        help="half-life of the averaged weights in thousands of images; default: the preset's",
    )
    group.add_argument("--precision", choices=("fp32", "bf16"), help="of the network; default: fp32")


def run(args) -> int:
    if not args.resume and args.data is None:
        raise ValueError("--data is needed to start a run (--resume takes it from the run)")
    try:
        with _stopped_at_once():
            return _run(args)
    except _Stopped as stopped:
        from multistage_diffusion.common.streams import tell

        name = signal.Signals(stopped.number).name
        tell(f"msd train: stopped by {name} before the first step; {args.out} can be used again", sys.stderr)
        return 128 + stopped.number


class _Stopped(BaseException):  # passes through whatever handles errors, as KeyboardInterrupt does
    """A signal that came before training, which would have saved first."""

    def __init__(self, number: int):
        self.number = number


@contextmanager
def _stopped_at_once() -> Iterator[None]:
    """SIGTERM and SIGHUP raise ``_Stopped`` where nothing else takes them, as training does."""

    def stop(number, frame):
        raise _Stopped(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    taken = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is signal.SIG_DFL]
    for caught in taken:
        signal.signal(caught, stop)
    try:
        yield
    finally:
        for caught in taken:
            signal.signal(caught, signal.SIG_DFL)


def _run(args) -> int:
    from multistage_diffusion.training.data_parallel import Processes

    with Processes.of_launcher() as processes:
        return _train(args, processes)


def _train(args: argparse.Namespace, processes) -> int:
    from multistage_diffusion.common.host_memory import keep_freed_memory
    from multistage_diffusion.common.streams import tell
    from multistage_diffusion.data.images import load_images
    from multistage_diffusion.training.configure import saved_settings
    from multistage_diffusion.training.trainer import train

    device = set_up_machine(args)
    if device.type == "cpu":
        keep_freed_memory()
    saved = saved_settings(args.out) if args.resume else None
    source = args.data or (saved or {}).get("data")
    if source is None:
        raise ValueError(f"{args.out} holds no run to resume; give --data to start one")
    image_size = args.image_size or (saved or {}).get("image_size")
    values = args.values or (saved or {}).get("values", "images")
    data = load_images(source, image_size=image_size, values=values)
    config = make_config(args, saved, source, data)
    result = train(
        config,
        data,
        args.out,
        resume=args.resume,
        device=device,
        processes=processes,
        cuda_graphs=args.cuda_graphs,
    )
    stopped = 0 if result.stopped_by is None else 128 + result.stopped_by
    if not processes.is_first:
        return stopped
    if stopped:
        name = signal.Signals(result.stopped_by).name
        tell(
            f"stopped by {name} after step {result.step} of {config.steps}; saved {result.checkpoint}; "
            f"go on with: msd train --out {args.out} --resume",
            sys.stderr,
        )
    else:
        tell(
            f"{args.out}: trained {result.step} steps in {result.seconds:.0f} s; {result.checkpoint}",
            sys.stdout,
        )
    return stopped


def make_config(args: argparse.Namespace, saved: dict | None, source: str, data):
    """The configuration: that of the run being resumed or of the preset, changed by what was given."""
    from multistage_diffusion.training.config import TrainingConfig
    from multistage_diffusion.training.configure import run_settings

    if saved is not None and args.preset is None and args.variant is not None:
        raise ValueError("--variant: is that of a preset; give --preset, too")
    settings = _given(args, TrainingConfig.__dataclass_fields__)
    if args.warmup_kimg is not None:
        settings["warmup_images"] = round(1000 * args.warmup_kimg)
    if args.ema_kimg is not None:
        settings["ema_halflife_images"] = 1000 * args.ema_kimg
    values = run_settings(
        data,
        source,
        preset=args.preset,
        variant=args.variant,
        saved=saved,
        network=_given(args, NETWORK_OPTIONS),
        class_conditional=bool(args.class_conditional),
        stages=args.stages,
        kimg=args.kimg,
        **settings,
    )
    _check_schedule(args, values.get("schedule", "edm"), values["stages"].variable)
    return TrainingConfig(**values)


def _check_schedule(args: argparse.Namespace, schedule: str, variable: str) -> None:
    """Raises ValueError for an option that the schedule would ignore, and for stages in another schedule's variable."""
    from multistage_diffusion.noise.schedules import SCHEDULES

    if variable not in ("sigma", SCHEDULES[schedule].variable):
        raise ValueError(f"--schedule {schedule}: the stages are cut in {variable}; give --stages, too")
    for name in sorted({name for kind in SCHEDULES.values() for name in kind.settings}):
        if getattr(args, name) is not None and name not in SCHEDULES[schedule].settings:
            owners = " or ".join(other for other, kind in SCHEDULES.items() if name in kind.settings)
            option = f"--{name.lower().replace('_', '-')}"
            raise ValueError(f"{option}: only schedule {owners} has this; the schedule is {schedule}")


def _given(args: argparse.Namespace, names: Iterable[str]) -> dict:
    """The options of these names that were on the command line and need no more than copying; "none" is None."""
    found = {name: getattr(args, name, None) for name in names if name not in ("stages", "data")}
    return {name: None if value == "none" else value for name, value in found.items() if value is not None}


def probability_or_none(text: str) -> float | str:
    """A probability, or the word "none"."""
    return text if text == "none" else number(low=0)(text)


def whole_or_none(text: str) -> int | str:
    """A whole number from 1 on, or the word "none"."""
    return text if text == "none" else whole(1)(text)

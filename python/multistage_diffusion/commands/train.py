"""``msd train``"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from multistage_diffusion.commands._options import add_command, add_machine_options, set_up_machine
from multistage_diffusion.common.settings import add_options, given, number, option_of
from multistage_diffusion.presets import DEFAULT_PRESET, DIGITS, TRAINABLE, VARIANTS
from multistage_diffusion.training.settings import GROUPS, NETWORK, NETWORK_GROUP, NOISE, RUN, SETTINGS

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


SETTINGS_OF_DATA = {name: SETTINGS[name] for name in ("data", "image_size", "values")}


def add_parser(subparsers):
    parser = add_command(
        subparsers,
        "train",
        "Train a multi-stage diffusion model, or go on with a run that was stopped.\n\n"
        "What is not given is as the preset has it, or the run with --resume.",
        EXAMPLES,
    )
    groups = {title: parser.add_argument_group(title, text) for title, text in GROUPS.items()}
    group = groups[RUN]
    group.add_argument(
        "--out",
        required=True,
        type=Path,
        metavar="DIR",
        help="run folder: configuration, log, checkpoints, plots",
    )
    group.add_argument(
        "--resume", action="store_true", help="go on from the newest intact checkpoint of the run folder"
    )
    group.add_argument("--kimg", type=number(above=0), metavar="X", help="--steps as thousands of images")
    _add_network_options(groups[NETWORK_GROUP])
    groups[NOISE].add_argument(
        "--stages",
        metavar="STAGES",
        help='"edm", "single", a stages.json, or boundaries such as 2.5103,7.6577 in the variable of the '
        "schedule, whose ends are understood",
    )
    for title, group in groups.items():
        add_options(group, {name: one for name, one in SETTINGS.items() if one.group == title})
    add_machine_options(
        parser,
        cuda_graphs="replay the steps from CUDA graphs, one for each mix of stages: faster where a GPU's part of "
        "the batch is small; with --stage-sampling systematic, whose mixes are few",
    )
    return parser


def _add_network_options(group) -> None:
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
    add_options(group, NETWORK)
    group.add_argument(
        "--class-conditional",
        action="store_true",
        default=None,
        help="give the network the labels of the images",
    )


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
    chosen = {**(saved or {}), **given(args, SETTINGS_OF_DATA)}
    source = chosen.get("data")
    if source is None:
        raise ValueError(f"{args.out} holds no run to resume; give --data to start one")
    data = load_images(source, image_size=chosen.get("image_size"), values=chosen.get("values", "images"))
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
    if args.steps is not None and args.kimg is not None:
        raise ValueError("--steps and --kimg exclude each other")
    settings = given(args, {name: one for name, one in SETTINGS.items() if one.group is not None})
    settings.pop("data", None)
    values = run_settings(
        data,
        source,
        preset=args.preset,
        variant=args.variant,
        saved=saved,
        network=given(args, NETWORK),
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
            raise ValueError(
                f"{option_of(name)}: only schedule {owners} has this; the schedule is {schedule}"
            )

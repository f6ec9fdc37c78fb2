"""Arguments that several subcommands share, and the types of their values."""

from __future__ import annotations

import argparse
import math
import os
import warnings
from collections.abc import Callable

SCHEDULE_NAMES = ("edm", "vp", "ve", "ldm", "flow")  # those of ``noise.schedules``, without torch


def add_command(subparsers, name: str, summary: str, examples: str) -> argparse.ArgumentParser:
    """A subcommand whose help begins with ``summary`` and ends with ``examples``."""
    return subparsers.add_parser(
        name,
        help=summary.partition("\n")[0],
        description=summary,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_machine_options(parser: argparse.ArgumentParser, cuda_graphs: str | None = None) -> None:
    """--device, --threads, and --cuda-graphs with this description."""
    group = parser.add_argument_group("machine")
    group.add_argument(
        "--device", default="auto", help='"cpu", "cuda", "cuda:1", ...; default: a GPU if there is one'
    )
    group.add_argument("--threads", type=whole(1), metavar="N", help="CPU threads; default: PyTorch's choice")
    if cuda_graphs is not None:
        group.add_argument("--cuda-graphs", action="store_true", help=cuda_graphs)


def set_up_machine(args: argparse.Namespace):
    """Applies --threads and returns the torch device of --device; among the processes that torchrun has started, each
    takes the GPU of its number, where none is named.

    Raises:
        ValueError: the device is not there, or cannot do what the options ask for.
    """
    import torch

    from msd_kernels.runtime import processor

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    name = args.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name}: no such device; try cpu or cuda") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: PyTorch sees {torch.cuda.device_count()} CUDA device(s)")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {name}: only cpu and cuda are supported")
    if getattr(args, "cuda_graphs", False) and device.type != "cuda":
        raise ValueError(f"--cuda-graphs: needs a CUDA device, got {device}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif getattr(args, "precision", None) == "bf16" and not processor.computes_in(torch.bfloat16):
        warnings.warn(f"--precision bf16: no faster than fp32 here; {processor.describe()}", stacklevel=2)
    return device


def number(
    low: float | None = None, above: float | None = None, *, infinite: bool = False
) -> Callable[[str], float]:
    """A number that is at least ``low`` or greater than ``above``; finite, unless ``infinite`` allows infinity."""

    def parse(text: str) -> float:
        value = _parsed(float, text, "a number")
        if (low is not None and not value >= low) or (above is not None and not value > above):
            raise argparse.ArgumentTypeError(
                f"{text} must be {'at least' if low is not None else 'above'} {low or above or 0}"
            )
        if math.isnan(value) or (math.isinf(value) and not infinite):
            raise argparse.ArgumentTypeError(f"{text} must be finite")
        return value

    return parse


def whole(low: int, high: int | None = None) -> Callable[[str], int]:
    """A whole number that is at least ``low`` and at most ``high``."""

    def parse(text: str) -> int:
        value = _parsed(int, text, "a whole number")
        if value < low:
            raise argparse.ArgumentTypeError(f"{value} must be at least {low}")
        if high is not None and value > high:
            raise argparse.ArgumentTypeError(f"{value} must be at most {high}")
        return value

    return parse


seed = whole(0, 2**64 - 1)  # what PyTorch's generators take


def numbers(text: str) -> tuple[float, ...]:
    """Finite numbers separated by commas."""
    return tuple(map(number(), text.split(",")))


def wholes(text: str) -> tuple[int, ...]:
    """Whole numbers separated by commas; an empty text is none."""
    return tuple(_parsed(int, part, "a whole number") for part in text.split(",") if text.strip())


def _parsed(kind, text: str, name: str):
    try:
        return kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not {name}") from None

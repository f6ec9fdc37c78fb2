"""Arguments that several subcommands share."""

from __future__ import annotations

import argparse
import os
import warnings

from multistage_diffusion.common.settings import whole


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

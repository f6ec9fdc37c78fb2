"""The command ``msd``: finds the subcommands, runs one, and turns errors into one line and an exit code.

Exit codes: 0 success, 1 a run that failed, 2 bad input, 128 + n a run that signal n stopped (resume it).
"""

from __future__ import annotations

import argparse
import re
import sys
import traceback
import warnings
from collections.abc import Sequence

from multistage_diffusion.commands import load_commands
from multistage_diffusion.common.streams import release, tell

EXAMPLES = """\
examples:
  msd train --data digits --out runs/digits        train
  msd sample --run runs/digits --out digits.png    sample
"""

# These do nothing but print: a reader who leaves early, such as head, has what it wanted.
PRINTING = ("flops", "info")


def build_parser() -> argparse.ArgumentParser:
    """The parser of ``msd`` with all subcommands."""
    parser = Parser(
        prog="msd",
        description="Train multi-stage diffusion models and sample from them.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--version", action=Version, nargs=0, default=argparse.SUPPRESS, help="show the version and exit"
    )
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    for module in load_commands():
        command = module.add_parser(subparsers)
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        command.set_defaults(run=module.run)
    return parser


class Parser(argparse.ArgumentParser):
    """Reports bad arguments in one line, without repeating the usage, and takes lists that begin with a minus."""

    def parse_known_args(self, args=None, namespace=None):
        return super().parse_known_args(_joined(sys.argv[1:] if args is None else args), namespace)

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _joined(arguments: Sequence[str]) -> list[str]:
    """``--option -1,1`` as ``--option=-1,1``, which argparse would take for two options."""
    joined: list[str] = []
    for argument in arguments:
        if joined and re.match(r"-(\.?\d|inf)", argument) and re.fullmatch(r"--[^=]+", joined[-1]):
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


class Version(argparse.Action):
    """Looks the version up when it is asked for: that takes longer than all that comes before a command."""

    def __call__(self, parser, *_):
        from importlib import metadata

        try:
            version = metadata.version("msd-kernels")
        except metadata.PackageNotFoundError:
            version = "(not installed)"
        print(f"msd {version}")
        parser.exit()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs ``msd`` with the given arguments (default: those of the process) and returns the exit code."""
    try:
        return _run(argv)
    finally:
        release(sys.stdout, sys.stderr)  # else what nobody reads would change the exit code


def _run(argv: Sequence[str] | None) -> int:
    parser = build_parser()
    try:
        args = parser.parse_args(argv)
    except SystemExit as request:  # --help, and bad arguments
        return request.code or 0
    if args.command is None:
        parser.print_help()
        return 0
    warnings.showwarning = _show_warning
    try:
        code = args.run(args) or 0
        if sys.stdout is not None:
            sys.stdout.flush()  # now, while what goes wrong can still be told
        return code
    except KeyboardInterrupt:
        tell(f"msd {args.command}: interrupted", sys.stderr)
        return 130
    except Exception as error:
        if isinstance(error, BrokenPipeError) and args.command in PRINTING:
            return 0
        if args.debug:
            tell(traceback.format_exc().rstrip(), sys.stderr)
        tell(f"msd {args.command}: {_one_line(error)}", sys.stderr)
        return _exit_code(error)


def _exit_code(error: Exception) -> int:
    """2 if other input would help, 1 if not."""
    if isinstance(error, ImportError):  # those below would fail with the same
        return 1
    from multistage_diffusion.training.checkpoints import CheckpointError, CheckpointSaveError
    from multistage_diffusion.training.data_parallel import ProcessError
    from multistage_diffusion.training.trainer import RunError

    if isinstance(error, CheckpointSaveError):
        return 1
    bad_input = (ValueError, FileNotFoundError, CheckpointError, ProcessError, RunError)
    return 2 if isinstance(error, bad_input) else 1


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, BrokenPipeError):
        return "the reader of what it prints has left before the end (Broken pipe)"
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    expected = isinstance(error, (ValueError, RuntimeError, OSError)) and text
    return text if expected else f"{type(error).__name__}: {text} (--debug shows where)"


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    tell(f"warning: {message}", sys.stderr)

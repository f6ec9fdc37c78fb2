"""``msd info``"""

from __future__ import annotations

from multistage_diffusion.commands._options import add_command

EXAMPLES = """\
  msd info                                         what is installed, and which backend serves which op
  MSD_KERNELS_BACKEND=reference msd info           the same with one backend forced
"""


def add_parser(subparsers):
    return add_command(
        subparsers, "info", "Show versions, devices, what was built, and what serves each op.", EXAMPLES
    )


def run(args) -> None:
    from msd_kernels import env

    print(env.report())

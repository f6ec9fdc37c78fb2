"""``python -m multistage_diffusion`` is the command ``msd``."""

import sys

from multistage_diffusion.cli import main

if __name__ == "__main__":
    sys.exit(main())

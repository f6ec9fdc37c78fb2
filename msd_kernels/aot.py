"""``python -m msd_kernels.aot``: see :mod:`msd_kernels.tools.aot`."""

import sys

from msd_kernels.tools.aot import main

if __name__ == "__main__":
    sys.exit(main())

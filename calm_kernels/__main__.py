"""``python -m calm_kernels``: the command line."""

import sys

from calm_kernels.cli import main

sys.exit(main())

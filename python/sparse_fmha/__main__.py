"""`python -m sparse_fmha`."""

import sys

from sparse_fmha.cli import main

sys.exit(main())

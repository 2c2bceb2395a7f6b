"""``python -m eua`` is ``eua``."""

import sys

from eua.cli import main

sys.exit(main())

"""``python -m eua`` is ``eua``."""

import sys

from eua.cli.main import main

sys.exit(main())

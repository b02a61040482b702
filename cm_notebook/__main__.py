"""``python -m cm_notebook`` is ``cm-notebook``."""

import sys

from .cli import main

sys.exit(main())

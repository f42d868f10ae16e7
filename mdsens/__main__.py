"""``python -m mdsens``: the command line."""

import sys

from mdsens.cli import main

sys.exit(main())

"""`python -m diffmergefs` is the command line."""

import sys

from diffmergefs.cli import main

sys.exit(main())

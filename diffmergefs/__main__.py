"""`python -m diffmergefs` is the command line."""

import os
import sys

# Python looks for modules in the current directory first, and so would whatever is loaded from
# here on. It stays where it is a checkout of ours.
if not sys.flags.safe_path and sys.path[0] != os.path.dirname(os.path.dirname(__file__)):
    del sys.path[0]

from diffmergefs.cli import main

sys.exit(main())

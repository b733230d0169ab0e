"""`python -m loraexport_serve`: the same as `loraexport-serve`."""

import sys

from .cli import main

sys.exit(main())

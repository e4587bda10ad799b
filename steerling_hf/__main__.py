"""`python -m steerling_hf` is the command `steerling-hf`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())

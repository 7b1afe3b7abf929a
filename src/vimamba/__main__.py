"""`vimamba ...` and `python -m vimamba ...`."""

import sys

from vimamba.cli import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())

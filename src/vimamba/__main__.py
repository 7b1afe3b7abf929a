"""`vimamba ...` and `python -m vimamba ...`."""

import sys

from vimamba_command import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())

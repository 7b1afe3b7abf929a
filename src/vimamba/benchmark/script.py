"""What the scripts of `benchmarks/` end with, whoever runs them and whatever they are given."""

from __future__ import annotations

import sys
from collections.abc import Callable

from vimamba.errors import UserError


def script(main: Callable[[], int | None]) -> None:
    """Run a script's `main` and exit with its status; wrong input and an interruption are a sentence each."""
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)

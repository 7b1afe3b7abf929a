"""How an option is spelt: messages from below name arguments as `epochs`, the command line reads them as --epochs."""

from __future__ import annotations

import re


def dashed(text: str) -> str:
    """A message with its arguments as options."""
    return re.sub(r"`([a-z_]\w*(?:\.\w+)*)`", r"--\1", text)

"""How much work a kill may cost."""

from __future__ import annotations

import dataclasses
import math
import re

from vimamba.errors import UserError


@dataclasses.dataclass(frozen=True)
class CheckpointEvery:
    """Seconds or steps between checkpoints; neither saves after each epoch only."""

    seconds: float = math.inf
    steps: int = 0

    @classmethod
    def parse(cls, text: str | None) -> CheckpointEvery:
        """From `10min`, `500 steps` or None.

        Raises:
            UserError: it is neither.
        """
        if text is None:
            return cls()
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(min|minutes?|steps?)\s*", text)
        number, unit = (float(found[1]), found[2]) if found else (0.0, "")
        if number <= 0 or (unit.startswith("step") and not number.is_integer()):
            raise UserError(f"`checkpoint_every` is '{text}'; give minutes or steps, such as 10min or 500steps")
        return cls(steps=int(number)) if unit.startswith("step") else cls(seconds=60 * number)

"""Which images are held out: drawn once, and kept with the run that was trained on the others."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from vimamba.data.samples import LastingSamples
from vimamba.errors import UserError, require, shown

HELD_OUT = "held_out.json"  # in a run's folder
MAX_BYTES = 2**29  # of that file, which may be a stranger's: ten million names

S = TypeVar("S", bound=LastingSamples)

Draw = Callable[[int, str, list[str], float, int], set[int]]


def hold_out(position: int, class_name: str, names: list[str], fraction: float, seed: int) -> set[int]:
    """Which of a class's images are held out, a function of the seed, the class and each one's own name.

    So no image changes sides when others are added or removed, but for the one that a class needs on either side.
    The share is `fraction` on average.
    """
    draws = []
    for name in names:
        text = f"{seed}\0{class_name}\0{name}".encode("utf-8", "surrogatepass")
        draws.append(int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") / 2**64)
    count = min(max(1, sum(draw < fraction for draw in draws)), len(names) - 1)
    return {*sorted(range(len(names)), key=draws.__getitem__)[:count]}


def hold_out_as_0_1(position: int, class_name: str, names: list[str], fraction: float, seed: int) -> set[int]:
    """What version 0.1 held out, which depends on the number of images; its runs say no more than the seed."""
    order = np.random.RandomState((seed + position) % 2**32).permutation(len(names))
    return {*order[: min(max(1, round(fraction * len(names))), len(names) - 1)].tolist()}


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """What a run was trained and measured on, by the names of the images in their data set.

    Args:
        drawn: whether the held-out images were drawn, not a half of their own in the data
        fingerprint: of all names with the sizes of the files, or of rows with their classes
    """

    drawn: bool
    fingerprint: str
    held_out: list[str]
    train: list[str]

    @classmethod
    def of(cls, drawn: bool, train: LastingSamples, val: LastingSamples) -> HeldOut:
        """Of a run that begins."""
        return cls(drawn, fingerprint(train, val), val.keys(), train.keys())

    @classmethod
    def read(cls, run: Path) -> HeldOut | None:
        """What a run's folder keeps; None for a run of version 0.1, or one whose data set has halves by itself.

        Raises:
            UserError: the file is damaged.
        """
        path = run / HELD_OUT
        if not path.exists():
            return None
        try:
            require(path.is_file(), "it is no regular file")
            require(path.stat().st_size <= MAX_BYTES, f"it is larger than {MAX_BYTES // 2**20} MB")
            values = json.loads(path.read_text(encoding="utf-8"))
            require(isinstance(values, dict), f"it holds {shown(values)}")
            found = cls(**values)
            names = isinstance(found.held_out, list) and isinstance(found.train, list)
            require(
                names and all(isinstance(name, str) for name in found.held_out + found.train),
                "it lists what are no names",
            )
        except (OSError, ValueError, TypeError, RecursionError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{path}: does not tell the run's held-out images ({reason}); restore it") from error
        return found

    def text(self) -> str:
        """What its file holds."""
        return json.dumps(dataclasses.asdict(self), indent=0) + "\n"


def fingerprint(*parts: LastingSamples) -> str:
    """A digest of images by name and size (or row and class), in whichever half they are."""
    lines = [f"{key}\0{mark}\n" for part in parts for key, mark in zip(part.keys(), part.marks(), strict=True)]
    return hashlib.sha256("".join(sorted(lines)).encode("utf-8", "surrogatepass")).hexdigest()


def how_drawn(run: Path) -> dict[str, Any]:
    """Arguments of `open_data` for a run's own data, so that its held-out images stay held out."""
    kept = HeldOut.read(run)
    return {"draw": hold_out_as_0_1} if kept is None else {"kept": kept}


def halve(
    samples: S, class_names: list[str], fraction: float, seed: int, draw: Draw = hold_out, kept: HeldOut | None = None
) -> tuple[S, S]:
    """Samples to learn from and samples held out: those that a run kept, or a share of each class.

    Raises:
        UserError: none of those that the run held out is there any more.
    """
    names = samples.keys()
    rows: set[int] = set()
    if kept is not None:
        before = {*kept.held_out}
        rows = {row for row, name in enumerate(names) if name in before}
        require(
            bool(rows),
            f"none of the {len(before)} images that the run held out is there any more; restore them, or measure on "
            "others with `data`",
        )
    else:
        for position, class_name in enumerate(class_names):
            members = np.flatnonzero(samples.targets == position).tolist()
            drawn = draw(position, class_name, [names[row] for row in members], fraction, seed) if members else ()
            rows |= {members[i] for i in drawn}
    return samples.select([i for i in range(len(names)) if i not in rows]), samples.select(sorted(rows))


def changes(kept: HeldOut, train: LastingSamples, val: LastingSamples) -> list[str]:
    """A line on the images that came, went or changed since the run began, or none."""
    before, now = {*kept.held_out, *kept.train}, {*train.keys(), *val.keys()}
    counts = ((len(now - before), "added"), (len(before - now), "removed"))
    said = " and ".join(f"{count} {what}" for count, what in counts if count)
    if not said:
        same = fingerprint(train, val) == kept.fingerprint
        return [] if same else ["since the run began, files have changed under their old names"]
    left = len({*kept.held_out} & {*val.keys()})
    rest = [f"those added are {'learnt from, not held out' if kept.drawn else 'in the half that they lie in'}"]
    rest = rest if now - before else []
    rest += [f"{left} of the {len(kept.held_out)} held-out images are left"] if left < len(kept.held_out) else []
    return [f"since the run began, images were {'; '.join([said, *rest])}"]

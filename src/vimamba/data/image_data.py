"""Images to learn from and images held out, as every source of them gives it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from vimamba.data.split import Draw, HeldOut, fingerprint, halve
from vimamba.errors import escaped, naming, require
from vimamba.processes import default_workers


@dataclasses.dataclass
class ImageData:
    """Training and held-out images with the names of their classes."""

    name: str
    class_names: list[str]
    train: Any  # Samples; LastingSamples but for the built-in ones
    val: Any
    description: str = ""
    img_size: tuple[int, int] | None = None  # native size, where all images share a small one
    in_chans: int = 3
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    small: bool = False  # in memory and cheap to decode: no worker processes needed
    built_in: bool = False  # carried in a package: the held-out images are the same for ever
    has_masks: bool = False  # of detection: whether the objects have masks beside their boxes
    drawn: bool = False  # whether the held-out images were drawn, not a half of their own
    notes: list[str] = dataclasses.field(default_factory=list)  # what was left out or taken for something, a line each

    @property
    def workers(self) -> int:
        """Processes that decode, if no number is asked for: none for a sample in memory."""
        return 0 if self.small else default_workers()

    @property
    def photographs(self) -> bool:
        """Whether flips and colour changes keep the meaning, as far as one can tell."""
        return not self.built_in

    def held_out(self) -> HeldOut | None:
        """For the run to keep; None where the held-out images are the same for ever."""
        return None if self.built_in else HeldOut.of(self.drawn, self.train, self.val)

    def moved_from(self, kept: HeldOut | None) -> bool:
        """Whether these are the images that a run kept a record of, in another place."""
        if kept is None or self.built_in or len(self.train) + len(self.val) != len(kept.train + kept.held_out):
            return False
        return fingerprint(self.train, self.val) == kept.fingerprint


@dataclasses.dataclass(frozen=True)
class Opening:
    """How the images to hold out are taken from data that have no half of them."""

    val_fraction: float
    seed: int
    strict: bool
    draw: Draw
    kept: HeldOut | None
    class_names: str | None = None  # a file of them
    ignore_index: int | None = None  # value of a mask's pixels that do not count; 255 if None

    def halve(self, name: str, samples: Any, class_names: list[str]) -> tuple[Any, Any]:
        if self.val_fraction == 1.0:
            require(not self.strict, "`val_fraction` 1 leaves nothing to train on")
            return samples.select([]), samples
        with naming(f"`data` {escaped(name)}"):
            return halve(samples, class_names, self.val_fraction, self.seed, self.draw, self.kept)

    def halve_unclassed(self, name: str, samples: Any) -> tuple[Any, Any]:
        """The same of images that have no class each: their `targets` are 0."""
        one = len(samples) == 1 and self.strict and self.kept is None
        require(not one, f"`data` {escaped(name)}: has a single image; a split needs two")
        return self.halve(name, samples, [""])


Source = Callable[[str, Opening], ImageData]

"""Whether an exported model does what the model in PyTorch does, on real images, and how long either takes."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vimamba.data.mnist import load_mnist
from vimamba.data.samples import Samples
from vimamba.data.transforms import eval_transform
from vimamba.errors import UserError, require
from vimamba.export.outputs import WHITE, normalised
from vimamba.export.source import Source

IMAGES = 4
REPEATS = 5
PARTED = 0.01  # share of the objects in an image that may differ: of two that are as sure, either may be chosen

Exported = Callable[[Tensor], Any]
"""Images to a tensor, or to a tuple of what a detector finds."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The largest difference of an output, and the seconds for one image, exported and in PyTorch."""

    difference: float
    seconds: float
    seconds_of_pytorch: float

    def __str__(self) -> str:
        times = self.seconds / self.seconds_of_pytorch
        apart = f"{self.difference:.1e}" if math.isfinite(self.difference) else "that of whole objects"
        return (
            f"largest difference from PyTorch {apart}; one image takes {1e3 * self.seconds:.1f} ms, "
            f"{times:.2f} times PyTorch's {1e3 * self.seconds_of_pytorch:.1f} ms"
        )


def example_images(source: Source, with_preprocessing: bool, samples: Samples | None = None) -> Tensor:
    """Real images as the exported graph takes them: some of `samples`, or built-in digits."""
    samples = load_mnist()[1] if samples is None else samples
    return prepared(source, [samples.image(i) for i in range(min(IMAGES, len(samples)))], with_preprocessing)


def prepared(source: Source, images: Sequence[Image.Image], with_preprocessing: bool) -> Tensor:
    """Images at the model's size, as uint8 RGB (batch, height, width, 3) or normalised."""
    prep = source.preprocessing
    raw = dataclasses.replace(prep, mean=(0.0,) * prep.in_chans, std=(1.0,) * prep.in_chans)
    transform = eval_transform(raw)
    raw_BCHW = torch.stack([transform(image) for image in images]).mul(WHITE).round().to(torch.uint8)
    rgb_BHWC = raw_BCHW.permute(0, 2, 3, 1).expand(-1, -1, -1, 3).contiguous()
    return rgb_BHWC if with_preprocessing else normalised(rgb_BHWC, prep)


def require_objects(model: Exported, batches: Sequence[Tensor]) -> None:
    """
    Raises:
        UserError: a detector finds nothing in any of the batches: there would be nothing to compare.
    """
    with torch.inference_mode():
        seen = any(len(model(batch)[0]) for batch in batches)
    require(seen, "the model finds no object in the images that the export is checked with; give `data` with some")


def compare(exported: Exported, model: Exported, batches: Sequence[Tensor], tolerance: float) -> Comparison:
    """Hold the outputs for some batches against each other, and the times for an image of the first.

    Raises:
        UserError: they differ by more than `tolerance`.
    """
    with torch.inference_mode():
        pairs = [(exported(batch), model(batch)) for batch in batches]
        difference = max(_difference(*pair) for pair in pairs)
        if not difference <= tolerance:  # nor is NaN
            raise UserError(
                f"the exported model differs from PyTorch's by {difference:.1e}, more than {tolerance:.0e}: nothing "
                "was written; please report it with the command"
            )
        image = batches[0][:1]
        times = [(_seconds(exported, image), _seconds(model, image)) for _ in range(REPEATS)]
    return Comparison(difference, *map(statistics.median, zip(*times, strict=True)))


def _difference(found: Any, wanted: Any) -> float:
    if not isinstance(wanted, tuple):
        return float((found - wanted).abs().max())
    return of_objects(found, wanted)


def of_objects(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The largest difference of objects from their partners: of places, as shares of the largest, of scores, of masks.

    Args:
        found, wanted: boxes (n, 4), labels (n,), scores (n,), the surest first, and masks (n, rows, columns) if any.

    Returns:
        Infinity where objects have no partner of their class, but for one in a hundred.
    """
    most, fewest = max(len(found[0]), len(wanted[0])), min(len(found[0]), len(wanted[0]))
    if fewest == 0:
        return 0.0 if most == 0 else math.inf
    (boxes, labels, scores, *masks), (other_boxes, other_labels, other_scores, *other_masks) = found, wanted
    scale = float(other_boxes.abs().max())
    values = [(boxes / scale, other_boxes / scale), (scores[:, None], other_scores[:, None])]
    values += [(mask.flatten(1), other.flatten(1)) for mask, other in zip(masks, other_masks, strict=True)]
    apart_NM = torch.stack([torch.cdist(one, other, p=math.inf) for one, other in values]).amax(0)
    apart_NM[labels[:, None] != other_labels] = math.inf
    nearest = torch.cat([apart_NM.amin(0), apart_NM.amin(1)]).sort().values
    return float(nearest[math.ceil((1 - PARTED) * len(nearest)) - 1])


def _seconds(run: Exported, image: Tensor) -> float:
    start = time.perf_counter()
    run(image)
    return time.perf_counter() - start

"""Whether an exported model does what the model in PyTorch does, on real images, and how long either takes."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from PIL import Image
from torch import Tensor, nn

from vimamba.data.mnist import load_mnist
from vimamba.data.samples import Samples
from vimamba.data.transforms import eval_transform
from vimamba.errors import UserError
from vimamba.export.outputs import WHITE, normalised
from vimamba.export.source import Source

IMAGES = 4
REPEATS = 5

Exported = Callable[[Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The largest difference of an output, and the seconds for one image, exported and in PyTorch."""

    difference: float
    seconds: float
    seconds_of_pytorch: float

    def __str__(self) -> str:
        times = self.seconds / self.seconds_of_pytorch
        return (
            f"largest difference from PyTorch {self.difference:.1e}; one image takes {1e3 * self.seconds:.1f} ms, "
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


def compare(exported: Exported, model: nn.Module, batches: Sequence[Tensor], tolerance: float) -> Comparison:
    """Hold the outputs for some batches against each other, and the times for an image of the first.

    Raises:
        UserError: they differ by more than `tolerance`.
    """
    with torch.inference_mode():
        difference = max(float((exported(batch) - model(batch)).abs().max()) for batch in batches)
        if not difference <= tolerance:  # nor is NaN
            raise UserError(
                f"the exported model differs from PyTorch's by {difference:.1e}, more than {tolerance:.0e}: nothing "
                "was written; please report it with the command"
            )
        image = batches[0][:1]
        times = [(_seconds(exported, image), _seconds(model, image)) for _ in range(REPEATS)]
    return Comparison(difference, *map(statistics.median, zip(*times, strict=True)))


def _seconds(run: Exported, image: Tensor) -> float:
    start = time.perf_counter()
    run(image)
    return time.perf_counter() - start

"""The built-in sample, and `python -m vimamba.data.mnist FOLDER`, which writes held-out digits as pictures."""

from __future__ import annotations

import sys
from importlib.resources import files
from pathlib import Path

import numpy as np

from vimamba.data.samples import ArraySamples, write_images

TRAIN_COUNT = 4000  # the archive is in a fixed shuffled order: 400 of each digit first, then 100 of each held out
MNIST_MEAN, MNIST_STD = (0.1307,), (0.3081,)


def load_mnist() -> tuple[ArraySamples, ArraySamples]:
    """4000 training and 1000 held-out digits."""
    with (files("vimamba.data") / "mnist_5k.npz").open("rb") as file, np.load(file) as archive:
        images, labels = archive["images"], archive["labels"]
    return (
        ArraySamples(images[:TRAIN_COUNT], labels[:TRAIN_COUNT], "mnist:train"),
        ArraySamples(images[TRAIN_COUNT:], labels[TRAIN_COUNT:], "mnist:val"),
    )


def write_digits(folder: Path, count: int = 3) -> list[Path]:
    """Write held-out digits as PNG files named after what they show; returns the paths."""
    held_out = load_mnist()[1]
    return write_images(held_out, [f"a-{held_out.target(index)}" for index in range(count)], folder)


if __name__ == "__main__":
    for path in write_digits(Path(sys.argv[1] if len(sys.argv) > 1 else "digits")):
        print(path)

"""What the tests of the commands share."""

import numpy as np
from PIL import Image


def write_photos(root, classes=("blue", "green", "red"), halves=(("train", 8), ("val", 4)), seed=0):
    """Noisy pictures, each class of its colour."""
    random = np.random.RandomState(seed)
    for half, count in halves:
        for position, name in enumerate(classes):
            folder = root / half / name
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                pixels = random.randint(0, 80, (20, 24, 3))
                pixels[..., position % 3] += 150
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    return root


def train_arguments(data, output, *more):
    """A training run of a second."""
    model = ["--model", "vim_nano", "--model_args", "{depth: 1, embed_dim: 16, d_state: 4}"]
    return [
        "train", "--data", data, *model, "--output", output, "--img_size", 16, "--num_workers", 0,
        "--batch_size", 6, "--epochs", 2, "--accelerator", "cpu", *more,
    ]  # fmt: skip

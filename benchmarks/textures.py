"""Small folders, no options: `python benchmarks/textures.py` trains on six textures and prints the held-out accuracy.

Each class is one of scikit-image's photographs, cut into crops from disjoint halves: the left one is learnt from, the
right one held out. Every model is trained by the same command, `vimamba train --data FOLDER --model MODEL`.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from skimage import data

from vimamba.benchmark.script import script

TEXTURES = ("brick", "grass", "gravel", "coins", "hubble_deep_field", "immunohistochemistry")
MODELS = ("vim_nano", "vim_tiny_patch16_224", "resnet18", "vit_tiny_patch16_224")


def write_textures(folder: Path, side: int = 112, train: int = 24, val: int = 12) -> Path:
    """Crops of each photograph, below train/CLASS and val/CLASS; the same ones every time."""
    for name in TEXTURES:
        picture = getattr(data, name)()
        rng = np.random.default_rng(0)
        half = picture.shape[1] // 2
        for part, pixels, count in (("train", picture[:, :half], train), ("val", picture[:, half:], val)):
            (folder / part / name).mkdir(parents=True)
            for index in range(count):
                top, left = (int(rng.integers(0, size - side + 1)) for size in pixels.shape[:2])
                crop = Image.fromarray(pixels[top : top + side, left : left + side])
                crop.save(folder / part / name / f"{index}.png")
    return folder


def train(folder: Path, output: Path, model: str, seed: int, more: list[str]) -> tuple[float, float]:
    """The best held-out accuracy of a run, and the seconds that it took."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "vimamba", "train", "--data", str(folder), "--model", model]
    subprocess.run([*command, "--seed", str(seed), "--output", str(output), *more], check=True)
    with (output / "metrics.csv").open(newline="") as file:
        best = max(float(row["val_top1"]) for row in csv.DictReader(file))
    return best, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options, more = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as place:
        folder, lines = write_textures(Path(place) / "textures"), []
        for model in options.models:
            runs = [train(folder, Path(place) / f"{model}-{seed}", model, seed, more) for seed in options.seeds]
            shares = [100 * accuracy for accuracy, _ in runs]
            each = ", ".join(f"{share:.1f}" for share in shares)
            seconds = statistics.mean(seconds for _, seconds in runs)
            lines.append(f"{model:24} {statistics.mean(shares):5.1f} % held out ({each}), {seconds:.0f} s a run")
            print("\n".join(lines), flush=True)


if __name__ == "__main__":
    script(main)

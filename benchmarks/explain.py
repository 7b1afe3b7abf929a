"""Explanations that are measured: digits on canvases, and the time of a hidden attention at 1248 px.

`python benchmarks/explain.py` trains two small models, with plain patches and with a convolutional stem, on digits that
stand anywhere on a canvas, prints how often each method's largest value lies on the digit and in its box (the pointing
game, arXiv 1608.00507), the areas under deletion and insertion beside those of a random map, and the time of a map of
one large picture in forward passes.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vimamba import VisionMamba, create_model
from vimamba.benchmark.script import script
from vimamba.data.mnist import load_mnist
from vimamba.inference.explain.faithful import curves, random_map
from vimamba.inference.explain.maps import MAPS, explain

SIDE, DIGIT, PATCH = 56, 28, 8  # pixels of a canvas, of a digit on it and of a patch
METHODS_OF_LARGE = ("attention", "rollout", "attribution")


digits = functools.cache(load_mnist)


def canvases(half: int, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Digits at random places: images (count, 1, SIDE, SIDE) from -1 to 1, classes, and the box (top, left) of each."""
    samples = digits()[half]
    random = np.random.RandomState(seed)
    images, labels, corners = torch.full((count, 1, SIDE, SIDE), -1.0), [], []
    for i, which in enumerate(random.randint(len(samples), size=count)):
        top, left = random.randint(0, SIDE - DIGIT + 1, 2)
        images[i, 0, top : top + DIGIT, left : left + DIGIT] = torch.from_numpy(samples.images[which] / 127.5 - 1)
        labels.append(samples.target(which))
        corners.append((top, left))
    return images, torch.tensor(labels), torch.tensor(corners)


def train(steps: int, stem: str, seed: int = 0) -> nn.Module:
    """A small model that names digits wherever they stand."""
    torch.manual_seed(seed)
    model = VisionMamba(
        img_size=SIDE, patch_size=PATCH, stem=stem, in_chans=1, embed_dim=48, depth=3, num_classes=10, d_state=8
    )
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for step in range(steps):
        images, labels, _ = canvases(0, 64, step + 1)
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    return model.eval()


def points(map_hw: Tensor, image_1HW: Tensor) -> tuple[bool, bool]:
    """Whether the part of the image with the largest value touches the digit, and its middle is in the digit's box."""
    ink_HW = image_1HW[0] > -0.5
    touches_hw = F.adaptive_max_pool2d(ink_HW[None].float(), map_hw.shape)[0] > 0
    at = int(map_hw.argmax())
    place = [(i + 0.5) * SIDE / n for i, n in zip(divmod(at, map_hw.shape[1]), map_hw.shape, strict=True)]
    digit = ink_HW.nonzero()
    in_box = all(
        low <= i < high + 1 for i, low, high in zip(place, digit.amin(0).tolist(), digit.amax(0).tolist(), strict=True)
    )
    return bool(touches_hw.flatten()[at]), in_box


def judge(model: nn.Module, count: int) -> None:
    """Print the table of methods."""
    images, labels, _ = canvases(1, count, 12345)
    with torch.no_grad():
        right = model(images).argmax(1) == labels
    print(f"top-1 {right.float().mean():.3f} of {count}; of those that are right:")
    images, labels = images[right], labels[right]
    blank = torch.full_like(images[0], -1.0)
    print(f"{'method':<22}{'on digit':>9}{'in box':>8}{'deletion':>10}{'insertion':>11}")
    for method in [*MAPS, "random"]:
        found_of: list[tuple[float, ...]] = []
        for i in range(len(images)):
            if method == "random":
                found = random_map(torch.empty(SIDE // PATCH, SIDE // PATCH), i)
            else:
                found = explain(model, images[i : i + 1], method, [int(labels[i])])[0]
            judged = curves(model, images[i], found, int(labels[i]), blank)
            found_of.append((*points(found, images[i]), judged.deletion_area, judged.insertion_area))
        on, box, deletion, insertion = map(statistics.mean, zip(*found_of, strict=True))
        print(f"{method:<22}{on:>9.3f}{box:>8.3f}{deletion:>10.3f}{insertion:>11.3f}", flush=True)


def time_large(side: int) -> None:
    """Print the time of each method for one picture, in forward passes."""
    model = create_model("vim_tiny_patch16_224", img_size=side).eval()
    image = torch.randn(1, 3, side, side)

    def seconds(run) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    def forward() -> None:
        with torch.no_grad():
            model(image)

    forward()
    for method in METHODS_OF_LARGE:  # in turns, since other load on the machine comes and goes
        pairs = [(seconds(forward), seconds(lambda: explain(model, image, method, [0]))) for _ in range(5)]  # noqa: B023
        once, spent = (statistics.median(times) for times in zip(*pairs, strict=True))
        ratio = statistics.median(spent / once for once, spent in pairs)
        print(f"{method} at {side} px: {spent:.2f} s, {ratio:.2f} forward passes of {once:.2f} s", flush=True)


def main() -> None:
    """Train, judge, time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000, help="of training")
    parser.add_argument("--images", type=int, default=300, help="that are judged")
    parser.add_argument("--large", type=int, default=1248, help="side of the large picture, pixels; 0 for none")
    options = parser.parse_args()
    if options.images:
        for stem in ("patch", "conv"):
            print(f"stem {stem}", flush=True)
            judge(train(options.steps, stem), options.images)
    if options.large:
        time_large(options.large)


if __name__ == "__main__":
    script(main)

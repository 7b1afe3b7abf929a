"""Dense tasks on the CPU: a large image through Vim-Ti and through DeiT-Ti under the same head, and what heads cost.

`python benchmarks/dense.py [--size 2048]` takes the time of a forward pass, the models in turns, and its peak memory,
each model in a process of its own; then the share of a training step of scenes that is outside the backbone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timm.layers import set_fused_attn
from torch import Tensor
from torch.nn import functional as F

from vimamba.benchmark import machine, memory, report
from vimamba.benchmark.script import script
from vimamba.benchmark.timing import alternate, quartiles, ratio
from vimamba.models.heads import SegmentationModel, build_detector, build_segmenter, enlarge

CLASSES = 19  # of Cityscapes, whose images are 2048 pixels wide
TRUNKS = {"Vim-Ti": "vim_tiny_patch16_224", "DeiT-Ti": "deit_tiny_patch16_224"}
SCENE, BATCH, OBJECTS = 256, 8, 6
# What a detector of small scenes needs on two cores: fewer boxes, narrower heads than the published ones.
SMALL_HEADS = dict(head="mask_rcnn", width=128, box_width=512, proposals=300, rois_per_image=64)
Step = Callable[[], None]


def main() -> None:
    """Measure, print, write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=2048, help="height and width of the large image, pixels")
    parser.add_argument("--width", type=int, default=192, help="channels of the head there; the trunk's by default")
    parser.add_argument("--repeats", type=int, default=5, help="rounds at most")
    parser.add_argument("--seconds", type=float, default=60, help="time for the rounds of a comparison; at least three")
    parser.add_argument("--only", choices=("forward", "step"), help="one of the two parts")
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="PyTorch's own choice by default")
    parser.add_argument("--peak-of", choices=TRUNKS, help=argparse.SUPPRESS)  # the process of one model
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    set_fused_attn(True)
    if options.peak_of:
        print(peak_here(options.peak_of, options.size, options.width))
        return
    if options.json:
        report.check_writable(options.json, "--json")
    facts = machine.describe("cpu")
    print(machine.heading(facts) + "\n")
    rows: list[dict[str, Any]] = []
    if options.only != "step":
        rows += large_image(options)
    if options.only != "forward":
        rows += training_steps(options)
    if options.json:
        options.json.write_text(json.dumps({"schema": 1, "machine": facts, "rows": rows}, indent=1) + "\n")


# -- a large image


def forward_step(trunk: str, size: int, width: int) -> Step:
    """Logits of one image at a quarter of its size, by the published head."""
    torch.manual_seed(0)
    model = build_segmenter(TRUNKS[trunk], {}, CLASSES, 3, (size, size), {"head": "upernet", "width": width}).eval()
    image_BCHW = torch.randn(1, 3, size, size)

    def step() -> None:
        with torch.inference_mode():
            model(image_BCHW)

    return step


def peak_here(trunk: str, size: int, width: int) -> int | None:
    """Bytes at the peak of a forward pass beyond the model, in this process."""
    forward_step(trunk, memory.SMALL, width)()
    return memory.growth(forward_step(trunk, size, width))


def peak(trunk: str, options: argparse.Namespace) -> int:
    """The same in a process of its own."""
    sizes = [part for name in ("size", "width", "threads") for part in (f"--{name}", str(getattr(options, name)))]
    command = [sys.executable, __file__, "--peak-of", trunk, *sizes]
    environment = {"MALLOC_MMAP_THRESHOLD_": "1048576", **os.environ}  # as vimamba.benchmark.memory has it
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return int(done.stdout)


def large_image(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time and memory of each trunk under the head."""
    peaks = [peak(trunk, options) for trunk in TRUNKS]
    steps = [forward_step(trunk, options.size, options.width) for trunk in TRUNKS]
    for step in steps:
        step()
    times = alternate(steps, options.repeats, options.seconds)
    rows = []
    for trunk, seconds, peak_bytes in zip(TRUNKS, times, peaks, strict=True):
        low, middle, high = quartiles(seconds)
        what = f"{trunk} + UPerNet, {options.size} px"
        print(f"{what}: {middle:.2f} s ({low:.2f} to {high:.2f}), {peak_bytes / 1e6:.0f} MB")
        rows.append({"what": what, "seconds": seconds, "peak_bytes": peak_bytes})
    faster, smaller = ratio(times[1], times[0]), peaks[1] / peaks[0]
    print(f"DeiT-Ti takes {faster:.2f} times as long and {smaller:.2f} times the memory\n")
    return [*rows, {"what": "DeiT-Ti to Vim-Ti", "time": faster, "memory": smaller}]


# -- training steps


def scenes() -> tuple[Tensor, list[dict[str, Tensor]], Tensor]:
    """Images of rectangles, their targets for detection, and the classes of their pixels."""
    generator = torch.Generator().manual_seed(0)
    images_BCHW = torch.randn(BATCH, 3, SCENE, SCENE, generator=generator)
    classes_BHW = torch.zeros(BATCH, SCENE, SCENE, dtype=torch.long)
    targets = []
    for pixels_HW in classes_BHW:
        corner = torch.randint(0, SCENE * 3 // 4, (OBJECTS, 2), generator=generator)
        boxes = torch.cat([corner, corner + torch.randint(16, SCENE // 4, (OBJECTS, 2), generator=generator)], 1)
        masks = torch.zeros(OBJECTS, SCENE, SCENE, dtype=torch.uint8)
        for number, (left, top, right, bottom) in enumerate(boxes.tolist()):
            masks[number, top:bottom, left:right] = 1
            pixels_HW[top:bottom, left:right] = number + 1
        targets.append({"boxes": boxes.float(), "labels": torch.arange(OBJECTS), "masks": masks})
    return images_BCHW, targets, classes_BHW


def training_steps(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The share of forward and backward passes that is not the backbone's, whose own are timed in turns with them."""
    rows = []
    images_BCHW, targets, classes_BHW = scenes()
    for name in (TRUNKS["Vim-Ti"], "vim_pyramid_nano"):
        for head, build, args in (
            ("UPerNet", build_segmenter, {}),
            ("Mask R-CNN", build_detector, SMALL_HEADS),
        ):
            torch.manual_seed(0)
            model: Any = build(name, {}, OBJECTS + 1, 3, (SCENE, SCENE), args)
            model.train()

            def whole(model: Any = model) -> None:
                if isinstance(model, SegmentationModel):
                    given = model(images_BCHW)
                    losses = [F.cross_entropy(enlarge(x, (SCENE, SCENE)), classes_BHW) for x in given]
                else:
                    losses = list(model(list(images_BCHW), targets).values())
                torch.stack(losses).sum().backward()

            def backbone(model: Any = model) -> None:
                torch.stack([x.mean() for x in model.backbone(images_BCHW)]).sum().backward()

            whole(), backbone()
            times = alternate([whole, backbone], options.repeats, options.seconds)
            step, outside = quartiles(times[0])[1], 1 - ratio(times[1], times[0])
            what = f"{name} + {head}, training step, {SCENE} px, batch {BATCH}"
            print(f"{what}: {step:.2f} s, {outside:.0%} outside the backbone")
            rows.append({"what": what, "seconds": times[0], "backbone_seconds": times[1], "outside": outside})
    return rows


if __name__ == "__main__":
    script(main)

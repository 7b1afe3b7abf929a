"""A large image through `vimamba predict --tile`: seconds, and the most memory that the process ever had.

`python benchmarks/large_image.py [--size 20000]` writes a TIFF file, tile by tile, of a built-in scene over and over,
and segments it with an untrained model in a process of its own. The memory is all that the kernel counts as the
process's, pages of files that are mapped included (VmHWM).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import torch

from vimamba.benchmark import machine, report
from vimamba.benchmark.script import script
from vimamba.cli import main as vimamba
from vimamba.data.scenes import SIDE, open_scenes
from vimamba.data.transforms import Preprocessing
from vimamba.tasks.weights import ModelCard, save_model

STORED = 2 * SIDE  # pixels of a tile of the file, two scenes by two
LIMIT = 3 * 2**30  # bytes that 20 000 x 20 000 pixels may take


def main() -> None:
    """Write the image and the model, measure, print, write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4000, help="height and width of the image, pixels")
    parser.add_argument("--tile", type=int, default=1024, help="of predict")
    parser.add_argument("--overlap", type=int, default=128, help="of predict")
    parser.add_argument("--model", default="vim_nano", help="the trunk")
    parser.add_argument("--depth", type=int, default=2, help="its blocks: more take mostly time")
    parser.add_argument("--folder", type=Path, help="where the files go; a temporary one by default")
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="PyTorch's own choice by default")
    parser.add_argument("--here", nargs=3, metavar=("RUN", "IMAGE", "OUTPUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        print(json.dumps(predict_here(options)))
        return
    if options.json:
        report.check_writable(options.json, "--json")
    facts = machine.describe("cpu")
    print(machine.heading(facts) + "\n")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        image, run = Path(folder) / "image.tif", Path(folder) / "model.safetensors"
        write_image(image, options.size)
        write_model(run, options.model, options.depth)
        words = [f"--{name}={getattr(options, name)}" for name in ("tile", "overlap", "threads")]
        command = [sys.executable, __file__, *words, "--here", str(run), str(image), folder]
        row = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
    what = f"{options.model}, {options.size} x {options.size} px in tiles of {options.tile} px"
    print(f"{what}: {row['seconds']:.0f} s, {row['peak_bytes'] / 2**30:.2f} GiB (target {LIMIT / 2**30:.0f} GiB)")
    if options.json:
        asked = {name: getattr(options, name) for name in ("model", "depth", "size", "tile", "overlap", "threads")}
        options.json.write_text(json.dumps({"machine": facts, "results": [asked | row]}, indent=1) + "\n")


def write_image(path: Path, size: int) -> None:
    """A TIFF file of tiles, compressed as most are."""
    scenes = open_scenes("scenes-seg").val
    rows = [np.concatenate([np.asarray(scenes.image(2 * row + i)) for i in range(2)], 1) for row in range(2)]
    tile_HWC = np.concatenate(rows)

    def stored() -> Iterator[np.ndarray]:
        for _ in range((-(-size // STORED)) ** 2):
            yield tile_HWC

    tifffile.imwrite(
        path, stored(), shape=(size, size, 3), dtype=np.uint8, tile=(STORED, STORED), compression="zlib",
        photometric="rgb", metadata=None,
    )  # fmt: skip


def write_model(path: Path, name: str, depth: int) -> None:
    """An untrained model of the scenes' classes."""
    torch.manual_seed(0)
    names = open_scenes("scenes-seg").class_names
    prep = Preprocessing((512, 512), 3, (0.5,) * 3, (0.5,) * 3, crop_pct=1.0)
    card = ModelCard(name, {"depth": depth}, names, prep, task="segment", head={"head": "linear"})
    save_model(path, card.build(), card)


def predict_here(options: Any) -> dict[str, float]:
    """Seconds, and bytes at most, of this process."""
    torch.set_num_threads(options.threads)
    run, image, output = options.here
    start = time.perf_counter()
    tiles = ["--tile", str(options.tile), "--overlap", str(options.overlap)]
    status = vimamba(["predict", run, image, *tiles, "--output", output, "--json"])
    assert status == 0, f"predict ended with {status}"
    seconds = time.perf_counter() - start
    lines = Path("/proc/self/status").read_text().splitlines()
    (peak,) = (int(line.split()[1]) for line in lines if line.startswith("VmHWM"))  # in KiB
    return {"seconds": seconds, "peak_bytes": 1024 * peak}


if __name__ == "__main__":
    script(main)

"""WebDataset shards, streamed through timm's reader."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.utils.data import IterableDataset

from vimamba.data.decode import flatten
from vimamba.data.folder import TRAIN_NAMES, VAL_NAMES
from vimamba.data.sources import ImageData
from vimamba.errors import UserError, require


class Shards:
    """One split of a folder of shards; `stream` opens it, once for each loader."""

    def __init__(self, root: Path, split: str, count: int):
        self.root, self.split, self.count = root, split, count

    def __len__(self) -> int:
        return self.count

    def stream(self, transform: Any, training: bool, batch_size: int, num_workers: int, seed: int) -> ShardStream:
        """An iterable data set of (tensor, class index)."""
        from timm.data import create_dataset

        dataset = create_dataset(
            f"wds/{self.root.name}",
            root=str(self.root),
            split=self.split,
            is_training=training,
            batch_size=batch_size,
            seed=seed,
            input_img_mode="",  # decoded, not converted: `flatten` knows better
        )
        dataset.set_loader_cfg(num_workers=num_workers)
        return ShardStream(dataset, transform)


class ShardStream(IterableDataset):
    """timm's stream of Pillow images with our decoding rules and transform."""

    def __init__(self, dataset: Any, transform: Any):
        self.dataset, self.transform = dataset, transform

    def __len__(self) -> int:
        return len(self.dataset)

    def set_epoch(self, epoch: int) -> None:
        self.dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator[tuple[Any, int, str]]:
        for image, target in self.dataset:
            yield self.transform(flatten(image)), int(target), ""


def open_shards(name: str, root: Path, class_names: list[str] | None) -> ImageData:
    """A folder with shards and the `_info.json` that timm's reader looks for."""
    info_path = next((root / n for n in ("_info.json", "info.json") if (root / n).is_file()), None)
    if info_path is None:
        raise UserError(f"--data {name}: {root}/_info.json is missing; it lists the splits, shards and their lengths")
    try:
        info = json.loads(info_path.read_text(encoding="utf-8"))
        counts = {split: int(entry["num_samples"]) for split, entry in info["splits"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"--data {name}: {info_path} is not a shard index with splits.*.num_samples ({error})"
        ) from error
    train = next((s for s in TRAIN_NAMES if s in counts), None)
    val = next((s for s in VAL_NAMES if s in counts), None)
    require(
        bool(train and val),
        f"--data {name}: {info_path} lists no train and val split, only {', '.join(counts)}",
    )
    names = class_names or info.get("class_names")
    require(bool(names), f"--data {name}: list the class names, one a line, in a file: --class_names FILE")
    assert train
    assert val
    return ImageData(name, list(names), Shards(root, train, counts[train]), Shards(root, val, counts[val]), name)

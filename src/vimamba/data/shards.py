"""WebDataset shards, streamed through timm's reader."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from timm.data.readers.reader_wds import ReaderWds
from torch.utils.data import IterableDataset, get_worker_info

from vimamba.data.decode import flatten
from vimamba.data.folder import TRAIN_NAMES, VAL_NAMES
from vimamba.data.sources import ImageData
from vimamba.data.transforms import mix_seed, seeded
from vimamba.errors import UserError, require, shown


class Shards:
    """One split of a folder of shards; `stream` opens it, once for each loader."""

    def __init__(self, root: Path, split: str, count: int):
        self.root, self.split, self.count = root, split, count

    def __len__(self) -> int:
        return self.count

    def stream(self, transform: Any, training: bool, batch_size: int, num_workers: int, seed: int) -> ShardStream:
        """An iterable data set of (tensor, class index)."""
        reader = SeededReader(
            root=str(self.root),
            split=self.split,
            is_training=training,
            batch_size=batch_size,
            seed=seed,
            input_img_mode="",  # decoded, not converted: `flatten` knows better
        )
        reader.set_loader_cfg(num_workers=num_workers)
        return ShardStream(reader, transform)


class SeededReader(ReaderWds):
    """timm's reader, whose order and draws are a function of the seed, the epoch and the worker alone."""

    worker_info: Any

    def draws(self, position: int = 0) -> int:
        """The seed of an image's draws, or of the order where no position is given."""
        return mix_seed(self.common_seed, self.epoch_count.value, self.dist_rank, self.worker_id, position)

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        if worker := get_worker_info():
            self.worker_info, self.worker_id, self.num_workers = worker, worker.id, worker.num_workers
        self.worker_seed = self.draws()  # else it is drawn by the loader, and goes on from epoch to epoch
        self.ds = None  # a pipeline keeps its random numbers: one for each epoch
        return super().__iter__()


class ShardStream(IterableDataset):
    """timm's stream of Pillow images with our decoding rules and transform."""

    def __init__(self, reader: SeededReader, transform: Any):
        self.reader, self.transform = reader, transform

    def __len__(self) -> int:
        return len(self.reader)

    def set_epoch(self, epoch: int) -> None:
        """Shards, samples and augmentation are drawn for this epoch, in workers that run already too."""
        self.reader.set_epoch(epoch)

    def __iter__(self) -> Iterator[tuple[Any, int, str]]:
        for position, (image, target) in enumerate(self.reader, start=1):
            with seeded(self.reader.draws(position)):
                item = self.transform(flatten(image))
            yield item, int(target), ""


def open_shards(name: str, root: Path, class_names: list[str] | None) -> ImageData:
    """A folder with shards and the `_info.json` that timm's reader looks for."""
    info_path = next((root / n for n in ("_info.json", "info.json") if (root / n).is_file()), None)
    if info_path is None:
        raise UserError(f"--data {name}: {root}/_info.json is missing; it lists the splits, shards and their lengths")
    try:
        info = json.loads(info_path.read_text(encoding="utf-8"))
        counts = {split: int(entry["num_samples"]) for split, entry in info["splits"].items()}
        shards = {str(name) for entry in info["splits"].values() for name in entry["filenames"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"--data {name}: {info_path} is not a shard index with splits.*.num_samples and filenames ({error})"
        ) from error
    for shard in sorted(shards):  # the index may be a stranger's, and webdataset opens addresses and commands too
        inside = Path(shard).name == shard and (root / shard).is_file()
        require(inside, f"--data {name}: {info_path} lists {shown(shard)}, which is no file in that folder")
    train = next((s for s in TRAIN_NAMES if s in counts), None)
    val = next((s for s in VAL_NAMES if s in counts), None)
    require(
        bool(train and val),
        f"--data {name}: {info_path} lists no train and val split, only {', '.join(counts)}",
    )
    names = class_names or info.get("class_names")
    require(bool(names), f"--data {name}: list the class names, one a line, in a file: --class_names FILE")
    require(isinstance(names, list), f"--data {name}: {info_path} has class_names that are no list")
    assert train
    assert val
    return ImageData(name, list(names), Shards(root, train, counts[train]), Shards(root, val, counts[val]), name)

"""From lists of images to batches: which image when, decoded and augmented by whom, and what was skipped."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler

from vimamba.data.decode import DecodeError
from vimamba.data.samples import Samples
from vimamba.data.sources import ImageData
from vimamba.data.transforms import (
    AugmentOptions,
    Preprocessing,
    Transform,
    eval_transform,
    mix_seed,
    seeded,
    train_transform,
)


class Batch(NamedTuple):
    """images_BCHW, targets_B, and a line on each file that could not be decoded (it is not among the images)."""

    images: torch.Tensor
    targets: torch.Tensor
    skipped: list[str]


class Draw(NamedTuple):
    """One image at one moment of a run; the seed decides its augmentation, so a resumed run repeats it."""

    sample: int
    seed: int


class ImageDataset(Dataset):
    """Decoded, transformed images. A file that cannot be decoded gives its line."""

    def __init__(self, samples: Samples, transform: Transform):
        self.samples, self.transform = samples, transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, draw: Draw | int) -> tuple[torch.Tensor, int, str] | str:
        index, seed = draw if isinstance(draw, tuple) else (draw, None)
        try:
            image = self.samples.image(index)
        except DecodeError as error:
            return str(error)
        if seed is None:
            return self.transform(image), self.samples.target(index), ""
        with seeded(seed):
            return self.transform(image), self.samples.target(index), ""


class RepeatedOrder(RepeatAugSampler):
    """Each image several times in a row, over the ranks; timm's takes the epoch alone for the seed of the order."""

    def __init__(self, dataset: Dataset, ranks: int, rank: int, copies: int, seed: int):
        super().__init__(dataset, ranks, rank, num_repeats=copies)
        self.seed = seed

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(mix_seed(self.seed, epoch))


class DrawSampler(Sampler):
    """The order of an epoch's images, a function of seed and epoch alone, from any batch on."""

    def __init__(self, order: Any, seed: int, epoch: int = 0, done: int = 0):
        self.order, self.seed = order, seed
        self.resumed_epoch, self.done = epoch, done
        self.set_epoch(epoch)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self.order.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[Draw]:
        start = self.done if self.epoch == self.resumed_epoch else 0
        rank = getattr(self.order, "rank", 0)
        for position, index in enumerate(self.order):
            if position >= start:
                yield Draw(index, mix_seed(self.seed, self.epoch, position, rank))


def collate(items: list[Any]) -> Batch:
    """A batch of what could be decoded."""
    good = [item for item in items if not isinstance(item, str)]
    images = torch.stack([item[0] for item in good]) if good else torch.empty(0)
    targets = torch.tensor([item[1] for item in good], dtype=torch.int64)
    return Batch(images, targets, [item for item in items if isinstance(item, str)])


class ImageDataModule(pl.LightningDataModule):
    """Loaders for training and validation on as many devices as there are.

    Its state is the place in the run, so that training resumes at the next batch with the same images.
    """

    def __init__(
        self, data: ImageData, prep: Preprocessing, augment: AugmentOptions,
        batch_size: int, num_workers: int, seed: int,
    ):  # fmt: skip
        super().__init__()
        self.data, self.prep, self.augment = data, prep, augment
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.epoch, self.batches_done = 0, 0

    def state_dict(self) -> dict[str, int]:
        assert self.trainer is not None
        progress = self.trainer.fit_loop.epoch_loop.batch_progress
        finished = progress.is_last_batch
        epoch = self.trainer.current_epoch + (1 if finished else 0)
        return {"epoch": epoch, "batches_done": 0 if finished else progress.current.ready}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.epoch, self.batches_done = state_dict["epoch"], state_dict["batches_done"]

    def train_dataloader(self) -> DataLoader:
        transform = train_transform(self.prep, self.augment)
        dataset = ImageDataset(self.data.train, transform)
        ranks, rank = self._place()
        if self.augment.repeated_augmentation > 1:
            order: Any = RepeatedOrder(dataset, ranks, rank, self.augment.repeated_augmentation, self.seed)
        else:
            order = DistributedSampler(dataset, ranks, rank, shuffle=True, seed=self.seed)
        sampler = DrawSampler(order, self.seed, self.epoch, self.batches_done * self.batch_size)
        # A last batch of one or two images gives noisy gradients; a data set smaller than a batch keeps it.
        return self._loader(dataset, sampler, drop_last=len(sampler) >= self.batch_size)

    def val_dataloader(self) -> DataLoader:
        return self.eval_loader(self.data.val)

    def eval_loader(self, samples: Any) -> DataLoader:
        """Every image once, in order."""
        transform = eval_transform(self.prep)
        ranks, rank = self._place()
        shard = Strided(len(samples), ranks, rank)
        return self._loader(ImageDataset(samples, transform), shard)

    def _place(self) -> tuple[int, int]:
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)

    def _loader(self, dataset: Any, sampler: Any, drop_last: bool = False) -> DataLoader:
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=collate,
            drop_last=drop_last,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
        )


class Strided(Sampler):
    """Each image once over all ranks; no rank repeats one to even the count, so metrics are exact."""

    def __init__(self, count: int, ranks: int, rank: int):
        self.count, self.ranks, self.rank = count, ranks, rank

    def __len__(self) -> int:
        return math.ceil((self.count - self.rank) / self.ranks)

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rank, self.count, self.ranks))

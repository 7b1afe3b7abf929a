"""From lists of images to batches: which image when, decoded and augmented by whom, and what was skipped."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler

from vimamba.data.decode import DecodeError
from vimamba.data.samples import Samples
from vimamba.data.sources import ImageData
from vimamba.data.transforms import Transform, mix_seed, seeded
from vimamba.processes import obey_parent


class Item(NamedTuple):
    """A transformed image (channels, height, width), what is to be said of it, and the size (height, width) it had."""

    image: torch.Tensor
    target: Any
    size: tuple[int, int]


class Batch(NamedTuple):
    """Items side by side, and a line on each file that could not be decoded (it is not among the images).

    Images of one size are a tensor (batch, channels, height, width), others a list; so are the targets, and whole
    numbers are a tensor (batch,).
    """

    images: Any
    targets: Any
    sizes: list[tuple[int, int]]
    skipped: list[str]


class Draw(NamedTuple):
    """One image at one moment of a run; the seed decides its augmentation, so a resumed run repeats it."""

    sample: int
    seed: int


class ImageDataset(Dataset):
    """Decoded images with their targets, transformed together. A file that cannot be decoded gives its line."""

    def __init__(self, samples: Samples, transform: Transform):
        self.samples, self.transform = samples, transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, draw: Draw | int) -> Item | str:
        index, seed = draw if isinstance(draw, tuple) else (draw, None)
        try:
            image, target = self.samples.image(index), self.samples.target(index)
        except DecodeError as error:
            return str(error)
        with seeded(seed) if seed is not None else contextlib.nullcontext():
            tensor, target = self.transform(image, target)
        return Item(tensor, target, (image.height, image.width))


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
    images, targets = _gathered([item.image for item in good]), _gathered([item.target for item in good])
    return Batch(images, targets, [item.size for item in good], [item for item in items if isinstance(item, str)])


def _gathered(values: list[Any]) -> Any:
    """One tensor where there can be one."""
    if all(isinstance(value, int) for value in values):
        return torch.tensor(values, dtype=torch.int64)
    same = all(isinstance(value, torch.Tensor) and value.shape == values[0].shape for value in values)
    return torch.stack(values) if same else values


class ImageAlone:
    """A transform of the image, beside a target that stays as it is."""

    def __init__(self, transform: Callable[[Any], torch.Tensor]):
        self.transform = transform

    def __call__(self, image: Any, target: Any) -> tuple[torch.Tensor, Any]:
        return self.transform(image), target


class Transforms(NamedTuple):
    """What images and targets go through, in training and in evaluation."""

    train: Transform
    eval: Transform


class ImageDataModule(pl.LightningDataModule):
    """Loaders for training and validation on as many devices as there are.

    Its state is the place in the run, so that training resumes at the next batch with the same images.
    """

    def __init__(
        self, data: ImageData, transforms: Transforms, batch_size: int, num_workers: int, seed: int = 0,
        repeats: int = 1,
    ):  # fmt: skip
        super().__init__()
        self.data, self.transforms, self.repeats = data, transforms, repeats
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
        dataset = ImageDataset(self.data.train, self.transforms.train)
        ranks, rank = self._place()
        if self.repeats > 1:
            order: Any = RepeatedOrder(dataset, ranks, rank, self.repeats, self.seed)
        else:
            order = DistributedSampler(dataset, ranks, rank, shuffle=True, seed=self.seed)
        sampler = DrawSampler(order, self.seed, self.epoch, self.batches_done * self.batch_size)
        # A last batch of one or two images gives noisy gradients; a data set smaller than a batch keeps it.
        return self._loader(dataset, sampler, drop_last=len(sampler) >= self.batch_size)

    def val_dataloader(self) -> DataLoader:
        return self.eval_loader(self.data.val)

    def eval_loader(self, samples: Any) -> DataLoader:
        """Every image once, in order."""
        ranks, rank = self._place()
        shard = Strided(len(samples), ranks, rank)
        return self._loader(ImageDataset(samples, self.transforms.eval), shard)

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
            worker_init_fn=obey_parent,
        )


class Strided(Sampler):
    """Each image once over all ranks; no rank repeats one to even the count, so metrics are exact."""

    def __init__(self, count: int, ranks: int, rank: int):
        self.count, self.ranks, self.rank = count, ranks, rank

    def __len__(self) -> int:
        return math.ceil((self.count - self.rank) / self.ranks)

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rank, self.count, self.ranks))

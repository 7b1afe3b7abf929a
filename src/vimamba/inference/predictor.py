"""A trained run at work: `vimamba.load_run`."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

from vimamba.data.decode import DecodeError, decode_image, flatten
from vimamba.data.loaders import ImageDataset, Item, collate
from vimamba.data.transforms import AugmentOptions, Transform
from vimamba.errors import UserError, escaped, require, shown
from vimamba.inference.evaluation import evaluate, open_for_eval
from vimamba.inference.runner import Runner
from vimamba.processes import check_workers, obey_parent
from vimamba.tasks.options import InferenceOptions, InferencePrecision
from vimamba.tasks.results import Results
from vimamba.tasks.task import Task
from vimamba.tasks.weights import ModelCard, load_model

Picture = str | os.PathLike[str] | Image.Image | np.ndarray


def load_run(
    run: str | os.PathLike[str], device: str | torch.device | None = None, precision: InferencePrecision = "32-true",
    window: Literal["auto", "whole", "slide"] = "auto", flip: bool = False,
) -> Predictor:  # fmt: skip
    """The trained model of a run.

    Args:
        run: the folder of a run, its model.safetensors, or one of its checkpoints; it may be a stranger's, since
            nothing in it is executed.
        device: "cpu", "cuda", "cuda:1" ...; the fastest if not given.
        precision: "32-true", "bf16-mixed", "16-mixed", or "int8": see `vimamba.quantize`.
        window: to segment, look at "whole" images, or "slide" a window of the training size over them; "auto" slides
            over images that are more than twice as large.
        flip: look at the mirrored image too, to segment.

    Raises:
        UserError: there is no run, it is damaged or of a newer version, or there is no such device.
    """
    model, card = load_model(os.fspath(run))
    return Predictor(model, card, device, precision, Path(run), InferenceOptions(window, flip))


class Predictor:
    """A model, what it was trained to know, and how it wants its images.

    Args:
        model: in evaluation mode.
        card: its description.
        device, precision: as of `load_run`.
        run: the folder or file that they are from, for `evaluate`.
        how: how a dense task looks at an image.
    """

    def __init__(
        self, model: nn.Module, card: ModelCard, device: str | torch.device | None = None,
        precision: InferencePrecision = "32-true", run: Path | None = None, how: InferenceOptions | None = None,
    ):  # fmt: skip
        self.card, self.run = card, run
        self.runner = Runner(model, card, "auto" if device is None else str(device), precision, how)

    @property
    def task(self) -> type[Task]:
        """What it was trained for."""
        return self.runner.task

    @property
    def model(self) -> nn.Module:
        """The network: preprocessed images (batch, channels, height, width) to outputs."""
        return self.runner.model

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.runner.device

    @functools.cached_property
    def transform(self) -> Transform:
        """From an image and its target to what the model takes, and the target."""
        return self.task.transforms(self.card.preprocessing, AugmentOptions(augment="none")).eval

    @property
    def class_names(self) -> list[str]:
        """The classes that it knows."""
        return self.card.class_names

    def predict(self, images: Picture | Sequence[Picture], batch_size: int | None = None, num_workers: int = 0) -> Any:
        """What images show.

        Args:
            images: a path, a PIL image, a uint8 array (height, width, channels) of 1, 3 or 4 channels, of any size; or
                a list of them.
            batch_size: images at once; chosen by the task if not given.
            num_workers: processes that decode files.

        Returns:
            A result for one image, a list of results for a list: `Classification`, `Segmentation` or `Detections` of
            `vimamba.tasks.results`. Each has `.to_dict()` and `.draw(image)`.

        Raises:
            UserError: one of them is no image; the sentence names it.
        """
        several = isinstance(images, Sequence) and not isinstance(images, str)
        given = list(cast("Sequence[Picture]", images)) if several else [cast("Picture", images)]
        require(bool(given), "`images`: the list is empty; give at least one image")
        found = []
        for result in self.stream(given, batch_size, num_workers):
            if isinstance(result, UserError):
                raise result
            found.append(result)
        return found if several else found[0]

    def stream(self, images: Sequence[Picture], batch_size: int | None = None, num_workers: int = 0) -> Iterator[Any]:
        """The same, one by one as batches are done; for an image that cannot be read, the UserError that says why."""
        batch_size = self.task.eval_batch if batch_size is None else batch_size
        require(batch_size >= 1, f"`batch_size` is {batch_size}; it must be at least 1")
        check_workers(num_workers)
        dataset = PictureDataset(Pictures(images), self.transform)
        loader = DataLoader(dataset, batch_size, num_workers=num_workers, collate_fn=list, worker_init_fn=obey_parent)
        for items in loader:
            yield from self.results(items)

    def item(self, image: Image.Image) -> Item:
        """An upright 8-bit image as the model takes it; `results` says what it shows."""
        return Item(self.transform(image, 0)[0], 0, (image.height, image.width))

    def results(self, items: Sequence[Item | UserError]) -> Iterator[Any]:
        """What images show, all looked at together; where one could not be read, the UserError that stands for it."""
        good = [item for item in items if not isinstance(item, UserError)]
        found = self._together(good) if good else iter(())
        yield from (item if isinstance(item, UserError) else next(found) for item in items)

    def _together(self, items: list[Item]) -> Iterator[Any]:
        batch = collate(items)
        for outputs, _ in self.runner(batch.images, batch.sizes):
            yield from self.task.predictions(outputs, self.class_names)

    def evaluate(
        self, data: str | os.PathLike[str] | None = None, split: Literal["auto", "val", "all"] = "auto",
        batch_size: int | None = None, num_workers: int | None = None,
    ) -> Results:  # fmt: skip
        """Measure on images whose classes are known; by default those that the run held out.

        Args:
            data: as of `vimamba.train`; what the run was trained on if not given.
            split: "val", "all", or "auto": the held-out images where the data or the run tell them apart.
            batch_size: images at once; chosen by the task if not given.
            num_workers: processes that decode; chosen by the machine if not given.

        Raises:
            UserError: there are no such data, or their classes are not the model's.
        """
        found, _ = open_for_eval(self.run or Path(), self.task, None if data is None else os.fspath(data), split)
        return evaluate(self.runner, found, batch_size, num_workers)[0]


class Pictures:
    """Images from wherever a caller has them, as Samples without classes."""

    def __init__(self, images: Sequence[Picture]):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def image(self, index: int) -> Image.Image:
        given = self.images[index]
        if isinstance(given, str | os.PathLike):
            return decode_image(given)
        image = given if isinstance(given, Image.Image) else self._of_array(given, index)
        return flatten(image, self.name(index))

    def target(self, index: int) -> int:
        return 0

    def name(self, index: int) -> str:
        given = self.images[index]
        return os.fspath(given) if isinstance(given, str | os.PathLike) else f"images[{index}]"

    def _of_array(self, array: Any, index: int) -> Image.Image:
        """
        Raises:
            DecodeError: it is not a uint8 array (height, width, channels).
        """
        what = "give a path, a PIL image or a uint8 array (height, width, channels)"
        if not isinstance(array, np.ndarray):
            raise DecodeError(self.name(index), f"is {shown(type(array).__name__)}; {what}")
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] not in (1, 3, 4) or array.size == 0:
            raise DecodeError(self.name(index), f"is an array of {array.dtype} and shape {array.shape}; {what}")
        return Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else np.ascontiguousarray(array))


class PictureDataset(ImageDataset):
    """Preprocessed images, or why one cannot be read."""

    def __getitem__(self, index: Any) -> Any:
        item = super().__getitem__(index)
        return UserError(escaped(item)) if isinstance(item, str) else item

"""The arguments of a training run beyond those of its optimiser and its augmentation."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

from vimamba.data.transforms import MAX_SIDE
from vimamba.errors import require
from vimamba.processes import check_workers
from vimamba.tasks.checkpoint_every import CheckpointEvery
from vimamba.tasks.loggers import check_loggers

Precision = Literal["32-true", "bf16-mixed", "16-mixed"]
InferencePrecision = Literal["32-true", "bf16-mixed", "16-mixed", "int8"]


@dataclasses.dataclass
class RunOptions:
    """What to learn from, with what, and where to keep it.

    Args:
        data: mnist (built in), a folder with train/ and val/ or with one sub-folder for each class, hfds/NAME of
            the hub, or wds/FOLDER of shards; to segment: scenes-seg (built in), or a folder with images/ and masks/ or
            as ADE20K; to detect: scenes-det (built in), or a folder with COCO's JSON files
        model: a model of `vimamba models` or any of timm's
        task: what is learned: classification, segment (a class for each pixel) or detect (boxes and masks)
        output: folder for what the run leaves; runs/DATA-MODEL if not given
        model_args: keyword arguments of the model, such as {depth: 8}
        pretrained: start from the model's published weights
        checkpoint: start from the weights in this file
        img_size: height and width the model sees, or one number; chosen from the images and the model if not given
        in_chans: 1 (grey) or 3 (colour); the data's own if not given
        val_fraction: share held out of a folder that has no val/
        class_names: file with one class name a line, for hub data, shards and masks whose labels have none
        num_workers: processes that decode images; chosen by the machine if not given
        max_undecodable: share of files that may be undecodable before the run stops
        checkpoint_every: minutes or steps, such as 10min or 500steps, between the checkpoints within an epoch, which
            are what a kill or a lost machine may cost; null keeps one after each epoch only
        logger: where every number is logged, below logs/ in the run's folder: tensorboard, csv, another of Lightning's
            loggers such as wandb, the path of a class, several with commas between, or none
        seed: of the weights, the order of the images and their augmentation
    """

    data: str
    model: str
    task: str = "classification"
    output: str | None = None
    model_args: dict[str, Any] = dataclasses.field(default_factory=dict)
    pretrained: bool = False
    checkpoint: str | None = None
    img_size: int | tuple[int, int] | None = None
    in_chans: int | None = None
    val_fraction: float = 0.2
    class_names: str | None = None
    num_workers: int | None = None
    max_undecodable: float = 0.01
    checkpoint_every: str | None = "10min"
    logger: str = "tensorboard,csv"
    seed: int = 0

    def __post_init__(self) -> None:
        size = (self.img_size, self.img_size) if isinstance(self.img_size, int) else self.img_size
        require(size is None or min(size) >= 1, f"`img_size` is {self.img_size}; it must be at least 1")
        self.img_size = size
        self.model_args = {name: _listed(value) for name, value in self.model_args.items()}
        require(
            self.in_chans in (None, 1, 3),
            f"`in_chans` is {self.in_chans}; images have 1 (grey) or 3 (colour)",
        )
        require(0 < self.val_fraction < 1, f"`val_fraction` is {self.val_fraction}; give a share between 0 and 1")
        require(0 <= self.max_undecodable <= 1, f"`max_undecodable` is {self.max_undecodable}; give a share, 0 to 1")
        instead = {"num_classes": "leave it out", "in_chans": "give `in_chans`", "img_size": "give `img_size`"}
        for name, advice in instead.items():
            require(name not in self.model_args, f"`model_args.{name}`: the data decide it; {advice}")
        check_workers(self.num_workers)
        check_loggers(self.logger)
        CheckpointEvery.parse(self.checkpoint_every)
        require(0 <= self.seed < 2**62, f"`seed` is {self.seed}; give a number from 0 to 2^62")
        require(
            not (self.pretrained and self.checkpoint),
            "`pretrained` and `checkpoint`: choose one to start from",
        )


@dataclasses.dataclass
class DenseOptions:
    """What the tasks segment and detect take besides.

    Args:
        head: upernet, fpn, dpt or linear to segment; faster_rcnn, mask_rcnn or cascade_mask_rcnn to detect; if not
            given, upernet, and mask_rcnn or, where the data have no masks, faster_rcnn
        head_args: keyword arguments of the head and of its features, such as {width: 128, pyramid: simple}
        short_side: pixels to which the short side of each image is brought first; images keep their size if not given
        long_side: pixels that the long side has at most then
        ignore_index: value of the pixels of a mask that do not count; 255 if not given
        dice: weight of the Dice loss beside the cross-entropy
        aux_weight: weight of the auxiliary head's loss
        class_mix: probability that an image is covered with what another shows of half its classes, to segment
    """

    head: str | None = None
    head_args: dict[str, Any] = dataclasses.field(default_factory=dict)
    short_side: int | None = None
    long_side: int | None = None
    ignore_index: int | None = None
    dice: float = 1.0
    aux_weight: float = 0.4
    class_mix: float = 0.0

    def __post_init__(self) -> None:
        self.head_args = {name: _listed(value) for name, value in self.head_args.items()}
        require("head" not in self.head_args, "`head_args.head`: give `head`")
        for name in ("short_side", "long_side"):
            value = getattr(self, name)
            require(value is None or 1 <= value <= MAX_SIDE, f"`{name}` is {value}; give 1 to {MAX_SIDE} pixels")
        require(
            self.ignore_index is None or 0 <= self.ignore_index < 2**16,
            f"`ignore_index` is {self.ignore_index}; a mask's pixels are 0 to {2**16 - 1}",
        )
        for name in ("dice", "aux_weight"):
            value = getattr(self, name)
            require(0.0 <= value < math.inf, f"`{name}` is {value}; it cannot be negative")
        require(0.0 <= self.class_mix <= 1.0, f"`class_mix` is {self.class_mix}; a probability lies between 0 and 1")


@dataclasses.dataclass
class InferenceOptions:
    """How a dense task looks at an image.

    Args:
        window: whole images at once, or to segment a window of the training size that slides over them; auto slides
            over images that are more than twice as large
        flip: look at the mirrored image too and take the mean, to segment
    """

    window: Literal["auto", "whole", "slide"] = "auto"
    flip: bool = False


def _listed(value: Any) -> Any:
    """With lists for tuples, as YAML has them."""
    return [_listed(item) for item in value] if isinstance(value, list | tuple) else value


@dataclasses.dataclass
class MachineOptions:
    """What to compute on, and how.

    Args:
        accelerator: cpu, gpu, mps ...; auto takes the fastest
        devices: how many, or which: 2, [0, 3], auto
        strategy: auto, ddp, fsdp ...
        num_nodes: machines
        precision: 32-true, bf16-mixed or 16-mixed
        compile: compile the model with torch.compile, which takes a minute or more at the beginning
        grad_checkpointing: keep less of the forward pass and compute it again in the backward pass: less memory, more
            time
    """

    accelerator: str = "auto"
    devices: int | list[int] | str = "auto"
    strategy: str = "auto"
    num_nodes: int = 1
    precision: Precision = "32-true"
    compile: bool = False
    grad_checkpointing: bool = False

    def __post_init__(self) -> None:
        require(self.num_nodes >= 1, f"`num_nodes` is {self.num_nodes}; it must be at least 1")
        apart = self.strategy.removesuffix("_find_unused_parameters_true").removesuffix("_find_unused_parameters_false")
        require(
            not apart.endswith(("_spawn", "_fork", "_notebook")),
            f"`strategy` {self.strategy}: copies this process, which holds what cannot be copied; give ddp",
        )

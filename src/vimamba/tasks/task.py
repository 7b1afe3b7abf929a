"""What is learned from images and how it is judged: the base that the loop, the files and the reports know."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric, MetricCollection

from vimamba.data.image_data import ImageData, Source
from vimamba.data.loaders import Batch, ImageAlone, Transforms
from vimamba.data.sources import open_classes
from vimamba.data.transforms import AugmentOptions, Preprocessing, eval_transform, mix_seed, train_transform
from vimamba.errors import UserError
from vimamba.layers.mixers.gate import collect_gates
from vimamba.models.description import create
from vimamba.tasks.defaults import BATCHES, check_unused, choose_augmentation, choose_preprocessing
from vimamba.tasks.find import TASKS
from vimamba.tasks.optim import OptimOptions, build_optimizer, lr_factor, parameter_groups
from vimamba.tasks.options import DenseOptions, InferenceOptions
from vimamba.tasks.results import Results

if TYPE_CHECKING:
    from vimamba.tasks.config import TrainConfig
    from vimamba.tasks.weights import Architecture, ModelCard


class Choice(NamedTuple):
    """What a task makes of the arguments that were left to it."""

    preprocessing: Preprocessing
    augment: AugmentOptions
    head: dict[str, Any]


class Task(pl.LightningModule):
    """A model, its loss, its optimiser and its evaluation.

    A task is a subclass with a `name`, under which it is known once its module has been imported. The least that it
    says is how many numbers the model gives (`outputs`), what is learned (`criterion`) and what is measured (`metrics`,
    of which `monitor` decides which epoch is the best); one whose targets are not a number an image says besides where
    its data are from (`source`), how they are transformed, and what its model is. Every number of an evaluation is
    logged as `val_` and its name.

    Every step draws its random numbers from (seed, epoch, batch), so a run that was interrupted and resumed
    takes the same steps as one that was not.

    Args:
        model: gives `outputs` numbers an image.
        card: the model's description, which its files carry.
        optim: how fast to learn.
        augment: what is done to a batch beyond what its images went through.
        seed: of everything random in a step.
        dense: the weights of the losses of dense tasks.
    """

    name: ClassVar[str]
    monitor: ClassVar[str]  # of an evaluation's numbers, the one that decides
    mode: ClassVar[Literal["max", "min"]] = "max"
    scored: ClassVar[bool] = True  # whether an evaluation has a loss; if not, `metrics` count the `images`
    batches: ClassVar[tuple[int, ...]] = BATCHES
    eval_batch: ClassVar[int] = 64  # images at once in evaluation
    result: ClassVar[Any] = None  # the class of what `predictions` gives
    counted: ClassVar[str] = "images"  # the column of the table of classes that tells whether there were any
    columns: ClassVar[dict[str, str]] = {}  # an epoch's numbers to show with their headings; "%" is for shares

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" in vars(cls):
            TASKS[cls.name] = cls

    # -- its data

    @classmethod
    def source(cls) -> Source:
        """How the data that `data` names are opened."""
        return open_classes

    @classmethod
    def choose(cls, config: TrainConfig, data: ImageData, behind: Architecture) -> Choice:
        """What is left to the task by the arguments: preprocessing, augmentation and the description of a head.

        Raises:
            UserError: the arguments do not go together, or not with the data.
        """
        check_unused(cls.name, config.dense)
        return Choice(choose_preprocessing(config.run, data, behind), choose_augmentation(config.augment, data), {})

    @classmethod
    def transforms(cls, prep: Preprocessing, augment: AugmentOptions) -> Transforms:
        """What images go through on their way into a batch."""
        return Transforms(ImageAlone(train_transform(prep, augment)), ImageAlone(eval_transform(prep)))

    @classmethod
    def renumbered(cls, target: Any, order: list[int]) -> Any:
        """A target whose class c is called order[c]."""
        return order[target]

    # -- its model

    @classmethod
    def outputs(cls, class_names: list[str]) -> int:
        """How many numbers the model gives an image of data with these classes."""
        raise NotImplementedError(f"{cls.__name__} does not say how many outputs its model has")

    @classmethod
    def build(cls, card: ModelCard, pretrained: bool = False) -> nn.Module:
        """The model that a card describes, with new weights or with its publisher's."""
        prep = card.preprocessing
        given = {"num_classes": cls.outputs(card.class_names), "in_chans": prep.in_chans, "pretrained": pretrained}
        return create(card.model, prep.img_size, **{**given, **card.model_args})

    @classmethod
    def trunk(cls, model: Any) -> tuple[nn.Module, str]:
        """What of a model is timm's, and where it stands in it: weights of other tasks go there."""
        return model, ""

    def step(self, images: Any, targets: Any) -> Tensor:
        """The loss of a training batch, a mean over its images."""
        images, targets = self.mix(images, targets)
        return self.loss(self.model(images), targets)

    def mix(self, images_BCHW: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """A training batch as it is learned from."""
        return images_BCHW, targets

    @classmethod
    def criterion(cls, outputs: Tensor, targets: Tensor) -> Tensor:
        """The loss, a mean over the images: of training and, in evaluation, `loss`."""
        raise NotImplementedError(f"{cls.__name__} has no criterion")

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """What a step makes smaller."""
        return self.criterion(outputs, targets)

    # -- what it finds

    @classmethod
    def check_inference(cls, how: InferenceOptions) -> None:
        """Refuse what has no meaning for the task.

        Raises:
            UserError: something was asked for that has none.
        """
        check_unused(cls.name, how)

    @classmethod
    def infer(
        cls, model: nn.Module, images: Any, sizes: list[tuple[int, int]], prep: Preprocessing, how: InferenceOptions
    ) -> Iterator[tuple[Any, slice]]:
        """What a model in evaluation gives for preprocessed images that had these sizes, part by part of the batch."""
        yield model(images).float(), slice(None)

    @classmethod
    def metrics(cls, class_names: list[str], detailed: bool = False) -> dict[str, Metric]:
        """What is measured beside the loss, by name; each takes (outputs, targets). Details are for a report alone."""
        return {}

    @classmethod
    def update(cls, evaluation: MetricCollection, outputs: Any, targets: Any) -> None:
        """Take in a part of a batch, as `infer` gave it, with its targets."""
        evaluation.update(outputs, targets)

    @classmethod
    def results(cls, values: dict[str, Any], class_names: list[str]) -> Results:
        """What `metrics` came to, and the number of images."""
        numbers = {name: float(value) for name, value in values.items() if name != "images"}
        return Results(int(values["images"]), numbers)

    @classmethod
    def predictions(cls, outputs: Any, class_names: list[str]) -> list[Any]:
        """What the outputs for some images say, one for each."""
        raise UserError(f"the task {cls.name} does not say how to read what its model gives")

    @classmethod
    def sentence(cls, share: str) -> str:
        """What the number that decides, as it is shown, means."""
        return f"{cls.monitor} {share} on the held-out images"

    # -- the same for all

    def __init__(
        self, model: nn.Module, card: ModelCard, optim: OptimOptions, augment: AugmentOptions, seed: int = 0,
        dense: DenseOptions | None = None,
    ):  # fmt: skip
        super().__init__()
        self.model, self.card, self.optim, self.augment, self.seed = model, card, optim, augment, seed
        self.dense = dense or DenseOptions()
        self.ema = ModelEmaV3(model, optim.ema, use_warmup=True) if optim.ema else None
        self.evaluation = evaluation_of(type(self), card.class_names)
        self.train_loss = MeanMetric(nan_strategy="disable")  # looking for them at each step would wait for the device
        self.train_loss.persistent(True)  # an epoch that was interrupted keeps its first half
        self.evaluated: Results | None = None
        self._diverged: Tensor | None = None  # on the device: whether any loss so far was not finite

    def diverged(self) -> bool:
        """Whether any step's loss so far was not a finite number; asking waits for the device."""
        return self._diverged is not None and bool(self._diverged)

    @property
    def evaluated_model(self) -> nn.Module:
        """The weights that count: the moving average if there is one."""
        return self.model if self.ema is None else self.ema.module

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        step_seed = mix_seed(self.seed, self.current_epoch, batch_idx, self.global_rank)
        torch.manual_seed(step_seed)
        np.random.seed(step_seed)  # timm's Mixup

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        if len(batch.images) == 0:  # none could be decoded; other processes wait for this one's gradients all the same
            return torch.stack([p.sum() for p in self.model.parameters() if p.requires_grad]).sum() * 0.0
        with collect_gates() as gates:
            loss = self.step(batch.images, batch.targets)
        self.train_loss.update(loss.detach().expand(len(batch.images)))  # without a check for NaN it ignores weights
        model: Any = self.model  # another of timm's has no gates
        loss = loss + model.gate_loss(gates) if gates else loss
        broken = ~loss.detach().isfinite()
        self._diverged = broken if self._diverged is None else self._diverged | broken
        if self._trainer is not None and self.trainer.loggers:
            rate = self.trainer.optimizers[0].param_groups[0]["lr"]
            self.log_dict({"loss": loss.detach(), "lr": rate}, on_step=True, on_epoch=False)
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if self.ema is not None:
            self.ema.update(self.model, step=self.global_step + 1)

    def on_train_start(self) -> None:
        """A resumed run goes on with the rates and weight decay asked for now, not with those of its checkpoint."""
        (optimizer,) = self.trainer.optimizers
        schedule: Any = self.trainer.lr_scheduler_configs[0].scheduler
        steps = math.ceil(self.trainer.num_training_batches / self.trainer.accumulate_grad_batches)
        if self.current_epoch and not getattr(self.trainer.datamodule, "batches_done", 0):  # type: ignore[attr-defined]
            schedule.last_epoch = self.current_epoch * steps  # which differs from before on other devices
        groups = parameter_groups(self.model, self.optim)
        for position, (group, now) in enumerate(zip(optimizer.param_groups, groups, strict=True)):
            rate = now.get("lr", self.optim.highest_lr)
            schedule.base_lrs[position] = group["initial_lr"] = rate
            group["lr"] = rate * schedule.lr_lambdas[position](schedule.last_epoch)
            group["weight_decay"] = now["weight_decay"]

    def on_train_epoch_start(self) -> None:
        self.train_loss.reset()

    def on_validation_epoch_start(self) -> None:
        self.evaluation.reset()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        if len(batch.images):
            prep = self.card.preprocessing
            for outputs, rows in self.infer(self.evaluated_model, batch.images, batch.sizes, prep, InferenceOptions()):
                self.update(self.evaluation, outputs, batch.targets[rows])

    def on_validation_epoch_end(self) -> None:
        """Within a training epoch, after the last of its steps: what callbacks and loggers read of the epoch."""
        self.evaluated = results_of(type(self), self.evaluation, self.card.class_names)
        numbers = {f"val_{name}": value for name, value in self.evaluated.numbers.items()}
        # Equal in every process, since the metrics have been gathered already.
        self.log_dict({"train_loss": self.train_loss.compute(), **numbers}, sync_dist=True)

    def configure_optimizers(self) -> Any:
        total_steps = int(self.trainer.estimated_stepping_batches)
        # Fused AdamW unscales gradients in its own step: under mixed precision Lightning refuses to clip them before.
        mixed = isinstance(self.trainer.precision_plugin, MixedPrecision)
        fused = self.device.type in ("cpu", "cuda") and not mixed
        optimizer = build_optimizer(self.model, self.optim, fused)
        factor = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, total_steps, self.optim))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": factor, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["vimamba"] = self.card.to_dict()


class MeanLoss(Metric):
    """A task's criterion over all images, and their number. A loss that is not a number is said, not left out."""

    total: Tensor
    images: Tensor

    def __init__(self, criterion: Any):
        super().__init__()
        self.criterion = criterion
        self.add_state("total", torch.tensor(0.0), "sum")
        self.add_state("images", torch.tensor(0), "sum")

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        self.total += self.criterion(outputs, targets).float() * len(targets)
        self.images += len(targets)

    def compute(self) -> dict[str, Tensor]:
        return {"loss": self.total / self.images, "images": self.images}


def evaluation_of(task: type[Task], class_names: list[str], detailed: bool = False) -> MetricCollection:
    """The metrics of a task, to be updated with (outputs, targets)."""
    loss: Any = {"loss": MeanLoss(task.criterion)} if task.scored else {}
    metrics = {**loss, **task.metrics(class_names, detailed)}
    # Groups are formed from the first batch, on which different metrics may agree by chance.
    return MetricCollection(metrics, compute_groups=False)


def results_of(task: type[Task], evaluation: MetricCollection, class_names: list[str]) -> Results:
    """What an evaluation has come to, over all processes."""
    return task.results(evaluation.compute(), class_names)

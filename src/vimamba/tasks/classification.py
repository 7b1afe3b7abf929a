"""Learning to name what an image shows."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from timm.data.mixup import Mixup
from timm.utils import ModelEmaV3
from torch import nn
from torchmetrics import MeanMetric

from vimamba.data.loaders import Batch
from vimamba.data.transforms import AugmentOptions, mix_seed
from vimamba.layers.gate import collect_gates
from vimamba.tasks.optim import OptimOptions, build_optimizer, lr_factor, parameter_groups
from vimamba.tasks.results import Evaluation, Results
from vimamba.tasks.weights import ModelCard


class ClassificationTask(pl.LightningModule):
    """A model, its loss, its optimiser and its evaluation.

    Every step draws its random numbers from (seed, epoch, batch), so a run that was interrupted and resumed
    takes the same steps as one that was not.
    """

    def __init__(self, model: nn.Module, card: ModelCard, optim: OptimOptions, augment: AugmentOptions, seed: int = 0):
        super().__init__()
        self.model, self.card, self.optim, self.seed = model, card, optim, seed
        self.smoothing = augment.label_smoothing
        self.mixup = None
        if augment.mixup or augment.cutmix:
            self.mixup = Mixup(
                augment.mixup,
                augment.cutmix,
                label_smoothing=self.smoothing,
                num_classes=len(card.class_names),
            )
        self.ema = ModelEmaV3(model, optim.ema, use_warmup=True) if optim.ema else None
        self.evaluation = Evaluation(card.class_names)
        self.train_loss = MeanMetric(nan_strategy="disable")  # looking for them at each step would wait for the device
        self.train_loss.persistent(True)  # an epoch that was interrupted keeps its first half
        self.results: Results | None = None
        self._diverged: torch.Tensor | None = None  # on the device: whether any loss so far was not finite

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

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        images_BCHW, targets = batch.images, batch.targets
        if len(images_BCHW) == 0:  # none could be decoded; other processes wait for this one's gradients all the same
            return torch.stack([p.sum() for p in self.model.parameters() if p.requires_grad]).sum() * 0.0
        with collect_gates() as gates:
            if self.mixup is not None and len(images_BCHW) > 1:
                even = len(images_BCHW) // 2 * 2  # Mixup pairs each image with another
                images_BCHW, targets = self.mixup(images_BCHW[:even], targets[:even])
                loss = nn.functional.cross_entropy(self.model(images_BCHW).float(), targets)
            else:
                logits_BC = self.model(images_BCHW).float()
                loss = nn.functional.cross_entropy(logits_BC, targets, label_smoothing=self.smoothing)
        self.train_loss.update(loss.detach().expand(len(images_BCHW)))  # without a check for NaN it ignores weights
        model: Any = self.model  # another of timm's has no gates
        loss = loss + model.gate_loss(gates) if gates else loss
        broken = ~loss.detach().isfinite()
        self._diverged = broken if self._diverged is None else self._diverged | broken
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
            self.evaluation.update(self.evaluated_model(batch.images), batch.targets)

    def on_validation_epoch_end(self) -> None:
        self.results = self.evaluation.compute()

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

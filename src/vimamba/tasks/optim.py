"""What is learned how fast: parameter groups, the optimiser, and the learning rate over the steps."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import torch
from timm.optim import create_optimizer_v2, list_optimizers, param_groups_layer_decay, param_groups_weight_decay
from torch import nn

from vimamba.errors import nearest, require


@dataclasses.dataclass
class OptimOptions:
    """How long and how fast to learn.

    Args:
        epochs: passes over the training images; if not given, 30, or as many as make enough steps of a small set
        batch_size: images in a step on each device; if not given, 32, or fewer for a small set
        opt: optimiser, by timm's name
        lr: highest learning rate, for the whole batch over all devices; if not given, chosen by the width of the model
            from new weights, and 2e-4 from trained ones
        weight_decay: for matrices; never for biases, norms and what the model exempts
        schedule: learning rate after the warm-up; poly falls in a straight line, as dense tasks are often trained
        warmup_epochs: epochs of linear warm-up; null takes a twentieth of the epochs, at most 5
        min_lr: learning rate at the end of cosine and poly
        layer_decay: factor on the learning rate from each layer to the one below it
        clip_grad: largest norm of the gradient; null does not clip
        accumulate: batches whose gradients are added up for one step
        patience: epochs without a better one after which the run ends; null takes them all
        ema: decay of a moving average of the weights, which is then what is evaluated and kept
    """

    epochs: int | None = None
    batch_size: int | None = None
    opt: str = "adamw"
    lr: float | None = None
    weight_decay: float = 0.05
    schedule: Literal["cosine", "poly", "constant"] = "cosine"
    warmup_epochs: float | None = None
    min_lr: float = 1e-6
    layer_decay: float | None = None
    clip_grad: float | None = 1.0
    accumulate: int = 1
    patience: int | None = None
    ema: float | None = None

    def __post_init__(self) -> None:
        for name, most in (("epochs", 10**6), ("batch_size", 2**16), ("accumulate", 2**16), ("patience", 10**6)):
            value = getattr(self, name)
            require(
                value is None or 1 <= value <= most, f"`{name}` is {value}; it must be at least 1, and at most {most}"
            )
        for name in ("lr", "weight_decay", "min_lr", "warmup_epochs", "clip_grad"):
            value = getattr(self, name)
            require(value is None or 0.0 <= value < math.inf, f"`{name}` is {value}; it cannot be negative")
        known = [str(name) for name in list_optimizers()]
        hint = nearest(self.opt, known) or "; such as adamw, sgd, lamb or lion"
        require(self.opt.removeprefix("lookahead_") in known, f"`opt` {self.opt}: timm has no such optimiser{hint}")
        require(self.lr != 0.0, "`lr` is 0; nothing would be learned")
        for name in ("layer_decay", "ema"):
            value = getattr(self, name)
            require(value is None or 0.0 < value < 1.0, f"`{name}` is {value}; give a number between 0 and 1")

    @property
    def passes(self) -> int:
        """The epochs, once they are chosen."""
        assert self.epochs is not None, "choose_schedule comes first"
        return self.epochs

    @property
    def batch(self) -> int:
        """The batch size, once it is chosen."""
        assert self.batch_size is not None, "choose_schedule comes first"
        return self.batch_size

    @property
    def highest_lr(self) -> float:
        """The learning rate asked for, or that of new weights."""
        return 2e-3 if self.lr is None else self.lr

    @property
    def warmup(self) -> float:
        """Epochs of warm-up."""
        return min(5.0, self.passes / 20) if self.warmup_epochs is None else self.warmup_epochs


def parameter_groups(model: nn.Module, options: OptimOptions) -> list[dict[str, Any]]:
    """Groups with their weight decay and learning rate.

    Exempt from weight decay: biases and other one-dimensional parameters, what `model.no_weight_decay()` names,
    and parameters with the attribute `_no_weight_decay` (the mark that mamba_ssm uses). What is named so, tables of
    positions and rates rather than matrices, learns by AdamW beside Muon.
    """
    named: Any = getattr(model, "no_weight_decay", set)
    exempt = set(named())
    exempt |= {name for name, p in model.named_parameters() if getattr(p, "_no_weight_decay", False)}
    more: dict[str, Any] = {"no_weight_decay_list": exempt, "fallback_no_weight_decay": "muon" in options.opt}
    if options.layer_decay is None:
        return param_groups_weight_decay(model, options.weight_decay, **more)
    groups = param_groups_layer_decay(model, options.weight_decay, layer_decay=options.layer_decay, **more)
    return [{**group, "lr": options.highest_lr * group["lr_scale"]} for group in groups]


def build_optimizer(model: nn.Module, options: OptimOptions, fused: bool) -> torch.optim.Optimizer:
    """timm's optimiser of that name on the model's parameter groups; fused where it can be."""
    more: dict[str, Any] = {"fused": True} if fused and options.opt in ("adam", "adamw") else {}
    return create_optimizer_v2(
        model, options.opt, options.highest_lr, options.weight_decay,
        param_group_fn=lambda model: parameter_groups(model, options), **more,
    )  # fmt: skip


def lr_factor(step: int, total_steps: int, options: OptimOptions) -> float:
    """The learning rate of a step as a share of the highest: linear warm-up, then the schedule."""
    warmup = max(1, round(total_steps * min(1.0, options.warmup / options.passes)))
    if options.warmup > 0 and step < warmup:
        return (step + 1) / warmup
    if options.schedule == "constant":
        return 1.0
    lowest = min(1.0, options.min_lr / options.highest_lr)
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    left = 1.0 - progress if options.schedule == "poly" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return lowest + (1.0 - lowest) * left

"""The bidirectional designs side by side: what each is, and one run of one of them under the common budget."""

from __future__ import annotations

import dataclasses
import math
import time
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import nn

from vimamba.data.loaders import Batch, ImageDataModule
from vimamba.data.samples import ArraySamples
from vimamba.data.sources import ImageData, open_data
from vimamba.data.transforms import AugmentOptions, Preprocessing
from vimamba.errors import UserError
from vimamba.layers.mixers.gate import collect_gates
from vimamba.models.registry import count_flops, count_parameters, create_model
from vimamba.tasks.classification import ClassificationTask
from vimamba.tasks.optim import OptimOptions
from vimamba.tasks.weights import ModelCard

BASE = "ssm_conv"
DESIGNS: dict[str, dict[str, Any]] = {
    "none": dict(bidirectional="none"),
    "layer": dict(bidirectional="layer"),
    "ssm": dict(bidirectional="ssm"),
    BASE: dict(),
    "every 2nd": dict(bidirectional="every 2nd"),
    "alternate": dict(bidirectional="none", alternate=True, pooled_token=True),
    "row + column": dict(paths=["row", "column"]),
    "row + column, shared": dict(paths=["row", "column"], path_weights="shared"),
    "snake": dict(paths=["snake"]),
    "row + window2": dict(paths=["row", "window2"]),
    "gate": dict(merge="gate", gate_sparsity=0.15),
    "conv 2d": dict(conv="2d"),
    "conv stem": dict(stem="conv"),
    "sincos": dict(pos_embed="sincos"),
    "rope": dict(rope="patches"),
    "registers": dict(num_registers=4),
}
"""Arguments of VisionMamba beyond those common to all."""
SKIPPING = "gate, a third skipped"


@dataclasses.dataclass
class Trial:
    """One trained model, as a row of the study.

    Times are the quickest seen, milliseconds: of a forward pass over a batch in evaluation, and of a training step.
    For gates, the `skip_` values are measured at the threshold that a third of the directions are under.
    """

    design: str
    seed: int
    lr: float
    steps: int
    top1: float
    parameters: int
    gflops: float
    forward_ms: float
    step_ms: float
    train_s: float
    skip_share: float | None = None
    skip_top1: float | None = None
    skip_forward_ms: float | None = None


@dataclasses.dataclass
class Budget:
    """What is common to all runs."""

    data: ImageData
    model: str
    model_args: dict[str, Any]
    optim: OptimOptions
    equal: str

    def card(self, design: str) -> ModelCard:
        data = self.data
        if data.img_size is None or data.mean is None or data.std is None:
            raise UserError(f"`data` {data.name}: the study takes small images of one size: mnist or digits")
        prep = Preprocessing(data.img_size, data.in_chans, data.mean, data.std, crop_pct=1.0)
        return ModelCard(self.model, {**self.model_args, **DESIGNS[design]}, data.class_names, prep)

    def build(self, design: str) -> nn.Module:
        return self.card(design).build()

    def flops(self, model: nn.Module) -> int:
        prep = self.card(BASE).preprocessing
        return count_flops(model.eval(), (prep.in_chans, *prep.img_size))

    def steps(self, flops: int) -> int:
        """Training steps: the epochs' for the base design, as many as cost the same for another."""
        steps = self.optim.passes * (len(self.data.train) // self.optim.batch)
        return steps if self.equal == "steps" else max(1, round(steps * self.flops(self.build(BASE)) / flops))


def open_study_data(name: str) -> ImageData:
    """What `data` names; "digits" is scikit-learn's, 1797 digits of 8×8 pixels, every fourth held out."""
    if name != "digits":
        return open_data(name)
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError:
        raise UserError("`data` digits: needs the package scikit-learn; run pip install 'vimamba[study]'") from None
    images, labels = load_digits(return_X_y=True)
    images = (images.reshape(-1, 8, 8) * 255 / 16).round().astype(np.uint8)
    held_out = np.arange(len(images)) % 4 == 3
    train, val = (ArraySamples(images[which], labels[which], name) for which in (~held_out, held_out))
    mean, std = float(images.mean() / 255), float(images.std() / 255)
    names = [str(digit) for digit in range(10)]
    return ImageData(name, names, train, val, "1797 digits, 8 x 8", (8, 8), 1, (mean,), (std,), small=True)


class AblationTask(ClassificationTask):
    """Classification that remembers how long each step took."""

    def on_train_start(self) -> None:
        self.step_times: list[float] = []

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        self.started = time.perf_counter()

    def on_train_batch_end(self, *args: Any) -> None:
        self.step_times.append(time.perf_counter() - self.started)


def run_design(design: str, seed: int, lr: float, budget: Budget) -> Trial:
    """Train one design from one seed with one learning rate and measure it."""
    torch.manual_seed(seed)
    model = budget.build(design)
    flops = budget.flops(model)
    augment = AugmentOptions(augment="affine")
    optim = dataclasses.replace(budget.optim, lr=lr)
    task = AblationTask(model.train(), budget.card(design), optim, augment, seed)
    transforms = task.transforms(task.card.preprocessing, augment)
    module = ImageDataModule(budget.data, transforms, budget.optim.batch, 0, seed)
    steps = budget.steps(flops)
    trainer = pl.Trainer(
        max_steps=steps, max_epochs=-1, gradient_clip_val=budget.optim.clip_grad, logger=False, deterministic=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
        use_distributed_sampler=False, accelerator="auto", devices=1,
    )  # fmt: skip
    began = time.perf_counter()
    trainer.fit(task, module)
    seconds = time.perf_counter() - began
    batches = [(b.images, b.targets) for b in module.eval_loader(budget.data.val)]
    model = task.model.eval().cpu()
    run = Trial(
        design, seed, lr, steps, accuracy(model, batches), count_parameters(model), flops / 1e9,
        forward_ms(model, batches[0][0]), 1e3 * min(task.step_times), seconds,
    )  # fmt: skip
    return measure_skipping(run, model, batches) if DESIGNS[design].get("merge") == "gate" else run


def measure_skipping(run: Trial, model: Any, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> Trial:
    """Skip the third of all directions of all layers and images whose gates are smallest."""
    with collect_gates() as collected:
        accuracy(model, batches)
    gates = torch.cat([gate.flatten() for gate in collected])
    threshold = float(gates.quantile(1 / 3))
    model.set_gate_threshold(threshold)
    return dataclasses.replace(
        run,
        skip_share=float((gates < threshold).float().mean()),
        skip_top1=accuracy(model, batches),
        skip_forward_ms=forward_ms(model, batches[0][0]),
    )


@torch.no_grad()
def accuracy(model: nn.Module, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Share of the images named right."""
    right = sum(int((model(images).argmax(1) == targets).sum()) for images, targets in batches)
    return right / sum(len(targets) for _, targets in batches)


@torch.no_grad()
def forward_ms(model: nn.Module, images: torch.Tensor, repeats: int = 8) -> float:
    """The quickest of several forward passes over a batch."""
    best = math.inf
    for _ in range(repeats):
        began = time.perf_counter()
        model(images)
        best = min(best, time.perf_counter() - began)
    return 1e3 * best


@torch.inference_mode()
def design_costs(size: int = 512, depth: int = 6, rounds: int = 7) -> dict[str, float]:
    """Forward time of each design of Vim-Ti on one image of `size` pixels, as a multiple of the base design's.

    In turns, on one thread, the least processor time of several rounds, so that other work on the machine matters
    little. The gated design is also measured with a third of its directions closed.
    """
    arguments = {**DESIGNS, SKIPPING: DESIGNS["gate"]}
    models: dict[str, Any] = {
        name: create_model("vim_tiny_patch16_224", img_size=size, depth=depth, **options).eval()
        for name, options in arguments.items()
    }
    models[SKIPPING].set_gate_threshold(0.4)
    for i, gate in enumerate(models[SKIPPING]._gates()):
        if i % 3 != 2:  # one direction of two in two layers of three
            gate.proj.bias[i % 2] = -2.0
    image, best = torch.randn(1, 3, size, size), dict.fromkeys(models, math.inf)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for _ in range(rounds):
        for name, model in models.items():
            began = time.process_time()
            model(image)
            best[name] = min(best[name], time.process_time() - began)
    torch.set_num_threads(threads)
    return {name: seconds / best[BASE] for name, seconds in best.items()}

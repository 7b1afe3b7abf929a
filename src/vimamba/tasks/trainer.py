"""Lightning's trainer for a run: what it is asked, and what it may not be asked on this machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, ProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher

from vimamba.errors import UserError, nearest, one_line, require
from vimamba.processes import cores
from vimamba.tasks.config import TrainConfig
from vimamba.tasks.options import MachineOptions


class Patience(EarlyStopping):
    """Ends a run that gets no better; a resumed one has the patience asked for now."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({**state_dict, "patience": self.patience})


def build_trainer(
    config: TrainConfig, folder: Path, keeper: pl.Callback, callbacks: list[pl.Callback], loggers: list[Logger],
    progress: bool, monitor: str, mode: str,
) -> pl.Trainer:  # fmt: skip
    """Lightning's trainer, without the files and lines of its own."""
    optim, machine = config.optim, config.machine
    known = ["auto", *StrategyRegistry.available_strategies()]
    hint = nearest(machine.strategy, known) or "; give auto, ddp or fsdp"
    require(machine.strategy in known, f"`strategy` {machine.strategy}: there is no such strategy{hint}")
    of_trainer = {name: value for name, value in vars(machine).items() if name not in ("compile", "grad_checkpointing")}
    if optim.patience is not None:
        # Asked after the validation, since the end of an epoch comes to it after the keeper has saved.
        patience = Patience(monitor, patience=optim.patience, mode=mode, check_on_train_epoch_end=False)
        callbacks = [*callbacks, patience]
    bars, savers = (any(isinstance(c, kind) for c in callbacks) for kind in (ProgressBar, Checkpoint))
    callbacks = [*callbacks, keeper]  # which saves what the others have made of an epoch
    try:
        trainer = pl.Trainer(
            **of_trainer,
            max_epochs=optim.epochs,
            gradient_clip_val=optim.clip_grad,
            accumulate_grad_batches=optim.accumulate,
            callbacks=callbacks,
            default_root_dir=folder,
            logger=loggers,
            enable_checkpointing=savers,
            enable_progress_bar=progress or bars,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
        )
    except Exception as error:  # Lightning's own errors, one kind for each option
        plain = MachineOptions()
        given = {key: value for key, value in of_trainer.items() if value != getattr(plain, key)} or of_trainer
        options = " ".join(f"`{key}` {value}" for key, value in given.items())
        raise UserError(f"{options}: not possible here: {one_line(error)}") from error
    require(
        not isinstance(trainer.strategy.launcher, _MultiProcessingLauncher),
        f"`devices` {machine.devices}: would copy this interactive process, which holds what cannot be copied; start a "
        "script, or give `devices` 1",
    )
    check_processes(trainer, machine)
    if trainer.precision != machine.precision:  # Lightning takes another without asking
        raise UserError(f"`precision` {machine.precision}: needs a GPU; on the CPU give bf16-mixed or 32-true")
    return trainer


def check_processes(trainer: pl.Trainer, machine: MachineOptions) -> None:
    """Refuse more processes than there are cores for, and machines that would wait for each other for ever."""
    few = trainer.strategy.root_device.type != "cpu" or trainer.num_devices <= cores()
    require(
        few,
        f"`devices` {machine.devices}: starts as many processes on the CPU, which has {cores()} cores; give no more",
    )
    environment = getattr(trainer.strategy, "cluster_environment", None)
    launched = "MASTER_ADDR" in os.environ or (environment is not None and environment.creates_processes_externally)
    require(
        trainer.num_nodes == 1 or launched,
        f"`num_nodes` {machine.num_nodes}: would wait for the other machines for ever; start it on each of them with "
        "torchrun or srun, or with MASTER_ADDR, MASTER_PORT and NODE_RANK set",
    )

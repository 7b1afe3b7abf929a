"""vimamba.train: the command's runs from Python; tasks, callbacks and loggers of others."""

import csv
import inspect
import logging
import warnings

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torchmetrics import MeanAbsoluteError

import vimamba
from tests.cli.runs import train_arguments
from vimamba.cli import main
from vimamba.errors import UserError
from vimamba.quiet import TALKATIVE
from vimamba.tasks.config import argument_kinds
from vimamba.tasks.run_folder import LAST
from vimamba.tasks.run_keeper import RunKeeper
from vimamba.tasks.signals import StoppedBySignal
from vimamba.tasks.task import Task

TINY = {
    "model": "vim_nano", "model_args": {"depth": 1, "embed_dim": 16, "d_state": 4}, "img_size": 16, "num_workers": 0,
    "batch_size": 6, "epochs": 2, "accelerator": "cpu", "progress": False,
}  # fmt: skip


def weights(run):
    return (run / "model.safetensors").read_bytes()


def test_a_run_is_the_command_s(photos, tmp_path):
    run = vimamba.train(data=photos, output=tmp_path / "called", **TINY)
    assert main([str(a) for a in train_arguments(photos, tmp_path / "typed")]) == 0
    assert weights(run.folder) == weights(tmp_path / "typed")
    assert [row["epoch"] for row in run.history] == [1, 2]
    assert run.best in run.history
    with (run.folder / "metrics.csv").open(newline="") as file:
        assert [float(row["val_loss"]) for row in csv.DictReader(file)] == pytest.approx(
            [row["val_loss"] for row in run.history], rel=1e-4
        )
    assert run.predictor("cpu").predict(photos / "val/red/0.png").label in ("blue", "green", "red")


def test_a_run_says_what_it_leaves_out_of_the_data(photos, tmp_path):
    (photos / "train" / "nothing").mkdir()
    with pytest.warns(UserWarning, match="sub-folders without images: 1"):
        vimamba.train(data=photos, output=tmp_path / "run", **TINY)


def test_without_progress_other_libraries_are_silent(photos, tmp_path, monkeypatch):
    said = []
    for name in TALKATIVE:  # as in a process that has called no command
        monkeypatch.setattr(logging.getLogger(name), "level", logging.NOTSET)
        logging.getLogger(name).manager._clear_cache()
    lightning = logging.getLogger("lightning.pytorch")
    monkeypatch.setattr(lightning, "level", logging.INFO)
    monkeypatch.setattr(lightning, "callHandlers", said.append)
    monkeypatch.setattr(logging.getLogger("lightning.pytorch.utilities.rank_zero"), "callHandlers", said.append)
    (photos / "train" / "red" / "0.png").write_bytes(b"")
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        vimamba.train(data=photos, output=tmp_path / "run", max_undecodable=0.5, **TINY)
    assert said == []
    assert ["0.png" in str(warning.message) for warning in warned] == [True]  # our own is heard
    assert lightning.level == logging.INFO


def test_a_run_is_resumed_and_replaced(photos, tmp_path):
    whole = vimamba.train(data=photos, output=tmp_path / "whole", schedule="constant", **TINY | {"epochs": 3})
    run = vimamba.train(data=photos, output=tmp_path / "run", schedule="constant", **TINY)
    with pytest.raises(UserError, match=r"`output` .*: exists and is not empty.*with `overwrite`"):
        vimamba.train(data=photos, output=tmp_path / "run", **TINY)
    resumed = vimamba.train(resume=run.folder, epochs=3, progress=False)
    assert [row["train_loss"] for row in resumed.history] == [row["train_loss"] for row in whole.history]
    with pytest.raises(UserError, match=r"`resume` .*seed 0 -> 5 cannot change within a run"):
        vimamba.train(resume=run.folder, seed=5)
    replaced = vimamba.train(data=photos, output=tmp_path / "run", overwrite=True, seed=5, **TINY)
    assert replaced.history != run.history


def test_the_signature_lists_every_argument():
    parameters = inspect.signature(vimamba.train).parameters
    assert {*argument_kinds(), "resume", "overwrite", "callbacks", "loggers", "progress"} == {*parameters}
    for name in parameters:
        assert f"\n    {name}: " in inspect.cleandoc(vimamba.train.__doc__).replace("Args:\n", "Args:\n\n"), name


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"epoch": 3}, "`epoch`: there is no such argument; did you mean epochs"),
        ({"epochs": "three"}, "`epochs`: expected a whole number or null, got 'three'"),
        ({"crop_scale": [1.0]}, "`crop_scale`: expected"),
        ({"model": None}, "`model`: required but not given"),
        ({"task": "classifcation"}, "`task` classifcation: there is no such task; did you mean classification"),
        ({"logger": "tensorbord"}, "`logger` tensorbord: there is no such logger; did you mean tensorboard"),
        ({"logger": "no.such.Thing"}, "`logger` no.such.Thing: cannot be imported"),
        ({"logger": "wandb"}, "`logger` wandb: cannot be used here"),
        ({"opt": "adamv"}, "`opt` adamv: timm has no such optimiser; did you mean"),
        ({"patience": 0}, "`patience` is 0"),
        ({"grad_checkpointing": "yes"}, "`grad_checkpointing`: expected true or false"),
        ({"model": "vgg11", "model_args": {}, "grad_checkpointing": True}, "`grad_checkpointing`: vgg11 cannot"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_refused(photos, tmp_path, given, said):
    with pytest.raises(UserError, match=said):
        vimamba.train(**TINY | {"data": photos, "output": tmp_path / "run"} | given)
    assert not (tmp_path / "run").exists()


def test_others_callbacks_and_loggers_see_every_number(photos, tmp_path):
    seen = []

    class Watch(pl.Callback):
        def on_validation_end(self, trainer, pl_module):
            seen.append(dict(trainer.callback_metrics))

    stop = EarlyStopping("val_loss", mode="min", min_delta=1e9, patience=1)
    logger = CSVLogger(tmp_path / "mine", name="a", version="b")
    run = vimamba.train(
        data=photos, output=tmp_path / "run", callbacks=[Watch(), stop], loggers=[logger], logger="none",
        **TINY | {"epochs": 9},
    )  # fmt: skip
    assert len(run.history) == 2  # the second epoch was no better by so much
    assert {"train_loss", "val_loss", "val_top1", "val_top5"} <= {*seen[0]}
    assert float(seen[1]["val_loss"]) == run.history[1]["val_loss"]
    with (tmp_path / "mine/a/b/metrics.csv").open(newline="") as file:
        logged = [row["val_loss"] for row in csv.DictReader(file) if row["val_loss"]]
    assert [float(value) for value in logged] == pytest.approx([row["val_loss"] for row in run.history])
    assert not (run.folder / "logs").exists()


def test_patience_ends_a_run_that_can_be_resumed(photos, tmp_path):
    run = vimamba.train(data=photos, output=tmp_path / "run", patience=1, lr=1e-9, **TINY | {"epochs": 9})
    assert len(run.history) == 2
    assert {path.name for path in (run.folder / "logs").iterdir()} == {"csv", "tensorboard"}
    (events,) = (run.folder / "logs").rglob("events.out.tfevents.*")
    assert all(tag in events.read_bytes() for tag in (b"loss", b"lr", b"train_loss", b"val_loss", b"val_top1"))
    more = vimamba.train(resume=run.folder, patience=9, epochs=4, progress=False)
    assert len(more.history) == 4
    assert len(list((run.folder / "logs/csv").iterdir())) == 2


def test_a_run_that_fails_leaves_no_logs(photos, tmp_path):
    with pytest.raises(UserError, match="the loss is no finite number"):
        vimamba.train(data=photos, output=tmp_path / "run", lr=1e30, clip_grad=None, warmup_epochs=0, **TINY)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("opt", ["sgd", "lamb", "lookahead_adam", "nmuon"])
def test_another_optimiser_learns(photos, tmp_path, opt):
    run = vimamba.train(data=photos, output=tmp_path / "run", opt=opt, lr=0.05 if opt == "sgd" else 5e-3, **TINY)
    state = torch.load(run.folder / "checkpoints/last.ckpt", weights_only=True)["optimizer_states"][0]
    assert any("exp_avg" in one for one in state["state"].values()) == (opt != "sgd")
    assert run.history[1]["train_loss"] < run.history[0]["train_loss"]


class BrightnessTask(Task):
    """A toy from outside the package: how bright a class is, as a number between 0 and 1."""

    name, monitor, mode, columns = "brightness", "mae", "min", {"mae": "mean error"}

    @classmethod
    def outputs(cls, class_names):
        return 1

    @classmethod
    def criterion(cls, outputs, targets):
        return nn.functional.mse_loss(outputs[:, 0].float(), targets.float() / 10)

    @classmethod
    def metrics(cls, class_names, detailed=False):
        return {"mae": ErrorOfTenths()}

    @classmethod
    def predictions(cls, outputs, class_names):
        return outputs[:, 0].tolist()


class ErrorOfTenths(MeanAbsoluteError):  # noqa: N818 - no exception
    def update(self, outputs, targets):
        super().update(outputs[:, 0].float(), targets.float() / 10)


@pytest.mark.slow
def test_a_task_from_outside_is_trained_evaluated_and_used(tmp_path, capsys):
    arguments = {**TINY, "epochs": 2, "img_size": None, "batch_size": 64, "lr": 5e-3}
    run = vimamba.train(data="mnist", output=tmp_path / "run", task="brightness", **arguments)
    assert run.best["val_mae"] == min(row["val_mae"] for row in run.history) < 0.25  # a constant's is 0.25
    assert (run.folder / "curves.png").is_file()
    assert not (run.folder / "per_class.csv").exists()
    predictor = run.predictor("cpu")
    assert predictor.evaluate().numbers["mae"] == pytest.approx(run.best["val_mae"], abs=1e-5)
    assert isinstance(predictor.predict(torch.zeros(28, 28, 1, dtype=torch.uint8).numpy()), float)
    assert main(["eval", str(run.folder)]) == 0
    assert f"mean error {run.best['val_mae']:.4g}" in capsys.readouterr().out
    typed = train_arguments("mnist", tmp_path / "typed", "--task", "brightness", "--img_size", 28, "--epochs", 1)
    assert main([str(a) for a in typed]) == 0
    out = capsys.readouterr().out
    assert "mean error" in out
    assert "mae 0." in out


def test_a_signal_ends_a_run_with_a_word(photos, tmp_path):
    class Ask(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            next(c for c in trainer.callbacks if isinstance(c, RunKeeper)).signals.asked = 2

    with pytest.raises(
        StoppedBySignal, match=r"stopped at epoch 1, batch 1; everything is saved: continue with `resume` .*run"
    ):
        vimamba.train(data=photos, output=tmp_path / "run", callbacks=[Ask()], **TINY)
    run = vimamba.train(resume=tmp_path / "run", progress=False)
    assert weights(run.folder) == weights(vimamba.train(data=photos, output=tmp_path / "whole", **TINY).folder)


@pytest.mark.parametrize(("name", "value"), [("data", "hfds/evil/x"), ("logger", "evil.module.Logger")])
def test_a_stranger_s_run_fetches_and_imports_nothing(photos, tmp_path, name, value):
    run = vimamba.train(data=photos, output=tmp_path / "run", **TINY).folder
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump({**config, name: value}))
    with pytest.raises(UserError, match=f"names a {name} to be .*; give `{name}` {value} if you mean it"):
        vimamba.train(resume=run, epochs=3)


def test_a_run_is_resumed_where_it_was_moved_to_and_with_what_it_had(photos, tmp_path, monkeypatch):
    paths = ("row", "column")
    arguments = TINY | {"model_args": TINY["model_args"] | {"paths": paths}}
    vimamba.train(data=photos, output=tmp_path / "run", **arguments)
    (tmp_path / "run").rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    again = {"img_size": 16, "model_args": arguments["model_args"], "epochs": np.int64(3)}
    assert len(vimamba.train(resume="moved", progress=False, **again).history) == 3


def test_a_run_of_version_0_1_keeps_the_rate_that_it_chose(photos, tmp_path):
    wide = TINY | {"model_args": TINY["model_args"] | {"embed_dim": 128}, "schedule": "constant", "warmup_epochs": 0}
    run = vimamba.train(data=photos, output=tmp_path / "run", **wide)
    assert {row["lr"] for row in run.history} == {1e-3}
    assert yaml.safe_load((run.folder / "config.yaml").read_text())["lr"] == 1e-3
    old = vimamba.train(data=photos, output=tmp_path / "old", lr=2e-3, **wide)
    config = yaml.safe_load((old.folder / "config.yaml").read_text())
    (old.folder / "config.yaml").write_text(yaml.safe_dump({**config, "lr": None}))
    checkpoint = torch.load(old.folder / LAST, weights_only=True)
    del checkpoint["vimamba"]["version"]
    torch.save(checkpoint, old.folder / LAST)
    assert vimamba.train(resume=old.folder, epochs=3, progress=False).history[-1]["lr"] == 2e-3


def test_a_run_that_got_no_better_is_at_its_end(photos, tmp_path):
    run = vimamba.train(data=photos, output=tmp_path / "run", patience=2, lr=1e-9, **TINY | {"epochs": 9})
    state = torch.load(run.folder / LAST, weights_only=True)["callbacks"]
    (patience,) = (value for name, value in state.items() if "Patience" in name)
    assert (patience["wait_count"], patience["stopped_epoch"]) == (2, 2)


def test_logs_of_others_stay(photos, tmp_path):
    mine = tmp_path / "run/logs/tensorboard/mine"
    mine.mkdir(parents=True)
    with pytest.raises(UserError, match="exists and is not empty"):
        vimamba.train(data=photos, output=tmp_path / "run", **TINY)
    vimamba.train(data=photos, output=tmp_path / "run", overwrite=True, **TINY)
    assert mine.is_dir()


def test_a_number_logged_late_and_single_callbacks(photos, tmp_path):
    class Late(pl.Callback):
        def on_validation_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch:
                pl_module.log("val_extra", 1.0)

    run = vimamba.train(data=photos, output=tmp_path / "run", callbacks=Late(), **TINY)
    assert "val_extra" in (run.folder / "metrics.csv").read_text()
    saver = ModelCheckpoint(tmp_path / "mine", monitor="val_loss")
    vimamba.train(data=photos, output=tmp_path / "other", callbacks=saver, **TINY)
    assert list((tmp_path / "mine").glob("*.ckpt"))

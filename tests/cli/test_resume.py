"""--resume with options of its own: what is taken, what is refused, and runs of version 0.1."""

import shutil

import pytest
import torch
import yaml

from tests.cli.runs import train_arguments, write_photos
from tests.cli.test_train import last_state, metrics
from vimamba.cli import main
from vimamba.models import build
from vimamba.tasks import weights
from vimamba.tasks.classification import ClassificationTask
from vimamba.tasks.config import GROUPS
from vimamba.tasks.resume import TAKEN

LAST = "checkpoints/last.ckpt"


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A run that was stopped after one of two epochs, its photographs beside it; not to be changed."""
    root = tmp_path_factory.mktemp("half")
    photos = write_photos(root / "photos")
    more = ("--epochs", 1, "--schedule", "constant", "--warmup_epochs", 0, "--layer_decay", 0.9)
    assert main([str(a) for a in train_arguments(photos, root / "run", *more)]) == 0
    return root


@pytest.fixture
def run(half, tmp_path):
    return shutil.copytree(half / "run", tmp_path / "run")


# Every option that is taken, with another value than the run's.
OTHER = {
    "num_workers": 1, "max_undecodable": 0.5, "checkpoint_every": "2steps", "epochs": 3, "lr": 1e-4,
    "weight_decay": 0.5, "schedule": "cosine", "warmup_epochs": 0.5, "min_lr": 1e-5, "clip_grad": 0.5,
    "patience": 9, "logger": "csv", "compile": True, "grad_checkpointing": True,
    "devices": 1, "accelerator": "auto", "strategy": "ddp_find_unused_parameters_false", "num_nodes": 1,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(TAKEN - {"strategy", "num_nodes", "data"}))
def test_what_is_safe_is_taken_said_and_kept(vimamba, run, name, monkeypatch):
    monkeypatch.setattr("torch.nn.Module.compile", lambda model: None)  # for real in test_every_option.py
    options = {"epochs": 2, name: OTHER[name]}
    given = [argument for option, value in options.items() for argument in (f"--{option}", value)]
    status, out, err = vimamba("train", "--resume", run, *given)
    assert (status, err) == (0, "")
    line = next(line for line in out.splitlines() if line.startswith("continued from last.ckpt"))
    assert f", {name} " in line
    assert f" -> {OTHER[name]}" in line
    assert line.count("->") == len(options)
    assert yaml.safe_load((run / "config.yaml").read_text())[name] == OTHER[name]


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        ("lr", lambda group: group["initial_lr"] == pytest.approx(1e-4 * group["lr_scale"])),
        ("weight_decay", lambda group: group["weight_decay"] in (0.0, 0.5)),
    ],
)
def test_what_is_taken_acts(vimamba, run, monkeypatch, name, groups):
    before, rates = last_state(run), []
    original = ClassificationTask.optimizer_step

    def optimizer_step(self, *arguments, **keywords):
        rates.append(max(group["lr"] for group in self.trainer.optimizers[0].param_groups))
        original(self, *arguments, **keywords)

    monkeypatch.setattr(ClassificationTask, "optimizer_step", optimizer_step)
    assert vimamba("train", "--resume", run, "--epochs", 2, f"--{name}", OTHER[name])[0] == 0
    (optimizer,) = torch.load(run / LAST, weights_only=True)["optimizer_states"]
    assert all(map(groups, optimizer["param_groups"]))
    assert not all(torch.equal(before[key], value) for key, value in last_state(run).items())
    assert rates == [1e-4 if name == "lr" else 2e-3] * 4  # from the first step on


REFUSED = {
    "batch_size": 4, "accumulate": 2, "ema": 0.9, "layer_decay": 0.5, "val_fraction": 0.4, "seed": 5, "img_size": 32,
    "in_chans": 1, "precision": "bf16-mixed", "pretrained": "true", "checkpoint": "other.pth", "class_names": "names",
    "model": "vim_tiny_patch16_224", "model_args.depth": 2, "augment": "none", "crop_scale": "[0.5, 1.0]", "hflip": 0.1,
    "color_jitter": 0.1, "auto_augment": "rand-m9", "random_erasing": 0.3, "mixup": 0.5, "cutmix": 0.5,
    "label_smoothing": 0.0, "repeated_augmentation": 2, "opt": "lamb", "task": "value", "head": "fpn",
    "head_args.width": 8, "short_side": 64, "long_side": 64, "ignore_index": 3, "dice": 0.5, "aux_weight": 0.1,
    "class_mix": 0.5, "scale_jitter": "[0.5, 1.0]",
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_changes_the_meaning_of_a_run_is_refused(vimamba, run, name):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    status, _, err = vimamba("train", "--resume", run, "--epochs", 2, f"--{name}", REFUSED[name])
    assert status == 2
    assert err.startswith(f"error: --resume {run}: {name.split('.')[0]} ")
    assert "cannot change within a run; leave it out, or start a new run from its weights" in err
    assert err.count("\n") == 1
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_every_option_is_taken_or_refused():
    names = {field for group in GROUPS for field in group.__dataclass_fields__}
    refused = {name.split(".")[0] for name in REFUSED}
    assert names == TAKEN | refused | {"output"}
    assert not TAKEN & refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seed", 5, "--ema", 0.5], "seed 0 -> 5 and ema null -> 0.5 cannot change within a run; leave them out"),
        (["--output", "elsewhere"], "--output elsewhere: a run that is resumed stays in "),
        (["--config", "other.yaml"], "label_smoothing 0.1 -> 0.3 cannot change within a run"),
    ],
)
def test_several_at_once(vimamba, run, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.yaml").write_text("label_smoothing: 0.3\nepochs: 7\n")
    status, _, err = vimamba("train", "--resume", run, *options)
    assert status == 2
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(("epochs", "status"), [(1, 2), (2, 0)])
def test_fewer_epochs_than_were_begun_are_refused(vimamba, run, epochs, status):
    assert vimamba("train", "--resume", run, "--epochs", 2)[0] == 0
    found, _, err = vimamba("train", "--resume", run, "--epochs", epochs)
    assert found == status
    assert not status or err == f"error: --resume {run}: --epochs is 1, and the run is in epoch 2 already; give more\n"


def test_data_that_have_moved_are_found_again(vimamba, half, run, tmp_path):
    moved = shutil.copytree(half / "photos", tmp_path / "moved")
    assert vimamba("train", "--resume", run, "--epochs", 2, "--data", moved)[0] == 0
    assert yaml.safe_load((run / "config.yaml").read_text())["data"] == str(moved)
    other = write_photos(tmp_path / "other", classes=("a", "b", "c"))
    status, _, err = vimamba("train", "--resume", run, "--epochs", 3, "--data", other)
    assert status == 2
    assert "the checkpoint's list of classes is ['blue', 'green', 'red'], not ['a', 'b', 'c']" in err


def test_a_moved_run_is_resumed_where_it_is(vimamba, run, tmp_path):
    moved = run.rename(tmp_path / "moved")
    assert vimamba("train", "--resume", moved, "--epochs", 2)[0] == 0
    assert len(metrics(moved)) == 2
    assert not run.exists()


def test_resuming_needs_neither_the_first_weights_nor_the_network(vimamba, photos, trained, tmp_path, monkeypatch):
    start, run = tmp_path / "start.safetensors", tmp_path / "run"
    shutil.copy(trained / "model.safetensors", start)
    assert vimamba(*train_arguments(photos, run, "--checkpoint", start, "--epochs", 1))[0] == 0
    rate = float(metrics(run)[0]["lr"])
    start.unlink()
    assert vimamba("train", "--resume", run, "--epochs", 2)[0] == 0
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["checkpoint"] == str(start)
    assert rate < 2.1e-4  # the rate of trained weights, which is kept
    (run / "config.yaml").write_text(yaml.safe_dump({**config, "checkpoint": None, "pretrained": True}))

    def fetch(*arguments):
        raise AssertionError("the network is not needed")

    monkeypatch.setattr(build, "published_weights", fetch)
    monkeypatch.setattr(weights, "load_start", fetch)
    assert vimamba("train", "--resume", run, "--epochs", 3)[0] == 0
    (optimizer,) = torch.load(run / LAST, weights_only=True)["optimizer_states"]
    assert {group["initial_lr"] for group in optimizer["param_groups"]} == {2e-4}


def test_a_run_of_version_0_1_is_resumed(vimamba, run, tmp_path):
    """Its config knows less, last and best are one file, and its state has neither processes nor a previous one."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    del config["checkpoint_every"]
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    contents = torch.load(run / LAST, weights_only=True)
    del contents["callbacks"]["RunFolder"]["world"]
    torch.save(contents, run / LAST)
    (run / "checkpoints/best.ckpt").unlink()
    (run / "checkpoints/best.ckpt").hardlink_to(run / LAST)
    (run / "checkpoints/.last.partial").write_bytes(b"half")
    status, _, err = vimamba("train", "--resume", run, "--epochs", 2)
    assert (status, err) == (0, "")
    assert len(metrics(run)) == 2
    assert not (run / LAST).samefile(run / "checkpoints/best.ckpt")


def test_a_config_that_was_edited_does_not_change_the_model(vimamba, run):
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model_args"]["depth"] = 2
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    status, _, err = vimamba("train", "--resume", run, "--epochs", 2)
    assert status == 2
    assert "the checkpoint's --model_args is {" in err


def test_a_run_of_version_0_1_goes_on(vimamba, run):
    """Without what has been added since: options, the task and version of the card, the column that decides."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    for name in ("task", "logger", "opt", "patience", "compile", "grad_checkpointing"):
        del config[name]
    (run / "config.yaml").write_text(yaml.safe_dump({**config, "img_size": 16}))
    checkpoint = torch.load(run / LAST, weights_only=True)
    del checkpoint["vimamba"]["task"], checkpoint["vimamba"]["version"]
    del checkpoint["callbacks"]["RunFolder"]["monitor"]
    torch.save(checkpoint, run / LAST)
    (run / "held_out.json").unlink()
    shutil.rmtree(run / "logs")
    status, out, err = vimamba("train", "--resume", run, "--epochs", 2)
    assert (status, err) == (0, "")
    assert "epochs 1 -> 2" in out
    assert "2/2" in out
    assert vimamba("eval", run)[0] == 0

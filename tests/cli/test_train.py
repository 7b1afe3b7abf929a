"""vimamba train: what it leaves, how it stops and resumes, what it refuses."""

import csv
import importlib.util
import json
import os
import signal

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from tests.cli.runs import train_arguments, write_photos
from vimamba.tasks.classification import ClassificationTask
from vimamba.tasks.run_keeper import RunKeeper
from vimamba.tasks.task import Task

FILES = ("config.yaml", "metrics.csv", "model.safetensors", "curves.png", "per_class.csv")
CHECKPOINTS = ("checkpoints/last.ckpt", "checkpoints/best.ckpt")


def metrics(run):
    with (run / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def last_state(run):
    return torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]


def test_a_run_leaves_its_files(trained):
    assert all((trained / name).stat().st_size for name in (*FILES, *CHECKPOINTS))
    rows = metrics(trained)
    assert [row["epoch"] for row in rows] == list("123456")
    assert float(rows[-1]["val_top1"]) > 0.9  # three plain colours
    with safe_open(trained / "model.safetensors", "pt") as file:
        assert '"class_names": ["blue", "green", "red"]' in file.metadata()["vimamba"]
    config = yaml.safe_load((trained / "config.yaml").read_text())
    assert config["epochs"] == 6
    assert config["layer_decay"] is None
    assert "resume" not in config


def test_a_run_is_repeated_by_its_config(vimamba, trained, tmp_path):
    status, out, _ = vimamba("train", "--config", trained / "config.yaml", "--output", tmp_path / "again")
    assert status == 0
    assert "of the held-out images named right" in out
    assert metrics(tmp_path / "again") == metrics(trained)


def interrupt_at(monkeypatch, step, signum):
    """Send ourselves a signal while a step is computed."""
    original, steps = Task.training_step, iter(range(1000))

    def training_step(self, batch, batch_idx):
        if next(steps) == step:
            os.kill(os.getpid(), signum)
        return original(self, batch, batch_idx)

    monkeypatch.setattr(Task, "training_step", training_step)


@pytest.mark.parametrize(
    ("step", "options"),
    [
        (1, []),  # within the first epoch
        (5, ["--mixup", "0.5", "--ema", "0.9", "--model_args.drop_path_rate", "0.3"]),  # within the second
        (3, ["--random_erasing", "0.5"]),  # at the last batch of the first epoch, whose validation comes first
        (1, ["--accumulate", "2", "--repeated_augmentation", "2"]),
        (4, ["--num_workers", "1", "--label_smoothing", "0"]),
    ],
)
def test_an_interrupted_run_resumes_to_the_same_result(vimamba, photos, tmp_path, monkeypatch, step, options):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert vimamba(*train_arguments(photos, whole, *options))[0] == 0
    with monkeypatch.context() as patch:
        interrupt_at(patch, step, signal.SIGINT)
        status, out, _ = vimamba(*train_arguments(photos, cut, *options))
    assert status == 130
    assert f"vimamba train --resume {cut}" in out
    assert vimamba("train", "--resume", cut)[0] == 0
    assert metrics(cut) == metrics(whole)
    cut_state, whole_state = last_state(cut), last_state(whole)
    assert all(torch.equal(cut_state[name], whole_state[name]) for name in whole_state)
    assert load_file(cut / "model.safetensors").keys() == load_file(whole / "model.safetensors").keys()


def test_computing_again_trains_the_same_weights(vimamba, photos, tmp_path):
    runs = [tmp_path / recompute for recompute in ("never", "always")]
    for run in runs:
        assert vimamba(*train_arguments(photos, run, "--model_args.recompute", run.name))[0] == 0
    never, always = (load_file(run / "model.safetensors") for run in runs)
    assert all(always[name].equal(never[name]) for name in never)


def test_sigterm_saves_too(vimamba, photos, tmp_path, monkeypatch):
    interrupt_at(monkeypatch, 2, signal.SIGTERM)
    assert vimamba(*train_arguments(photos, tmp_path / "run"))[0] == 143
    assert (tmp_path / "run" / "checkpoints/last.ckpt").is_file()


def test_a_finished_run_can_be_trained_longer(vimamba, photos, tmp_path):
    run = tmp_path / "run"
    assert vimamba(*train_arguments(photos, run, "--schedule", "constant"))[0] == 0
    assert vimamba("train", "--resume", run)[0] == 0  # nothing to do is no mistake
    assert vimamba("train", "--resume", run, "--epochs", 3)[0] == 0
    assert len(metrics(run)) == 3


def test_fine_tuning_takes_the_body_and_leaves_the_head(vimamba, trained, tmp_path):
    data = write_photos(tmp_path / "two", classes=("dark", "light"))
    more = ("--checkpoint", trained / "model.safetensors")
    status, out, _ = vimamba(*train_arguments(data, tmp_path / "run", *more))
    assert status == 0
    assert "with a new head" in out


def test_a_model_of_a_folder_is_known_by_its_registered_name_afterwards(vimamba, photos, tmp_path):
    (tmp_path / "own").mkdir()
    config = {"architecture": "vim_nano", "num_classes": 5, "model_args": {"depth": 1, "embed_dim": 16, "d_state": 4}}
    config["pretrained_cfg"] = {"input_size": [3, 16, 16], "mean": [0.25, 0.5, 0.75], "std": [0.5, 0.5, 0.5]}
    (tmp_path / "own" / "config.json").write_text(json.dumps(config))
    model = ("--model", f"local-dir:{tmp_path}/own", "--model_args.depth", 2, "--epochs", 1)
    status, _, err = vimamba(*train_arguments(photos, tmp_path / "run", *model))
    assert (status, err) == (0, "")
    assert vimamba("predict", tmp_path / "run", photos / "val" / "red")[0] == 0
    with safe_open(tmp_path / "run" / "model.safetensors", "pt") as file:
        described = json.loads(file.metadata()["vimamba"])
    assert described["model"] == "vim_nano"
    assert described["preprocessing"]["mean"] == [0.25, 0.5, 0.75]
    assert described["model_args"] == {"depth": 2, "embed_dim": 16, "d_state": 4}
    (tmp_path / "own" / "config.json").unlink()
    assert vimamba("train", "--resume", tmp_path / "run", "--epochs", 2)[0] == 0  # from what the checkpoint says


@pytest.mark.parametrize("argument", ["norm_layer: [1]", "block_args: {a: 1}", "nothing: 1"])
def test_arguments_that_a_file_could_not_say_are_not_trained_with(vimamba, photos, tmp_path, argument):
    more = ["--model", "resnet18", "--model_args", f"{{{argument}}}"]
    status, _, err = vimamba(*train_arguments(photos, tmp_path / "run", *more))
    assert (status, err.count("\n")) == (2, 1)
    assert "--model_args" in err
    assert not (tmp_path / "run").exists()


def test_what_is_typed_for_timm_is_left_out_of_the_file(vimamba, photos, tmp_path):
    run = tmp_path / "run"
    assert vimamba(*train_arguments(photos, run, "--model_args.exportable", "true", "--epochs", 1))[0] == 0
    assert vimamba("predict", run, photos / "val" / "red")[0] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "vim_nanno"], "--model vim_nanno: there is no such model; did you mean vim_nano"),
        (["--data", "mnits"], "--data mnits: there is no such folder or built-in sample; did you mean mnist?"),
        (["--epochs", "0"], "--epochs is 0; it must be at least 1"),
        (["--epochs", "ten"], "--epochs: expected a whole number or null, got ten"),
        (["--batch-size", "-4"], "--batch_size is -4; it must be at least 1"),
        (["--epohs", "3"], "--epohs: there is no such option; did you mean --epochs"),
        (["--lr", "-1"], "--lr is -1.0; it cannot be negative"),
        (["--schedule", "cosinus"], "--schedule: expected cosine or poly or constant, got cosinus"),
        (["--in_chans", "4"], "--in_chans is 4"),
        (["--img_size", "0"], "--img_size is 0"),
        (["--precision", "8-bit"], "--precision: expected 32-true or bf16-mixed or 16-mixed, got 8-bit"),
        (["--devices", "none"], "--devices none"),
        (["--model_args.dept", "3"], "--model_args"),
        (["--auto_augment", "rand-x9-nonsense"], "--auto_augment rand-x9-nonsense"),
        (["--config", "nowhere.yaml"], "--config: there is no file"),
        (["--checkpoint", "nowhere.pt"], "nowhere.pt"),
        (["--resume", "nowhere"], "--resume nowhere: holds no config.yaml"),
        (["--data", "hfds/some/thing"], "pip install 'vimamba[hub]'"),
        (["--data", "wds/some"], "some/_info.json is missing"),
        (["--strategy", "dpd"], "--strategy dpd: there is no such strategy; did you mean ddp"),
        (["--strategy", "ddp_spawn"], "--strategy ddp_spawn: copies this process"),
        (["--strategy", "ddp_fork_find_unused_parameters_true"], "copies this process, which holds what cannot be"),
        (["--strategy", "fsdp"], "--strategy fsdp: not possible here"),
        (["--devices", "1000"], "--devices 1000: starts as many processes on the CPU, which has"),
        (["--num_nodes", "2"], "--num_nodes 2: would wait for the other machines for ever; start it on each of them"),
        (["--num_nodes", "0"], "--num_nodes is 0; it must be at least 1"),
        (["--num_workers", "100000"], "--num_workers is 100000; it counts processes, at most"),
        (["--num_workers", "-1"], "--num_workers is -1; it counts processes"),
        (["--seed", str(2**64)], f"--seed is {2**64}; give a number from 0 to 2^62"),
    ],
)
def test_wrong_options_are_refused_in_one_sentence(vimamba, photos, tmp_path, monkeypatch, options, message):
    found = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "datasets" else found(name))
    status, _, err = vimamba(*train_arguments(photos, tmp_path / "run", *options))
    assert status == 2
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_too_large_a_batch_is_said_as_that(vimamba, photos, tmp_path, monkeypatch):
    def training_step(self, batch, batch_idx):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(ClassificationTask, "training_step", training_step)
    status, _, err = vimamba(*train_arguments(photos, tmp_path / "run"))
    assert status == 2
    assert err.startswith("error: --batch_size 6: does not fit into the memory; give less")


def break_photos(photos, how):
    if how == "empty":
        for path in photos.rglob("*.png"):
            path.unlink()
    elif how == "one class":
        for name in ("blue", "red"):
            for half in ("train", "val"):
                for path in (photos / half / name).iterdir():
                    path.unlink()
    elif how == "missing from val":
        for path in (photos / "val" / "red").iterdir():
            path.unlink()
    elif how == "only in val":
        (photos / "val" / "red").rename(photos / "val" / "reds")
    elif how == "truncated":
        whole = (photos / "train" / "red" / "3.png").read_bytes()
        (photos / "train" / "red" / "3.png").write_bytes(whole[: len(whole) // 2])
    elif how == "0 bytes":
        (photos / "val" / "blue" / "1.png").write_bytes(b"")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("empty", "no images found"),
        ("one class", "found one class only ('green')"),
        ("missing from val", "no images of class 'red'"),
        ("only in val", "class 'reds' is not in"),
        ("truncated", "1 of the 24 training images cannot be decoded, more than 1%"),
        ("0 bytes", "1 of the 12 held-out images cannot be decoded, more than 1%"),
    ],
)
def test_broken_data_are_refused_in_one_sentence(vimamba, photos, tmp_path, how, message):
    break_photos(photos, how)
    status, _, err = vimamba(*train_arguments(photos, tmp_path / "run"))
    assert status == 2
    assert message in err
    assert err.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in err


@pytest.mark.parametrize("workers", [0, 1])
def test_a_few_undecodable_files_are_named_and_left_out(vimamba, photos, tmp_path, workers):
    break_photos(photos, "truncated")
    break_photos(photos, "0 bytes")
    more = ("--max_undecodable", 0.1, "--num_workers", workers)
    status, _, err = vimamba(*train_arguments(photos, tmp_path / "run", *more))
    assert status == 0
    assert err.count("red/3.png: cannot be decoded") == 1
    assert err.count("blue/1.png: is empty (0 bytes)") == 1
    assert "1 training image could not be decoded" in err
    assert "1 held-out image could not be decoded" in err


def test_images_of_odd_sizes_and_kinds_are_learnt_from(vimamba, photos, tmp_path):
    folder = photos / "train" / "red"
    Image.new("RGB", (1, 1), "red").save(folder / "one.png")
    Image.new("L", (40_000, 10), 99).save(folder / "long.png")
    Image.fromarray(np.full((9, 9), 40_000, np.uint16)).save(folder / "deep.png")
    Image.new("CMYK", (9, 9)).save(folder / "print.jpg")
    status, _, err = vimamba(*train_arguments(photos, tmp_path / "run"))
    assert (status, err) == (0, "")


def test_an_existing_folder_is_kept_unless_told_otherwise(vimamba, photos, tmp_path):
    run = tmp_path / "run"
    assert vimamba(*train_arguments(photos, run))[0] == 0
    (run / "notes.txt").write_text("mine")
    before = (run / "model.safetensors").read_bytes()
    status, _, err = vimamba(*train_arguments(photos, run, "--seed", 5))
    assert status == 2
    assert "--overwrite" in err
    assert f"--resume {run}" in err
    assert (run / "model.safetensors").read_bytes() == before
    assert vimamba(*train_arguments(photos, run, "--seed", 5, "--overwrite"))[0] == 0
    assert (run / "model.safetensors").read_bytes() != before
    assert (run / "notes.txt").read_text() == "mine"


def test_a_folder_that_cannot_be_written_is_refused(vimamba, photos, tmp_path):
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file" / "run", "/proc/run"):
        status, _, err = vimamba(*train_arguments(photos, output))
        assert status == 2
        assert err.startswith(f"error: --output {output}: ")
        assert err.count("\n") == 1


FULL = "[enforce fail at inline_container.cc:671] . unexpected pos 576 vs 534"  # torch.save on a full disk


@pytest.mark.parametrize(
    ("problem", "said"),
    [
        (OSError(28, "No space left on device"), "(No space left on device)"),
        (RuntimeError(FULL), f"(is the disk full? {FULL})"),
        (RuntimeError("a device\nwent away"), "(a device went away)"),
    ],
)
def test_a_checkpoint_that_cannot_be_written_costs_no_finished_epoch(
    vimamba, photos, tmp_path, monkeypatch, problem, said
):
    run, saved = tmp_path / "run", []
    original = RunKeeper._save

    def save(self, trainer, *more):
        if saved:

            def full(path):
                path.write_bytes(b"half a checkpoint")
                raise problem

            monkeypatch.setattr(trainer, "save_checkpoint", full)
        saved.append(1)
        original(self, trainer, *more)

    monkeypatch.setattr(RunKeeper, "_save", save)
    status, _, err = vimamba(*train_arguments(photos, run))
    monkeypatch.undo()
    assert status == 2
    assert f"last.ckpt: cannot be written {said}; the run up to its last checkpoint is kept" in err
    assert err.count("\n") == 1
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]
    assert vimamba("train", "--resume", run)[0] == 0
    assert len(metrics(run)) == 2


def test_a_diverging_run_stops_and_says_so(vimamba, photos, tmp_path):
    status, _, err = vimamba(
        *train_arguments(photos, tmp_path / "run", "--lr", 1e30, "--clip_grad", "null", "--warmup_epochs", 0)
    )
    assert status == 2
    assert "lower --lr" in err

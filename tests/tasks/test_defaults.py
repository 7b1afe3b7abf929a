"""What a run is given where nobody said."""

from types import SimpleNamespace

import pytest
import timm
import torch
from PIL import Image
from torch import nn

from tests.cli.runs import train_arguments, write_photos
from vimamba.cli import main
from vimamba.data.decode import DecodeError
from vimamba.data.sources import ImageData
from vimamba.tasks.config import read_config
from vimamba.tasks.defaults import (
    choose_lr,
    choose_preprocessing,
    choose_schedule,
    steps_an_epoch,
    typical_side,
)
from vimamba.tasks.optim import OptimOptions
from vimamba.tasks.options import RunOptions
from vimamba.tasks.weights import architecture


@pytest.mark.parametrize("images", [2, 20, 144, 500, 511, 512, 4000, 1_281_167])
def test_small_sets_get_enough_steps_and_large_ones_are_left(images):
    chosen = choose_schedule(OptimOptions(), images)
    steps = chosen.passes * steps_an_epoch(images, chosen.batch)
    assert steps >= 600 or chosen.passes == 300
    assert chosen.batch == (32 if images >= 512 else 16)
    assert (chosen.passes == 30) == (steps_an_epoch(images, chosen.batch) * 30 >= 600)


def test_what_is_asked_for_is_left():
    asked = choose_schedule(OptimOptions(epochs=3, batch_size=7), 144)
    assert (asked.passes, asked.batch) == (3, 7)
    assert choose_schedule(OptimOptions(epochs=3), 144).batch == 16
    assert choose_schedule(OptimOptions(batch_size=8), 144).passes == 34
    assert choose_schedule(OptimOptions(batch_size=8, accumulate=2), 144).passes == 67


@pytest.mark.parametrize(
    ("images", "batch", "accumulate", "steps"), [(10, 4, 1, 2), (10, 4, 3, 1), (3, 4, 1, 1), (100, 4, 3, 9)]
)
def test_steps_are_those_of_the_trainer(images, batch, accumulate, steps):
    assert steps_an_epoch(images, batch, accumulate) == steps


@pytest.mark.parametrize(
    ("name", "lr"), [("vim_nano", 2e-3), ("vim_tiny_patch16_224", 6.7e-4), ("vim_small_patch16_224", 3.3e-4)]
)
def test_the_rate_falls_with_the_width(name, lr):
    with torch.device("meta"):
        model = timm.create_model(name, depth=1)
    assert choose_lr(OptimOptions(), model, trained=False).lr == lr
    assert choose_lr(OptimOptions(), model, trained=True).lr == 2e-4
    assert choose_lr(OptimOptions(lr=0.5), model, trained=True).lr == 0.5
    assert choose_lr(OptimOptions(), nn.Linear(2, 2), trained=False).lr == 2e-3


def images_of(*sides):
    """Data of pictures whose short sides are these; None cannot be decoded."""

    def image(index):
        if sides[index] is None:
            raise DecodeError("a", "b")
        return Image.new("RGB", (sides[index] + 9, sides[index]))

    class Listed(list):
        pass

    train = Listed(sides)
    train.image = image
    return ImageData("photos", ["a", "b"], train, [])


@pytest.mark.parametrize(
    ("model", "sides", "size"),
    [
        ("vim_nano", [20], 28),
        ("vim_nano", [40, 500, 50], 28),
        ("vim_nano", [56], 56),
        ("vim_nano", [112, 30, 130], 56),
        ("vim_nano", [4000], 56),
        ("vim_nano", [None, None], 28),
        ("vim_nano", [None, 60], 56),
        ("vim_tiny_patch16_224", [112], 112),
        ("vim_tiny_patch16_224", [32], 112),
        ("vim_tiny_patch16_224", [113], 224),
        ("vim_tiny_patch16_224", [3000], 224),
        ("resnet18", [100], 224),
        ("vit_base_patch14_dinov2", [100], 518),
    ],
)
def test_the_size_follows_the_images(model, sides, size):
    options, data = RunOptions("photos", model), images_of(*sides)
    assert choose_preprocessing(options, data, architecture(model)).img_size == (size, size)


def test_weights_keep_their_size_and_a_size_that_is_given_is_taken():
    data, behind = images_of(112), architecture("vim_tiny_patch16_224")
    for given, size in (
        ({"pretrained": True}, 224),
        ({"checkpoint": "w.pth"}, 224),
        ({"img_size": (64, 80)}, (64, 80)),
    ):
        chosen = choose_preprocessing(RunOptions("photos", behind.name, **given), data, behind).img_size
        assert chosen == (size if isinstance(size, tuple) else (size, size))
    small = SimpleNamespace(train=data.train)
    assert typical_side(small) == 112


def test_what_was_chosen_is_said_and_kept(tmp_path, capsys):
    photos = write_photos(tmp_path / "photos", halves=(("train", 30), ("val", 1)))
    model = ["--model", "vim_nano", "--model_args", "{depth: 1, embed_dim: 16, d_state: 4}", "--num_workers", "0"]
    run = tmp_path / "run"
    assert main(["train", "--data", str(photos), *model, "--output", str(run), "--epochs", "2"]) == 0
    assert "2 epochs of 5 steps of 16 images: 10 steps" in capsys.readouterr().out
    kept = read_config(run / "config.yaml")
    assert (kept["batch_size"], kept["epochs"], kept["img_size"]) == (16, 2, [28, 28])
    assert main([str(a) for a in train_arguments(photos, tmp_path / "other", "--accumulate", 2)]) == 0
    assert "2 epochs of 8 steps of 12 images: 16 steps" in capsys.readouterr().out

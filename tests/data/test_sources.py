"""Where images come from, and into which halves they go."""

import numpy as np
import pytest
from PIL import Image

from tests.data.folders import GREY, make
from vimamba.data import mnist
from vimamba.data.loaders import ImageDataModule, RepeatedOrder
from vimamba.data.sources import open_data
from vimamba.data.transforms import AugmentOptions, Preprocessing, eval_transform, train_transform
from vimamba.tasks.task import Task


def test_the_sample_is_split_evenly_and_apart():
    data = open_data("mnist")
    assert (len(data.train), len(data.val)) == (4000, 1000)
    assert np.bincount(data.train.targets).tolist() == [400] * 10
    assert np.bincount(data.val.targets).tolist() == [100] * 10
    assert not {i.tobytes() for i in data.train.images} & {i.tobytes() for i in data.val.images}


def test_digits_can_be_written_as_pictures(tmp_path):
    paths = mnist.write_digits(tmp_path / "digits")
    assert len(paths) == 3
    held_out = open_data("mnist").val
    assert np.array_equal(np.asarray(Image.open(paths[1])), held_out.images[1])
    assert f"-{held_out.target(1)}.png" in paths[1].name


@pytest.mark.parametrize("augment", ["none", "affine", "crop"])
@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("policy", [None, "rand-m9-mstd0.5-inc1"])
def test_transforms_give_the_size_and_channels_asked_for(augment, in_chans, policy):
    prep = Preprocessing((20, 28), in_chans, (0.5,) * in_chans, (0.5,) * in_chans)
    options = AugmentOptions(augment=augment, auto_augment=policy, random_erasing=0.5)
    for mode, size in (("L", (9, 70)), ("RGB", (1, 1)), ("RGB", (40_000, 10))):
        tensor = train_transform(prep, options)(Image.new(mode, size))
        assert tensor.shape == (in_chans, 20, 28)
        assert eval_transform(prep)(Image.new(mode, size)).shape == (in_chans, 20, 28)


def test_cutting_a_long_image_does_not_change_what_is_seen():
    long = Image.fromarray(np.random.RandomState(0).randint(0, 255, (20, 400), dtype=np.uint8))
    middle = long.crop((100, 0, 300, 20))
    difference = (eval_transform(GREY)(long) - eval_transform(GREY)(middle)).abs().max()
    assert difference < 0.05


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_depend_on_seed_and_epoch_alone(workers):
    data = open_data("mnist")
    data.train.images = data.train.images[:64]
    module = ImageDataModule(data, Task.transforms(GREY, AugmentOptions(augment="affine")), 16, workers, seed=3)

    def epoch(number, done=0):
        module.epoch, module.batches_done = number, done
        return [batch.images for batch in module.train_dataloader()]

    first, again, second = epoch(0), epoch(0), epoch(1)
    assert len(first) == 4
    assert all(a.equal(b) for a, b in zip(first, again, strict=True))
    assert not first[0].equal(second[0])
    resumed = epoch(1, done=3)
    assert len(resumed) == 1
    assert resumed[0].equal(second[3])


@pytest.mark.parametrize("copies", [1, 3])
def test_the_order_of_images_depends_on_seed_and_epoch(copies):
    data = open_data("mnist")

    def order(seed, epoch):
        transforms = Task.transforms(GREY, AugmentOptions(augment="affine"))
        module = ImageDataModule(data, transforms, 16, 0, seed, repeats=copies)
        module.epoch = epoch
        return [draw.sample for draw in module.train_dataloader().sampler]

    first = order(seed=1, epoch=2)
    assert order(seed=1, epoch=2) == first
    assert order(seed=2, epoch=2) != first
    assert order(seed=1, epoch=3) != first
    runs = np.diff(np.flatnonzero(np.diff([-1, *first, -1])))
    assert runs[:-1].tolist() == [copies] * (len(runs) - 1)


def test_ranks_share_the_copies_of_an_image():
    ranks = [RepeatedOrder(range(300), 2, rank, copies=2, seed=5) for rank in range(2)]
    for order in ranks:
        order.set_epoch(4)
    first, second = map(list, ranks)
    assert first == second
    assert len(set(first)) == len(first)


def test_a_hub_data_set(tmp_path):
    make(tmp_path, {"train/cat": 3, "train/dog": 3, "validation/cat": 1, "validation/dog": 1})
    data = open_data(f"hfds/{tmp_path}")
    assert data.class_names == ["cat", "dog"]
    assert (len(data.train), len(data.val)) == (6, 2)
    assert data.train.image(0).size == (8, 8)
    assert sorted(data.train.target(i) for i in range(6)) == [0, 0, 0, 1, 1, 1]

"""Where images come from, and into which halves they go."""

import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from tests.cli.runs import train_arguments
from vimamba.cli import main
from vimamba.data import sample
from vimamba.data.loaders import ImageDataModule
from vimamba.data.sources import open_data
from vimamba.data.transforms import AugmentOptions, Preprocessing, eval_transform, train_transform
from vimamba.errors import UserError

GREY = Preprocessing((28, 28), 1, (0.13,), (0.31,), crop_pct=1.0)


def make(root, counts):
    """Folders of numbered grey pictures: make(root, {"train/cat": 3})."""
    for name, count in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.new("L", (8, 8), i).save(root / name / f"{i}.png")
    return root


def test_the_sample_is_split_evenly_and_apart():
    data = open_data("mnist")
    assert (len(data.train), len(data.val)) == (4000, 1000)
    assert np.bincount(data.train.targets).tolist() == [400] * 10
    assert np.bincount(data.val.targets).tolist() == [100] * 10
    assert not {i.tobytes() for i in data.train.images} & {i.tobytes() for i in data.val.images}


def test_digits_can_be_written_as_pictures(tmp_path):
    paths = sample.write_digits(tmp_path / "digits")
    assert len(paths) == 3
    held_out = open_data("mnist").val
    assert np.array_equal(np.asarray(Image.open(paths[1])), held_out.images[1])
    assert f"-{held_out.target(1)}.png" in paths[1].name


@pytest.mark.parametrize(("train", "val"), [("train", "val"), ("training", "validation"), ("train", "test")])
def test_halves_by_folder(tmp_path, train, val):
    make(tmp_path, {f"{train}/cat": 3, f"{train}/dog": 4, f"{val}/cat": 1, f"{val}/dog/deeper": 2})
    data = open_data(str(tmp_path))
    assert data.class_names == ["cat", "dog"]
    assert (len(data.train), len(data.val)) == (7, 3)
    assert [data.val.target(i) for i in range(3)] == [0, 1, 1]


@pytest.mark.parametrize("inside", ["", "train/"])
def test_one_folder_is_split_by_the_seed(tmp_path, inside):
    make(tmp_path, {f"{inside}cat": 10, f"{inside}dog": 2, f"{inside}.hidden": 3})
    first, again, other = (open_data(str(tmp_path), 0.3, seed) for seed in (0, 0, 1))
    names = {data.train.name(i) for data in (first,) for i in range(len(first.train))}
    held_out = {first.val.name(i) for i in range(len(first.val))}
    assert not names & held_out
    assert len(names | held_out) == 12
    assert np.bincount(first.val.targets).tolist() == [3, 1]
    assert first.val.paths.tolist() == again.val.paths.tolist()
    assert first.val.paths.tolist() != other.val.paths.tolist()


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({}, "no images found"),
        ({"cat": 4}, "one class only ('cat')"),
        ({"cat": 4, "dog": 1}, "class 'dog' has a single image"),
        ({"train/cat": 2, "train/dog": 2, "val/cat": 1}, "no images of class 'dog'"),
        ({"train/cat": 2, "train/dog": 2, "val/cat": 1, "val/dogs": 1}, "class 'dogs' is not in"),
        ({"val/cat": 2, "val/dog": 2}, "has val/ but no train/"),
    ],
)
def test_folders_that_nothing_can_be_learnt_from(tmp_path, counts, message):
    make(tmp_path, counts)
    with pytest.raises(UserError, match=message.replace("(", r"\(").replace(")", r"\)")):
        open_data(str(tmp_path))


def test_loose_images_are_counted_in_the_refusal(tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="1 images lie loose"):
        open_data(str(tmp_path))


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
    module = ImageDataModule(data, GREY, AugmentOptions(augment="affine"), 16, workers, seed=3)

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


def test_a_hub_data_set(tmp_path):
    make(tmp_path, {"train/cat": 3, "train/dog": 3, "validation/cat": 1, "validation/dog": 1})
    data = open_data(f"hfds/{tmp_path}")
    assert data.class_names == ["cat", "dog"]
    assert (len(data.train), len(data.val)) == (6, 2)
    assert data.train.image(0).size == (8, 8)
    assert sorted(data.train.target(i) for i in range(6)) == [0, 0, 0, 1, 1, 1]


def write_shards(root, splits, info=None):
    """write_shards(root, {"train": (shards, samples in each)}): grey pictures, each of its own brightness."""
    index = {}
    (root / "label").parent.mkdir(parents=True, exist_ok=True)
    for split, (shards, count) in splits.items():
        names = [f"{split}-{shard}.tar" for shard in range(shards)]
        for shard, name in enumerate(names):
            with tarfile.open(root / name, "w") as tar:
                for i in range(count):
                    value = shard * count + i
                    Image.new("L", (28, 28), value).save(root / "image.png")
                    (root / "label").write_text(str(value % 2))
                    tar.add(root / "image.png", f"{value:04}.png")
                    tar.add(root / "label", f"{value:04}.cls")
        index[split] = {
            "name": split, "num_samples": shards * count, "filenames": names, "shard_lengths": [count] * shards,
        }  # fmt: skip
    (root / "_info.json").write_text(json.dumps({"splits": index, "class_names": ["even", "odd"], **(info or {})}))
    return root


def test_shards(tmp_path):
    with pytest.raises(UserError, match=r"_info.json is missing"):
        open_data(f"wds/{tmp_path}")
    write_shards(tmp_path, {"train": (1, 6), "validation": (1, 4)}, {"class_names": None})
    with pytest.raises(UserError, match="--class_names"):
        open_data(f"wds/{tmp_path}")
    (tmp_path / "names.txt").write_text("even\nodd\n")
    data = open_data(f"wds/{tmp_path}", class_names=str(tmp_path / "names.txt"))
    module = ImageDataModule(data, GREY, AugmentOptions(augment="none"), 2, 0, seed=0)
    batches = list(module.val_dataloader())
    assert [batch.targets.tolist() for batch in batches] == [[0, 1], [0, 1]]
    assert sum(len(batch.images) for batch in module.train_dataloader()) == 6


@pytest.mark.parametrize("workers", [0, 2])
def test_the_order_of_shards_depends_on_seed_and_epoch_alone(tmp_path, workers):
    data = open_data(f"wds/{write_shards(tmp_path, {'train': (8, 4), 'validation': (1, 2)})}")

    def epochs(seed, *numbers):
        module = ImageDataModule(data, GREY, AugmentOptions(augment="affine"), 4, workers, seed)
        loader = module.train_dataloader()
        for number in numbers:
            module.set_epoch(number)
            yield torch.cat([batch.images for batch in loader])

    first, second, again = epochs(3, 0, 1, 0)
    (alone,), (other,) = epochs(3, 1), epochs(4, 0)
    assert first.equal(again)
    assert second.equal(alone)  # as a run that resumes at this epoch
    for different in (second, other):
        assert not first.equal(different)
    assert sorted(first.amax((1, 2, 3)).tolist()) != first.amax((1, 2, 3)).tolist()  # shuffled


def test_training_tells_the_shards_of_each_epoch(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(ImageDataModule, "set_epoch", lambda self, epoch: seen.append(epoch))
    root = write_shards(tmp_path / "shards", {"train": (2, 4), "validation": (1, 2)})
    assert main(list(map(str, train_arguments(f"wds/{root}", tmp_path / "run", "--epochs", 3)))) == 0
    assert seen == [0, 1, 2]


@pytest.mark.parametrize("shard", ["/etc/passwd", "../secret.tar", "pipe:touch canary", "https://example.org/a.tar", 7])
def test_an_index_may_list_files_of_its_folder_only(tmp_path, shard):
    write_shards(tmp_path, {"train": (1, 2), "validation": (1, 2)})
    index = json.loads((tmp_path / "_info.json").read_text())
    index["splits"]["train"]["filenames"] = [shard]
    (tmp_path / "_info.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="which is no file in that folder"):
        open_data(f"wds/{tmp_path}")

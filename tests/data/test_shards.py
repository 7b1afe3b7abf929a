"""Shards are read like files of a folder, and what is wrong with one is said by its name."""

import io
import json
import re
import tarfile

import pytest
import torch
from PIL import Image

from tests.cli.runs import train_arguments
from tests.data.folders import GREY
from vimamba.data.decode import DecodeError
from vimamba.data.loaders import ImageDataModule
from vimamba.data.sources import open_data
from vimamba.data.transforms import AugmentOptions
from vimamba.errors import UserError
from vimamba.tasks.task import Task


def picture(value):
    file = io.BytesIO()
    Image.new("L", (28, 28), value).save(file, "png")
    return file.getvalue()


def write_tar(path, members):
    """write_tar(path, {"0001.png": bytes})."""
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


def write_shards(root, splits, info=None):
    """write_shards(root, {"train": (shards, samples in each)}): grey pictures, each of its own brightness."""
    index = {}
    root.mkdir(parents=True, exist_ok=True)
    for split, (shards, count) in splits.items():
        names = [f"{split}-{shard}.tar" for shard in range(shards)]
        for shard, name in enumerate(names):
            members = {}
            for value in range(shard * count, (shard + 1) * count):
                members |= {f"{value:04}.png": picture(value), f"{value:04}.cls": str(value % 2).encode()}
            write_tar(root / name, members)
        index[split] = {
            "name": split, "num_samples": shards * count, "filenames": names, "shard_lengths": [count] * shards,
        }  # fmt: skip
    (root / "_info.json").write_text(json.dumps({"splits": index, "class_names": ["even", "odd"], **(info or {})}))
    return root


def test_shards(tmp_path):
    with pytest.raises(UserError, match=r"_info.json is missing"):
        open_data(f"wds/{tmp_path}")
    write_shards(tmp_path, {"Training": (1, 6), "validation": (1, 4)}, {"class_names": None})
    with pytest.raises(UserError, match="`class_names`"):
        open_data(f"wds/{tmp_path}")
    (tmp_path / "names.txt").write_text("even\nodd\n")
    data = open_data(f"wds/{tmp_path}", class_names=str(tmp_path / "names.txt"))
    assert data.notes == []
    module = ImageDataModule(data, Task.transforms(GREY, AugmentOptions(augment="none")), 2, 0)
    batches = list(module.val_dataloader())
    assert [batch.targets.tolist() for batch in batches] == [[0, 1], [0, 1]]
    assert [data.val.image(i).getpixel((0, 0)) for i in range(4)] == [0, 1, 2, 3]
    assert sum(len(batch.images) for batch in module.train_dataloader()) == 6


@pytest.mark.parametrize("workers", [0, 2])  # more than there are shards
def test_images_of_shards_depend_on_seed_and_epoch_alone(tmp_path, workers):
    data = open_data(f"wds/{write_shards(tmp_path, {'train': (1, 32), 'validation': (1, 2)})}")

    def epoch(seed, number, done=0):
        module = ImageDataModule(data, Task.transforms(GREY, AugmentOptions(augment="affine")), 4, workers, seed)
        module.epoch, module.batches_done = number, done
        return torch.cat([batch.images for batch in module.train_dataloader()])

    first = epoch(3, 0)
    assert len(first) == 32
    assert first.equal(epoch(3, 0))
    assert epoch(3, 1, done=3).equal(epoch(3, 1)[12:])  # as a run that resumes within this epoch
    for different in (epoch(3, 1), epoch(4, 0)):
        assert not first.equal(different)
    assert sorted(first.amax((1, 2, 3)).tolist()) != first.amax((1, 2, 3)).tolist()  # shuffled


def spoil_shard(path, how):
    whole = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "compressed":
        with tarfile.open(path, "w:gz") as tar:
            tar.addfile(tarfile.TarInfo("a.png"))
    elif how == "no samples":
        write_tar(path, {})
    else:
        path.write_bytes({
            "empty": b"",
            "garbage": b"\x07garbage" * 999,
            "truncated": whole[:1400],
            "truncated header": whole[:1700],
            "damaged in the middle": whole[:1024] + b"\xff" * 512 + whole[1536:],
        }[how])  # fmt: skip


@pytest.mark.parametrize(
    "how",
    [
        "missing",
        "compressed",
        "no samples",
        "empty",
        "garbage",
        "truncated",
        "truncated header",
        "damaged in the middle",
    ],
)
@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_damaged_shard_is_refused_by_name(tmp_path, split, how):
    write_shards(tmp_path, {"train": (1, 4), "validation": (1, 4)})
    spoil_shard(tmp_path / f"{split}-0.tar", how)
    with pytest.raises(UserError) as refused:
        open_data(f"wds/{tmp_path}")
    assert (f"split {split} hold no samples" if how == "no samples" else f"{split}-0.tar") in str(refused.value)
    assert str(refused.value).count("\n") == 0


def test_shards_that_hold_less_than_their_index_says(tmp_path):
    write_shards(tmp_path, {"train": (2, 4), "validation": (1, 4)})
    write_tar(tmp_path / "train-1.tar", {"7.png": picture(7), "7.cls": b"1"})
    data = open_data(f"wds/{tmp_path}")
    assert len(data.train) == 5
    assert "says that train has 8 samples, and its shards hold 5" in data.notes[0]


GOOD = picture(9)
BAD_SAMPLES = [
    ({"a.png": b"no image", "a.cls": b"1"}, "is not an image"),
    ({"a.png": b"", "a.cls": b"1"}, "cannot be decoded|is not an image"),
    ({"a.png": GOOD[: len(GOOD) // 2], "a.cls": b"1"}, "cannot be decoded|is not an image"),
    ({"a.png": GOOD, "a.cls": b"cat"}, "its label is 'cat'; the classes count from 0 to 1"),
    ({"a.png": GOOD, "a.cls": b"2"}, "its label is '2'; the classes count from 0 to 1"),
    ({"a.png": GOOD, "a.cls": b"-1"}, "its label is '-1'"),
    ({"a.png": GOOD, "a.cls": b"9" * 5000}, "its label is '9999"),
    ({"a.png": GOOD, "a.cls": b""}, "its label is ''"),
    ({"a.png": GOOD, "a.cls": b"\xff\x00"}, "its label is "),
    ({"a.png": GOOD}, "has no label"),
    ({"a.cls": b"1"}, "has no image"),
    ({"a.txt": b"a cat", "a.cls": b"1"}, "has no image"),
]


@pytest.mark.parametrize(("members", "reason"), BAD_SAMPLES)
def test_a_bad_sample_is_named_and_skipped(tmp_path, members, reason):
    write_shards(tmp_path, {"train": (1, 4), "validation": (1, 2)})
    write_tar(tmp_path / "train-0.tar", {"0.png": GOOD, "0.cls": b"1\n", **members, "z.JPG": GOOD, "z.CLS": b"0"})
    train = open_data(f"wds/{tmp_path}").train
    assert [train.target(i) for i in (0, 2)] == [1, 0]
    assert [train.image(i).size for i in (0, 2)] == [(28, 28)] * 2
    with pytest.raises(DecodeError, match=reason) as refused:
        train.image(1)
    assert re.match(rf"{tmp_path}/train-0.tar:a\S*: ", str(refused.value))


@pytest.mark.parametrize(("most", "status"), [(0.5, 0), (0.01, 2)])
def test_bad_samples_count_among_the_undecodable(tmp_path, vimamba, most, status):
    root = write_shards(tmp_path / "shards", {"train": (2, 6), "validation": (1, 4)})
    write_tar(root / "train-0.tar", {f"{i}{end}": data for i in range(6) for end, data in
                                     ((".png", GOOD), (".cls", b"1" if i else b"none"))})  # fmt: skip
    more = ("--max_undecodable", most, "--epochs", 1)
    found, _, err = vimamba(*train_arguments(f"wds/{root}", tmp_path / "run", *more))
    assert found == status
    assert "train-0.tar:0.png: its label is 'none'" in err
    assert ("1 of the 12 training images cannot be decoded" in err) == (status == 2)


@pytest.mark.parametrize("seed", [0, 4])
def test_shards_without_a_split_to_hold_out_are_split(tmp_path, seed):
    write_shards(tmp_path, {"train": (2, 40)})
    data = open_data(f"wds/{tmp_path}", 0.3, seed)
    keys = {*data.train.keys()}, {*data.val.keys()}
    assert not keys[0] & keys[1]
    assert len(keys[0] | keys[1]) == 80
    assert 12 <= len(keys[1]) <= 36
    assert f"{len(keys[1])} images of its train split are held out" in data.notes[0]
    assert keys[1] == {*open_data(f"wds/{tmp_path}", 0.3, seed).val.keys()}
    assert keys[1] != {*open_data(f"wds/{tmp_path}", 0.3, seed + 1).val.keys()}


@pytest.mark.parametrize("workers", [0, 2])
def test_training_on_shards_is_evaluated_as_it_was(tmp_path, vimamba, workers):
    root = write_shards(tmp_path / "shards", {"train": (1, 16), "validation": (1, 5)})
    run = tmp_path / "run"
    arguments = train_arguments(f"wds/{root}", run, "--num_workers", workers)
    assert vimamba(*arguments)[0] == 0
    status, out, _ = vimamba("eval", run, "--json", "--num_workers", workers)
    assert (status, json.loads(out.splitlines()[-1])["images"]) == (0, 5)


@pytest.mark.parametrize("shard", ["/etc/passwd", "../secret.tar", "pipe:touch canary", "https://example.org/a.tar", 7])
def test_an_index_may_list_files_of_its_folder_only(tmp_path, shard):
    write_shards(tmp_path, {"train": (1, 2), "validation": (1, 2)})
    index = json.loads((tmp_path / "_info.json").read_text())
    index["splits"]["train"]["filenames"] = [shard]
    (tmp_path / "_info.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="which is no file in that folder"):
        open_data(f"wds/{tmp_path}")

"""What is read of a folder: its halves, its classes, and each image once."""

import os
import re

import pytest
from PIL import Image

from tests.data.folders import make
from vimamba.data import folder as folders
from vimamba.data import walk
from vimamba.data.sources import open_data
from vimamba.data.walk import find_images
from vimamba.errors import UserError

PAIRS = [
    ("train", "val"), ("training", "validation"), ("train", "test"), ("Train", "Val"), ("TRAIN", "TEST"),
    ("Training", "Testing"), ("training", "Valid"), ("training_set", "test_set"), ("Train Data", "eval-data"),
]  # fmt: skip


@pytest.mark.parametrize(("train", "val"), PAIRS)
def test_halves_by_folder(tmp_path, train, val):
    make(tmp_path, {f"{train}/cat": 3, f"{train}/dog": 4, f"{val}/cat": 1, f"{val}/dog/deeper": 2})
    data = open_data(str(tmp_path))
    assert data.class_names == ["cat", "dog"]
    assert (len(data.train), len(data.val)) == (7, 3)
    assert [data.val.target(i) for i in range(3)] == [0, 1, 1]
    said = f"{tmp_path}: taken as halves: {train}/ to learn from, {val}/ held out"
    assert data.notes == ([] if (train, val) == ("train", "val") else [said])


@pytest.mark.parametrize(
    ("counts", "classes", "said"),
    [
        ({"train/a": 2, "train/b": 2}, ["a", "b"], "train/ to learn from, a share of it held out"),
        ({"Val/a": 1, "Val/b": 1, "Test/a": 1, "train/a": 1, "train/b": 2}, ["a", "b"], "Val/ held out"),
        ({"train/a": 2, "train/b": 2, "test": 3}, ["a", "b"], "images beside the halves: 3 (test/)"),
        ({"train/a": 1, "train/b": 1, "val/a": 1, "val/b": 1, "more/a": 2}, ["a", "b"], "the halves: 2 (more/)"),
        ({"train": 2, "car": 2, "plane": 2}, ["car", "plane", "train"], ""),  # of railway
        ({"one/a": 2, "one/b": 2, "two/a": 2, "two/b": 2}, ["one", "two"], "if they are halves, name them"),
        ({"a": 2, "b": 2, "empty": 0}, ["a", "b"], "sub-folders without images: 1 ("),
        ({"train/a": 2, "train/c": 0, "val/a": 2, "train/b": 1, "val/b": 1}, ["a", "b"], "/train/c/)"),
    ],
)
def test_what_a_folder_is_taken_for_is_said(tmp_path, counts, classes, said):
    data = open_data(str(make(tmp_path, counts)), 0.5)
    assert data.class_names == classes
    assert said in " ".join(data.notes)
    assert bool(data.notes) == bool(said)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({}, "no images found"),
        ({"cat": 4}, "one class only ('cat')"),
        ({"cat": 4, "dog": 1}, "class 'dog' has a single image"),
        ({"train/cat": 2, "train/dog": 2, "val/cat": 1}, "no images of class 'dog'"),
        ({"train/cat": 2, "train/dog": 2, "val/cat": 1, "val/dogs": 1}, "class 'dogs' is not in"),
        ({"Val/cat": 2, "Val/dog": 2}, "has Val/ but no train/"),
        ({"train": 2, "val": 2}, "train/ and val/ hold images, but no sub-folders"),
        ({"train/cat": 2, "dog": 2}, "train/ may be a half of the images or a class beside dog/"),
        ({"test/cat": 2, "dog": 2, "cow": 2}, "test/ may be a half of the images or a class beside cow/, dog/"),
        ({"train/a": 2, "Training/a": 2, "val/a": 1}, "Training/ and train/ may be the same half"),
        ({"train/a": 2, "val/a": 1, "valid/a": 1}, "val/ and valid/ may be the same half"),
    ],
)
def test_folders_that_nothing_can_be_learnt_from(tmp_path, counts, message):
    with pytest.raises(UserError, match=re.escape(message)):
        open_data(str(make(tmp_path, counts)))


def read(root):
    """What is learnt from and held out, by class: {"cat": ["cat/0.png", ...]}."""
    data = open_data(str(root), 0.5)
    found = {name: [] for name in data.class_names}
    for half in (data.train, data.val):
        for row, key in enumerate(half.keys()):
            found[data.class_names[half.target(row)]].append(key)
    return {name: sorted(keys) for name, keys in found.items()}, " ".join(data.notes)


PLAIN = {"cat": ["cat/0.png", "cat/1.png"], "dog": ["dog/0.png", "dog/1.png"]}


@pytest.mark.parametrize(
    "hidden", ["cat/.thumbs", "cat/.ipynb_checkpoints", "__MACOSX/cat", "cat/__MACOSX", "dog/@eaDir/x", ".git/a"]
)
def test_hidden_folders_are_not_read(tmp_path, hidden):
    make(tmp_path, {"cat": 2, "dog": 2, hidden: 3})
    assert read(tmp_path) == (PLAIN, "")


@pytest.mark.parametrize("where", ["run", "cat/run", "runs/deeper/run"])
@pytest.mark.parametrize("beside", ["model.safetensors", "checkpoints"])
def test_a_run_inside_the_data_is_no_class(tmp_path, where, beside):
    make(tmp_path, {"cat": 2, "dog": 2, f"{where}/digits": 3})
    (tmp_path / where / "config.yaml").touch()
    (tmp_path / where / beside).mkdir()
    found, said = read(tmp_path)
    assert found == PLAIN
    assert f"folders of training runs: 1 ({tmp_path}/{where})" in said


def test_a_class_may_hold_what_a_run_does(tmp_path):
    make(tmp_path, {"cat/checkpoints": 2, "dog": 2})
    (tmp_path / "dog" / "config.yaml").touch()
    assert read(tmp_path)[0]["cat"] == ["cat/checkpoints/0.png", "cat/checkpoints/1.png"]
    assert read(tmp_path)[0]["dog"] == PLAIN["dog"]


@pytest.mark.parametrize(
    ("link", "target", "said"),
    [
        ("cat/self", "..", "links to images that are read already: 2"),
        ("cat/me", ".", "links to folders that are read already: 1"),
        ("again", "cat", "images that are read already: 2"),
        ("dog/more", "../cat", "images that are read already: 2"),
        ("loop", "loop", "files of other kinds"),
        ("all", ".", "images that are read already: 4"),
        ("cat/copy.png", "0.png", "images that are read already: 1"),
        ("dog/copy.png", "../cat/0.png", "images that are read already: 1"),
        ("cat/gone.png", "nowhere.png", "pipes, devices or broken links: 1"),
        ("cat/round.png", "round.png", "pipes, devices or broken links: 1"),
    ],
)
def test_links_add_nothing_that_is_there(tmp_path, link, target, said):
    make(tmp_path, {"cat": 2, "dog": 2})
    (tmp_path / link).symlink_to(target)
    found, line = read(tmp_path)
    assert found == PLAIN
    assert said in line


def test_links_to_elsewhere_are_read(tmp_path):
    pool = make(tmp_path / "pool", {"cat": 2, "dog": 2})
    (tmp_path / "linked/train").mkdir(parents=True)
    for name in ("cat", "dog"):
        (tmp_path / "linked/train" / name).symlink_to(pool / name)
        (tmp_path / "linked/val" / name).mkdir(parents=True)
        (tmp_path / "linked/val" / name / "x.png").symlink_to(pool / name / "0.png")
    with pytest.raises(UserError, match="no images of class 'cat', 'dog'"):  # not the same ones in both halves
        open_data(str(tmp_path / "linked"))
    for name in ("cat", "dog"):
        Image.new("L", (9, 9)).save(pool / name / "other.png")
        (tmp_path / "linked/train" / name).unlink()
        (tmp_path / "linked/train" / name).mkdir()
        (tmp_path / "linked/train" / name / "y.png").symlink_to(pool / name / "other.png")
    data = open_data(str(tmp_path / "linked"))
    assert (data.train.keys(), data.val.keys()) == (
        ["train/cat/y.png", "train/dog/y.png"],
        ["val/cat/x.png", "val/dog/x.png"],
    )


def test_what_is_left_out_is_counted_in_one_line(tmp_path):
    make(tmp_path, {".": 3, "cat": 2, "dog": 2})
    (tmp_path / "labels.csv").touch()
    for name in ("notes.txt", "more.TXT", "model.pdf", "drawing.eps", "no-ending"):
        (tmp_path / "cat" / name).touch()
    os.mkfifo(tmp_path / "dog" / "pipe.jpg")  # which would be waited for
    found, said = read(tmp_path)
    assert found == PLAIN
    assert said.startswith(f"{tmp_path}: not read: ")
    assert f"images outside the sub-folders: 3 ({tmp_path}/0.png" in said
    assert "files of other kinds: 6 (" in said
    assert f"pipes, devices or broken links: 1 ({tmp_path}/dog/pipe.jpg)" in said
    with pytest.raises(UserError, match="1 images lie loose"):
        open_data(str(make(tmp_path / "loose", {".": 1})))


@pytest.mark.parametrize("ending", [".jfif", ".avif", ".jp2", ".JPG", ".webp", ".tga", ".qoi", ".ppm"])
def test_endings_that_pillow_reads_are_images(tmp_path, ending):
    path = tmp_path / f"a{ending}"
    Image.new("RGB", (8, 8)).save(path, format=None if ending != ".JPG" else "jpeg")
    (tmp_path / "a.h5").touch()
    assert find_images(tmp_path) == [str(path)]


def test_a_class_whose_name_is_no_text_is_refused_at_once(tmp_path):
    make(tmp_path, {"cat": 2})
    os.mkdir(os.fsencode(tmp_path) + b"/caf\xe9")
    Image.new("L", (8, 8)).save(os.fsencode(tmp_path) + b"/caf\xe9/a.png".replace(b"a.png", b"a\xff.png"), "png")
    with pytest.raises(UserError, match=r"the class folder 'caf\\udce9' has a name that is no text; rename it"):
        open_data(str(tmp_path))


def test_a_folder_that_may_not_be_read_is_refused(tmp_path, monkeypatch):
    make(tmp_path, {"cat": 2, "dog/inner": 2})
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("inner"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(walk.os, "scandir", refuse)
    with pytest.raises(UserError, match=r"dog/inner: cannot be read \(Permission denied\)"):
        folders.read_folder(tmp_path)

"""vimamba.load_run: images in every form a caller has them, results, and what is refused."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

import vimamba
from tests.cli.runs import train_arguments, write_photos
from vimamba.cli import main
from vimamba.errors import UserError


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run on three colours, the photographs beside it; not to be changed."""
    root = tmp_path_factory.mktemp("colours")
    write_photos(root / "photos")
    more = ("--epochs", 6, "--lr", 5e-3, "--augment", "none", "--logger", "none")
    assert main([str(a) for a in train_arguments(root / "photos", root / "run", *more)]) == 0
    return root / "run"


@pytest.fixture(scope="module")
def predictor(run):
    return vimamba.load_run(run)


@pytest.fixture
def red(run):
    return run.parent / "photos/val/red/0.png"


def test_one_image_in_every_form(predictor, red):
    image = Image.open(red)
    forms = (
        red,
        str(red),
        image,
        np.asarray(image),
        np.dstack([np.asarray(image), np.full((20, 24, 1), 255, np.uint8)]),
    )
    results = [predictor.predict(form) for form in forms]
    assert {result.label for result in results} == {"red"}
    assert len({result.score for result in results}) == 1


def test_several_images_are_answered_in_order(predictor, run):
    names = ["green", "red", "blue", "red", "green"]
    paths = [run.parent / f"photos/val/{name}/{i % 4}.png" for i, name in enumerate(names)]
    for workers, batch_size in ((0, 32), (1, 2)):
        results = predictor.predict(paths, batch_size=batch_size, num_workers=workers)
        assert [result.label for result in results] == names
    assert [r.label for r in predictor.predict(tuple(paths[:1]))] == names[:1]


def test_a_result(predictor, red):
    result = predictor.predict(red)
    assert result.scores.shape == (3,)
    assert result.scores.sum() == pytest.approx(1, abs=1e-5)
    assert (
        result.top(2)
        == sorted(zip(predictor.class_names, result.scores.tolist(), strict=True), key=lambda x: -x[1])[:2]
    )
    assert len(result.top(9)) == 3
    assert result.top(1) == [(result.label, result.score)]
    assert result.to_dict(1) == {"predictions": [{"class": "red", "probability": round(result.score, 6)}]}


@pytest.mark.parametrize("size", [(24, 20), (300, 10), (5, 400)])
@pytest.mark.parametrize("names", [["$x_2$", "猫", "a" * 200], ["", "\u05d0\u05d1", "b"]])
def test_a_result_is_drawn(predictor, red, size, names):
    result = predictor.predict(red)
    object.__setattr__(result, "class_names", names)
    image = Image.new("RGB", size, "red")
    drawn = result.draw(image)
    assert drawn.width >= size[0]
    assert drawn.height > size[1]
    assert np.asarray(drawn)[size[1] :].min() < 128  # letters
    assert image.size == size


@pytest.mark.parametrize("precision", ["bf16-mixed", "int8", "32-true"])
def test_the_precision_acts(run, red, precision):
    full, given = vimamba.load_run(run), vimamba.load_run(run, device="cpu", precision=precision)
    same = np.array_equal(full.predict(red).scores, given.predict(red).scores)
    assert same == (precision == "32-true")
    assert given.device == torch.device("cpu")
    assert given.predict(red).label == "red"


def test_a_run_is_measured(predictor, run, tmp_path):
    results = predictor.evaluate()
    assert results.images == 12
    assert results.numbers["top1"] == 1.0
    assert results.confusion.tolist() == [[4, 0, 0], [0, 4, 0], [0, 0, 4]]
    other = write_photos(tmp_path / "other", halves=(("all", 3),), seed=5) / "all"
    assert predictor.evaluate(str(other), batch_size=2, num_workers=1).images == 9
    assert predictor.evaluate(str(run.parent / "photos"), split="val").images == 12


def test_measuring_says_what_it_leaves_out_of_the_data(predictor, tmp_path):
    other = write_photos(tmp_path / "other", halves=(("all", 3),)) / "all"
    (other / "notes.txt").touch()
    (other / "nothing").mkdir()
    with pytest.warns(UserWarning, match="sub-folders without images: 1"):
        assert predictor.evaluate(other).images == 9


@pytest.mark.parametrize(
    ("images", "said"),
    [
        ([], "`images`: the list is empty"),
        ("missing.jpg", "missing.jpg: there is no such file"),
        (".", ".: is a folder, not an image"),
        (np.zeros((4, 4, 3)), r"images\[0\]: is an array of float64 and shape \(4, 4, 3\); give"),
        (np.zeros((4, 4), np.uint8), r"an array of uint8 and shape \(4, 4\); give"),
        (np.zeros((2, 4, 4, 3), np.uint8), r"shape \(2, 4, 4, 3\); give"),
        (np.zeros((4, 4, 2), np.uint8), r"shape \(4, 4, 2\); give"),
        (np.zeros((0, 4, 3), np.uint8), r"shape \(0, 4, 3\); give"),
        ([Image.new("RGB", (4, 4)), Image.new("L", (0, 3))], "0 x 3 pixels"),
        ([torch.zeros(3, 4, 4)], r"images\[0\]: is 'Tensor'; give a path"),
        (7, r"images\[0\]: is 'int'"),
    ],
)  # fmt: skip
def test_what_is_no_image_is_refused(predictor, images, said):
    with pytest.raises(UserError, match=said):
        predictor.predict(images)


def test_a_stream_goes_on_after_what_is_no_image(predictor, red):
    first, second, third = predictor.stream([red, "missing.jpg", red])
    assert (first.label, third.label) == ("red", "red")
    assert isinstance(second, UserError)


def test_wrong_arguments_are_named(predictor, run, red):
    for arguments, said in (({"batch_size": 0}, "`batch_size` is 0"), ({"num_workers": -1}, "`num_workers` is -1")):
        with pytest.raises(UserError, match=said):
            predictor.predict(red, **arguments)
    with pytest.raises(UserError, match="`device` vulkan9"):
        vimamba.load_run(run, device="vulkan9")
    with pytest.raises(UserError, match="`precision` 8-bit: give 32-true"):
        vimamba.load_run(run, precision="8-bit")


def rewritten(run, to, change):
    """A copy of a run whose card says something else."""
    shutil.copytree(run, to)
    with safe_open(to / "model.safetensors", "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    save_file(tensors, to / "model.safetensors", metadata | {"vimamba": change(metadata["vimamba"])})
    return to


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda card: card[:-20], "damaged"),
        (lambda card: card.replace('"version": "0.1.0"', '"version": "9.0", "grid": 3'), "of vimamba '9.0'.*upgrade"),
        (lambda card: card.replace('"task": "classification"', '"task": "divination"'), "there is no such task"),
        (lambda card: card.replace('"version": "0.1.0"', '"grid": 3'), "its description of the model is damaged"),
        (lambda card: card.replace('"class_names"', '"classes"'), "its description of the model is damaged"),
    ],
)  # fmt: skip
def test_a_card_that_cannot_be_used_is_refused(run, tmp_path, change, said):
    with pytest.raises(UserError, match=said):
        vimamba.load_run(rewritten(run, tmp_path / "run", change))


def test_a_card_of_version_0_1_has_no_task(run, tmp_path):
    def older(card):
        changed = card.replace(', "task": "classification"', "").replace(', "version": "0.1.0"', "")
        changed = changed.replace('"task": "classification", ', "").replace('"version": "0.1.0", ', "")
        assert "task" not in changed
        assert "version" not in changed
        return changed

    predictor = vimamba.load_run(rewritten(run, tmp_path / "run", older))
    assert predictor.card.task == "classification"


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no model\\.safetensors; is it a run's folder"):
        vimamba.load_run(tmp_path)
    with pytest.raises(UserError, match="there is no such run or file"):
        vimamba.load_run(tmp_path / "nothing")

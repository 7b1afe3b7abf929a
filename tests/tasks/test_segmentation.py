"""A class for each pixel: the loss and the numbers by hand, windows, and runs from their options to their folders."""

import itertools
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import vimamba
from tests.dense import CLASSES, SEGMENT, scene, write_masks
from vimamba.data.samples import IGNORE
from vimamba.data.transforms import AugmentOptions, Preprocessing
from vimamba.errors import UserError
from vimamba.tasks.optim import OptimOptions
from vimamba.tasks.options import DenseOptions, InferenceOptions
from vimamba.tasks.results import Segmentation
from vimamba.tasks.segmentation import SegmentationTask, class_mixed, dice_loss, slid, starts
from vimamba.tasks.task import evaluation_of, results_of
from vimamba.tasks.weights import ModelCard, load_model

NAMES = ["a", "b", "c", "d"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_masks(tmp_path_factory.mktemp("masks"))


@pytest.fixture
def run(segmented_run):
    return segmented_run


def confusion(found, wanted, classes):
    counted = np.zeros((classes, classes), np.int64)
    for f, w in zip(found.ravel(), wanted.ravel(), strict=True):
        if w != IGNORE:
            counted[w, f] += 1
    return counted


def test_numbers_are_those_of_a_confusion_matrix():
    """Of images of several sizes, with pixels that do not count, one image of nothing else, and an absent class."""
    random = np.random.RandomState(0)
    evaluation, total = evaluation_of(SegmentationTask, NAMES), np.zeros((4, 4), np.int64)
    for size in ((7, 9), (16, 5), (3, 3), (20, 20)):
        logits = torch.from_numpy(random.randn(1, 4, *size).astype(np.float32))
        logits[:, 3] = -9.0
        wanted = torch.from_numpy(random.randint(-1, 2, size).astype(np.int32))
        if size == (3, 3):
            wanted[:] = IGNORE
        SegmentationTask.update(evaluation, logits, [wanted])
        total += confusion(logits.argmax(1)[0].numpy(), wanted.numpy(), 4)
    results = results_of(SegmentationTask, evaluation, NAMES)
    hits, there, found = total.diagonal(), total.sum(1), total.sum(0)
    union = there + found - hits
    ious = [float(h / u) if u else None for h, u in zip(hits, union, strict=True)]
    assert [row["iou"] for row in results.per_class] == ious
    assert ious[3] is None
    assert ious[2] == 0.0  # nowhere, but found
    assert results.numbers["miou"] == sum(ious[:3]) / 3
    assert results.numbers["pixel_accuracy"] == hits.sum() / there.sum()
    assert [row["pixels"] for row in results.per_class] == there.tolist()
    assert results.images == 4


def task_of(model, **dense):
    card = ModelCard(
        "vim_nano", {}, NAMES[:2], Preprocessing((8, 8), 3, (0.5,) * 3, (0.5,) * 3), task="segment",
        head={"head": "linear"},
    )  # fmt: skip
    return SegmentationTask(model, card, OptimOptions(), AugmentOptions(), 0, DenseOptions(**dense))


def test_the_loss_is_cross_entropy_and_dice_and_the_auxiliary_head_s():
    torch.manual_seed(0)
    logits, auxiliary = torch.randn(2, 2, 4, 4), torch.randn(2, 2, 4, 4)
    targets = torch.randint(-1, 2, (2, 4, 4))
    valid = targets != IGNORE
    log = logits.log_softmax(1)
    entropy = -log.gather(1, targets.clamp(min=0)[:, None])[:, 0][valid].mean()
    share = logits.softmax(1) * valid[:, None]
    both = nn.functional.one_hot(targets.clamp(min=0), 2).permute(0, 3, 1, 2) * valid[:, None]
    dice = (1 - 2 * (share * both).sum((0, 2, 3)) / (share + both).sum((0, 2, 3))).mean()
    second = nn.functional.cross_entropy(auxiliary, targets, ignore_index=IGNORE)
    task = task_of(nn.Identity(), dice=0.5, aux_weight=0.25)
    torch.testing.assert_close(dice_loss(logits, targets), dice)
    torch.testing.assert_close(task.loss((logits, auxiliary), targets), entropy + 0.5 * dice + 0.25 * second)
    torch.testing.assert_close(task_of(nn.Identity(), dice=0.0).loss(logits, targets), entropy)
    nothing = torch.full_like(targets, IGNORE)
    assert float(task.loss((logits, auxiliary), nothing)) == pytest.approx(0.0, abs=1e-6)


def test_half_the_classes_of_another_image_come_with_their_pixels():
    """Two of three: the largest class stays where it is, and so do the pixels that do not count."""
    four, one = [1] * 7 + [2, 3, 4, IGNORE, 2], [2] * 12
    targets = torch.tensor([four, one], dtype=torch.int32).reshape(2, 3, 4)
    images = torch.tensor([10, 20])[:, None, None, None] + targets[:, None].expand(2, 3, 3, 4)
    pasted = set()
    for _ in range(20):
        mixed, wanted = class_mixed(images, targets, 1.0)
        assert torch.equal(mixed[0], images[0])  # the other has nothing but its largest class
        moved = mixed[1, 0] < 20
        there = wanted[1][moved].unique()
        assert torch.equal(moved, torch.isin(targets[0], there))
        assert torch.equal(mixed[1, 0], torch.where(moved, 10, 20) + wanted[1])
        pasted.add(tuple(there.tolist()))
    assert pasted == {(2, 3), (2, 4), (3, 4)}
    still = class_mixed(images, targets, 0.0)
    assert torch.equal(still[0], images)
    assert torch.equal(still[1], targets)


@pytest.mark.parametrize(("length", "window"), [(8, 8), (5, 8), (9, 8), (100, 32), (683, 512), (2048, 512)])
def test_windows_cover_an_axis(length, window):
    window = min(length, window)
    found = starts(length, window)
    assert found[0] == 0
    assert found[-1] + window == length
    assert all(b - a <= max(1, round(window * 2 / 3)) for a, b in itertools.pairwise(found))


class ByPlace(nn.Module):
    """Logits of a pixel by its colour alone, so that windows and mirrors change nothing."""

    def forward(self, images_BCHW):
        return torch.stack([images_BCHW[:, 0], -images_BCHW[:, 1]], 1)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("window", ["whole", "slide", "auto"])
def test_windows_and_mirrors_see_the_same_pixels(window, flip):
    images = [torch.randn(3, 20, 13), torch.randn(3, 20, 13), torch.randn(3, 6, 31)]
    sizes = [(20, 13), (20, 13), (6, 31)]
    prep = Preprocessing((8, 8), 3, (0.5,) * 3, (0.5,) * 3)
    seen = 0
    for logits, rows in SegmentationTask.infer(ByPlace(), images, sizes, prep, InferenceOptions(window, flip)):
        torch.testing.assert_close(logits, ByPlace()(images[rows.start][None]))
        seen += 1
    assert seen == 3


def test_a_window_sees_no_more_than_itself():
    class Mean(nn.Module):
        def forward(self, images_BCHW):
            return images_BCHW.mean((2, 3), keepdim=True)[:, :1].expand(-1, 1, *images_BCHW.shape[2:])

    image = torch.zeros(3, 4, 12)
    image[:, :, 8:] = 6.0
    logits = slid(Mean(), image, (4, 6), False)[0, 0]  # windows at 0, 3 and 6
    assert starts(12, 6) == [0, 3, 6]
    torch.testing.assert_close(logits, torch.tensor([0.0] * 3 + [0.5] * 3 + [2.5] * 3 + [4.0] * 3))


def test_a_run_learns_and_is_used(run, data):
    assert run.best["val_miou"] > 0.6
    assert run.best["val_miou"] == max(row["val_miou"] for row in run.history)
    predictor = vimamba.load_run(run.folder)
    assert predictor.evaluate().numbers["miou"] == pytest.approx(run.best["val_miou"], abs=1e-6)
    path = data / "val/images/8.png"
    result = predictor.predict(path)
    image, masks, _ = scene(8)
    assert result.mask.shape == image.shape[:2]
    assert result.mask[masks[0]].mean() > 0.5
    several = predictor.predict([path, Image.fromarray(image[:20])], batch_size=2)
    np.testing.assert_array_equal(several[0].mask, result.mask)
    assert several[1].mask.shape == (20, 32)
    said = result.to_dict()
    assert (said["height"], said["width"]) == (32, 32)
    assert said["classes"][0]["class"] == "background"
    assert sum(row["share"] for row in said["classes"]) == pytest.approx(1.0, abs=1e-5)
    assert predictor.class_names == ["background", *CLASSES]
    assert set((run.folder / "per_class.csv").read_text().splitlines()[0].split(",")) >= {"name", "pixels", "iou"}


def test_windows_and_mirrors_act_on_a_run(run, data):
    path = data / "val/images/8.png"
    image = Image.open(path).resize((96, 64))
    found = {
        (window, flip): vimamba.load_run(run.folder, window=window, flip=flip).predict(image).mask
        for window in ("auto", "whole", "slide") for flip in (False, True)
    }  # fmt: skip
    assert np.array_equal(found["auto", False], found["slide", False])
    assert len({mask.tobytes() for mask in found.values()}) == 4


def test_pictures_of_masks():
    mask = np.array([[0, 1, 1], [0, 0, 2]], np.uint8)
    names = ["background", "$x_2$ 猫", "a" * 200]
    result = Segmentation(mask, names)
    picture = result.mask_image()
    assert picture.mode == "P"
    np.testing.assert_array_equal(np.asarray(picture), mask)
    assert len({tuple(picture.getpalette()[3 * i : 3 * i + 3]) for i in range(3)}) == 3
    assert result.draw(Image.new("RGB", (3, 2), "white")).height > 2
    many = Segmentation(np.array([[0, 299]], np.int32), [str(i) for i in range(300)])
    assert np.asarray(many.mask_image()).tolist() == [[0, 299]]
    assert many.top(5) == [("0", 0.5), ("299", 0.5)]


def test_a_run_is_resumed_to_the_bit(data, tmp_path):
    whole = vimamba.train(data=data, output=tmp_path / "whole", schedule="constant", **SEGMENT | {"epochs": 3})
    vimamba.train(data=data, output=tmp_path / "run", schedule="constant", **SEGMENT)
    resumed = vimamba.train(resume=tmp_path / "run", epochs=3, progress=False)
    assert [row["train_loss"] for row in resumed.history] == [row["train_loss"] for row in whole.history]
    weights = [(folder / "model.safetensors").read_bytes() for folder in (whole.folder, resumed.folder)]
    assert weights[0] == weights[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        {"head": "upernet", "head_args": {"width": 8}},
        {"head": "fpn", "head_args": {"width": 64, "pyramid": "simple"}},
        {"head": "dpt", "head_args": {"width": 8, "auxiliary": True}, "layer_decay": 0.7},
        {"head_args": {"width": 8}, "model": "resnet18", "model_args": {}, "precision": "bf16-mixed", "head": None},
        {"grad_checkpointing": True, "schedule": "poly", "ema": 0.9, "scale_jitter": (0.9, 1.1)},
        {"short_side": 24, "long_side": 40, "in_chans": 1, "hflip": 0.0, "class_mix": 0.5},
    ],
)  # fmt: skip
def test_heads_and_options(data, tmp_path, more):
    run = vimamba.train(data=data, output=tmp_path / "run", **SEGMENT | {"epochs": 1} | more)
    _, card = load_model(run.folder)
    assert card.head["head"] == (more.get("head", "linear") or "upernet")
    assert np.isfinite(run.best["val_loss"])
    result = run.predictor("cpu").predict(Image.new("RGB", (45, 37)))
    assert result.mask.shape == (37, 45)
    assert run.predictor("cpu").evaluate().images == 4


def test_a_run_starts_from_weights_of_any_task(data, tmp_path):
    from tests.cli.runs import write_photos

    small = {k: v for k, v in SEGMENT.items() if k not in ("task", "head")} | {"epochs": 1}
    classes = vimamba.train(data=write_photos(tmp_path / "photos"), output=tmp_path / "classes", **small)
    frozen = {"lr": 1e-12, "weight_decay": 0.0}
    dense = vimamba.train(
        data=data, output=tmp_path / "dense", checkpoint=str(classes.folder / "model.safetensors"),
        **SEGMENT | {"epochs": 1, "img_size": 48} | frozen,
    )  # fmt: skip
    before, after = load_model(classes.folder)[0], load_model(dense.folder)[0]
    trunk = after.backbone.trunk
    torch.testing.assert_close(trunk.layers[0].mixer.A_log, before.layers[0].mixer.A_log)
    want = before
    want.set_input_size(trunk.img_size)
    torch.testing.assert_close(trunk.pos_embed, want.pos_embed)
    again = vimamba.train(
        data=data, output=tmp_path / "again", checkpoint=str(dense.folder / "model.safetensors"),
        **SEGMENT | {"epochs": 1} | frozen,
    )  # fmt: skip
    torch.testing.assert_close(load_model(again.folder)[0].classifier[1].weight, after.classifier[1].weight)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"head": "unet"}, "`head` unet: `task` segment has upernet, fpn, dpt, linear"),
        ({"head_args": {"widht": 8}}, "'widht', which is no argument of the head; did you mean width"),
        ({"head_args": {"width": "wide"}}, "width='wide'; it must be"),
        ({"head_args": {"head": "fpn"}}, "`head_args.head`: give `head`"),
        ({"mixup": 0.5}, "`mixup` 0.5: is of no use to `task` segment"),
        ({"auto_augment": "rand-m9-mstd0.5-inc1"}, "`auto_augment` .*is of no use to `task` segment"),
        ({"data": "scenes-det"}, "`data` scenes-det: is of another task; give scenes-seg or a folder"),
        ({"data": "mnist"}, "`data` mnist: is of another task"),
        ({"data": "scenes-seg", "class_names": "names.txt"}, "`class_names` names.txt: is for masks of one's own"),
        ({"data": "scenes-seg", "ignore_index": 3}, "`ignore_index` 3: is for masks of one's own"),
        ({"task": "classification", "data": "mnist", "head": "fpn"}, "`head` fpn: is of no use to `task` class"),
        ({"task": "classification", "data": "scenes-seg", "head": None}, "scenes-seg: is not for classification"),
        ({"ignore_index": 70000}, "`ignore_index` is 70000"),
        ({"dice": -1.0}, "`dice` is -1.0; it cannot be negative"),
        ({"class_mix": 1.5}, "`class_mix` is 1.5; a probability lies between 0 and 1"),
        ({"short_side": 64, "long_side": 32}, "long_side is 32"),
        ({"scale_jitter": (2.0, 1.0)}, "`scale_jitter` is 2.0, 1.0"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(data, tmp_path, more, said):
    with pytest.raises(UserError, match=said):
        vimamba.train(**{"data": data, "output": tmp_path / "run"} | SEGMENT | more)
    assert not (tmp_path / "run").exists()


def test_a_stranger_s_head_is_held_against_the_tensors(run, tmp_path):
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(run.folder / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        card = json.loads(file.metadata()["vimamba"])
    for change, said in (
        ({"head": {"head": "upernet", "width": 8}}, "is of another model"),
        ({"head": {"head": "linear", "layers": [10**9]}}, "layers"),
        ({"head": {"head": "linear", "nonsense": 1}}, "no argument of the head"),
        ({"head": ["linear"]}, "head"),
        ({"task": "detect"}, "head"),
        ({"class_names": ["a", "b"]}, "is of another model"),
    ):
        save_file(tensors, tmp_path / "model.safetensors", {"vimamba": json.dumps(card | change)})
        with pytest.raises(UserError, match=said):
            load_model(tmp_path / "model.safetensors")

"""Transforms give the pixels that timm's and torchvision's first ones give, and take masks and boxes along."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from timm.data import create_transform
from torchvision import transforms as v1
from torchvision import tv_tensors

from vimamba.data import steps
from vimamba.data.decode import to_channels
from vimamba.data.samples import IGNORE
from vimamba.data.steps import CutLongSide, KeepVisible
from vimamba.data.transforms import (
    CROP_MODES,
    INTERPOLATIONS,
    AugmentOptions,
    Preprocessing,
    dense_eval_transform,
    dense_train_transform,
    eval_transform,
    seeded,
    train_transform,
)
from vimamba.errors import UserError

SIZES = [(37, 90), (90, 37), (48, 48), (17, 13), (40, 9)]  # width, height; the last is cut before a central crop
COLOUR = dict(in_chans=3, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
GREY = dict(in_chans=1, mean=(0.13,), std=(0.31,))


def noise(size, mode="RGB"):
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    return Image.fromarray(np.random.RandomState(0).randint(0, 256, shape, dtype=np.uint8))


@pytest.mark.parametrize("kind", [COLOUR, GREY], ids=["colour", "grey"])
@pytest.mark.parametrize("img_size", [(32, 32), (24, 40)])
@pytest.mark.parametrize("crop_mode", CROP_MODES)
def test_evaluation_gives_the_bits_of_timm(kind, img_size, crop_mode):
    for interpolation in INTERPOLATIONS:
        for crop_pct in (0.875, 1.0):
            how = dict(interpolation=interpolation, crop_pct=crop_pct, crop_mode=crop_mode)
            prep = Preprocessing(img_size, **kind, **how)
            timms = create_transform(img_size, mean=prep.mean, std=prep.std, **how)
            for size in SIZES:
                image = to_channels(noise(size), prep.in_chans)
                expected = timms(CutLongSide()(image) if crop_mode == "center" else image)
                found = eval_transform(prep)(noise(size))
                assert type(found) is torch.Tensor
                assert found.equal(expected), (interpolation, crop_pct, size)


@pytest.mark.parametrize("kind", [COLOUR, GREY], ids=["colour", "grey"])
@pytest.mark.parametrize(
    "options",
    [{}, dict(hflip=0.0, color_jitter=0.0), dict(crop_scale=(0.08, 0.2), random_erasing=1.0)],
)
def test_a_random_crop_draws_what_timm_draws(kind, options):
    prep, augment = Preprocessing((24, 40), **kind), AugmentOptions(augment="crop", **options)
    timms = create_transform(
        prep.img_size, is_training=True, scale=augment.crop_scale, hflip=augment.hflip, mean=prep.mean, std=prep.std,
        color_jitter=augment.color_jitter, interpolation="bicubic", re_prob=augment.random_erasing, re_mode="pixel",
    )  # fmt: skip
    assert_same_draws(prep, augment, lambda image: timms(to_channels(image, prep.in_chans)))


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "3a", "augmix-m5-w4-d2", "original"])
def test_a_policy_draws_what_timm_draws(policy):
    prep, augment = Preprocessing((24, 40), **COLOUR), AugmentOptions(augment="crop", auto_augment=policy)
    timms = create_transform(
        prep.img_size, is_training=True, scale=augment.crop_scale, color_jitter=augment.color_jitter,
        auto_augment=policy, interpolation="bicubic", mean=prep.mean, std=prep.std,
    )  # fmt: skip
    assert_same_draws(prep, augment, timms)


def test_affine_draws_what_torchvision_drew():
    prep = Preprocessing((24, 40), **GREY, interpolation="bilinear")
    augment = AugmentOptions(augment="affine", random_erasing=1.0)
    old = v1.Compose([
        CutLongSide(), v1.Resize(24), v1.CenterCrop((24, 40)),
        v1.RandomAffine(10, (0.08, 0.08), (0.9, 1.1), 5, v1.InterpolationMode.BILINEAR), v1.ToTensor(),
        v1.Normalize(prep.mean, prep.std), v1.RandomErasing(1.0),
    ])  # fmt: skip
    assert_same_draws(prep, augment, lambda image: old(to_channels(image, 1)))


def assert_same_draws(prep, augment, expected):
    new = pickle.loads(pickle.dumps(train_transform(prep, augment)))  # as a worker that is spawned gets it
    for seed, size in enumerate(SIZES * 4):
        with seeded(seed):
            one = expected(noise(size))
        with seeded(seed):
            other = new(noise(size))
        assert other.equal(one), (seed, size)


LEVEL = 230


def scene(size, box):
    """A bright rectangle on black, with its mask and its box."""
    image = Image.new("RGB", size)
    ImageDraw.Draw(image).rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill=(LEVEL, LEVEL, LEVEL))
    mask = torch.from_numpy(np.asarray(image)[None, :, :, 0] > 0).to(torch.uint8)
    boxes = tv_tensors.BoundingBoxes([box], dtype=torch.float32, format="XYXY", canvas_size=(size[1], size[0]))
    return image, dict(masks=tv_tensors.Mask(mask), boxes=boxes, labels=torch.tensor([3]))


def extent(mask_HW):
    """(left, top, right, bottom) of what is set."""
    rows, columns = mask_HW.any(1).nonzero().flatten(), mask_HW.any(0).nonzero().flatten()
    return torch.stack([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])


@pytest.mark.parametrize("img_size", [(64, 64), (48, 96)])
@pytest.mark.parametrize("size", [(120, 90), (61, 140), (64, 64), (30, 30), (400, 100)])
@pytest.mark.parametrize(
    ("augment", "crop_mode"),
    [("none", "center"), ("none", "squash"), ("none", "border"), ("crop", "center"), ("affine", "center")],
)
def test_masks_and_boxes_stay_with_the_image(augment, crop_mode, size, img_size):
    prep = Preprocessing(img_size, 3, (0.0,) * 3, (1.0,) * 3, "bilinear", crop_mode=crop_mode)
    transform = train_transform(prep, AugmentOptions(augment=augment, color_jitter=0.1))
    width, height = size
    box = [width // 2 - width // 8, height // 2 - height // 6, width // 2 + width // 9, height // 2 + height // 5]
    seen = 0
    for seed in range(20):
        with seeded(seed):
            image, target = transform(*scene(size, box))
        assert image.shape == (3, *img_size)
        assert type(image) is torch.Tensor
        assert target["masks"].shape == (1, *img_size)
        assert target["masks"].dtype == torch.uint8
        assert target["boxes"].canvas_size == img_size
        assert target["labels"].equal(torch.tensor([3]))
        left, top, right, bottom = target["boxes"][0].tolist()
        assert 0 <= left <= right <= img_size[1]
        assert 0 <= top <= bottom <= img_size[0]
        if min(right - left, bottom - top) < 4:
            continue  # nearly all of it was cropped away
        seen += 1
        bright, mask = image[0] > image.max() / 2, target["masks"][0] > 0
        grown = torch.nn.functional.max_pool2d(torch.stack([bright, mask])[:, None].float(), 3, 1, 1)[:, 0] > 0
        assert not (bright & ~grown[1]).any(), f"seed {seed}: bright more than a pixel outside the mask"
        assert not (mask & ~grown[0]).any(), f"seed {seed}: mask more than a pixel outside what is bright"
        if augment == "affine" and (min(left, top) == 0 or right == img_size[1] or bottom == img_size[0]):
            continue  # what the border leaves of a turned rectangle is less than its box
        for found in (extent(bright), extent(mask)):
            assert (found - target["boxes"][0]).abs().max() <= 1.5, (
                seed
            )  # whole pixels stand for a line within half of one
    assert seen > 10


def test_colour_and_erasing_leave_masks_and_boxes_as_they_are():
    prep = Preprocessing((32, 32), **COLOUR)
    plain, strong = (
        train_transform(prep, AugmentOptions(augment="crop", color_jitter=jitter, random_erasing=erasing))
        for jitter, erasing in ((0.0, 0.0), (0.9, 1.0))
    )
    results = []
    for transform in (plain, strong):
        with seeded(1):
            results.append(transform(*scene((64, 64), [20, 20, 50, 40])))
    assert not results[0][0].equal(results[1][0])
    for name in ("masks", "boxes"):
        assert results[0][1][name].equal(results[1][1][name])


def test_a_policy_is_refused_beside_masks_and_boxes():
    prep = Preprocessing((32, 32), **COLOUR)
    transform = train_transform(prep, AugmentOptions(augment="crop", auto_augment="rand-m9-mstd0.5-inc1"))
    image, target = scene((64, 64), [20, 20, 50, 40])
    for name in ("masks", "boxes"):
        with pytest.raises(UserError, match=r"`auto_augment` rand-m9-mstd0\.5-inc1 moves the image and not its masks"):
            transform(image, target[name])


@pytest.mark.parametrize("crop_mode", CROP_MODES)
def test_masks_are_read_at_the_centres_of_pixels(crop_mode):
    prep = Preprocessing((8, 8), **COLOUR, crop_pct=1.0, crop_mode=crop_mode)
    mask = torch.zeros(1, 64, 64, dtype=torch.uint8)
    mask[:, 4::8, 4::8] = 7
    assert (eval_transform(prep)(noise((64, 64)), tv_tensors.Mask(mask))[1] == 7).all()


def squares(size):
    """An image in which every pixel of a square has the square's own grey, with its masks, boxes and map of classes."""
    width, height = size
    corners = [(4, 6), (width // 2, 3), (width // 3, height // 2), (width - 21, height - 18)]
    image = np.zeros((height, width), np.uint8)
    masks = np.zeros((len(corners), height, width), np.uint8)
    for number, (left, top) in enumerate(corners):
        masks[: number + 1, top : top + 17, left : left + 15] = 0  # later ones cover earlier ones
        masks[number, top : top + 17, left : left + 15] = 1
        image[top : top + 17, left : left + 15] = number + 1
    boxes = tv_tensors.BoundingBoxes(
        np.stack([extent(torch.from_numpy(mask)) for mask in masks]), dtype=torch.float32, format="XYXY",
        canvas_size=(height, width),
    )  # fmt: skip
    objects = dict(boxes=boxes, labels=torch.arange(1, 5), masks=tv_tensors.Mask(masks), area=boxes[:, 2] * 1.0,
                   crowd=torch.tensor([False, True, False, False]))  # fmt: skip
    return Image.fromarray(image), objects, tv_tensors.Mask(image.astype(np.int32))


PLAIN = dict(in_chans=1, mean=(0.5,), std=(1 / 255,))  # a pixel of value v comes out as v - 127.5


@pytest.mark.parametrize("sides", [{}, dict(short_side=50), dict(short_side=80, long_side=90), dict(long_side=60)])
@pytest.mark.parametrize("size", [(96, 64), (48, 130)])
@pytest.mark.parametrize("jitter", [(0.2, 0.9), (0.5, 3.0), (1.0, 1.0)])
def test_windows_move_masks_and_boxes_with_the_image(sides, size, jitter, monkeypatch):
    monkeypatch.setattr(steps, "TRIES", 1)  # the same place for a mask of classes and for objects
    prep = Preprocessing((56, 72), **PLAIN, interpolation="nearest", **sides)
    transform = dense_train_transform(prep, AugmentOptions(augment="crop", scale_jitter=jitter, color_jitter=0.0))
    image, objects, classes = squares(size)
    kept = 0
    for seed in range(40):
        with seeded(seed):
            one, mask = transform(image, classes)
        with seeded(seed):
            other, target = transform(image, objects)
        assert one.equal(other)
        assert one.shape == (1, 56, 72)
        values = (one[0] + 127.5).round()
        border = values == 128  # of the mean, which the image itself does not have
        assert (mask == -1).equal(border)
        assert mask.dtype == torch.int32
        # Pillow and we take the nearest pixel of a place that may lie on a line between two.
        assert ((values == mask) | border).float().mean() > 0.97
        for index, label in enumerate(target["labels"].tolist()):
            assert target["masks"][index].bool().equal(mask == label)
            found, box = extent(mask == label), target["boxes"][index]
            assert (found - box).abs().max() <= 1.5 * max(1.0, jitter[1])
        inside = {value for value in range(1, 5) if (mask == value).any()}
        assert inside == {*target["labels"].tolist()}
        assert {len(value) for value in target.values()} == {len(target["labels"])}
        assert target["boxes"].canvas_size == (56, 72)
        assert target["crowd"].equal(target["labels"] == 2)
        kept += len(target["labels"])
    assert kept > 20


def test_a_window_that_a_class_fills_is_drawn_anew():
    """Of a mask with one small square, windows that have some of it are found far more often than by one draw."""
    mask = torch.zeros(200, 200, dtype=torch.int32)
    mask[90:130, 80:120] = 1
    prep = Preprocessing((40, 40), **PLAIN)
    options = AugmentOptions(augment="crop", scale_jitter=(1.0, 1.0), hflip=0.0, color_jitter=0.0)
    transform, image = dense_train_transform(prep, options), noise((200, 200), "L")
    shares = []
    for seed in range(60):
        with seeded(seed):
            shares.append(float((transform(image, tv_tensors.Mask(mask))[1] == 1).float().mean()))
    assert sum(share > 0 for share in shares) > 50  # one draw has some of it in 23 of 60
    with seeded(0):
        ignored = transform(image, tv_tensors.Mask(torch.full((200, 200), -1, dtype=torch.int32)))[1]
    assert (ignored == -1).all()


def test_a_window_of_bicubic_pixels_is_that_part_of_the_scaled_image():
    """Only the part that is seen is scaled: but for its outermost pixels it is what scaling the whole image gives."""
    prep = Preprocessing((40, 40), **PLAIN, interpolation="bicubic")
    transform = dense_train_transform(
        prep, AugmentOptions(augment="crop", scale_jitter=(2.0, 2.0), hflip=0.0, color_jitter=0.0)
    )
    image = noise((50, 50), "L")
    whole = torch.from_numpy(np.asarray(image.resize((100, 100), Image.Resampling.BICUBIC)).astype(np.float32))
    with seeded(3):
        part = transform(image, tv_tensors.Mask(torch.zeros(50, 50, dtype=torch.int32)))[0][0] + 127.5
    inner = part[4:-4, 4:-4]
    windows = whole.unfold(0, 32, 1).unfold(1, 32, 1)
    assert (windows - inner).abs().amax((2, 3)).min() < 0.01


def test_without_augmentation_a_window_is_a_crop():
    prep = Preprocessing((32, 200), **PLAIN)
    transform = dense_train_transform(prep, AugmentOptions(augment="none", scale_jitter=(0.1, 2.0)))
    image, _, classes = squares((96, 64))
    tops = set()
    for seed in range(10):
        with seeded(seed):
            values, mask = transform(image, classes)
        assert (mask[:, 96:] == -1).all()
        assert (values[0, :, :96] + 127.5).round().equal(mask[:, :96].float())
        tops |= {top for top in range(33) if classes[top : top + 32].equal(mask[:, :96])}
    assert len(tops) > 3


def test_flips_and_colour_of_dense_samples_are_drawn():
    prep = Preprocessing((64, 96), **PLAIN, interpolation="nearest")
    image, objects, classes = squares((96, 64))
    flip = dense_train_transform(prep, AugmentOptions(augment="crop", hflip=1.0, color_jitter=0.0))
    values, target = flip(image, objects)
    assert (values[0] + 127.5).round().equal(classes.flip(1).float())
    assert target["boxes"][:, 0].equal(96 - objects["boxes"][:, 2])
    assert target["masks"].equal(objects["masks"].flip(2))
    colour = dense_train_transform(prep, AugmentOptions(augment="crop", hflip=0.0, color_jitter=0.9))
    changed, mask = colour(noise((96, 64)), classes)
    assert mask.equal(classes)
    assert not changed.equal(colour(noise((96, 64)), classes)[0])


def test_an_object_whose_mask_is_cut_away_goes_and_a_cut_box_shrinks_to_its_mask():
    masks = torch.zeros(2, 40, 40, dtype=torch.uint8)
    masks[0, 0:40, 0:4] = 1  # a hook: what of it is in the right half of its box is at the top
    masks[0, 0:6, 0:30] = 1
    masks[1, 10:20, 2:8] = 1
    boxes = tv_tensors.BoundingBoxes([[0.0, 0, 30, 40], [2, 10, 9.5, 20]], format="XYXY", canvas_size=(40, 40))
    target = dict(boxes=boxes, labels=torch.tensor([5, 6]), masks=tv_tensors.Mask(masks))
    left = boxes - torch.tensor([9.0, 0, 9, 0])
    moved = {"boxes": tv_tensors.BoundingBoxes(left, format="XYXY", canvas_size=(40, 31)), "labels": target["labels"],
             "masks": tv_tensors.Mask(masks[:, :, 9:])}  # fmt: skip
    _, kept = KeepVisible()(None, moved)
    assert kept["labels"].tolist() == [5]  # half a pixel of the other's box is left, and nothing of its mask
    assert kept["boxes"].tolist() == [[0, 0, 21, 6]]
    assert isinstance(kept["boxes"], tv_tensors.BoundingBoxes)
    assert isinstance(kept["masks"], tv_tensors.Mask)
    _, kept = KeepVisible()(None, target)
    assert kept["boxes"].equal(boxes)  # what is not cut keeps the box that it came with


def test_without_masks_an_object_goes_with_its_box():
    boxes = tv_tensors.BoundingBoxes(
        [[-5.0, -5, 12, 9], [30.2, 2, 50, 20], [29, 39, 31, 41], [40, 0, 50, 9]], format="XYXY", canvas_size=(40, 31)
    )
    _, kept = KeepVisible()(None, dict(boxes=boxes, labels=torch.arange(4)))
    assert kept["labels"].tolist() == [0, 2]  # of the second 0.8 pixels are left
    assert kept["boxes"].tolist() == [[0, 0, 12, 9], [29, 39, 31, 40]]


def test_samples_without_objects_pass_through_dense_training():
    boxes = tv_tensors.BoundingBoxes(torch.zeros(0, 4), format="XYXY", canvas_size=(30, 20))
    target = dict(boxes=boxes, labels=torch.zeros(0, dtype=torch.int64), masks=tv_tensors.Mask(torch.zeros(0, 30, 20)))
    prep = Preprocessing((16, 16), **COLOUR)
    image, kept = dense_train_transform(prep, AugmentOptions(augment="crop", scale_jitter=(0.5, 2.0)))(
        noise((20, 30)), target
    )
    assert image.shape == (3, 16, 16)
    assert kept["boxes"].shape == (0, 4)
    assert kept["masks"].shape == (0, 16, 16)


@pytest.mark.parametrize(
    ("sides", "expected"),
    [
        ({}, (90, 37)),
        (dict(short_side=20), (49, 20)),
        (dict(short_side=74, long_side=100), (100, 41)),
        (dict(long_side=45), (45, 18)),
        (dict(long_side=400), (90, 37)),
    ],
)
def test_evaluation_of_dense_tasks_scales_the_image_alone(sides, expected):
    transform = pickle.loads(pickle.dumps(dense_eval_transform(Preprocessing((16, 16), **COLOUR, **sides))))
    image, target = noise((90, 37)), squares((90, 60))[1]
    tensor, same = transform(image, target)
    assert tensor.shape == (3, expected[1], expected[0])
    assert transform(image).equal(tensor)
    assert all(same[name] is target[name] for name in target)


def test_a_strip_is_not_scaled_beyond_the_largest_side():
    tensor = dense_eval_transform(Preprocessing((16, 16), **GREY, short_side=800))(noise((4000, 4), "L"))
    assert tensor.shape == (1, 8, 8192)


@pytest.mark.parametrize(
    "values", [dict(short_side=0), dict(long_side=1.5), dict(short_side=9000), dict(long_side=True)]
)
def test_sides_are_checked(values):
    with pytest.raises(UserError, match=f"preprocessing: {next(iter(values))} is"):
        Preprocessing((16, 16), **COLOUR, **values)


def test_a_long_side_below_the_short_side_is_refused():
    with pytest.raises(UserError, match="long_side is 100; it must be at least the short_side, 200"):
        Preprocessing((16, 16), **COLOUR, short_side=200, long_side=100)


@pytest.mark.parametrize("jitter", [(0.0, 1.0), (2.0, 1.0), (1.0, 1e9), (float("nan"), 1.0)])
def test_impossible_scale_jitter_is_refused(jitter):
    with pytest.raises(UserError, match="`scale_jitter` is"):
        AugmentOptions(scale_jitter=jitter)


def test_turns_move_masks_and_boxes_with_the_image():
    """Beside a mask of classes what comes in is IGNORE, and beside objects nothing; the image is not mirrored."""
    prep = Preprocessing((60, 60), **PLAIN, interpolation="nearest")
    transform = dense_train_transform(
        prep, AugmentOptions(augment="affine", scale_jitter=(1.0, 1.0), color_jitter=0.0, hflip=1.0)
    )
    image, objects, classes = squares((60, 60))
    turned = 0
    for seed in range(20):
        with seeded(seed):
            one, mask = transform(image, classes)
        with seeded(seed):
            other, target = transform(image, objects)
        assert one.equal(other)
        values = (one[0] + 127.5).round()
        turned += int((mask == IGNORE).any())
        agree = (values == mask) | (mask == IGNORE) | ~torch.isin(values, torch.arange(5.0))  # edges are mixed
        assert agree.float().mean() > 0.94
        for index, label in enumerate(target["labels"].tolist()):
            assert target["masks"][index].bool().equal(mask == label)
            assert (extent(mask == label) - target["boxes"][index]).abs().max() == 0
    assert turned > 15


@pytest.mark.parametrize("augment", ["crop", "affine"])
def test_hues_are_turned(augment):
    """A grey image stays grey, and a red one does not stay red."""
    prep = Preprocessing((16, 16), **COLOUR)
    transform = dense_train_transform(prep, AugmentOptions(augment=augment, color_jitter=0.9))
    mask = tv_tensors.Mask(torch.zeros(32, 32, dtype=torch.int32))
    with seeded(1):
        red = transform(Image.new("RGB", (32, 32), (200, 40, 40)), mask)[0][:, 8, 8]
    with seeded(1):
        grey = transform(Image.new("RGB", (32, 32), (90, 90, 90)), mask)[0][:, 8, 8]
    std, mean = (np.array(COLOUR[name]) for name in ("std", "mean"))
    _, green, blue = red.numpy() * std + mean
    assert abs(green - blue) > 0.02
    shades = grey.numpy() * std + mean
    assert shades == pytest.approx(np.full(3, shades[0]), abs=0.01)

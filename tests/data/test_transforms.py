"""Transforms give the pixels that timm's and torchvision's first ones give, and take masks and boxes along."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from timm.data import create_transform
from torchvision import transforms as v1
from torchvision import tv_tensors

from vimamba.data.decode import to_channels
from vimamba.data.steps import CutLongSide
from vimamba.data.transforms import (
    CROP_MODES,
    INTERPOLATIONS,
    AugmentOptions,
    Preprocessing,
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

"""The page's own preparation of images beside Pillow's and torchvision's, in Node."""

import json
import shutil
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image

from vimamba.data.steps import MAX_ASPECT
from vimamba.data.transforms import (
    CROP_MODES,
    INTERPOLATIONS,
    MAX_SIDE,
    Preprocessing,
    dense_eval_transform,
    eval_transform,
)
from vimamba.serve.page import FILE
from vimamba.tasks.segmentation import starts

pytestmark = [] if shutil.which("node") else pytest.mark.browser
SIZES = [(61, 40), (40, 61), (7, 5), (24, 24), (9, 300), (200, 31)]
BEGINS, ENDS = "const sinc =", "let session = null;"
PROGRAM = """
const {images, ...web} = JSON.parse(require("fs").readFileSync(0));
const settings = {web};
%s
console.log(JSON.stringify(%s));
"""


def in_node(expression, **given):
    """What the page's own functions say of what is given."""
    script = FILE.read_text()
    program = PROGRAM % (script[script.index(BEGINS) : script.index(ENDS)], expression)
    done = subprocess.run(["node", "-e", program], input=json.dumps(given), capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def drawn_arrays():
    """Images, and the same as the page has them."""
    drawn = np.random.RandomState(0)
    arrays = [drawn.randint(0, 256, (height, width, 3), np.uint8) for height, width in SIZES]
    return arrays, [dict(width=a.shape[1], height=a.shape[0], data=a.ravel().tolist()) for a in arrays]


def in_order(self, size, resample=None, *others, resize=Image.Image.resize, **more):
    """Across first, then down: Pillow 13 takes the other order, and rounds in between, where that is faster."""
    return resize(resize(self, (size[0], self.height), resample, *others, **more), size, resample, *others, **more)


@pytest.mark.parametrize("img_size", [(24, 24), (16, 27)], ids=str)
@pytest.mark.parametrize("crop_mode", CROP_MODES)
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_images_are_what_the_model_was_trained_on_to_the_bit(interpolation, crop_mode, img_size, monkeypatch):
    prep = Preprocessing(img_size, 3, (0.2, 0.5, 0.7), (0.25, 0.5, 0.125), interpolation, 0.9, crop_mode)
    arrays, images = drawn_arrays()
    pixels = in_node(
        "images.map(image => [...whole(image).data])", preprocessing=vars(prep), max_aspect=MAX_ASPECT, images=images
    )
    monkeypatch.setattr(Image.Image, "resize", in_order)
    transform, mean, std = eval_transform(prep), *(torch.tensor(v).view(3, 1, 1) for v in (prep.mean, prep.std))
    for array, found in zip(arrays, pixels, strict=True):
        wanted = (transform(Image.fromarray(array), 0)[0] * std + mean).mul(255).round().to(torch.uint8)
        assert found == wanted.permute(1, 2, 0).flatten().tolist(), array.shape


@pytest.mark.parametrize("sides", [(None, None), (30, None), (None, 50), (48, 100)], ids=str)
def test_images_are_what_a_segmenter_was_trained_on_to_the_bit(sides, monkeypatch):
    prep = Preprocessing((24, 24), 3, (0.2, 0.5, 0.7), (0.25, 0.5, 0.125), "bilinear", 1.0, "center", *sides)
    arrays, images = drawn_arrays()
    seen = "images.map(fitted).map(({width, height, data}) => ({width, height, data: [...data]}))"
    pixels = in_node(seen, preprocessing=vars(prep), max_side=MAX_SIDE, images=images)
    monkeypatch.setattr(Image.Image, "resize", in_order)
    transform, mean, std = dense_eval_transform(prep), *(torch.tensor(v).view(3, 1, 1) for v in (prep.mean, prep.std))
    for array, found in zip(arrays, pixels, strict=True):
        wanted = (transform(Image.fromarray(array), 0)[0] * std + mean).mul(255).round().to(torch.uint8)
        assert (found["height"], found["width"]) == wanted.shape[1:]
        assert found["data"] == wanted.permute(1, 2, 0).flatten().tolist(), array.shape


def test_windows_begin_where_the_predictors_do():
    pairs = [(window + more, window) for window in (1, 2, 32, 97, 512) for more in (0, 1, 31, 300, 1025, 4001)]
    found = in_node("images.map(([length, window]) => starts(length, window))", images=pairs)
    assert found == [starts(*pair) for pair in pairs]

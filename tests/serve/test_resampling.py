"""The page's own preparation of images beside Pillow's and torchvision's, in Node."""

import json
import shutil
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image

from vimamba.data.steps import MAX_ASPECT
from vimamba.data.transforms import CROP_MODES, INTERPOLATIONS, Preprocessing, eval_transform
from vimamba.serve.page import FILE

pytestmark = [] if shutil.which("node") else pytest.mark.browser
SIZES = [(61, 40), (40, 61), (7, 5), (24, 24), (9, 300), (200, 31)]
BEGINS, ENDS = "const sinc =", "let session = null;"
PROGRAM = """
const {preprocessing, max_aspect, images} = JSON.parse(require("fs").readFileSync(0));
const settings = {web: {preprocessing, max_aspect}};
%s
console.log(JSON.stringify(images.map(image => [...whole(image).data])));
"""


def in_order(self, size, resample=None, *others, resize=Image.Image.resize, **more):
    """Across first, then down: Pillow 13 takes the other order, and rounds in between, where that is faster."""
    return resize(resize(self, (size[0], self.height), resample, *others, **more), size, resample, *others, **more)


@pytest.mark.parametrize("img_size", [(24, 24), (16, 27)], ids=str)
@pytest.mark.parametrize("crop_mode", CROP_MODES)
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_images_are_what_the_model_was_trained_on_to_the_bit(interpolation, crop_mode, img_size, monkeypatch):
    prep = Preprocessing(img_size, 3, (0.2, 0.5, 0.7), (0.25, 0.5, 0.125), interpolation, 0.9, crop_mode)
    drawn = np.random.RandomState(0)
    arrays = [drawn.randint(0, 256, (height, width, 3), np.uint8) for height, width in SIZES]
    given = {
        "preprocessing": vars(prep),
        "max_aspect": MAX_ASPECT,
        "images": [dict(width=a.shape[1], height=a.shape[0], data=a.ravel().tolist()) for a in arrays],
    }
    script = FILE.read_text()
    program = PROGRAM % script[script.index(BEGINS) : script.index(ENDS)]
    done = subprocess.run(["node", "-e", program], input=json.dumps(given), capture_output=True, text=True, check=True)
    monkeypatch.setattr(Image.Image, "resize", in_order)
    transform, mean, std = eval_transform(prep), *(torch.tensor(v).view(3, 1, 1) for v in (prep.mean, prep.std))
    for array, found in zip(arrays, json.loads(done.stdout), strict=True):
        wanted = (transform(Image.fromarray(array), 0)[0] * std + mean).mul(255).round().to(torch.uint8)
        assert found == wanted.permute(1, 2, 0).flatten().tolist(), array.shape

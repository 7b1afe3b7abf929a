"""Folders of pictures as they are met: what the tests of the data share."""

from PIL import Image

from vimamba.data.transforms import Preprocessing

GREY = Preprocessing((28, 28), 1, (0.13,), (0.31,), crop_pct=1.0)


def make(root, counts):
    """Folders of numbered grey pictures, all of them different: make(root, {"train/cat": 3})."""
    for position, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            picture = Image.new("L", (8, 8), i)
            picture.putpixel((position, 0), 255 - i)
            picture.save(root / name / f"{i}.png")
    return root

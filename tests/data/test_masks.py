"""Folders of images and masks: every layout, every kind of mask, and what is wrong with them."""

import dataclasses
import json
import os

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

from vimamba.data.decode import DecodeError, decode_image
from vimamba.data.image_data import Opening
from vimamba.data.masks import open_masks
from vimamba.data.samples import IGNORE
from vimamba.data.split import HeldOut, hold_out
from vimamba.errors import UserError

OPENING = Opening(0.25, 0, True, hold_out, None)
WHOLE = Opening(1.0, 0, False, hold_out, None)
CLASSES = np.array([[0, 1, 2, 2], [0, 1, 1, 2], [0, 0, 1, 2]])  # which no turn leaves as they are


def mask_of(values, dtype=np.uint8):
    return Image.fromarray(np.asarray(values).astype(dtype))


def write(root, images="images", masks="masks", count=4, values=CLASSES, ending=".png", **how):
    for index in range(count):
        picture = np.random.RandomState(sum(images.encode()) + 100 * index).randint(
            0, 256, (*np.shape(values)[:2], 3), np.uint8
        )
        for folder, image, end in ((images, Image.fromarray(picture), ".png"), (masks, mask_of(values, **how), ending)):
            (root / folder).mkdir(parents=True, exist_ok=True)
            image.save(root / folder / f"{index}{end}")
    return root


def opened(root, opening=OPENING, **how):
    return open_masks(str(root), dataclasses.replace(opening, **how))


@pytest.mark.parametrize("masks", ["masks", "mask", "annotations", "labels", "SegmentationClass", "gtFine"])
@pytest.mark.parametrize("ending", [".png", ".tif", ".bmp"])
def test_two_folders_are_one_that_is_split(tmp_path, masks, ending):
    data = opened(write(tmp_path, masks=masks, count=8, ending=ending))
    assert data.drawn
    assert sorted(data.train.keys() + data.val.keys()) == [f"images/{index}.png" for index in range(8)]
    assert len(data.val) > 0
    assert data.class_names == ["0", "1", "2"]
    assert "no list of classes: the values of the masks, 0 to 2, are taken for them" in data.notes[0]
    mask = data.train.target(0)
    assert isinstance(mask, tv_tensors.Mask)
    assert mask.dtype == torch.int32
    assert mask.equal(torch.tensor(CLASSES, dtype=torch.int32))
    assert data.train.image(0).size == (4, 3)
    data = opened(tmp_path, WHOLE)
    assert (len(data.train), len(data.val)) == (0, 8)


@pytest.mark.parametrize(
    ("train", "val"),
    [
        (("train/images", "train/masks"), ("val/images", "val/masks")),
        (("images/train", "masks/train"), ("images/val", "masks/val")),
        (("images/training", "annotations/training"), ("images/validation", "annotations/validation")),
        (("training/img", "training/gt"), ("test/img", "test/gt")),
        (("images/train/a", "masks/train/a"), ("images/val/b", "masks/val/b")),
    ],
)
def test_halves(tmp_path, train, val):
    write(tmp_path, *train, count=3)
    write(tmp_path, *val, count=2)
    data = opened(tmp_path)
    assert not data.drawn
    assert data.train.keys() == [f"{train[0]}/{index}.png" for index in range(3)]
    assert data.val.keys() == [f"{val[0]}/{index}.png" for index in range(2)]
    assert data.val.target(1).equal(torch.tensor(CLASSES, dtype=torch.int32))


def test_a_half_alone_is_split_or_measured(tmp_path):
    data = opened(write(tmp_path, "train/images", "train/masks"))
    assert data.drawn
    assert len(data.train) + len(data.val) == 4
    os.rename(tmp_path / "train", tmp_path / "val")
    with pytest.raises(UserError, match="nothing to learn from, but a half to hold out"):
        opened(tmp_path)
    assert len(opened(tmp_path, WHOLE).val) == 4


def test_a_single_image_cannot_be_split(tmp_path):
    write(tmp_path, count=1)
    with pytest.raises(UserError, match="has a single image; a split needs two"):
        opened(tmp_path)
    assert len(opened(tmp_path, WHOLE).val) == 1


def test_a_run_keeps_what_it_held_out(tmp_path):
    data = opened(write(tmp_path, count=12))
    kept = data.held_out()
    write(tmp_path, count=20)
    again = opened(tmp_path, Opening(0.9, 7, True, hold_out, HeldOut(**vars(kept))))
    assert again.val.keys() == data.val.keys()
    assert len(again.train) == 20 - len(data.val)
    assert not data.moved_from(again.held_out())
    assert data.moved_from(kept)


def test_a_changed_mask_changes_the_fingerprint(tmp_path):
    data = opened(write(tmp_path, values=np.zeros((40, 40)) + np.arange(40)))
    kept = data.held_out()
    mask_of(np.random.RandomState(0).randint(0, 3, (40, 40))).save(tmp_path / "masks" / "1.png")
    assert not opened(tmp_path).moved_from(kept)


def test_ade20k_is_read_as_it_comes(tmp_path):
    values = np.array([[0, 1, 150], [2, 3, 0]])
    for half, count in (("training", 3), ("validation", 1)):
        write(tmp_path, f"images/{half}", f"annotations/{half}", count=count, values=values)
    rows = [f"{i}\t0.1\t11664\t1172\t1\tclass {i}, thing" for i in range(1, 151)]
    (tmp_path / "objectInfo150.txt").write_text("\n".join(["Idx\tRatio\tTrain\tVal\tStuff\tName", *rows]))
    data = opened(tmp_path)
    assert len(data.class_names) == 150
    assert data.class_names[0] == "class 1, thing"
    assert data.val.target(0).tolist() == [[IGNORE, 0, 149], [1, 2, IGNORE]]
    assert data.notes == []


PALETTE = {"sky": (0, 0, 255), "tall tree": (0, 128, 0), "road": (90, 90, 90)}
TEXTS = {
    "palette.txt": "\n".join(f"{name} {r} {g} {b}" for name, (r, g, b) in PALETTE.items()),
    "palette.csv": "r,g,b,name\n" + "\n".join(f"{r},{g},{b},{name}" for name, (r, g, b) in PALETTE.items()),
    "class_dict.csv": "name, r, g, b\r\n"
    + "\r\n".join(f"{name}, {r}, {g}, {b}" for name, (r, g, b) in PALETTE.items()),
    "labelmap.txt": "# label:color_rgb:parts:actions\n"
    + "\n".join(f"{name}:{r},{g},{b}::" for name, (r, g, b) in PALETTE.items()),
    "palette.json": json.dumps(PALETTE),
}
COLOURS = np.array([*PALETTE.values()], dtype=np.uint8)


@pytest.mark.parametrize("listed", TEXTS)
@pytest.mark.parametrize("given", [False, True])
def test_colours_stand_for_classes(tmp_path, listed, given):
    write(tmp_path, values=COLOURS[CLASSES])
    path = tmp_path / (f"another-{listed}" if given else listed)
    path.write_text(TEXTS[listed])
    if not given:
        (tmp_path / "classes.txt").write_text("a\nb\nc")  # which has no colours
    data = opened(tmp_path, class_names=str(path) if given else None)
    assert data.class_names == [*PALETTE]
    assert data.train.target(0).tolist() == CLASSES.tolist()
    image = Image.fromarray(COLOURS[CLASSES]).convert("RGBA")
    image.save(str(data.train.masks[0]))
    assert data.train.target(0).tolist() == CLASSES.tolist()


@pytest.mark.parametrize("name", ["void", "Ignore"])
def test_a_colour_may_stand_for_no_class(tmp_path, name):
    (tmp_path / "palette.txt").write_text(f"sky 0 0 255\n{name} 0 0 0\nroad 90 90 90\n")
    write(tmp_path, values=np.array([[[0, 0, 255], [0, 0, 0], [90, 90, 90]]]))
    data = opened(tmp_path)
    assert data.class_names == ["sky", "road"]
    assert data.train.target(0).tolist() == [[0, IGNORE, 1]]


def test_numbers_count_the_lines_of_a_palette(tmp_path):
    (tmp_path / "palette.txt").write_text("void 0 0 0\nsky 0 0 255\nroad 90 90 90\n")
    data = opened(write(tmp_path, values=[[0, 1, 2, 255]]))
    assert data.class_names == ["sky", "road"]
    assert data.train.target(0).tolist() == [[IGNORE, 0, 1, IGNORE]]


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_greys_of_a_palette_are_what_the_masks_hold(tmp_path, mode):
    (tmp_path / "palette.txt").write_text("land 0 0 0\nwater 255 255 255\nvoid 128 128 128\n")
    values = np.array([[0, 255, 128]])
    data = opened(write(tmp_path, values=values if mode == "L" else np.stack([values] * 3, -1)))
    assert data.train.target(0).tolist() == [[0, 1, IGNORE]]


def test_a_colour_that_no_class_has_is_named(tmp_path):
    (tmp_path / "palette.txt").write_text("sky 0 0 255\nroad 90 90 90\n")
    data = opened(write(tmp_path, values=np.array([[[0, 0, 255], [1, 2, 3], [1, 2, 3], [4, 4, 4]]])))
    with pytest.raises(DecodeError, match="has the colour 1 2 3 in 2 pixels; the palette does not have it"):
        data.train.target(0)


def test_coloured_masks_without_a_palette_are_refused(tmp_path):
    write(tmp_path, values=COLOURS[CLASSES])
    with pytest.raises(UserError, match=r"0\.png: is coloured; give each colour's class in a palette\.txt"):
        opened(tmp_path)
    (tmp_path / "classes.txt").write_text("a\nb\nc")
    with pytest.raises(DecodeError, match="is coloured"):
        opened(tmp_path).train.target(0)


def test_numbers_in_three_channels_are_numbers(tmp_path):
    data = opened(write(tmp_path, values=np.stack([CLASSES] * 3, -1)))
    assert data.train.target(0).tolist() == CLASSES.tolist()


@pytest.mark.parametrize("mode", ["L", "P", "I;16", "I", "1", "RGB"])
def test_depths_and_kinds_of_masks(tmp_path, mode):
    values = CLASSES // 2 if mode == "1" else CLASSES
    write(tmp_path, values=values)
    image = mask_of(values)
    if mode == "P":
        image.putpalette([90, 90, 90, 255, 0, 0, 90, 90, 90])  # two indices of one colour
    elif mode == "1":
        image = Image.fromarray(values.astype(bool))
    elif mode != "L":
        image = {"I;16": mask_of(values, np.uint16), "I": mask_of(values, np.int32), "RGB": image.convert("RGB")}[mode]
    ending = ".tif" if mode == "I" else ".png"
    for index in range(4):
        (tmp_path / "masks" / f"{index}.png").unlink()
        image.save(tmp_path / "masks" / f"{index}{ending}")
    assert opened(tmp_path).train.target(0).tolist() == values.tolist()


def test_more_than_256_classes_of_16_bits(tmp_path):
    (tmp_path / "classes.txt").write_text("\n".join(f"class {i}" for i in range(400)))
    data = opened(write(tmp_path, values=[[0, 255, 399]], dtype=np.uint16))
    assert data.train.target(0).tolist() == [[0, 255, 399]]  # 255 is one of them
    data = opened(tmp_path, ignore_index=255)
    assert data.train.target(0).tolist() == [[0, IGNORE, 399]]


def test_numbers_of_objects_are_not_taken_for_classes(tmp_path):
    write(tmp_path, values=[[0, 1, 300]], dtype=np.uint16)
    with pytest.raises(UserError, match="hold values to 300; if these are classes and not objects, name the classes"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("ignore_index", "expected"), [(None, [0, 1, IGNORE, 2]), (0, [IGNORE, 1, None, 2]), (2, [0, 1, None, IGNORE])]
)
def test_one_value_is_left_out(tmp_path, ignore_index, expected):
    (tmp_path / "classes.txt").write_text("a\nb\nc\n")
    values = [[0, 1, 0 if ignore_index is not None else 255, 2]]
    target = opened(write(tmp_path, values=values), ignore_index=ignore_index).train.target(0)[0].tolist()
    assert [one for one, other in zip(target, expected, strict=True) if other is not None] == [
        other for other in expected if other is not None
    ]


def test_without_a_list_the_value_left_out_is_no_class(tmp_path):
    assert opened(write(tmp_path, values=[[0, 1, 255]])).class_names == ["0", "1"]
    assert opened(tmp_path, ignore_index=1).class_names == [str(value) for value in range(256)]


@pytest.mark.parametrize("names", [None, "sky\nroad\n"])
def test_0_and_255_are_two_classes(tmp_path, names):
    if names:
        (tmp_path / "classes.txt").write_text(names)
    write(tmp_path, values=[[0, 255, 255]])
    mask_of([[255] * 3]).save(tmp_path / "masks" / "0.png")  # the first is of one class alone
    data = opened(tmp_path, WHOLE)
    assert data.class_names == (names.split() if names else ["background", "foreground"])
    assert data.val.target(0).tolist() == [[1, 1, 1]]
    assert data.val.target(1).tolist() == [[0, 1, 1]]
    assert data.notes == [f"{tmp_path}: the masks hold 0 and 255 alone: taken for {' and '.join(data.class_names)}"]


def test_with_a_1_among_them_255_is_left_out(tmp_path):
    (tmp_path / "classes.txt").write_text("a\nb\n")
    data = opened(write(tmp_path, values=[[0, 255, 1]]))
    assert data.train.target(0).tolist() == [[0, IGNORE, 1]]


@pytest.mark.parametrize("value", [3, 254])
def test_a_value_beyond_the_classes_is_named(tmp_path, value):
    (tmp_path / "classes.txt").write_text("a\nb\nc\n")
    data = opened(write(tmp_path, values=[[0, value, value, 1]]))
    with pytest.raises(DecodeError, match=f"has the value {value} in 2 pixels; the 3 classes are 0 to 2"):
        data.train.target(0)


def test_a_value_beyond_16_bits_is_named(tmp_path):
    (tmp_path / "classes.txt").write_text("a\nb\nc\n")
    data = opened(write(tmp_path, values=[[0, 70000, 1]], dtype=np.int32, ending=".tif"))
    with pytest.raises(DecodeError, match="has the value 70000 in 1 pixels"):
        data.train.target(0)


def test_a_mask_of_another_size_leaves_its_image_out(tmp_path):
    data = opened(write(tmp_path))
    mask_of(np.zeros((3, 5))).save(str(data.train.masks[0]))
    with pytest.raises(DecodeError, match="is 5 x 3 pixels, and its image 4 x 3"):
        data.train.target(0)


def test_files_without_a_partner_are_named_and_left_out(tmp_path):
    write(tmp_path, count=30)
    os.remove(tmp_path / "masks" / "7.png")
    mask_of(CLASSES).save(tmp_path / "masks" / "lonely.png")
    data = opened(tmp_path)
    assert len(data.train) + len(data.val) == 29
    assert "images without a mask: 1 (" in data.notes[1]
    assert "7.png" in data.notes[1]
    assert "masks without an image: 1 (" in data.notes[1]


@pytest.mark.parametrize(("folder", "what"), [("masks", "4 of 30 are images without a mask"),
                                              ("images", "4 of 30 are masks without an image")])  # fmt: skip
def test_many_files_without_a_partner_are_refused(tmp_path, folder, what):
    write(tmp_path, count=30)
    for index in range(4):
        os.remove(tmp_path / folder / f"{index}.png")
    with pytest.raises(UserError, match=f"{what} of the same name in masks/, such as .*0.png; rename"):
        opened(tmp_path)


def test_an_ending_of_masks_is_not_part_of_the_name(tmp_path):
    write(tmp_path, count=6)
    for index in range(6):
        os.rename(tmp_path / "masks" / f"{index}.png", tmp_path / "masks" / f"{index}_mask.png")
    mask_of(CLASSES).save(tmp_path / "masks" / "3-seg.png")
    data = opened(tmp_path)
    assert len(data.train) + len(data.val) == 6
    assert "second masks of an image: 1" in data.notes[1]


def test_lossy_masks_are_refused(tmp_path):
    write(tmp_path)
    mask_of(CLASSES).save(tmp_path / "masks" / "2.jpg")
    with pytest.raises(UserError, match=r"2\.jpg: is a JPEG, which blurs the numbers of classes; write masks as PNG"):
        opened(tmp_path)
    os.replace(tmp_path / "masks" / "2.jpg", tmp_path / "masks" / "2.png")
    data = opened(tmp_path, WHOLE)
    with pytest.raises(DecodeError, match=r"2\.png: is a JPEG, which blurs"):
        data.val.target(2)


def test_what_cannot_be_decoded_is_named(tmp_path):
    (tmp_path / "classes.txt").write_text("a\nb\nc\n")
    data = opened(write(tmp_path), WHOLE)
    (tmp_path / "masks" / "0.png").write_bytes(b"no picture")
    mask_of(CLASSES, np.float32).save(tmp_path / "masks" / "1.png", "TIFF")
    (tmp_path / "images" / "2.png").write_bytes(b"")
    for index, reason in ((0, "is not an image"), (1, "has pixels of the kind F"), (2, "is empty")):
        with pytest.raises(DecodeError, match=reason):
            data.val.target(index)


@pytest.mark.parametrize(
    ("folders", "reason"),
    [
        ([], "has no images/ with masks/"),
        (["images"], "has no images/ with masks/"),
        (["images", "masks"], "holds no images"),
        (["cats/a"], "has no images/ with masks/"),
    ],
)
def test_empty_folders_are_refused(tmp_path, folders, reason):
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True)
    with pytest.raises(UserError, match=reason):
        opened(tmp_path)


def test_of_two_folders_the_one_with_pictures_is_meant(tmp_path):
    write(tmp_path)
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "all.json").write_text("{}")
    assert len(opened(tmp_path, WHOLE).val) == 4
    write(tmp_path, masks="labels")
    with pytest.raises(UserError, match="labels/ and masks/ may both be meant; leave one of them there"):
        opened(tmp_path)


# Pillow 13 turns the pixels of uncompressed TIFF files wrongly.
HOW = {".jpg": dict(quality=100), ".tif": dict(compression="tiff_lzw")}


@pytest.mark.parametrize("ending", HOW)
@pytest.mark.parametrize(
    ("drawn_on", "orientation"),
    # Of a half turn nothing tells that the mask was drawn before it: it is taken as it would be seen.
    [*(("what is shown", turn) for turn in range(1, 9)), *(("what is stored", turn) for turn in range(5, 9))],
)
def test_masks_follow_images_that_are_turned(tmp_path, orientation, drawn_on, ending):
    """An image whose pixels are its mask: after reading both are the same."""
    grey = np.kron(CLASSES, np.ones((16, 16))) * 100
    stored = Image.fromarray(grey.astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    stored.save(tmp_path / "images" / f"0{ending}", exif=exif, **HOW[ending])
    image = np.asarray(decode_image(tmp_path / "images" / f"0{ending}")).astype(int)
    (tmp_path / "classes.txt").write_text("a\nb\nc\n")
    seen = grey if drawn_on == "what is stored" else (image + 50) // 100 * 100
    mask_of(seen // 100).save(tmp_path / "masks" / "0.png")
    found = opened(tmp_path, WHOLE).val.target(0).numpy()
    assert found.shape == image.shape
    assert np.abs(found * 100 - image).max() < 20


@pytest.mark.parametrize(
    ("file", "text", "reason"),
    [
        ("palette.txt", "sky 0 0 255\nroad\n", "has a colour in the line 'sky 0 0 255' and none in 'road'"),
        ("palette.txt", "sky 0 0 300\nroad 1 1 1\n", r"has the colour \[0, 0, 300\]"),
        ("palette.txt", "sky 0 0 255\nroad 0 0 255\n", r"gives the colour \(0, 0, 255\) to road and to another class"),
        ("palette.json", '{"sky": [1, 2]}', r"has the colour \[1, 2\]"),
        ("palette.json", '{"sky": [1, 2', "is not JSON"),
        ("palette.json", '"sky"', r"holds 'sky'; give \{name: \[r, g, b\]\}"),
        ("palette.json", "[1]", "lists what are no names"),
        ("classes.txt", "a\nb\na\n", "names the class a twice"),
        ("classes.txt", "\n\n", "names no classes"),
        ("classes.txt", "a\x1b[31m\nb", "which is no text"),
        ("classes.txt", "a" * 2**21, "larger than the 1 MB"),
    ],
)
def test_lists_of_classes_that_make_no_sense_are_refused(tmp_path, file, text, reason):
    write(tmp_path)
    (tmp_path / file).write_text(text)
    with pytest.raises(UserError, match=f"{file}: .*{reason}"):
        opened(tmp_path)


def test_a_list_that_is_not_there_or_no_text_is_refused(tmp_path):
    write(tmp_path)
    with pytest.raises(UserError, match=r"none\.txt: is no file"):
        opened(tmp_path, class_names=str(tmp_path / "none.txt"))
    (tmp_path / "classes.txt").write_bytes(b"\xff\xfe\x00\xd8")
    with pytest.raises(UserError, match="cannot be read"):
        opened(tmp_path)


def test_names_in_json(tmp_path):
    (tmp_path / "palette.json").write_text('["sky", "1 2 3", "road"]')
    assert opened(write(tmp_path)).class_names == ["sky", "1 2 3", "road"]


def test_copies_across_the_halves_are_told(tmp_path):
    write(tmp_path, "train/images", "train/masks")
    write(tmp_path, "val/images", "val/masks", count=2)
    os.remove(tmp_path / "val/images/0.png")
    os.link(tmp_path / "train/images/3.png", tmp_path / "val/images/0.png")
    assert "1 of the 2 held-out images are copies" in opened(tmp_path).notes[-1]

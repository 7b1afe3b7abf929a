"""Large images tile by tile: seams, objects that seams cut, and going on after every tile."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from skimage import measure
from torch import nn

import vimamba
from tests.dense import scene
from vimamba.data.decode import DecodeError
from vimamba.data.transforms import Preprocessing
from vimamba.errors import UserError
from vimamba.inference import tiles
from vimamba.inference.joining import Frame, joined
from vimamba.inference.predictor import Predictor
from vimamba.inference.tiles import TileOptions, Tiling, detect, segment, spans, weights
from vimamba.tasks.options import InferenceOptions
from vimamba.tasks.results import Crop, Detections
from vimamba.tasks.weights import ModelCard

# -- where tiles lie


@pytest.mark.parametrize("overlap", [0, 1, 12, 16])
@pytest.mark.parametrize("length", [1, 5, 16, 17, 31, 32, 33, 47, 48, 49, 100, 1000])
def test_tiles_cover_an_axis_and_their_weights_are_one(length, overlap):
    tile, total = 32, np.zeros(length)
    found = spans(length, tile, overlap)
    for span in found:
        total[span.start : span.stop] += weights(span, length, overlap)
        assert 0 <= span.seen <= span.start < span.stop <= length
        assert span.stop - span.seen == min(tile, length)  # all see the same size
    np.testing.assert_allclose(total, 1.0, atol=1e-6)
    assert all(a.stop - b.start == overlap for a, b in itertools.pairwise(found))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tile": 31}, "`tile` is 31; it must be at least 32"),
        ({"tile": 64, "overlap": 33}, "`overlap` is 33; give 0 to half of `tile`, 32"),
        ({"tile": 64, "overlap": -1}, "`overlap` is -1"),
        ({"overlap": 5}, "`overlap` 5: goes with `tile`"),
    ],
)
def test_tiles_that_cannot_be_are_refused(options, said):
    with pytest.raises(UserError, match=said):
        TileOptions(**options)


def test_tiles_overlap_by_an_eighth_unless_told():
    assert TileOptions(1024).overlap == 128
    assert TileOptions(64).overlap == 8
    assert TileOptions(64, 0).overlap == 0


# -- a class for each pixel


class ByColour(nn.Module):
    """Logits of a pixel by its colour alone, for so many classes."""

    def __init__(self, classes=3, offset=0.0):
        super().__init__()
        self.mix = nn.Parameter(torch.randn(classes, 3, generator=torch.Generator().manual_seed(0)))
        self.offset = nn.Parameter(torch.full((), offset))

    def forward(self, images_BCHW):
        return torch.einsum("kc,bchw->bkhw", self.mix, images_BCHW) + self.offset


def predictor_of(model, task="segment", classes=3, names=None, **how):
    """With a model of the tests' own."""
    names = names or [f"class {i}" for i in range(classes)]
    head = {"head": "linear" if task == "segment" else "mask_rcnn"}
    card = ModelCard("vim_nano", {}, names, Preprocessing((8, 8), 3, (0.5,) * 3, (0.5,) * 3), task=task, head=head)
    return Predictor(model.eval(), card, "cpu", how=InferenceOptions(**how))


def image_file(path, height, width, **how):
    pixels = np.random.RandomState(height).randint(0, 255, (height, width, 3), dtype=np.uint8)
    tifffile.imwrite(path, pixels, photometric="rgb", metadata=None, tile=(16, 16), **how)
    return str(path), pixels


SIZES = [(70, 90, 32, 0), (70, 90, 32, 8), (70, 90, 48, 24), (33, 200, 32, 16), (20, 20, 32, 16), (1, 1, 32, 4),
         (65, 64, 64, 5)]  # fmt: skip


@pytest.mark.parametrize(("height", "width", "tile", "overlap"), SIZES)
def test_a_model_that_sees_pixels_alone_has_no_seams(tmp_path, height, width, tile, overlap):
    predictor = predictor_of(ByColour())
    path, pixels = image_file(tmp_path / "image.tif", height, width)
    seen = []
    result, files = segment(Tiling(predictor, path, TileOptions(tile, overlap), tmp_path, "out"),
                            lambda done, of: seen.append((done, of)))  # fmt: skip
    wanted = predictor.predict(Image.fromarray(pixels)).mask
    np.testing.assert_array_equal(result.mask, wanted)
    stored = tifffile.TiffFile(files["mask"]).pages[0]
    assert stored.is_tiled
    np.testing.assert_array_equal(stored.asarray(), wanted)
    assert Image.open(files["mask"]).mode == "P"
    assert seen == [(i, seen[-1][1]) for i in range(seen[-1][1] + 1)]
    assert sorted(result.to_dict()["classes"], key=str) == sorted(
        predictor.predict(Image.fromarray(pixels)).to_dict()["classes"], key=str
    )


def test_more_classes_than_a_byte_holds(tmp_path):
    predictor = predictor_of(ByColour(300), classes=300)
    path, pixels = image_file(tmp_path / "image.tif", 40, 70)
    result, files = segment(Tiling(predictor, path, TileOptions(32, 8), tmp_path, "out"))
    np.testing.assert_array_equal(result.mask, predictor.predict(Image.fromarray(pixels)).mask)
    stored = tifffile.imread(files["mask"])
    assert stored.dtype == np.uint16
    np.testing.assert_array_equal(stored, result.mask)


class Drift(nn.Module):
    """Logits that depend on the place in what is seen, so that a hard seam would be a jump."""

    def forward(self, images_BCHW):
        across = torch.linspace(-1, 1, images_BCHW.shape[3]).expand(len(images_BCHW), 1, images_BCHW.shape[2], -1)
        return torch.cat([across, -across], 1)


def test_logits_pass_from_a_tile_to_the_next(tmp_path, monkeypatch):
    predictor = predictor_of(Drift(), classes=2, window="whole")
    path, _ = image_file(tmp_path / "image.tif", 32, 56)
    tiling = Tiling(predictor, path, TileOptions(32, 8), tmp_path, "out")
    result, _ = segment(tiling)
    total = np.zeros((2, 56))
    for number in range(2):
        _, across = tiling.place(number)
        total[:, across.start : across.stop] += Drift()(torch.zeros(1, 3, 1, 32))[0, :, 0].numpy() * weights(
            across, 56, 8
        )
    np.testing.assert_array_equal(result.mask, np.broadcast_to(total.argmax(0), (32, 56)))
    assert (np.diff(result.mask[0].astype(int)) != 0).sum() == 3


def test_tags_of_the_place_on_earth_and_a_picture_go_with_the_mask(tmp_path, monkeypatch):
    monkeypatch.setattr(tiles, "PREVIEW", 40)
    scale = (33550, "d", 3, (0.5, 0.5, 0.0), True)
    path, pixels = image_file(tmp_path / "image.tif", 70, 90, extratags=[scale])
    _, files = segment(Tiling(predictor_of(ByColour()), path, TileOptions(32, 8), tmp_path, "out"))
    assert tifffile.TiffFile(files["mask"]).pages[0].tags[33550].value == scale[3]
    overlay = Image.open(files["overlay"])
    assert overlay.width >= 30  # 90 pixels by 3, and a legend below
    assert overlay.height > 24
    picture, every = Tiling(predictor_of(ByColour()), path, TileOptions(32, 8), tmp_path, "out").preview()
    assert (picture.size, every) == ((30, 24), 3)
    np.testing.assert_array_equal(np.asarray(picture), np.asarray(Image.fromarray(pixels).reduce(3)))


@pytest.fixture(scope="module")
def run(segmented_run):
    """With a large image of its kind beside it."""
    rows = [np.concatenate([scene(4 * row + column)[0] for column in range(4)], 1) for row in range(3)]
    path = segmented_run.folder.parent / "large.tif"
    tifffile.imwrite(path, np.concatenate(rows), photometric="rgb", tile=(16, 16))
    return segmented_run


def test_a_run_sees_the_same_but_near_seams(run, tmp_path):
    path = run.folder.parent / "large.tif"
    predictor = vimamba.load_run(run.folder, window="whole")
    whole = predictor.predict(path).mask
    result, _ = segment(Tiling(predictor, str(path), TileOptions(64, 16), tmp_path, "out"))
    far = np.ones_like(whole, dtype=bool)  # from the seams
    for axis, length in enumerate(whole.shape):
        for span in spans(length, 64, 16)[1:]:
            np.moveaxis(far, axis, 0)[span.start - 8 : span.start + 24] = False
    agree = result.mask == whole
    assert agree[far].mean() > 0.9
    assert agree.mean() > 0.85


# -- going on


def interrupted_after(tiling, count):
    def advance(done, of):
        if done == count:
            raise KeyboardInterrupt

    return tiling, advance


def counted(outputs, seen):
    def call(number):
        seen.append(number)
        return outputs(number)

    return call


def fresh(kind, folder, options, offset=0.0):
    if kind == "segment":
        return Tiling(predictor_of(ByColour(offset=offset)), str(folder / "image.tif"), options, folder, "out")
    return Tiling(predictor_of(Finder(offset), "detect"), str(folder / "image.tif"), options, folder, "out")


def outcome(kind, tiling, advance=lambda done, of: None):
    """What is found and written."""
    result, files = segment(tiling, advance) if kind == "segment" else detect(tiling, 0.1, advance)
    numbers = result.mask.tobytes() if kind == "segment" else json.dumps(result.to_dict())
    return numbers, {what: (tiling.folder / path).read_bytes() for what, path in files.items()}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["segment", "detect"])
@pytest.mark.parametrize("overlap", [0, 12])
def test_it_goes_on_after_every_tile(tmp_path, monkeypatch, kind, overlap):
    options = TileOptions(32, overlap)
    image_file(tmp_path / "image.tif", 70, 90)
    tiling = fresh(kind, tmp_path, options)
    wanted = outcome(kind, tiling)
    tiling.end()
    assert not [*tmp_path.glob(".*")]
    for count in range(len(tiling) + 1):
        with pytest.raises(KeyboardInterrupt):
            outcome(kind, *interrupted_after(fresh(kind, tmp_path, options), count))
        seen = []
        again = fresh(kind, tmp_path, options)
        with monkeypatch.context() as patch:
            patch.setattr(
                again, "outputs", lambda number, of=again.outputs, seen=seen: seen.append(number) or of(number)
            )
            assert outcome(kind, again) == wanted
        assert seen == [*range(count, len(tiling))]
        once_more = fresh(kind, tmp_path, options)  # all is done and written
        monkeypatch.setattr(once_more, "outputs", None)
        assert outcome(kind, once_more) == wanted
        once_more.end()
    assert not [*tmp_path.glob(".*")]


@pytest.mark.parametrize("kind", ["segment", "detect"])
def test_a_tile_that_was_half_done_is_done_again(tmp_path, kind):
    """Whatever the tile after the last one that is noted has left behind."""
    options = TileOptions(32, 12)
    image_file(tmp_path / "image.tif", 70, 90)
    tiling = fresh(kind, tmp_path, options)
    wanted = outcome(kind, tiling)
    tiling.end()
    for count in (1, 5, len(tiling) - 1):
        with pytest.raises(KeyboardInterrupt):
            outcome(kind, *interrupted_after(fresh(kind, tmp_path, options), count + 1))
        again = fresh(kind, tmp_path, options)
        again.note(count)  # as if it had been lost between what it found and its note
        assert outcome(kind, again) == wanted
        again.end()


@pytest.mark.parametrize("kind", ["segment", "detect"])
@pytest.mark.parametrize("change", ["weights", "options", "image", "names", "note", "arrays"])
def test_another_call_begins_anew(tmp_path, monkeypatch, kind, change):
    options, offset = TileOptions(32, 12), 0.0
    image_file(tmp_path / "image.tif", 70, 90)
    with pytest.raises(KeyboardInterrupt):
        outcome(kind, *interrupted_after(fresh(kind, tmp_path, options), 5))
    state = tmp_path / ".out.tiles"
    if change == "weights":
        offset = 0.01
    elif change == "options":
        options = TileOptions(32, 10)
    elif change == "image":
        image_file(tmp_path / "image.tif", 70, 90, compression="zlib")
    elif change == "note":
        (state / "progress.json").write_text('{"key": ')
    elif change == "arrays":
        next(path for path in state.iterdir() if path.name in ("labels.npy", "objects.jsonl")).unlink()
    tiling = fresh(kind, tmp_path, options, offset)
    if change == "names":
        tiling.predictor.card = dataclasses.replace(tiling.predictor.card, class_names=["x", "y", "z"])
    seen = []
    monkeypatch.setattr(tiling, "outputs", counted(tiling.outputs, seen))
    outcome(kind, tiling)
    assert seen == [*range(len(tiling))]


def test_objects_that_the_disk_lost_are_found_again(tmp_path):
    options = TileOptions(32, 12)
    image_file(tmp_path / "image.tif", 70, 90)
    wanted = outcome("detect", fresh("detect", tmp_path, options))
    kept = tmp_path / ".out.tiles/objects.jsonl"
    kept.write_text("".join(f"{line}\n" for line in kept.read_text().splitlines()[:4]))
    assert outcome("detect", fresh("detect", tmp_path, options)) == wanted


def test_a_file_that_ends_early_is_named(tmp_path):
    path, _ = image_file(tmp_path / "image.tif", 70, 90)
    whole = (tmp_path / "image.tif").read_bytes()
    (tmp_path / "image.tif").write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(DecodeError, match=r"image\.tif: "):
        segment(Tiling(predictor_of(ByColour()), path, TileOptions(32, 8), tmp_path, "out"))


def test_a_missing_tifffile_is_said_before_the_work(tmp_path, monkeypatch):
    Image.new("RGB", (50, 50)).save(tmp_path / "image.png")
    tiling = Tiling(predictor_of(ByColour()), str(tmp_path / "image.png"), TileOptions(32, 8), tmp_path, "out")
    monkeypatch.setattr(tiles.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(tiling, "outputs", None)
    with pytest.raises(UserError, match="needs tifffile; run pip install"):
        segment(tiling)


# -- objects


class Finder(nn.Module):
    """Finds every patch of one bright colour: red ones are of class 0, blue ones of class 2."""

    def __init__(self, offset=0.0, masks=True):
        super().__init__()
        self.offset, self.masks = nn.Parameter(torch.full((), offset)), masks

    def forward(self, images):
        return [self.find(image_CHW.numpy()) for image_CHW in images]

    def find(self, image_CHW):
        boxes, labels = [], []
        for channel in (0, 2):
            for region in measure.regionprops(measure.label(image_CHW[channel] > 0.9)):
                top, left, bottom, right = region.bbox
                boxes.append([left, top, right, bottom])
                labels.append(channel)
        scores = torch.tensor([0.5 + 0.4 * (b[2] - b[0]) / 1000 for b in boxes])  # larger parts are surer
        found = {"boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), "scores": scores,
                 "labels": torch.tensor(labels, dtype=torch.int64)}  # fmt: skip
        return found | ({"masks": torch.ones(len(boxes), 1, 28, 28)} if self.masks else {})


def with_patches(path, patches, size=(200, 300)):
    """Patches of a colour: (left, top, right, bottom, channel)."""
    pixels = np.zeros((*size, 3), np.uint8)
    for left, top, right, bottom, channel in patches:
        pixels[top:bottom, left:right, channel] = 255
    tifffile.imwrite(path, pixels, photometric="rgb", tile=(64, 64))
    return str(path)


def found_boxes(result):
    return sorted((*(round(side) for side in box), label) for box, label in
                  zip(result.boxes.tolist(), result.label_ids.tolist(), strict=True))  # fmt: skip


PATCHES = {  # tiles of 96 begin at 0, 64, 128 ... and overlap by 32
    "inside a tile": [(5, 5, 30, 40, 0), (100, 110, 120, 125, 2)],
    "cut by a seam": [(70, 10, 110, 40, 0)],
    "cut by a seam in the middle of a large one": [(10, 20, 180, 50, 2)],
    "over four tiles": [(50, 40, 140, 130, 0)],
    "in all of an overlap": [(66, 66, 94, 94, 0)],
    "barely in an overlap": [(60, 10, 66, 30, 0), (93, 50, 125, 60, 2)],
    "larger than a tile": [(0, 0, 290, 150, 0)],
    "beside each other": [(66, 10, 78, 40, 0), (80, 10, 94, 40, 0), (50, 100, 79, 120, 2), (81, 100, 130, 120, 2)],
    "over each other of two classes": [(70, 10, 90, 40, 0), (70, 10, 90, 40, 2)],
    "none": [],
}


@pytest.mark.parametrize("patches", PATCHES.values(), ids=PATCHES)
@pytest.mark.parametrize("masks", [True, False], ids=["masks", "boxes"])
def test_objects_that_seams_cut_are_joined(tmp_path, patches, masks):
    path = with_patches(tmp_path / "image.tif", patches)
    predictor = predictor_of(Finder(masks=masks), "detect")
    result, files = detect(Tiling(predictor, path, TileOptions(96, 32), tmp_path, "out"), 0.5)
    assert found_boxes(result) == sorted(patches)
    assert result.size == (200, 300)
    assert (result.masks is not None) == masks
    for box, mask in zip(result.boxes.round().astype(int), result.masks if masks else [], strict=False):
        rows, columns = np.nonzero(mask)
        assert [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] == pytest.approx(box, abs=1)
    assert result.scores.tolist() == sorted(result.scores.tolist(), reverse=True)
    assert Image.open(files["overlay"]).size == (300, 200)


def test_without_an_overlap_parts_stay_apart(tmp_path):
    path = with_patches(tmp_path / "image.tif", [(70, 10, 130, 40, 0)])
    result, _ = detect(Tiling(predictor_of(Finder(), "detect"), path, TileOptions(96, 0), tmp_path, "out"), 0.5)
    assert found_boxes(result) == [(70, 10, 96, 40, 0), (96, 10, 130, 40, 0)]


def test_objects_of_small_scores_are_left_out(tmp_path):
    path = with_patches(tmp_path / "image.tif", [(5, 5, 30, 40, 0), (100, 110, 190, 125, 2)])
    predictor = predictor_of(Finder(), "detect")
    found = [
        len(detect(Tiling(predictor, path, TileOptions(96, 32), tmp_path, "out"), score)[0].scores)
        for score in (0.2, 0.515, 0.9)
    ]
    assert found == [2, 1, 0]


def test_the_picture_of_objects_is_small(tmp_path, monkeypatch):
    monkeypatch.setattr(tiles, "PREVIEW", 150)
    path = with_patches(tmp_path / "image.tif", [(60, 40, 150, 130, 0)])
    _, files = detect(Tiling(predictor_of(Finder(), "detect"), path, TileOptions(96, 32), tmp_path, "out"), 0.5)
    picture = np.asarray(Image.open(files["overlay"])).astype(int)
    assert picture.shape == (100, 150, 3)
    assert not picture[66:].any()
    assert (picture[20:65, 30:75].max(-1) > 60).all()  # the object, drawn over in its colour


FRAMES = [Frame(0, 0, 64, 64), Frame(32, 0, 96, 64)]


def found_in(boxes, labels=None, crops=None):
    """What is found in a part, the surest first."""
    scores = np.linspace(0.9, 0.5, len(boxes), dtype=np.float32)
    labels = np.zeros(len(boxes), np.int64) if labels is None else np.int64(labels)
    return Detections(np.float32(boxes), labels, scores, crops, ["a", "b"], (100, 100))


def test_a_small_object_in_the_box_of_a_large_one_stays():
    """Of two that the overlap shows in both tiles, each goes with the one that is most like it."""
    large, small = [0.0, 0.0, 60.0, 60.0], [40.0, 40.0, 50.0, 50.0]
    result = joined([found_in([large, small]), found_in([small, [32.0, 0.0, 60.0, 60.0]])], FRAMES, [(0, 1)])
    assert found_boxes(result) == [(0, 0, 60, 60, 0), (40, 40, 50, 50, 0)]


def test_objects_of_other_classes_in_the_same_place_stay():
    box = [[40.0, 10.0, 60.0, 30.0]]
    result = joined([found_in(box, [0]), found_in(box, [1])], FRAMES, [(0, 1)])
    assert found_boxes(result) == [(40, 10, 60, 30, 0), (40, 10, 60, 30, 1)]


def test_objects_in_the_same_box_whose_masks_lie_apart_stay():
    box, lower = [[40.0, 10.0, 60.0, 30.0]], np.tri(20, k=-2, dtype=bool)
    parts = [found_in(box, crops=[Crop(10, 40, mask)]) for mask in (lower, lower.T)]
    assert len(joined(parts, FRAMES, [(0, 1)]).scores) == 2
    assert len(joined([parts[0], parts[0]], FRAMES, [(0, 1)]).scores) == 1

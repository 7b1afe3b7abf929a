"""Exported models beside PyTorch's: every design, both kinds of ONNX file, programs and packages, and a C++ program."""

from __future__ import annotations

import dataclasses
import errno
import functools
import json
import math
import os
import shutil
import subprocess
from argparse import Namespace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
import torch.nn.functional as F
from onnx.reference import ReferenceEvaluator
from PIL import Image
from safetensors.torch import save_file

from tests.clients.test_graphs import DESIGNS, SMALL
from vimamba import VisionMamba, load_run, onnx_library
from vimamba.data.samples import ArraySamples
from vimamba.data.transforms import Preprocessing
from vimamba.errors import UserError
from vimamba.export import Source, export_aoti, export_int8, export_onnx, export_pt2, export_web, load_source
from vimamba.export.check import example_images, of_objects
from vimamba.export.outputs import Outputs, normalised
from vimamba.inference.evaluation import open_for_eval
from vimamba.models.heads import build_detector, build_segmenter, enlarge
from vimamba.ops.cpu import library
from vimamba.tasks.find import find_task

ROOT = Path(__file__).parents[2]
built = pytest.mark.skipif(library.UNAVAILABLE is not None, reason=str(library.UNAVAILABLE))
CLASSES = ["one", "two", "three", "four", "five"]
MODES = [dict(bidirectional="none"), dict(bidirectional="layer"), dict(bidirectional="ssm"), dict(merge="sum")]
PYRAMID = dict(dims=[8, 8, 16, 16], depths=[1, 1, 2, 1], head_dim=8, d_state=4, num_classes=5)


def source_of(model: torch.nn.Module, side: int = 32, in_chans: int = 3, noise: float = 0.2) -> Source:
    """Weights that tell the directions and the channels apart: fresh ones are all alike."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += noise * torch.randn(parameter.shape, generator=generator)
    prep = Preprocessing((side, side), in_chans, (0.4,) * in_chans, (0.3,) * in_chans)
    return Source(model.eval(), "small", "classification", CLASSES, prep, "mit")


def small(**options) -> Source:
    torch.manual_seed(0)
    return source_of(VisionMamba(**{**SMALL, **options}), in_chans=options.get("in_chans", 3))


def session_of(path: Path, threads: int = 1) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    if library.ONNX_PATH.exists():
        options.register_custom_ops_library(onnx_library())
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def run(path: Path, images: torch.Tensor, threads: int = 1) -> torch.Tensor:
    return torch.from_numpy(session_of(path, threads).run(None, {"images": images.numpy()})[0])


KINDS = {
    "stock": ({}, {"": 21}),
    "vimamba": (dict(operator="vimamba"), {"": 21, "vimamba": 1}),
    "microsoft": (dict(operator="microsoft"), {"": 21, "com.microsoft": 1}),
}


OF_ONNX = [
    *((options, kind) for options in [*DESIGNS, *MODES, "pyramid"] for kind in ("stock", "vimamba")),
    *((options, "microsoft") for options in [*DESIGNS[::3], DESIGNS[5], MODES[2]]),  # whose mixers are unlike
]


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        pytest.param(
            *of, marks=[*([built] if of[1] == "vimamba" else []), *([pytest.mark.slow] if i % 4 else [])], id=str(of)
        )
        for i, of in enumerate(OF_ONNX)
    ],
)
def test_onnx_gives_pytorchs_logits(options, kind, tmp_path):
    pyramid = options == "pyramid"
    source = source_of(timm.create_model("vim_pyramid_nano", **PYRAMID)) if pyramid else small(**options)
    path = tmp_path / "model.onnx"
    given, opsets = KINDS[kind]
    assert export_onnx(source, path, **given).difference <= 1e-4
    images = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        wanted = source.model(images)
    assert wanted.std() > 0.1
    torch.testing.assert_close(run(path, images), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(run(path, images[:1], threads=3), wanted[:1], rtol=1e-4, atol=1e-4)
    assert opsets_of(path) == opsets


def opsets_of(path: Path) -> dict[str, int]:
    return {entry.domain: entry.version for entry in onnx.load(path).opset_import}


def test_a_portable_file_runs_in_openvino(tmp_path):
    source, path = small(merge="gate"), tmp_path / "model.onnx"
    assert export_onnx(source, path, portable=True).difference <= 1e-4
    assert opsets_of(path) == {"": 18}
    openvino = pytest.importorskip("openvino")
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    images = example_images(source, False)
    with torch.inference_mode():
        found = torch.from_numpy(compiled({"images": images.numpy()})[0])
        torch.testing.assert_close(found, source.model(images), rtol=1e-4, atol=1e-4)


def test_a_standard_file_is_what_onnx_says_it_is(tmp_path):
    source, path = small(merge="gate"), tmp_path / "model.onnx"
    export_onnx(source, path, operator="standard")
    assert opsets_of(path) == {"": 27}
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    images = example_images(source, False)
    found = torch.from_numpy(ReferenceEvaluator(model).run(None, {"images": images.numpy()})[0])
    with torch.inference_mode():
        torch.testing.assert_close(found, source.model(images), rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def any_size(tmp_path_factory):
    """Of a kind, made once: a model of one channel, now of another size, and its file, from bytes to probabilities."""

    @functools.cache
    def exported(export):
        source, path = small(in_chans=1), tmp_path_factory.mktemp("any_size") / "model.pt2"
        found = export(source, path, img_size=(40, 48), dynamic_size=True, with_preprocessing=True)
        assert found.difference <= 1e-5
        assert found.seconds > 0
        return source, path

    return exported


RGB = np.random.RandomState(0).randint(0, 256, (33, 57, 3), np.uint8)


def probabilities(source: Source) -> torch.Tensor:
    """What PyTorch finds in RGB."""
    grey = torch.tensor(np.asarray(Image.fromarray(RGB).convert("L")))
    with torch.inference_mode():
        return source.model((grey[None, None] / 255 - 0.4) / 0.3).softmax(1)


@pytest.mark.parametrize("export", [export_onnx, export_pt2, export_aoti])
def test_any_size_and_preprocessing(export, any_size):
    (source, path), images = any_size(export), torch.from_numpy(RGB)[None]
    if export is export_onnx:
        found = run(path, images)
    elif export is export_pt2:
        program = torch.export.load(path)
        assert str(program.graph).count("vimamba.blocks") == 1
        found = program.module()(images)
    else:
        found = torch._inductor.aoti_load_package(str(path))(images)
    torch.testing.assert_close(found, probabilities(source), rtol=1e-4, atol=1e-5)


@built
@pytest.mark.compiled
def test_a_cpp_program_runs_a_package(any_size, tmp_path):
    cmake, root = shutil.which("cmake"), torch.__path__[0]
    if cmake is None:
        pytest.skip("needs cmake")
    (source, package), picture = any_size(export_aoti), tmp_path / "image.ppm"
    Image.fromarray(RGB).save(picture)
    subprocess.run([cmake, "-S", ROOT / "examples/cpp", "-B", tmp_path, f"-DTORCH_ROOT={root}"], check=True)
    subprocess.run([cmake, "--build", tmp_path], check=True)
    command = [tmp_path / "classify", package, library.PATH, picture]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={"PATH": os.defpath})
    names, *lines = done.stdout.splitlines()
    assert json.loads(names) == CLASSES
    assert [float(line.split()[1]) for line in lines] == pytest.approx(probabilities(source)[0].tolist(), abs=1e-5)


def test_the_file_tells_what_it_is(tmp_path):
    export_onnx(small(), tmp_path / "model.onnx")
    told = {entry.key: entry.value for entry in onnx.load(tmp_path / "model.onnx").metadata_props}
    assert (told["model"], told["task"], told["license"]) == ("small", "classification", "mit")
    assert json.loads(told["class_names"]) == CLASSES
    assert Preprocessing.from_dict(json.loads(told["preprocessing"])) == small().preprocessing


@pytest.mark.parametrize("export", [export_onnx, export_pt2])
def test_a_difference_leaves_nothing_behind(export, tmp_path, monkeypatch):
    forward, calls = Outputs.forward, []

    def another(self, images):
        if not torch.compiler.is_exporting():
            calls.append(images)
        return forward(self, images) + (0.0 if torch.compiler.is_exporting() else 2e-4)

    monkeypatch.setattr(Outputs, "forward", another)
    path = tmp_path / "model.pt2"
    path.write_text("an earlier one")
    with pytest.raises(UserError, match="differs from PyTorch's by 2"):
        export(small(), path)
    assert calls
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.pt2"]
    assert path.read_text() == "an earlier one"


def test_weights_of_more_than_2_gb_lie_beside_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.onnx._internal.exporter._onnx_program._LARGE_MODEL_THRESHOLD", 1000)
    export_onnx(small(), tmp_path / "model.onnx")
    assert {entry.name for entry in tmp_path.iterdir()} == {"model.onnx", "model.onnx.data"}
    assert run(tmp_path / "model.onnx", torch.zeros(1, 3, 32, 32)).shape == (1, 5)


@pytest.mark.parametrize(("head", "export"), [("linear", export_onnx), ("upernet", export_pt2)])
def test_a_segmenters_logits_have_the_images_size(head, export, tmp_path):
    torch.manual_seed(0)
    args = dict(depth=2, embed_dim=16, d_state=4)
    model = build_segmenter("vim_nano", args, 5, 3, (32, 32), {"head": head, "width": 8})
    source = dataclasses.replace(source_of(model), task="segment")
    images = example_images(source.sized((40, 48)), False)
    export(source, tmp_path / "model.pt2", img_size=(40, 48))
    exported = run if export is export_onnx else lambda path, x: torch.export.load(path).module()(x)
    with torch.inference_mode():
        wanted = enlarge(source.model(images), (40, 48))
    assert wanted.shape == (4, 5, 40, 48)
    torch.testing.assert_close(exported(tmp_path / "model.pt2", images), wanted, rtol=1e-4, atol=1e-4)


def test_int8_tells_the_accuracy_before_and_after(trained, tmp_path):
    data = open_for_eval(trained, find_task("classification"), str(trained.parent / "photos"))[0]
    export_onnx(trained, tmp_path / "float.onnx")
    found = export_int8(trained, tmp_path / "model.onnx", data)
    assert (found.images, found.before) == (12, load_run(trained).evaluate().numbers["top1"])
    assert found.after >= found.before - 0.1
    assert 0 < found.difference < 1
    assert [entry.name for entry in tmp_path.iterdir() if entry.name != "float.onnx"] == ["model.onnx"]
    kinds = {node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node}
    assert {"QuantizeLinear", "DequantizeLinear", "Scan"} <= kinds
    with pytest.raises(UserError, match="`int8`: is for models of one of classification, segment, detect"):
        export_int8(dataclasses.replace(small(), task="depth"), tmp_path / "x.onnx", data)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"dynamic_size": True, "with_preprocessing": True}], ids=str)
def test_int8_of_a_segmenter_tells_the_mean_iou(options, segmented, tmp_path):
    data = open_for_eval(segmented, find_task("segment"), str(segmented.parent / "data"))[0]
    found = export_int8(segmented, tmp_path / "model.onnx", data, **options)
    assert (found.measure, found.images) == ("mIoU", 4)
    assert found.before == pytest.approx(load_run(segmented).evaluate().numbers["miou"], abs=1e-3)
    assert found.before > 0.6
    assert abs(found.after - found.before) < 0.1
    assert 0 < found.difference < (1 if options else 5)
    assert str(found).startswith(f"mIoU {found.after:.2%} of 4 images, {found.before:.2%} in float32; ")
    assert "QuantizeLinear" in {node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node}


@pytest.mark.slow
@pytest.mark.parametrize("with_preprocessing", [False, True])
def test_int8_of_a_detector_tells_the_average_precision(with_preprocessing, detected, tmp_path):
    data = open_for_eval(detected, find_task("detect"), str(detected.parent / "data"))[0]
    found = export_int8(detected, tmp_path / "model.onnx", data, with_preprocessing=with_preprocessing)
    assert (found.measure, found.images) == ("AP", len(data.val))
    assert found.before == pytest.approx(load_run(detected).evaluate().numbers["map"], abs=1e-3)
    assert found.before > 0.1
    assert abs(found.after - found.before) < 0.1
    assert found.difference > 0
    assert "QuantizeLinear" in {node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node}
    assert "from PyTorch that of whole objects; one" in str(dataclasses.replace(found, difference=math.inf))


SEGMENTERS = [
    ("linear", "vim_nano", {"portable": True, "with_preprocessing": True}), ("upernet", "vim_nano", {}),
    ("fpn", "vim_tiny_patch16_224", {}), ("dpt", "vim_nano", {}),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("head", "backbone", "options"), SEGMENTERS, ids=str)
def test_a_segmenter_of_any_size(head, backbone, options, tmp_path):
    torch.manual_seed(0)
    args = dict(depth=4, embed_dim=16, d_state=4)
    model = build_segmenter(backbone, args, 5, 3, (64, 64), {"head": head, "width": 64})
    source, path = dataclasses.replace(source_of(model, side=64, noise=0.02), task="segment"), tmp_path / "model.onnx"
    export_onnx(source, path, dynamic_size=True, **options)
    wanted = Outputs(source, "with_preprocessing" in options)
    for height, width in ((64, 96), (33, 45), (70, 41), (18, 200)):
        images = torch.randn(2, 3, height, width)
        if options:
            images = torch.randint(0, 256, (2, height, width, 3), dtype=torch.uint8)
        with torch.inference_mode():
            torch.testing.assert_close(run(path, images), wanted(images), rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="`dynamic_size`: of a model that segments or detects is for `format` onnx"):
        export_pt2(source, path, dynamic_size=True)


DETECTORS = [
    ("mask_rcnn", {}), ("cascade_mask_rcnn", {"portable": True}), ("faster_rcnn", {"img_size": (40, 64)}),
    # Padded, and many anchors in the padding are as sure as each other.
    ("mask_rcnn", {"img_size": (48, 40)}), ("mask_rcnn", {"img_size": (33, 95), "portable": True}),
    ("mask_rcnn", {"dynamic_size": True, "with_preprocessing": True}), ("cascade_mask_rcnn", {"dynamic_size": True}),
    ("faster_rcnn", {"dynamic_size": True, "portable": True}),
    pytest.param("mask_rcnn", {"operator": "vimamba", "with_preprocessing": True}, marks=built),
]  # fmt: skip


ANY_SIZE = [(20, 20), (33, 64), (70, 45), (64, 200), (130, 130)]


def resized(images, height, width, raw):
    """Images, (batch, height, width, 3) of bytes or (batch, 3, height, width), at another size."""
    if not raw:
        return F.interpolate(images, (height, width), mode="bilinear")
    scaled_BCHW = F.interpolate(images.permute(0, 3, 1, 2).float(), (height, width), mode="bilinear")
    return scaled_BCHW.round().byte().permute(0, 2, 3, 1).contiguous()


@pytest.mark.slow
@pytest.mark.parametrize(("head", "options"), DETECTORS, ids=str)
def test_a_detector_finds_what_pytorchs_does(head, options, detected, tmp_path):
    source, path = load_source(detected), tmp_path / "model.onnx"
    data = open_for_eval(detected, find_task("detect"), str(detected.parent / "data"))[0]
    if head != "mask_rcnn":  # of a fresh one every box is as sure as any
        torch.manual_seed(0)
        args = dict(width=16, box_width=32, proposals=40, anchor_sizes=[6, 11, 16, 24, 32], score_threshold=0.2)
        model = build_detector(
            "vim_nano", dict(depth=2, embed_dim=16, d_state=4), 3, 3, (32, 32), {"head": head, **args}
        )
        source = dataclasses.replace(source_of(model), task="detect")
    least = 1e-3 if head.startswith("cascade") else 1e-4
    assert export_onnx(source, path, samples=data.val, **options).difference <= least
    given = onnx.load(path).graph.output
    names = [output.name for output in given]
    assert names == ["boxes", "labels", "scores", "masks"][: 4 if "mask" in head else 3]
    assert {output.type.tensor_type.shape.dim[0].dim_param for output in given} == {"objects"}
    session, found = session_of(path), 0
    raw = "with_preprocessing" in options
    images = example_images(source.sized(options.get("img_size")), raw, data.val)
    more = [resized(images, *size, raw) for size in ANY_SIZE] if "dynamic_size" in options else []
    for image in [one for batch in (images, *more) for one in batch.split(1)]:
        outputs = [torch.from_numpy(values) for values in session.run(None, {"images": image.numpy()})]
        with torch.inference_mode():
            (wanted,) = source.model(normalised(image, source.preprocessing) if raw else image)
        masks = [wanted["masks"][:, 0]] if "masks" in wanted else []
        assert of_objects(outputs, [*(wanted[name] for name in names[:3]), *masks]) <= least
        found += len(wanted["boxes"])
    assert found > 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("export", "options"),
    [
        (export_pt2, {}),
        (export_pt2, {"with_preprocessing": True, "img_size": (40, 64)}),
        (export_aoti, {"img_size": (48, 40)}),
    ],
    ids=["pt2", "pt2 of another size", "aoti of another size"],
)
def test_a_detector_as_a_program(export, options, detected, tmp_path):
    """With one object, with several, and with none."""
    source, path = load_source(detected), tmp_path / "model.pt2"
    data = open_for_eval(detected, find_task("detect"), str(detected.parent / "data"))[0]
    assert export(source, path, samples=data.val, **options).difference <= 1e-5
    exported = torch._inductor.aoti_load_package(str(path)) if export is export_aoti else None
    exported = exported or torch.export.load(path).module()
    raw, source, counts = "with_preprocessing" in options, source.sized(options.get("img_size")), []
    images = example_images(source, raw, data.val)
    for image in [*images.split(1), torch.zeros_like(images[:1])]:
        with torch.inference_mode():
            outputs = exported(image)
            (wanted,) = source.model(normalised(image, source.preprocessing) if raw else image)
        assert (
            of_objects(outputs, [*(wanted[name] for name in ("boxes", "labels", "scores")), wanted["masks"][:, 0]])
            <= 1e-5
        )
        counts.append(len(outputs[0]))
    assert max(counts) > 2


def test_objects_are_held_against_their_partners():
    torch.manual_seed(0)
    boxes, labels, scores = torch.rand(100, 4) * 32, torch.arange(100) % 3, torch.rand(100).sort(descending=True).values
    wanted = boxes, labels, scores, torch.rand(100, 28, 28)
    order = torch.randperm(100)
    assert of_objects([values[order] for values in wanted], wanted) == 0
    assert of_objects([values[1:] for values in wanted], wanted) == 0  # one of a hundred
    assert of_objects([values[3:] for values in wanted], wanted) > 0.1
    assert of_objects([values[:4] for values in wanted], [values[:3] for values in wanted]) > 0.1
    assert of_objects([values[:0] for values in wanted], wanted) == math.inf
    assert of_objects((boxes, (labels + 1) % 3, *wanted[2:]), wanted) > 0.1
    assert of_objects((boxes + 0.32, *wanted[1:]), wanted) == pytest.approx(0.01, rel=0.05)
    assert of_objects((boxes, labels, scores + 2e-4, wanted[3]), wanted) == pytest.approx(2e-4, rel=0.01)
    assert of_objects((*wanted[:3], wanted[3] + 3e-4), wanted) == pytest.approx(3e-4, rel=0.01)


def test_what_of_a_detector_cannot_be_exported_is_said(detected, tmp_path):
    source, path = load_source(detected), tmp_path / "model.pt2"
    with pytest.raises(UserError, match="`operator` standard: ONNX Runtime has no RoiAlign of that opset"):
        export_onnx(source, path, operator="standard")
    for export in (export_pt2, export_aoti):
        with pytest.raises(UserError, match="`dynamic_size`: of a model that segments or detects is for `format` onnx"):
            export(source, path, dynamic_size=True)
    with pytest.raises(UserError, match="`img_size`: the page of a dense model takes any size; leave it out"):
        export_web(source, tmp_path / "page", img_size=64)
    black = ArraySamples(np.zeros((1, 32, 32), np.uint8), np.zeros(1), "black")
    with pytest.raises(UserError, match="the model finds no object in the images that the export is checked with"):
        export_onnx(source, path, samples=black)
    assert not list(tmp_path.iterdir())


def test_a_page_whose_model_fails_its_check_leaves_nothing_and_harms_nothing(tmp_path, monkeypatch):
    source, folder = small(), tmp_path / "page"

    def differs(*args: object) -> None:
        raise UserError("the exported model differs")

    monkeypatch.setattr("vimamba.export.writing.compare", differs)
    with pytest.raises(UserError, match="differs"):
        export_web(source, folder)
    assert not list(tmp_path.iterdir())
    folder.mkdir()
    (folder / "index.html").write_text("of before")
    with pytest.raises(UserError, match="differs"):
        export_web(source, folder)
    assert [(file.name, file.read_text()) for file in folder.iterdir()] == [("index.html", "of before")]

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("vimamba.export.writing.compare", full)
    with pytest.raises(UserError) as refused:
        export_web(source, folder)
    assert str(refused.value) == f"`output` {folder}/model.onnx: cannot be written (No space left on device)"


def test_what_cannot_be_exported_is_said(tmp_path, monkeypatch):
    source, path = small(), tmp_path / "model.onnx"
    with pytest.raises(UserError, match="`task` depth: is not exported; export a model of one of classification, "):
        export_pt2(dataclasses.replace(source, task="depth"), path)
    with pytest.raises(UserError, match="`img_size` 4 x 4: the model cannot take it"):
        export_pt2(source, path, img_size=4)
    with pytest.raises(UserError, match="cannot be written"):
        export_pt2(source, tmp_path / "no" / "model.pt2")
    with pytest.raises(UserError, match="is a folder; give a file"):
        export_pt2(source, tmp_path)
    with pytest.raises(UserError, match="packages are called something"):
        export_aoti(source, path)
    monkeypatch.setattr("vimamba.export.onnx.find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(UserError, match=r"needs the package onnxscript: pip install 'vimamba\[export\]'"):
        export_onnx(source, path)
    assert not list(tmp_path.iterdir())


def test_a_name_with_a_checkpoint_and_a_checkpoint_of_the_official_code(tmp_path):
    args = dict(depth=1, embed_dim=16, d_state=4, num_classes=3)
    model = timm.create_model("vim_nano", **args)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    source = load_source("vim_nano", tmp_path / "model.safetensors", args)
    assert (source.name, source.class_names) == ("vim_nano", ["0", "1", "2"])
    assert source.preprocessing.img_size == (28, 28)
    assert all(torch.equal(a, b) for a, b in zip(source.model.parameters(), model.parameters(), strict=True))
    official = timm.create_model("vim_tiny_patch16_224", depth=1).state_dict()
    torch.save({"model": official, "args": Namespace(model="vim_tiny_patch16_midclstok")}, tmp_path / "official.pth")
    source = load_source(tmp_path / "official.pth", model_args={"if_divide_out": False})
    assert source.model.layers[0].mixer.merge == "sum"
    assert (len(source.class_names), source.class_names[0]) == (1000, "tench, Tinca tinca")
    assert source.license == "apache-2.0"


@pytest.mark.parametrize("kind", ["stock", pytest.param("vimamba", marks=built)])
def test_an_official_checkpoint_at_512_pixels(kind, tmp_path):
    """At its full width; its depth is in the hand of whoever has the checkpoint."""
    torch.manual_seed(0)
    model = source_of(timm.create_model("vim_tiny_patch16_224", depth=2), noise=0.1).model
    torch.save({"model": model.state_dict(), "args": Namespace()}, tmp_path / "official.pth")
    published = dict(use_middle_cls_token=True, if_divide_out=True)
    source, path = load_source(tmp_path / "official.pth", model_args=published).sized(512), tmp_path / "model.onnx"
    assert export_onnx(source, path, **KINDS[kind][0]).difference <= 1e-4
    images = torch.randn(1, 3, 512, 512, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        wanted = source.model(images)
    assert wanted.std() > 0.1
    torch.testing.assert_close(run(path, images, threads=2), wanted, rtol=1e-4, atol=1e-4)


def test_a_run_knows_its_own_arguments(trained):
    with pytest.raises(UserError, match="a run knows its own"):
        load_source(trained, model_args={"depth": 1})

"""Exported models beside PyTorch's: every design, both kinds of ONNX file, programs and packages, and a C++ program."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from PIL import Image

from tests.clients.test_graphs import DESIGNS, SMALL
from vimamba import VisionMamba
from vimamba.data.transforms import Preprocessing
from vimamba.errors import UserError
from vimamba.export import Source, export_aoti, export_onnx, export_pt2, lowering
from vimamba.export.check import example_images
from vimamba.export.outputs import Outputs
from vimamba.ops.cpu import library

ROOT = Path(__file__).parents[2]
built = pytest.mark.skipif(library.UNAVAILABLE is not None, reason=str(library.UNAVAILABLE))
CLASSES = ["one", "two", "three", "four", "five"]
MODES = [dict(bidirectional="none"), dict(bidirectional="layer"), dict(bidirectional="ssm"), dict(merge="sum")]
PYRAMID = dict(dims=[8, 8, 16, 16], depths=[1, 1, 2, 1], head_dim=8, d_state=4, num_classes=5)


def source_of(model: torch.nn.Module, side: int = 32, in_chans: int = 3) -> Source:
    """Weights that tell the directions and the channels apart: fresh ones are all alike."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    prep = Preprocessing((side, side), in_chans, (0.4,) * in_chans, (0.3,) * in_chans)
    return Source(model.eval(), "small", "classification", CLASSES, prep, "mit")


def small(**options) -> Source:
    torch.manual_seed(0)
    return source_of(VisionMamba(**{**SMALL, **options}), in_chans=options.get("in_chans", 3))


def run(path: Path, images: torch.Tensor) -> torch.Tensor:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


@pytest.mark.parametrize("portable", [False, True], ids=["stock", "portable"])
@pytest.mark.parametrize("options", [*DESIGNS, *MODES, "pyramid"], ids=str)
def test_onnx_gives_pytorchs_logits(options, portable, tmp_path):
    pyramid = options == "pyramid"
    source = source_of(timm.create_model("vim_pyramid_nano", **PYRAMID)) if pyramid else small(**options)
    path = tmp_path / "model.onnx"
    assert export_onnx(source, path, portable=portable).difference <= 1e-4
    images = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        wanted = source.model(images)
    assert wanted.std() > 0.1
    torch.testing.assert_close(run(path, images), wanted, rtol=1e-4, atol=1e-4)
    opsets = {entry.domain: entry.version for entry in onnx.load(path).opset_import}
    assert opsets == ({"": 18} if portable else {"": 21, "com.microsoft": 1})


def test_a_chunk_that_is_not_full_and_a_length_of_several():
    u, delta = torch.randn(2, 2, 2 * lowering.CHUNK + 3, 4).abs()
    B, C = torch.randn(2, 2, 2 * lowering.CHUNK + 3, 3)
    A = -torch.rand(4, 3)
    states, h = [], torch.zeros(2, 4, 3)
    for t in range(u.shape[1]):
        h = h * (delta[:, t, :, None] * A).exp() + (delta * u)[:, t, :, None] * B[:, t, None]
        states.append((h * C[:, t, None]).sum(-1))
    torch.testing.assert_close(lowering.chunked(u, delta, A, B, C), torch.stack(states, 1))


def test_a_portable_file_runs_in_openvino(tmp_path):
    openvino = pytest.importorskip("openvino")
    source, path = small(merge="gate"), tmp_path / "model.onnx"
    export_onnx(source, path, portable=True)
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    images = example_images(source, False)
    with torch.inference_mode():
        found = torch.from_numpy(compiled({"images": images.numpy()})[0])
        torch.testing.assert_close(found, source.model(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("export", [export_onnx, export_pt2, export_aoti])
def test_any_size_and_preprocessing(export, tmp_path):
    """One channel and another size too: a file that takes colour bytes and gives probabilities."""
    source = small(in_chans=1)
    path = tmp_path / "model.pt2"
    found = export(source, path, img_size=(40, 48), dynamic_size=True, with_preprocessing=True)
    assert found.difference <= 1e-5
    assert found.seconds > 0
    rgb = np.random.RandomState(0).randint(0, 256, (1, 33, 57, 3), np.uint8)
    grey = np.asarray(Image.fromarray(rgb[0]).convert("L"))
    with torch.inference_mode():
        logits = source.model((torch.tensor(grey)[None, None] / 255 - 0.4) / 0.3)
    images = torch.from_numpy(rgb)
    if export is export_onnx:
        found = run(path, images)
    elif export is export_pt2:
        found = torch.export.load(path).module()(images)
    else:
        found = torch._inductor.aoti_load_package(str(path))(images)
    torch.testing.assert_close(found, logits.softmax(1), rtol=1e-4, atol=1e-5)


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


@built
def test_a_cpp_program_runs_a_package(tmp_path):
    cmake, root = shutil.which("cmake"), torch.__path__[0]
    if cmake is None:
        pytest.skip("needs cmake")
    source, package, picture = small(), tmp_path / "model.pt2", tmp_path / "image.ppm"
    export_aoti(source, package, with_preprocessing=True)
    rgb = np.random.RandomState(0).randint(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(rgb).save(picture)
    subprocess.run([cmake, "-S", ROOT / "examples/cpp", "-B", tmp_path, f"-DTORCH_ROOT={root}"], check=True)
    subprocess.run([cmake, "--build", tmp_path], check=True)
    command = [tmp_path / "classify", package, library.PATH, picture]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={"PATH": os.defpath})
    names, *lines = done.stdout.splitlines()
    assert json.loads(names) == CLASSES
    wanted = Outputs(source, with_preprocessing=True)(torch.from_numpy(rgb)[None])[0].tolist()
    assert [float(line.split()[1]) for line in lines] == pytest.approx(wanted, abs=1e-5)

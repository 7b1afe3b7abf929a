"""The commands of docs/serve.md, run as they stand but for the ports, and what they print."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from tests.serve.servers import Server
from vimamba.cli import main

DOC = (Path(__file__).parents[2] / "docs" / "serve.md").read_text()
LINES = [line for block in re.findall(r"```sh\n(.*?)```", DOC, re.DOTALL) for line in block.splitlines()]
SERVES = [line for line in LINES if line.startswith("vimamba serve ")]
ASKS = [line for line in LINES if "curl " in line]
EXPORTS = [line for line in LINES if line.startswith("vimamba export ")]
OTHERS = {"pip install 'vimamba[train,serve]'", "npm install onnxruntime-web@1.30.0"}


@pytest.fixture(scope="module")
def workplace(trained, tmp_path_factory):
    """A folder with what the document speaks of; the runtime's files are empty."""
    root = tmp_path_factory.mktemp("workplace")
    shutil.copytree(trained, root / "runs" / "photos")
    (root / "new").mkdir()
    Image.new("RGB", (20, 20), "red").save(root / "new" / "red.jpg")
    for name in ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"):
        file = root / "node_modules/onnxruntime-web/dist" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    return root


def test_there_is_no_other_command():
    static = [line for line in LINES if line.startswith("python -m http.server ")]
    assert {*LINES} == {*SERVES, *ASKS, *EXPORTS, *static, *OTHERS}
    assert min(map(len, (SERVES, ASKS, EXPORTS, static))) > 0


@pytest.mark.slow
@pytest.mark.parametrize("line", SERVES)
def test_servers(line, workplace, tmp_path, monkeypatch):
    monkeypatch.chdir(workplace)
    run, *options = line.split()[2:]
    with Server(Path(run), *options, "--port", "0", log=tmp_path / "log") as server:
        assert server.said.startswith(f"{run} at http://{server.host}:")
        if line == SERVES[0]:
            answers = [said(ask, server.port) for ask in ASKS]
            assert [len(answer.get("results", ["one"])) for answer in answers[:4]] == [1, 2, 1, 1]
            assert all("error" not in answer for answer in answers)
        assert server.stop() == 0


def said(line, port):
    """The JSON that a shell prints; of /metrics, nothing."""
    found = subprocess.run(
        ["bash", "-c", line.replace("curl", "curl -s").replace(":8000", f":{port}")], capture_output=True, check=True
    )
    return {} if "/metrics" in line else json.loads(found.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("line", EXPORTS)
def test_folders(line, workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    assert main(line.split()[1:]) == 0
    assert "page/" in capsys.readouterr().out
    page = (workplace / "page/index.html").read_text()
    assert ("https://cdn.jsdelivr.net" in page) == ("--runtime" not in line)
    assert '"integrity"' in page
    assert (workplace / "page/model.onnx").is_file()


def test_what_no_folder_can_be_made_of(workplace, segmented, detected, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    for words, sentence in (
        ("--output p --runtime nowhere", "--runtime nowhere: has no ort.wasm.bundle.min.mjs; give node_modules/"),
        ("--output new/red.jpg", "--output new/red.jpg: is a file; give a folder"),
        ("--output p --dynamic_size true", "--dynamic_size: --format web chooses it; leave it out"),
    ):
        assert main(["export", "runs/photos", "--format", "web", *words.split()]) == 2
        assert capsys.readouterr().err.startswith(f"error: {sentence}")
        assert not Path("p").exists()
    for run in (detected, segmented):
        assert main(["export", str(run), "--format", "web", "--output", "p", "--img_size", "64"]) == 2
        said = "error: --img_size: the page of a dense model takes any size; leave it out"
        assert capsys.readouterr().err.startswith(said)

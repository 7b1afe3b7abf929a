"""The commands that the README, the recipes and the help show, and the README's Python, run as they stand.

Data, models and budgets are cut small by options behind them.
"""

from __future__ import annotations

import re
import shlex
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import timm
import torch
import yaml
from PIL import Image

from tests.cli.runs import write_photos
from tests.dense import write_masks, write_objects
from vimamba import onnx_library
from vimamba.cli import COMMANDS
from vimamba.cli.examples import EXAMPLES
from vimamba.data import scenes
from vimamba.models import checkpoints
from vimamba.ops.cpu import library
from vimamba.serve import server

ROOT = Path(__file__).parents[2]
README, EXPORT = ((ROOT / name).read_text() for name in ("README.md", "docs/export.md"))
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
OFFICIAL, OFFICIAL_SMALL = "vim_t_midclstok_76p1acc.pth", "vim_s_midclstok_80p5acc.pth"
SMALLER = {
    "train": "--epochs 1 --batch_size 500 --model_args.depth 1 --num_workers 0 --devices 1 "
    "--strategy auto --accelerator cpu --overwrite",
    "train --resume": "",
    "eval": "",
    "predict": "",
    "export": "",
    "serve": "",  # by a server that ends at once: tests/serve/test_documented.py has one that serves
    "explain": "",
    "bench": "--models vim_nano --against test_vit --sizes 32 --repeats 1 --seconds 0 --memory false",
    "models": "",
    "ablate": "--model_args.depth 1 --model_args.embed_dim 16 --designs [none] --seeds 1 --epochs 1 --batch_size 1000 "
    "--lr [0.003]",
    "info": "",
}
# Of recipes for dense tasks, by what their names begin with.
DENSE = (
    "--epochs 1 --batch_size 4 --num_workers 0 --devices 1 --strategy auto --accelerator cpu --overwrite --img_size 32"
)
SMALLER_RECIPES = {
    "scenes_seg": DENSE,
    "scenes_det": DENSE,
    "ade20k": f"{DENSE} --model_args.depth 1 --head_args '{{width: 8, pyramid: deconv}}'",
    "coco": f"{DENSE} --model_args.depth 1 --head_args '{{width: 8, box_width: 8, proposals: 8, rois_per_image: 4}}'",
}


def smaller(words: list[str]) -> list[str]:
    """What is typed behind a command so that it takes no time."""
    recipe = Path(words[words.index("--config") + 1]).stem if "--config" in words else ""
    of_recipe = next((more for start, more in SMALLER_RECIPES.items() if recipe.startswith(start)), None)
    return shlex.split(of_recipe or SMALLER["train --resume" if "--resume" in words else words[0]])


def commands_in(text: str) -> list[str]:
    """The lines of a text that call vimamba, in comments too, each with the lines that it is continued on."""
    whole = re.sub(r"\\\n#?\s*", "", text)
    return re.findall(r"^(?:#\s+)?(vimamba [^#\n]+)", whole, re.MULTILINE)


DOCUMENTS = {
    "README.md": commands_in("".join(re.findall(r"```sh\n(.*?)```", README, re.DOTALL))),
    "export.md": commands_in(EXPORT),
    **{path.name: commands_in(path.read_text()) for path in RECIPES},
    "help": [line for lines in EXAMPLES.values() for line in lines],
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with what the documents speak of."""
    root = tmp_path_factory.mktemp("workplace")
    for name in ("photos", "IMAGENET", "imagenet"):
        write_photos(root / name)
    write_photos(root / "other_photos", seed=1)
    (root / "new").mkdir()
    Image.new("RGB", (20, 20), "red").save(root / "new" / "red.jpg")
    Image.new("RGB", (90, 70), "red").save(root / "large.tif")
    shutil.copytree(ROOT / "recipes", root / "recipes")
    for name, model in ((OFFICIAL, "vim_tiny_patch16_224"), (OFFICIAL_SMALL, "vim_small_patch16_224")):
        torch.save({"model": timm.create_model(model, depth=1).state_dict(), "args": Namespace()}, root / name)
    write_masks(root / "ADEChallengeData2016")
    write_objects(root / "coco")
    return root


@pytest.fixture(autouse=True)
def _there(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("VIMAMBA_CACHE", str(workplace / "cache"))
    monkeypatch.setattr(checkpoints, "hf_hub_download", lambda *arguments: str(workplace / OFFICIAL))
    monkeypatch.setattr(server, "serve", lambda run, what, how, ready: server.application(run, what, how))
    monkeypatch.setattr(scenes, "COUNTS", {"train": 8, "val": 4})


def test_every_document_shows_commands_and_every_command_is_shown():
    assert all(DOCUMENTS.values())
    for where in ("README.md", "help"):
        assert {line.split()[1] for line in DOCUMENTS[where]} == {*COMMANDS}


def test_commands_run_one_after_the_other(vimamba):
    called = set()
    for where, lines in DOCUMENTS.items():
        for line in [line for line in lines if line not in called]:
            called.add(line)
            words = shlex.split(line)[1:]
            more = smaller(words)
            status, _, err = vimamba(*words, *more)
            assert status == 0, f"{where}: {line}: {err}"
            if "--config" in words and "--output" in words:
                check_kept(*(Path(words[words.index(name) + 1]) for name in ("--config", "--output")), more)


def check_kept(recipe, run, more):
    """Everything that a recipe says, and that is not cut small, went into the run."""
    told, kept = (yaml.safe_load(path.read_text()) for path in (recipe, run / "config.yaml"))
    names = told.keys() - {word.removeprefix("--").partition(".")[0] for word in more}
    assert {name: kept[name] for name in names} == {name: told[name] for name in names}


def test_the_readmes_python_runs(workplace):
    models, runs, _ = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict = {}
    exec(models, names)
    assert names["logits"].shape == (1, 10)
    assert names["y"].shape == names["u"].shape
    shutil.copy(workplace / "new/red.jpg", workplace / "new/1.jpg")
    small = "epochs=1, model_args={'depth': 1}, accelerator='cpu', num_workers=0, overwrite=True, progress=False"
    exec(runs.replace("output=", f"{small}, output="), names)
    assert names["result"].label in names["predictor"].class_names


def test_the_readmes_python_of_dense_tasks_runs(vimamba, workplace):
    for name in ("scenes_seg", "scenes_det"):
        words = ["train", "--config", f"recipes/{name}.yaml", "--output", f"runs/{name.replace('_', '-')}"]
        assert vimamba(*words, *smaller(words))[0] == 0
    shutil.copy(workplace / "new/red.jpg", workplace / "new/1.jpg")
    names: dict = {}
    exec(re.findall(r"```python\n(.*?)```", README, re.DOTALL)[2], names)
    assert names["mask"].shape == (20, 20)
    assert len(names["found"].boxes) == len(names["found"].labels) == len(names["found"].masks)


def test_the_readmes_make_targets_are_there():
    targets = re.findall(r"^make ([a-z-]+)", README, re.MULTILINE)
    assert targets
    assert all(f"\n{target}: " in (ROOT / "Makefile").read_text() for target in targets)


def test_the_python_of_the_page_on_export_runs(vimamba, workplace):
    lines = DOCUMENTS["export.md"]
    run = ["train", "--data", "photos", "--model", "vim_nano", "--output", "runs/photos", *smaller(["train"])]
    assert vimamba(*run)[0] == 0
    names: dict = {}
    for block, file in zip(re.findall(r"```python\n(.*?)```", EXPORT, re.DOTALL), ("rgb", "fast"), strict=True):
        if file == "fast" and library.UNAVAILABLE is not None:
            continue
        assert vimamba(*shlex.split(next(line for line in lines if f"photos-{file}.onnx" in line))[1:])[0] == 0
        if file == "fast":
            shutil.copy(onnx_library(), "operators.so")
        exec(block, names)
    assert names["probabilities"].sum() == pytest.approx(1.0, abs=1e-5)
    assert "logits" not in names or names["logits"].shape == names["probabilities"].shape

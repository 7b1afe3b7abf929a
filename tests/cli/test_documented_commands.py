"""The commands that the recipes, the help, the README and the documentation show, and their Python, run as they stand.

Data, models and budgets are cut small by options behind them. docs/serve.md has a test of its own, which serves:
tests/serve/test_documented.py.
"""

from __future__ import annotations

import copy
import re
import shlex
import shutil
import sys
import types
from argparse import Namespace
from importlib.metadata import metadata
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from timm.models import _registry as registry

import vimamba as vimamba_package
from tests.cli.runs import write_photos
from tests.dense import write_masks, write_objects
from vimamba import train
from vimamba.cli import COMMANDS, main
from vimamba.cli.examples import EXAMPLES
from vimamba.data import scenes
from vimamba.data.mnist import write_digits
from vimamba.models import checkpoints
from vimamba.ops.cpu import library
from vimamba.serve import server

ROOT = Path(__file__).parents[2]
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
    if "--task" in words:
        of_recipe = DENSE
    more = shlex.split(of_recipe or SMALLER["train --resume" if "--resume" in words else words[0]])
    return [*more, "--img_size", "32"] if words[0] == "train" and "--img_size" in words else more


def commands_in(text: str) -> list[str]:
    """The lines of a text that call vimamba, in comments too, each with the lines that it is continued on."""
    whole = re.sub(r"\\\n#?\s*", "", text)
    return re.findall(r"^(?:#\s+)?(vimamba [^#\n]+)", whole, re.MULTILINE)


PAGES = {
    path.name: path.read_text()
    for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))
    if path.name != "serve.md"
}
EXTRAS = {*metadata("vimamba").get_all("Provides-Extra")}
OTHERS = [["pip", "install", "--no-deps", "stardist"]]
DOCUMENTS = {
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
    assert {line.split()[1] for line in DOCUMENTS["help"]} == {*COMMANDS}
    assert {line.split()[1] for text in shells() for line in commands_in(text)} == {*COMMANDS} - {"serve"}


@pytest.mark.slow
def test_commands_run_one_after_the_other(vimamba, runs):
    called = set()
    on_pages = {line.strip() for text in shells() for line in commands_in(text)}  # called when a page is run
    for where, lines in DOCUMENTS.items():
        for line in [line for line in lines if line not in called | (on_pages if where == "help" else set())]:
            called.add(line)
            words = shlex.split(line)[1:]
            more = smaller(words)
            if line not in MADE:
                status, _, err = vimamba(*words, *more)
                assert status == 0, f"{where}: {line}: {err}"
            if "--config" in words and "--output" in words:
                check_kept(*(Path(words[words.index(name) + 1]) for name in ("--config", "--output")), more)


def check_kept(recipe, run, more):
    """Everything that a recipe says, and that is not cut small, went into the run."""
    told, kept = (yaml.safe_load(path.read_text()) for path in (recipe, run / "config.yaml"))
    names = told.keys() - {word.removeprefix("--").partition(".")[0] for word in more}
    assert {name: kept[name] for name in names} == {name: told[name] for name in names}


# -- pages, block by block


def blocks(page):
    """The blocks of code of a page: (language, text)."""
    return re.findall(r"^```(\w*)[^\n]*\n(.*?)^```", page, re.DOTALL | re.MULTILINE)


def shells():
    """The blocks of sh of all pages."""
    return [text for page in PAGES.values() for language, text in blocks(page) if language == "sh"]


def small_train(**options):
    """`vimamba.train`, cut small."""
    small = {"model_args": {"depth": 1}, "epochs": 1, "accelerator": "cpu", "num_workers": 0, "overwrite": True}
    return train(**options | small, progress=False)


class Shell:
    """What a page's blocks of sh are taken for: commands of ours are called, others looked at."""

    def __init__(self, capsys, monkeypatch):
        self.capsys, self.monkeypatch = capsys, monkeypatch

    def __call__(self, text):
        for line in re.sub(r"\\\n\s*", "", text).splitlines():
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=\S+", words[0]):
                self.monkeypatch.setenv(*words.pop(0).split("=", 1))
            if words:
                (self.call if "vimamba" in words else self.look_at)(words)

    def call(self, words):
        into = words.pop() if words[-2] == ">" else None
        words = words[words.index("vimamba") + 1 : len(words) - bool(into)]
        elsewhere = "--num_nodes" in words  # on machines that are not here: it is read as they would, and no more
        more = ["--print_config"] if elsewhere else smaller(words)
        try:
            status = main([*words, *more])
        except SystemExit as printed:  # --print_config
            status = printed.code
        out, err = self.capsys.readouterr()
        assert status == 0, f"{shlex.join(words)}: {err}"
        if into:
            Path(into).write_text(out)

    def look_at(self, words):
        match words:
            case ["pip", "install", *_, what]:
                assert words in OTHERS or {*re.fullmatch(r"vimamba\[([\w,]+)\]", what)[1].split(",")} <= EXTRAS
            case ["cp", source, to]:
                assert source == "$(python -c 'import vimamba; print(vimamba.onnx_library())')"
                shutil.copy(vimamba_package.onnx_library(), to)
            case ["make", target]:
                assert f"\n{target}: " in (ROOT / "Makefile").read_text()
            case ["python", "-m", "pytest", path]:
                assert any((ROOT / path).glob("test_*.py"))
            case ["python", script, *options]:
                text = (ROOT / script).read_text()
                assert all(f'"{option}"' in text for option in options if option.startswith("--"))
            case _:
                assert words in OTHERS


# A run of each kind.
MADE = [
    "vimamba train --data photos --model vim_nano --output runs/photos",
    "vimamba train --config recipes/scenes_seg.yaml --output runs/scenes-seg",
    "vimamba train --config recipes/scenes_det.yaml --output runs/scenes-det",
]


@pytest.fixture(scope="module")
def runs(workplace):
    """The workplace with these runs in it."""
    write_digits(workplace / "new", 1)
    shutil.copy(workplace / "new/red.jpg", workplace / "new/1.jpg")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workplace)
        patch.setattr(scenes, "COUNTS", {"train": 8, "val": 4})
        for line in MADE:
            words = shlex.split(line)[1:]
            assert main([*words, *smaller(words)]) == 0
    return workplace


@pytest.mark.slow
@pytest.mark.parametrize("name", PAGES)
def test_every_block_of_a_page_runs(name, capsys, runs, tmp_path, monkeypatch):
    """From top to bottom, in a folder with what pages speak of, or, where a page makes that itself, an empty one."""
    if name == "export.md" and library.UNAVAILABLE is not None:
        pytest.skip("it has --operator vimamba, whose library was not built")
    here = tmp_path / "here"
    if name in BEGINNINGS:
        here.mkdir()
        BEGINNINGS[name](here, monkeypatch)
    else:
        shutil.copytree(runs, here)
    monkeypatch.chdir(here)
    monkeypatch.setattr(vimamba_package, "train", small_train)
    for registered in ("_model_entrypoints", "_model_to_module", "_module_to_models", "_model_pretrained_cfgs"):
        monkeypatch.setattr(registry, registered, copy.copy(getattr(registry, registered)))
    page = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", page)
    shell = Shell(capsys, monkeypatch)
    for language, text in blocks(PAGES[name]):
        included = re.findall(r'^--8<-- "([^":]+)', text, re.MULTILINE)
        if included:  # tests/test_examples.py and tests/export run them
            assert all((ROOT / path).is_file() for path in included)
        elif language == "sh":
            shell(text)
        elif language == "python":
            exec(compile(text, name, "exec"), vars(page))
        else:
            assert language == "text", f"{name}: a block of {language or 'no language'}: is it text, or does it run?"
            assert "vimamba " not in text


def nuclei(folder, monkeypatch):
    """What stands in for stardist's picture: discs, one in each tile."""
    y, x = np.mgrid[:256, :256]
    mask = np.where(np.hypot(y % 128 - 64, x % 128 - 64) < 20, 1 + y // 128 * 2 + x // 128, 0).astype(np.uint16)
    Image.fromarray((mask > 0).astype(np.uint16) * 300 + 5).save(folder / "img2d.tif")
    Image.fromarray(mask).save(folder / "mask2d.tif")
    monkeypatch.setattr(sys, "argv", ["tiles.py", str(folder)])


BEGINNINGS = {"start.md": lambda folder, monkeypatch: None, "microscopy.md": nuclei}

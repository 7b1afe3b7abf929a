"""Names, arguments and weights, as timm and the hub hand them over."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

import vimamba
from vimamba import VisionMamba
from vimamba.layers.mixers import BidirectionalMixer
from vimamba.models import checkpoints
from vimamba.models.pyramid import VisionMambaPyramid

MODELS = ["vim_nano", "vim_pyramid_nano"]
NAN = math.nan
IMPOSSIBLE = [
    *(("mode", v) for v in ("both", None, 1)),
    ("merge", "max"),
    ("gate", "pixel"),
    ("path_weights", "tied"),
    ("conv", "3d"),
    ("dt_init", "ones"),
    *(("d_conv", v) for v in (0, -4, 1.5, True, NAN)),
    *(("d_state", v) for v in (0, -1, 16.0, "16")),
    *(("expand", v) for v in (0, -2, NAN, math.inf, "2", 0.01)),
    *(("dt_rank", v) for v in (0, -1, 1.5, "automatic")),
    *((name, v) for name in ("dt_min", "dt_max", "dt_scale") for v in (0, -0.1, NAN, math.inf)),
    ("dt_max", 1e-5),
    *(("dt_init_floor", v) for v in (-1, NAN)),
    *(("layer_scale", v) for v in (NAN, "1e-5")),
]
OF_MODELS = [
    *(("drop_path_rate", v) for v in (7, -0.1, NAN, "0.1")),
    *(("drop_rate", v) for v in (2, -0.1, NAN)),
    *(("num_classes", v) for v in (-1, 2.5)),
    *(("in_chans", v) for v in (0, -3, 1.5)),
    *(("img_size", v) for v in (0, (32, 32, 32), (-8, 32), "32")),
    *(("bidirectional", v) for v in ("both", None)),
    ("global_pool", "median"),
]
OF_TOKENS = [
    *(("depth", v) for v in (0, -1, 2.0)),
    *(("norm_eps", v) for v in (-1.0, NAN)),
    *(("pos_drop_rate", v) for v in (1.5, NAN)),
    *(("patch_size", v) for v in (0, (4, 4, 4), 4.5)),
    *(("stride", v) for v in (0, -1)),
    *(("num_registers", v) for v in (-1, 1.5)),
    ("embed_dim", 0),
    ("pos_embed", "sine"),
]


@pytest.mark.parametrize(("name", "value"), IMPOSSIBLE)
def test_a_mixer_refuses_impossible_arguments(name, value):
    with pytest.raises(ValueError, match=f"^{name}") as refused:
        BidirectionalMixer(16, **{name: value})
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("name", "value"), [*IMPOSSIBLE[3:8], *OF_MODELS])
def test_models_refuse_impossible_arguments(model, name, value):
    with pytest.raises(ValueError, match=f"^{name}"):
        timm.create_model(model, **{name: value} if value is not None else {name: "None"})


@pytest.mark.parametrize(("name", "value"), OF_TOKENS)
def test_token_models_refuse_impossible_arguments(name, value):
    with pytest.raises(ValueError, match=f"^{name}"):
        VisionMamba(**{"depth": 2, name: value})


@pytest.mark.parametrize("owner", [VisionMamba, VisionMambaPyramid])
def test_unknown_arguments_name_the_model(owner):
    name = owner.__name__
    with pytest.raises(TypeError, match=rf"^{name} has no argument 'drop_pth_rate'; did you mean drop_path_rate"):
        owner(drop_pth_rate=0.1)
    with pytest.raises(TypeError, match=rf"^{name} has no argument 'dt_mn'; did you mean dt_min"):
        owner(dt_mn=0.1)


def test_the_pyramid_speaks_of_bidirectional_and_still_takes_mode():
    for name in ("bidirectional", "mode"):
        model = VisionMambaPyramid(dims=(8, 8, 16, 16), depths=(1, 1, 1, 1), **{name: "ssm"})
        assert model.stages[3].blocks[0].mixer.mode == "ssm"
    with pytest.raises(ValueError, match="give one"):
        VisionMambaPyramid(bidirectional="ssm", mode="none")


@pytest.mark.parametrize("name", MODELS)
def test_models_are_built_where_and_as_asked(name):
    model = timm.create_model(name, device="meta", dtype=torch.bfloat16)
    tensors = [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]
    assert all(t.device.type == "meta" and t.dtype == torch.bfloat16 for t in tensors)
    assert model(torch.empty(2, 3, 64, 64, device="meta", dtype=torch.bfloat16)).shape == (2, model.num_classes)
    with torch.device("meta"):
        assert timm.create_model(name, drop_path_rate=0.1)(torch.empty(2, 3, 64, 64)).device.type == "meta"
    double = timm.create_model(name, dtype=torch.float64).eval()
    assert double(torch.zeros(1, 3, 32, 32, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("name", MODELS)
def test_a_new_classifier_follows_the_model(name):
    model = timm.create_model(name, in_chans=1, dtype=torch.float64).eval()
    model.reset_classifier(3)
    assert model.in_chans == 1
    assert (model.head.training, model.head.weight.dtype) == (False, torch.float64)
    model.train().reset_classifier(4)
    assert model.head.training
    with pytest.raises(ValueError, match="num_classes"):
        model.reset_classifier(-1)
    assert model.num_classes == 4


def test_without_pooling_the_pyramid_gives_maps():
    model = timm.create_model("vim_pyramid_nano").eval()
    model.reset_classifier(0, "")
    assert model(torch.zeros(1, 3, 64, 96)).shape == (1, 192, 2, 3)
    model.reset_classifier(7)
    assert model(torch.zeros(1, 3, 64, 96)).shape == (1, 7, 2, 3)


def test_a_resized_model_says_so_and_stays_frozen():
    model = timm.create_model("vim_nano").eval().requires_grad_(False)
    model.set_input_size((56, 28), patch_size=8)
    assert not any(p.requires_grad for p in model.parameters())
    assert model.img_size == (56, 28)
    if get_config := getattr(timm.models, "get_model_input_config", None):  # timm 1.0.31 and later
        assert get_config(model)["input_size"] == (3, 56, 28)
    assert not model.patch_embed.training
    with pytest.raises(ValueError, match="img_size"):
        model.set_input_size(0)


def test_tagged_names_load_the_published_weights(tmp_path, monkeypatch):
    source = timm.create_model("vim_tiny_patch16_224", depth=1)
    path = tmp_path / "vim_t_midclstok_76p1acc.pth"
    torch.save({"model": source.state_dict()}, path)
    monkeypatch.setenv("VIMAMBA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(checkpoints, "hf_hub_download", lambda *args: str(path))
    assert "vim_tiny_patch16_224.in1k" in timm.list_pretrained("vim_*")
    for how in (dict(), dict(pretrained_cfg="in1k"), dict(features_only=True, out_indices=[0])):
        tag = "" if "pretrained_cfg" in how else ".in1k"
        model = timm.create_model(f"vim_tiny_patch16_224{tag}", pretrained=True, depth=1, **how)
        inner = model.model if "features_only" in how else model
        torch.testing.assert_close(inner.layers[0].mixer.A_log, source.layers[0].mixer.A_log)
        assert "state_dict" not in model.pretrained_cfg
        assert "state_dict" not in inner.pretrained_cfg


@pytest.mark.parametrize("name", MODELS)
def test_a_file_can_stand_for_the_published_weights(name, tmp_path):
    source = timm.create_model(name)
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    for file in ("weights.safetensors", "weights.pth"):
        model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / file)))
        torch.testing.assert_close(model.head.weight, source.head.weight)


@pytest.mark.parametrize("name", MODELS)
def test_models_go_to_the_hub_and_back(name, tmp_path, monkeypatch):
    source = timm.create_model(name, num_classes=4)
    nn.init.normal_(source.head.weight)
    timm.models.save_for_hf(source, tmp_path, model_args=dict(num_classes=4), safe_serialization="both")
    monkeypatch.setattr("timm.models._hub.hf_hub_download", lambda repo_id, filename, **kw: str(tmp_path / filename))
    for place in (f"local-dir:{tmp_path}", "hf-hub:someone/model"):
        model = timm.create_model(place, pretrained=True)
        torch.testing.assert_close(model.head.weight, source.head.weight)


def test_models_are_pushed_to_the_hub(monkeypatch):
    pushed = []

    class Api:
        def __init__(self, **kwargs):
            self.repo_id = "a/b"

        def create_repo(self, repo_id, **kwargs):
            return self

        def file_exists(self, **kwargs):
            return False

        def upload_folder(self, repo_id, folder_path, **kwargs):
            pushed.append((repo_id, sorted(path.name for path in Path(folder_path).iterdir())))

    monkeypatch.setattr("timm.models._hub.HfApi", Api)
    timm.models.push_to_hf_hub(vimamba.create_model("vim_nano"), "a/b")
    assert pushed == [("a/b", ["README.md", "config.json", "model.safetensors", "pytorch_model.bin"])]

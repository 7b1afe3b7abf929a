"""Checkpoints of the official code: the golden files, every switch, and files that must be refused."""

from __future__ import annotations

import argparse
import os
import pickle

import pytest
import torch
from torch.nn.functional import cross_entropy

import vimamba
from tests.goldens import golden_files, load_golden
from tests.models import official
from vimamba.errors import UserError


def relative(found: torch.Tensor, truth: torch.Tensor) -> float:
    return float((found.detach().double() - truth.detach().double()).norm() / truth.detach().double().norm())


@pytest.mark.parametrize("path", golden_files(), ids=lambda p: p.stem)
def test_golden_outputs_and_gradients(path):
    golden = load_golden(path)
    model = vimamba.load_hustvl(golden["state_dict"], **golden["config"])
    logits = model(golden["input"])
    assert relative(logits, golden["logits"]) < 1e-4
    assert relative(model.forward_head(model.forward_features(golden["input"]), True), golden["features"]) < 1e-4
    cross_entropy(logits, torch.tensor([3, 7])).backward()
    for name, parameter in model.named_parameters():
        assert relative(parameter.grad, golden["grads"][name]) < 1e-3, name


def official_state(config: dict, depth=2, embed_dim=16, state=4, patch=8, side=4, classes=5) -> dict[str, torch.Tensor]:
    """Random weights under the official names, for these constructor arguments."""
    g = torch.Generator().manual_seed(7)

    def rand(*shape: int, scale: float = 0.3) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64) * scale

    ssm = config.get("ssm_cfg") or {}
    inner, width, rank = embed_dim * ssm.get("expand", 2), ssm.get("d_conv", 4), ssm.get("dt_rank", 1)
    w = {"patch_embed.proj.weight": rand(embed_dim, 3, patch, patch), "patch_embed.proj.bias": rand(embed_dim)}
    count = 0
    if config.get("if_cls_token", True):
        names = ["cls_token_head", "cls_token_tail"] if config.get("use_double_cls_token") else ["cls_token"]
        count = len(names)
        w |= {name: rand(1, 1, embed_dim) for name in names}
    if config.get("if_abs_pos_embed", True):
        w["pos_embed"] = rand(1, side * side + count, embed_dim)
    if config.get("if_rope"):
        w |= {"rope.freqs_cos": rand(side * side, embed_dim), "rope.freqs_sin": rand(side * side, embed_dim)}
    for i in range(depth):
        p, kind = f"layers.{i}.mixer.", config["bimamba_type"]
        w |= {p + "in_proj.weight": rand(2 * inner, embed_dim), p + "out_proj.weight": rand(embed_dim, inner)}
        if ssm.get("bias"):
            w |= {p + "in_proj.bias": rand(2 * inner), p + "out_proj.bias": rand(embed_dim)}
        if config.get("init_layer_scale") is not None:
            w[p + "gamma"] = rand(embed_dim)
        for s in ("", "_b") if kind == "v2" else ("",):
            w |= {
                f"{p}conv1d{s}.weight": rand(inner, 1, width), f"{p}x_proj{s}.weight": rand(rank + 2 * state, inner),
                f"{p}dt_proj{s}.weight": rand(inner, rank), f"{p}dt_proj{s}.bias": rand(inner) - 1,
                f"{p}D{s}": rand(inner),
            }  # fmt: skip
            if ssm.get("conv_bias", True):
                w[f"{p}conv1d{s}.bias"] = rand(inner)
        w |= {p + n: rand(inner, state) for n in (["A_log"] if kind == "none" else ["A_log", "A_b_log"])}
        w[f"layers.{i}.norm.weight"] = rand(embed_dim) + 1
    w |= {"norm_f.weight": rand(embed_dim) + 1, "head.weight": rand(classes, embed_dim), "head.bias": rand(classes)}
    if not config.get("rms_norm", True):
        w |= {k.replace("weight", "bias"): rand(embed_dim) for k in list(w) if "norm" in k}
    return w


SWITCHES = {
    "published": dict(bimamba_type="v2"),
    "v1": dict(bimamba_type="v1"),
    "one direction": dict(bimamba_type="none"),
    "pairs of layers": dict(bimamba_type="none", if_bidirectional=True),
    "pairs of layers of v2": dict(bimamba_type="v2", if_bidirectional=True),
    "sum": dict(bimamba_type="v2", if_divide_out=False),
    "misspelt": dict(bimamba_type="v2", if_devide_out=False),
    "head": dict(bimamba_type="v2", use_middle_cls_token=False),
    "double": dict(bimamba_type="v2", use_double_cls_token=True),
    "last token": dict(bimamba_type="v2", if_cls_token=False, final_pool_type="none"),
    "mean": dict(bimamba_type="v2", if_cls_token=False, final_pool_type="mean"),
    "max": dict(bimamba_type="v2", if_cls_token=False, final_pool_type="max"),
    "all": dict(bimamba_type="v2", if_cls_token=False, final_pool_type="all"),
    "no positions": dict(bimamba_type="v2", if_abs_pos_embed=False),
    "rope": dict(bimamba_type="v2", if_rope=True),
    "rope, residual, no class token": dict(
        bimamba_type="v2", if_rope=True, if_rope_residual=True, if_cls_token=False, final_pool_type="mean"
    ),
    "rope of another grid": dict(bimamba_type="v2", if_rope=True, if_rope_residual=True, pt_hw_seq_len=7),
    "layer scale": dict(bimamba_type="v2", init_layer_scale=0.1),
    "layer norm": dict(bimamba_type="v2", rms_norm=False, fused_add_norm=False),
    "mixer sizes": dict(bimamba_type="v2", ssm_cfg=dict(d_conv=3, expand=3, dt_rank=2, conv_bias=False, bias=True)),
    "eps": dict(bimamba_type="v2", norm_epsilon=1e-2, residual_in_fp32=False),
}


@pytest.mark.parametrize("config", SWITCHES.values(), ids=SWITCHES.keys())
def test_every_switch_of_the_official_constructor(config):
    weights = official_state(config)
    for stride, size in ((8, 32), (4, 20)):
        told = {"use_middle_cls_token": True, "if_divide_out": True, "img_size": size, "stride": stride}
        full = told | config
        model = vimamba.load_hustvl({k: v.float() for k, v in weights.items()}, **full).double()
        images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        loaded = weights | {k: v for k, v in model.state_dict().items() if not k.startswith("rope.")}
        want = official.forward(images, loaded, full, depth=2)
        # rope's frequencies are kept in float32, as the official buffers are.
        assert relative(model(images), want) < (1e-5 if config.get("if_rope") else 1e-10)


def test_a_whole_checkpoint_file_with_its_arguments(tmp_path):
    weights = {k: v.float() for k, v in official_state(SWITCHES["published"], patch=16).items()}
    args = argparse.Namespace(model="vim_tiny_patch16_stride8_224_bimambav2", lr=1e-3)
    torch.save({"model": weights, "optimizer": {}, "epoch": 3, "args": args}, tmp_path / "vim.pth")
    model = vimamba.load_hustvl(tmp_path / "vim.pth")
    assert (model.patch_embed.stride, model.img_size, model.training) == ((8, 8), (40, 40), False)
    assert vimamba.load_hustvl(str(tmp_path / "vim.pth"), stride=16).img_size == (64, 64)


def test_arguments_that_contradict_the_tensors_are_refused():
    weights = {k: v.float() for k, v in official_state(SWITCHES["published"]).items()}
    for kwargs, message in (
        (dict(depth=3), "depth=3 does not fit the checkpoint, whose tensors say 2"),
        (dict(bimamba_type="v1"), "bimamba_type='v1' does not fit"),
        (dict(if_bimambaa=True), "if_bimambaa is not an argument.*did you mean if_bimamba"),
        (dict(stride=8, img_size=64), "pos_embed has shape"),
        (dict(flip_img_sequences_ratio=0.5), "flip_img_sequences_ratio"),
    ):
        with pytest.raises(UserError, match=message):
            vimamba.load_hustvl(weights, **kwargs)


NAME = "vim_tiny_patch16_{}224_bimambav2_final_pool_{}_abs_pos_embed_with_{}_div2"


@pytest.mark.parametrize("pool", ["mean", "max", "all", "none"])
@pytest.mark.parametrize("stride", ["", "stride8_"])
def test_the_official_name_tells_pooling_and_stride(tmp_path, recwarn, pool, stride):
    config = dict(bimamba_type="v2", if_cls_token=False)
    weights = {k: v.float() for k, v in official_state(config, patch=16).items()}
    args = argparse.Namespace(model=NAME.format(stride, pool, "noclstok"))
    torch.save({"model": weights, "args": args}, tmp_path / "vim.pth")
    model = vimamba.load_hustvl(tmp_path / "vim.pth")
    size = model.img_size[0]
    assert (size, model.patch_embed.stride) == ((40, (8, 8)) if stride else (64, (16, 16)))
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    want = official.forward(x, weights, config | {"final_pool_type": pool, "stride": 8 if stride else 16}, depth=2)
    assert relative(model(x), want) < 1e-4
    assert not recwarn.list


def test_what_is_pooled_is_asked_for_where_nothing_tells():
    weights = {k: v.float() for k, v in official_state(dict(bimamba_type="v2", if_cls_token=False)).items()}
    with pytest.raises(UserError, match="no class token, and does not tell what is pooled: give final_pool_type"):
        vimamba.load_hustvl(weights)


def test_rotary_frequencies_are_asked_about():
    weights = {k: v.float() for k, v in official_state(SWITCHES["rope"]).items()}
    with pytest.raises(UserError, match="has rotary frequencies: give if_rope"):
        vimamba.load_hustvl(weights, use_middle_cls_token=True, if_divide_out=True, stride=8)


@pytest.mark.parametrize(
    ("side", "kwargs", "stride", "warned"),
    [
        (14, {}, 16, False),  # whole patches on 224 pixels
        (27, {}, 8, True),  # 224 pixels, or 432 by 16
        (27, {"stride": 16}, 16, False),
        (27, {"img_size": 224}, 8, False),
        (27, {"img_size": 432}, 16, False),
        (24, {}, 16, True),  # 384 pixels, or others
    ],
)
def test_the_stride_of_a_bare_state_dict_is_checked_or_said(recwarn, side, kwargs, stride, warned):
    weights = {k: v.float() for k, v in official_state(dict(bimamba_type="v2"), patch=16, side=side).items()}
    model = vimamba.load_hustvl(weights, use_middle_cls_token=True, if_divide_out=True, **kwargs)
    assert model.patch_embed.stride == (stride, stride)
    assert [f"stride={stride}" in str(warning.message) for warning in recwarn] == [True] * warned


def test_a_nested_name_in_the_arguments_is_not_spelt_out(tmp_path):
    bomb: list = []
    for _ in range(200):  # 2^200 letters
        bomb = [bomb, bomb]
    weights = {k: v.float() for k, v in official_state(dict(bimamba_type="v2")).items()}
    torch.save({"model": weights, "args": argparse.Namespace(model=bomb)}, tmp_path / "vim.pth")
    with pytest.warns(UserWarning, match="taken as the published models are"):
        vimamba.load_hustvl(tmp_path / "vim.pth")


class Hostile:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_file_that_wants_to_run_code_is_refused_by_name(tmp_path, legacy):
    path, mark = tmp_path / "bad.pth", tmp_path / "mark"
    if legacy:
        path.write_bytes(pickle.dumps({"model": Hostile(mark)}))
    else:
        torch.save({"model": Hostile(mark)}, path)
    with pytest.raises(UserError, match=r"bad\.pth: refused, it asks to run posix\.mkdir on loading; nothing was exec"):
        vimamba.load_hustvl(path)
    assert not mark.exists()


def test_files_that_are_no_checkpoints_are_refused(tmp_path):
    whole = tmp_path / "whole.pth"
    torch.save({"model": official_state(SWITCHES["published"])}, whole)
    cases = {
        "text.pth": b"hello, this is a text file",
        "empty.pth": b"",
        "cut.pth": whole.read_bytes()[:5000],
        "cut.safetensors": b"\x40\x00\x00\x00\x00\x00\x00\x00{",
    }
    for name, contents in cases.items():
        (tmp_path / name).write_bytes(contents)
        with pytest.raises(UserError, match=f"{name}: not a PyTorch or safetensors checkpoint"):
            vimamba.load_hustvl(tmp_path / name)
    with pytest.raises(UserError, match=r"missing\.pth: no such checkpoint file"):
        vimamba.load_hustvl(tmp_path / "missing.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UserError, match="holds a list, not a state dict"):
        vimamba.load_hustvl(tmp_path / "list.pth")
    with pytest.raises(UserError, match="not a Vision Mamba checkpoint"):
        vimamba.load_hustvl({"weight": torch.zeros(3)})

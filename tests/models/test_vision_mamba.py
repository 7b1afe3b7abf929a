"""VisionMamba and the registry: what timm and its users expect of a model, and stability in mixed precision."""

from __future__ import annotations

import argparse
import os

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn

import vimamba
from vimamba.errors import UserError
from vimamba.layers.embed.position import resize_pos_embed
from vimamba.models import checkpoints, registry
from vimamba.models.registry import convert_checkpoint, count_flops, count_parameters

SMALL = dict(img_size=32, patch_size=8, embed_dim=16, depth=4, d_state=4, num_classes=5)


def small(**kwargs) -> vimamba.VisionMamba:
    torch.manual_seed(0)
    return vimamba.VisionMamba(**{**SMALL, **kwargs}).eval()


def images(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("vim_tiny_patch16_224", 7_148_008), ("vim_small_patch16_224", 25_796_584), ("vim_base_patch16_224", 97_598_440)],
)
def test_published_sizes(name, parameters):
    model = timm.create_model(name)
    assert (count_parameters(model), len(model.state_dict())) == (parameters, 415)
    assert model.pretrained_cfg["hf_hub_id"].startswith("hustvl/Vim-")


def test_every_registered_model_runs_and_is_listed():
    assert "vim_nano" in vimamba.list_models()
    assert vimamba.list_models("*stride8*") == sorted(n for n in vimamba.list_models() if "stride8" in n)
    for name in vimamba.list_models("vim_*patch16*"):
        model = timm.create_model(name, depth=2, num_classes=3, img_size=64)
        assert model(images(1, 3, 64, 64)).shape == (1, 3)
        assert model.patch_embed.stride == ((8, 8) if "stride8" in name else (16, 16))


SWITCHES = [
    *(dict(bidirectional=b) for b in ("none", "layer", "ssm", "ssm_conv", ("none", "ssm", "layer", "layer"))),
    *(dict(class_token=c) for c in ("head", "double", "none")),
    *(dict(global_pool=p) for p in ("mean", "max", "last", "avg")),
    *(dict(rope=r, rope_residual=True) for r in ("patches", "hustvl")),
    dict(merge="sum", layer_scale=0.1, drop_path_rate=0.2, drop_rate=0.1, pos_drop_rate=0.1, norm="layer"),
    dict(stride=4, d_conv=3, expand=1.5, dt_rank=3, pos_embed=False, conv_bias=False, bias=True),
    dict(in_chans=1, bidirectional="ssm", class_token="double"),
]


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_every_switch_learns_in_every_parameter(switches):
    model = small(**switches).train()
    x = images(3, switches.get("in_chans", 3), 32, 32)
    nn.functional.cross_entropy(model(x), torch.tensor([0, 1, 2])).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize(("height", "width"), [(32, 32), (40, 24), (37, 61), (8, 8), (64, 8)])
@pytest.mark.parametrize("switches", [{}, dict(class_token="double"), dict(rope="patches"), dict(stride=4)], ids=str)
def test_any_image_size(height, width, switches):
    assert small(**switches)(images(2, 3, height, width)).shape == (2, 5)


def test_an_image_smaller_than_a_patch_is_refused():
    with pytest.raises(ValueError, match="the image is 7×32 pixels, smaller than one patch of 8×8"):
        small()(images(1, 3, 7, 32))


def test_resizing_keeps_the_class_tokens_position_embedding():
    model = small()
    middle = model.pos_embed[:, 8]
    model.set_input_size((64, 48))
    assert model.pos_embed.shape == (1, 8 * 6 + 1, 16)
    torch.testing.assert_close(model.pos_embed[:, 24], middle)
    fixed = model(images(1, 3, 64, 48))
    torch.testing.assert_close(small()(images(1, 3, 64, 48)), fixed)
    model.set_input_size(patch_size=4)
    assert model(images(1, 3, 64, 48)).shape == (1, 5)


def test_classifier_contract():
    model = small()
    x = images(2, 3, 32, 32)
    features = model.forward_features(x)
    assert features.shape == (2, 17, 16)
    assert torch.equal(model.forward_head(features), model(x))
    assert model.forward_head(features, pre_logits=True).shape == (2, 16)
    assert model.get_classifier() is model.head
    model.reset_classifier(0)
    assert model(x).shape == (2, 16)
    model.reset_classifier(7, "mean")
    assert (model(x).shape, model.num_classes, model.global_pool) == ((2, 7), 7, "mean")
    assert small(num_classes=0, global_pool="")(x).shape == (2, 17, 16)


@pytest.mark.parametrize("indices", [[0, 3], [1], [-1], [0, 1, 2, 3]])
def test_features_only(indices):
    model = timm.create_model("vim_nano", features_only=True, out_indices=indices, depth=4, img_size=32, stride=4)
    maps = model(images(2, 3, 32, 24))
    assert [m.shape for m in maps] == [(2, 64, 8, 6)] * len(indices)
    assert model.feature_info.channels() == [64] * len(indices)
    assert model.feature_info.reduction() == [4] * len(indices)


@pytest.mark.parametrize("switches", [{}, dict(bidirectional="layer"), dict(class_token="double")], ids=str)
def test_intermediates(switches):
    model = small(**switches)
    x = images(2, 3, 32, 24)
    last, maps = model.forward_intermediates(x)
    torch.testing.assert_close(last, model.forward_features(x))
    assert [m.shape for m in maps] == [(2, 16, 4, 3)] * 4
    normed = model.forward_intermediates(x, indices=[3], norm=True, intermediates_only=True, output_fmt="NLC")[0]
    positions = vimamba.layers.grid.class_positions(model.class_token, 12)
    torch.testing.assert_close(normed, vimamba.layers.grid.split_tokens(last, positions)[0])
    early = model.forward_intermediates(x, indices=[1], stop_early=True, intermediates_only=True)
    torch.testing.assert_close(early[0], maps[1])
    (patches, classes) = model.forward_intermediates(x, indices=1, return_prefix_tokens=True, intermediates_only=True)[
        0
    ]
    assert (patches.shape, classes.shape) == ((2, 16, 4, 3), (2, len(positions), 16))
    assert model.prune_intermediate_layers([1], prune_norm=True) == [1]
    pruned = model.forward_intermediates(x, indices=[1], intermediates_only=True)
    torch.testing.assert_close(pruned[0], maps[1])


def test_weight_decay_leaves_the_scan_alone():
    model = small()
    groups = param_groups_weight_decay(model, 0.1, no_weight_decay_list=model.no_weight_decay())
    decayed = {id(p) for g in groups if g["weight_decay"] for p in g["params"]}
    names = {n for n, p in model.named_parameters() if id(p) in decayed}
    assert not [n for n in names if n.endswith(("A_log", "A_b_log", "D", "D_b", "bias", "pos_embed", "cls_token"))]
    assert "layers.0.mixer.in_proj.weight" in names


def test_layer_groups_rise_with_depth():
    model = small()
    groups = param_groups_layer_decay(model, 0.1, no_weight_decay_list=model.no_weight_decay(), layer_decay=0.5)
    scale = {id(p): g["lr_scale"] for g in groups for p in g["params"]}
    parameters = dict(model.named_parameters())
    order = ["patch_embed.proj.weight", "layers.0.mixer.D", "layers.3.mixer.D", "head.weight"]
    scales = [scale[id(parameters[n])] for n in order]
    assert scales == sorted(scales)
    assert scales[0] < scales[1] < scales[2]


def test_gradient_checkpointing_gives_the_same_gradients():
    grads = []
    for enable in (False, True):
        model = small().train()
        model.set_grad_checkpointing(enable)
        model(images(2, 3, 32, 32)).sum().backward()
        grads.append([p.grad for p in model.parameters()])
    for plain, saved in zip(*grads, strict=True):
        torch.testing.assert_close(plain, saved)


def test_compiles_and_exports():
    model, x = small(depth=2), images(2, 3, 32, 32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
    compiled(x).sum().backward()
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), model(x))


@pytest.mark.slow
def test_compiled_with_inductor():
    model, x = small(depth=1), images(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("dtype", "steps"), [(torch.bfloat16, 200), (torch.float16, 40)])
def test_mixed_precision_trains_without_a_nan(dtype, steps):
    torch.manual_seed(0)
    model = small(depth=2).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
    x, targets = images(16, 3, 32, 32), torch.arange(16) % 5
    losses = []
    for _ in range(steps):
        with torch.autocast("cpu", dtype):
            loss = nn.functional.cross_entropy(model(x), targets)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert all(loss == loss for loss in losses)
    assert losses[-1] < 0.5 * losses[0]


def test_residual_stays_in_float32_under_autocast():
    model, seen = small(), []
    model.layers[1].register_forward_hook(lambda m, args, out: seen.append((args[0].dtype, out.dtype)))
    model.layers[1].mixer.register_forward_hook(lambda m, args, out: seen.append((args[0].dtype, out.dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        model(images(1, 3, 32, 32))
    assert seen == [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32)]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(bidirectional="ssm_convv"), "bidirectional must be one of .*'ssm_convv'; did you mean ssm_conv"),
        (dict(bidirectional=["none"] * 3), "bidirectional has 3 entries for depth=4"),
        (dict(bidirectional="layer", depth=3), 'layer 2 is "layer" but has no second layer'),
        (dict(class_token="mid"), "class_token must be one of"),
        (dict(class_token="none", global_pool="token"), 'global_pool="token" needs a class token'),
        (dict(merge="max"), "merge must be one of"),
        (dict(rope="patches", embed_dim=18), "rope needs embed_dim divisible by 4, got 18"),
        (dict(img_size=4), "smaller than one patch"),
    ],
)
def test_impossible_options_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        small(**kwargs)


def test_unknown_model_suggests_the_nearest():
    with pytest.raises(UserError, match="model 'vim_tny_patch16_224' is unknown; did you mean vim_tiny_patch16_224"):
        vimamba.create_model("vim_tny_patch16_224")


def test_checkpoint_of_another_size_and_of_another_model(tmp_path):
    path = tmp_path / "weights.pth"
    source = small()
    official = {"model": source.state_dict(), "args": argparse.Namespace(input_size=32)}  # trained on squares only
    torch.save(official, path)
    kwargs = {k: v for k, v in SMALL.items() if k != "img_size"}
    model = vimamba.create_model("vim_tiny_patch16_224", checkpoint_path=str(path), img_size=64, **kwargs)
    torch.testing.assert_close(model.head.weight, source.head.weight)
    torch.testing.assert_close(
        model.pos_embed, resize_pos_embed(source.pos_embed, source.grid, model.grid, source.class_token)
    )
    with pytest.raises(UserError, match="is of another model: it has unknown"):
        vimamba.create_model("vim_tiny_patch16_224", checkpoint_path=str(path), **SMALL | {"depth": 2})
    with pytest.raises(UserError, match=r"is of another model: head.bias has shape \(5,\), the model has \(6,\)"):
        vimamba.create_model("vim_tiny_patch16_224", checkpoint_path=str(path), **SMALL | {"num_classes": 6})


@pytest.mark.parametrize("size", [(32, 32), (16, 64)])
def test_a_bare_state_dict_of_another_size_is_refused(tmp_path, size):
    source = small(img_size=size)  # 16 patches, whose rows and columns nothing tells
    assert convert_checkpoint(source.state_dict(), small(img_size=size))["pos_embed"].equal(source.pos_embed)
    with pytest.raises(UserError, match=r"pos_embed is for 17 tokens .* call model\.set_input_size"):
        convert_checkpoint(source.state_dict(), small(img_size=64))


def test_published_weights_are_converted_and_cached(tmp_path, monkeypatch):
    source = timm.create_model("vim_tiny_patch16_224", depth=2)
    torch.save({"model": source.state_dict(), "epoch": 1}, tmp_path / "vim_t_midclstok_76p1acc.pth")
    asked = []

    def download(hub_id, filename):
        asked.append((hub_id, filename))
        return str(tmp_path / filename)

    monkeypatch.setenv("VIMAMBA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(checkpoints, "hf_hub_download", download)
    for classes in (1000, 3):
        model = timm.create_model("vim_tiny_patch16_224", pretrained=True, depth=2, num_classes=classes, in_chans=1)
        torch.testing.assert_close(model.layers[1].mixer.A_log, source.layers[1].mixer.A_log)
        torch.testing.assert_close(model.patch_embed.proj.weight, source.patch_embed.proj.weight.sum(1, keepdim=True))
    assert asked == [("hustvl/Vim-tiny-midclstok", "vim_t_midclstok_76p1acc.pth")]
    assert [p.suffix for p in (tmp_path / "cache").iterdir()] == [".safetensors"]


def test_offline_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("VIMAMBA_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert os.listdir(tmp_path) == []
    with pytest.raises(UserError, match=r"could not be fetched from the hub .* give its path as `checkpoint`"):
        vimamba.create_model("vim_small_patch16_224", pretrained=True)
    with pytest.raises(UserError, match="no weights are published for vim_nano"):
        vimamba.create_model("vim_nano", pretrained=True)


def test_operations_are_counted():
    model = small()
    scan = 2 * 4 * 17 * 9 * 32 * 4
    assert count_flops(model, (3, 32, 32)) > scan
    assert count_flops(model, (3, 64, 64)) > 3.5 * count_flops(model, (3, 32, 32))
    assert registry.count_parameters(model) == sum(p.numel() for p in model.parameters())

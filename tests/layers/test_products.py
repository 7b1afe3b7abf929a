"""Modules in float32 where PyTorch has no instructions for products of a lower type: who asks for it sees only time."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import vimamba
from vimamba.layers.products import in_quick_type, without_slow_autocast
from vimamba.models.heads import build_detector, build_segmenter
from vimamba.ops import backends


@pytest.fixture(autouse=True)
def no_instructions(monkeypatch):
    monkeypatch.setattr(backends, "_has_instructions", lambda dtype: False)


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def seen(monkeypatch):
    """The types in which PyTorch's convolutions multiply."""
    types = []

    def note(function):
        def noted(x, *args, **kwargs):
            types.append(backends.compute_dtype(x))
            return function(x, *args, **kwargs)

        return noted

    for name in ("conv1d", "conv2d", "conv3d", "conv_transpose2d"):
        monkeypatch.setattr(nn.functional, name, note(getattr(nn.functional, name)))
    return types


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_module_is_computed_in_float32_and_gives_the_lower_type(dtype, autocast):
    conv = nn.Conv2d(3, 8, 3, padding=1)
    wide = copy.deepcopy(conv) if autocast else copy.deepcopy(conv).to(dtype).float()
    used = conv if autocast else conv.to(dtype)
    x = rand(2, 3, 9, 9).to(dtype)
    calls = []
    used.register_forward_hook(lambda module, args, output: calls.append((args[0].dtype, output.dtype)))
    with torch.autocast("cpu", dtype, enabled=autocast):
        y = in_quick_type(used, x)
    assert calls == [(torch.float32, torch.float32)]
    expected = wide(x.float())
    assert y.dtype == dtype
    assert torch.equal(y, expected.to(dtype))
    y.float().square().sum().backward()
    expected.square().sum().backward()
    for found, wanted in zip(used.parameters(), wide.parameters(), strict=True):
        assert (found.grad.float() - wanted.grad).norm() < 0.01 * wanted.grad.norm()


def test_running_statistics_are_kept():
    for autocast in (False, True):
        norm = nn.BatchNorm2d(4)
        norm = norm if autocast else norm.bfloat16()
        before = norm.running_mean.clone()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            in_quick_type(norm, rand(2, 4, 5, 5).bfloat16())
        assert not torch.equal(norm.running_mean, before)
        norm.eval()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            assert in_quick_type(norm, rand(2, 4, 5, 5).bfloat16()).dtype == torch.bfloat16


def test_lists_and_dicts_of_tensors():
    class Both(nn.Module):
        def forward(self, maps):
            return {"sum": maps[0] + maps[1], "first": maps[0]}

    with torch.autocast("cpu", torch.bfloat16):
        y = in_quick_type(Both(), [rand(2, 3), rand(2, 3, seed=1).bfloat16()])
    assert {k: v.dtype for k, v in y.items()} == {"sum": torch.bfloat16, "first": torch.bfloat16}


def test_nothing_changes_elsewhere(monkeypatch):
    conv, x = nn.Conv2d(3, 8, 3), rand(2, 3, 9, 9)
    assert torch.equal(in_quick_type(conv, x), conv(x))
    assert in_quick_type(conv.double(), x.double()).dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16), without_slow_autocast(x):
        assert not torch.is_autocast_enabled("cpu")
    monkeypatch.setattr(backends, "_has_instructions", lambda dtype: True)
    with torch.autocast("cpu", torch.bfloat16), without_slow_autocast(x):
        assert torch.is_autocast_enabled("cpu")
    calls = []
    conv.float().register_forward_pre_hook(lambda module, args: calls.append(torch.is_autocast_enabled("cpu")))
    with torch.autocast("cpu", torch.bfloat16):
        in_quick_type(conv, x)
    assert calls == [True]


MODELS = {
    "plain": dict(name="vim_nano", img_size=64),
    "conv stem and 2-D convolution": dict(name="vim_nano", img_size=64, patch_size=8, stride=8, stem="conv", conv="2d"),
    "pyramid with attention": dict(name="vim_pyramid_nano", attention=(1, 1)),
}


@pytest.mark.parametrize("given", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("mode", ["autocast", "bfloat16", "training"])
def test_classifiers(given, mode, seen):
    torch.manual_seed(0)
    model, x = vimamba.create_model(**given, num_classes=5), rand(2, 3, 64, 64)
    exact = model.eval()(x)
    seen.clear()
    if mode == "bfloat16":
        out = copy.deepcopy(model).bfloat16()(x.bfloat16())
    else:
        model.train(mode == "training")
        with torch.autocast("cpu", torch.bfloat16):
            out = model(x)
    assert seen
    assert set(seen) == {torch.float32}
    assert out.dtype == torch.bfloat16
    if mode == "training":
        out.float().square().mean().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
        assert sum(p.grad is not None for p in model.parameters()) > 20
    else:
        assert (out.float() - exact).norm() < 0.03 * exact.norm()


@pytest.mark.parametrize("head", ["upernet", "fpn", "dpt", "linear"])
@pytest.mark.parametrize("training", [False, True])
def test_segmenters(head, training, seen):
    torch.manual_seed(0)
    model = build_segmenter("vim_nano", {}, 3, 3, (64, 64), dict(head=head, width=64)).train(training)
    x = rand(2, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    assert seen
    assert set(seen) == {torch.float32}
    if not training:
        exact = model(x)
        assert out.dtype == torch.bfloat16
        assert (out.float() - exact).norm() < 0.03 * exact.norm()


@pytest.mark.parametrize("training", [False, True])
def test_detectors(training, seen):
    torch.manual_seed(0)
    args = dict(head="mask_rcnn", width=16, box_width=32, proposals=20)
    model = build_detector("vim_nano", {}, 2, 3, (64, 64), args).train(training)
    target = dict(boxes=torch.tensor([[5.0, 5, 40, 40]]), labels=torch.tensor([1]), masks=torch.ones(1, 64, 64))
    with torch.autocast("cpu", torch.bfloat16):
        found = model([rand(3, 64, 64)], [target] if training else None)
    assert seen
    assert set(seen) == {torch.float32}
    if training:
        sum(found.values()).backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", ["vim_nano", "vim_pyramid_nano"])
def test_float64_stays_under_autocast(name):
    model, x = vimamba.create_model(name, img_size=64, num_classes=5).double().eval(), rand(2, 3, 64, 64).double()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    assert out.dtype == torch.float64
    assert torch.equal(out, model(x))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_is_computed_again_is_what_was(dtype, autocast):
    grads, x = [], rand(2, 3, 64, 64).to(dtype)
    for recompute in ("always", "never"):
        torch.manual_seed(0)
        model = vimamba.create_model("vim_nano", img_size=64, num_classes=5, recompute=recompute).to(dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(x).square().sum()
        loss.backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    for again, kept in zip(*grads, strict=True):
        assert torch.equal(again, kept)

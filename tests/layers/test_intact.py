"""Modules that were replaced, hooked or reparametrised take part; untouched ones run fused."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from vimamba import VisionMamba
from vimamba.layers.grid import Layout
from vimamba.layers.mixers import BidirectionalMixer

NAMES = ["in_proj", "conv1d", "x_proj", "dt_proj", "conv1d_b", "x_proj_b", "dt_proj_b", "out_proj"]
LAYOUT = Layout((3, 4), (6,))


def mixer(**options) -> BidirectionalMixer:
    torch.manual_seed(0)
    return BidirectionalMixer(8, d_state=4, **options)


def tokens() -> Tensor:
    return torch.randn(2, 13, 8, generator=torch.Generator().manual_seed(1))


class Elsewhere(nn.Module):
    """The same module, under another type."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


DESIGNS = [
    {},
    dict(mode="ssm", merge="sum"),
    dict(paths=["row", "column"], merge="gate", gate="token"),
    dict(conv_bias=False, d_conv=3, paths=["snake"]),
    dict(mode="none", paths=["row:backward"], pooled_token=True, bias=True),
]


@pytest.mark.parametrize("options", DESIGNS, ids=str)
@pytest.mark.parametrize("reverse", [False, True])
def test_called_modules_give_what_the_fused_path_gives(options, reverse):
    plain = mixer(**options)
    wrapped = copy.deepcopy(plain)
    for name, module in list(plain.named_children()):
        if isinstance(module, (nn.Linear, nn.Conv1d)):
            setattr(wrapped, name, Elsewhere(getattr(wrapped, name)))
    outs, grads = [], []
    for model in (plain, wrapped):
        out = model(tokens(), reverse=reverse, layout=LAYOUT)
        out.square().sum().backward()
        outs.append(out)
        grads.append({name.replace(".inner", ""): p.grad for name, p in model.named_parameters()})
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-4, atol=1e-6)
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-3, atol=1e-5, msg=name)


def test_untouched_modules_run_fused(monkeypatch):
    monkeypatch.setattr(BidirectionalMixer, "one_direction", lambda *args: pytest.fail("not fused"))
    mixer()(tokens())


@pytest.mark.parametrize("name", NAMES)
def test_pruned_weights_are_those_that_count(name):
    model = mixer()
    prune.random_unstructured(getattr(model, name), "weight", amount=0.5)
    zeroed = mixer()
    getattr(zeroed, name).weight.data.copy_(getattr(model, name).weight)
    torch.testing.assert_close(model(tokens()), zeroed(tokens()), rtol=1e-4, atol=1e-6)
    getattr(model, name).weight_orig.data.mul_(2)  # the weight is made at each call
    assert not torch.allclose(model(tokens()), zeroed(tokens()))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("wrap", [parametrizations.spectral_norm, parametrizations.weight_norm, nn.utils.spectral_norm])
def test_parametrised_weights_are_those_that_count(name, wrap):
    model = mixer().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrap(getattr(model, name))
    model.eval()
    out = model(tokens())
    same = mixer()
    getattr(same, name).weight.data.copy_(getattr(model, name).weight)
    torch.testing.assert_close(out, same(tokens()), rtol=1e-4, atol=1e-6)
    out.sum().backward()
    assert all(p.grad is not None for p in getattr(model, name).parameters())


def test_dynamically_quantised_layers_are_called():
    quantize = pytest.importorskip("torch.ao.quantization")
    model = VisionMamba(img_size=16, patch_size=8, embed_dim=16, depth=2, num_classes=3, d_state=4).eval()
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        small = quantize.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
        kinds = {type(module).__module__ for module in small.layers[0].mixer.children()}
        assert any("quantized" in kind for kind in kinds)
        out, want = small(x), model(x)
    assert not torch.equal(out, want)
    torch.testing.assert_close(out, want, rtol=0.1, atol=0.05)


@pytest.mark.parametrize("name", NAMES)
def test_lora_learns(name):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = VisionMamba(img_size=16, patch_size=8, embed_dim=16, depth=1, num_classes=3, d_state=4)
    x = torch.randn(2, 3, 16, 16)
    before = model(x)
    rank = 32 if name.startswith("conv1d") else 2  # the rank of a depthwise convolution is a multiple of its groups
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=rank, target_modules=rf"layers\.0\.mixer\.{name}"))
    torch.testing.assert_close(adapted(x), before)  # B starts at zero
    F.cross_entropy(adapted(x), torch.tensor([0, 2])).backward()
    learned = {n: p for n, p in adapted.named_parameters() if "lora_B" in n}
    assert len(learned) == 1
    for parameter in learned.values():
        assert parameter.grad.abs().sum() > 0
        parameter.data.add_(torch.ones_like(parameter))
    out = adapted(x)
    assert not torch.allclose(out, before)
    if not name.startswith("conv1d"):  # peft merges no depthwise convolution
        torch.testing.assert_close(adapted.merge_and_unload()(x), out, rtol=1e-3, atol=1e-4)

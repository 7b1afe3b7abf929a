"""8-bit integers: the product on every instruction set, and models with it."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn

import vimamba
from vimamba.errors import UserError
from vimamba.layers.norm import RMSNorm
from vimamba.layers.quantized import QuantizedLinear
from vimamba.ops import backends, blocks, quantized_linear

torch_backend = backends.load("torch")


def product(rows: int, inputs: int, outputs: int, bias: bool = True):
    torch.manual_seed(rows + inputs)
    x = torch.randn(rows, inputs) * torch.logspace(-3, 3, rows)[:, None]
    weight = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
    return x, weight, torch.rand(outputs) + 0.1, torch.randn(outputs) if bias else None


@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"), [(1, 1, 1), (9, 3, 5), (7, 70, 130), (50, 192, 768), (200, 384, 192)]
)
@pytest.mark.parametrize("bias", [True, False])
def test_every_instruction_set_gives_the_exact_integers(each_set, rows, inputs, outputs, bias):
    x, weight, scales, bias = product(rows, inputs, outputs, bias)
    y = backends.load("cpu").quantized_linear(x, weight, scales, bias)
    twin = torch_backend.quantized_linear(x.double(), weight, scales.double(), None if bias is None else bias.double())
    rounding = 1e-6 * twin.abs().amax(1, keepdim=True)
    one_step_of_a_tie = x.abs().amax(1, keepdim=True) * scales  # a number just between two integers
    far = (y - twin).abs() > rounding
    assert far.float().mean() < 0.02
    assert bool(((y - twin).abs() <= rounding + 1.01 * one_step_of_a_tie).all())


def test_zeros_stay_zero(each_set):
    _, weight, scales, _ = product(4, 10, 6)
    assert not backends.load("cpu").quantized_linear(torch.zeros(4, 10), weight, scales, None).any()


def test_a_quantized_layer_is_near_the_layer():
    linear, x = nn.Linear(192, 70), torch.randn(3, 5, 192)
    with torch.no_grad():
        linear.weight[3] = 0
        quantized = QuantizedLinear(linear)
        y, exact = quantized(x), linear(x)
    assert y.shape == exact.shape
    assert (y - exact).norm() / exact.norm() < 0.02
    assert torch.equal(y[..., 3], exact[..., 3])
    assert quantized(x.bfloat16()).dtype == torch.bfloat16
    assert "in_features=192, out_features=70, bias=True" in repr(quantized)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(weight=torch.zeros(6, 10)), "weight must be"),
        (dict(x=torch.zeros(4, 9)), r"x must have shape \(..., in_features\) = \(..., 10\)"),
        (dict(scales=torch.ones(5)), "scales must have shape"),
        (dict(bias=torch.ones(5)), "bias must have shape"),
    ],
)
def test_what_does_not_fit_is_named(change, words):
    x, weight, scales, bias = product(4, 10, 6)
    with pytest.raises(ValueError, match=words):
        quantized_linear(**(dict(x=x, weight=weight, scales=scales, bias=bias) | change))


def test_it_has_no_gradient():
    x, weight, scales, bias = product(4, 10, 6)
    with pytest.raises(UserError, match="no gradient"):
        quantized_linear(x.requires_grad_(), weight, scales, bias)


# Models.

MODELS = {
    "vim_nano": dict(),
    "vim_pyramid_nano": dict(img_size=64),
    "biased": dict(model="vim_nano", bias=True),
    "gated": dict(model="vim_nano", merge="gate"),
}


def make(name: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    options = dict(MODELS[name])
    model = timm.create_model(options.pop("model", name), **options).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.02 * torch.randn_like(weight))
    return model, torch.randn(3, 3, *model.default_cfg["input_size"][1:] if "img_size" not in options else (64, 64))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("autocast", [False, True])
def test_a_quantized_model_is_near_the_model(name, autocast):
    model, x = make(name)
    before = copy.deepcopy(model.state_dict())
    small = vimamba.quantize(model)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not any(p.requires_grad for p in small.parameters())
    assert not small.training
    integers = [module for module in small.modules() if isinstance(module, QuantizedLinear)]
    assert integers
    assert not any(isinstance(module, QuantizedLinear) for module in model.modules())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y, exact = small(x).float(), model(x).float()
    assert 0 < (y - exact).norm() / exact.norm() < 0.1


def test_blocks_of_integers_are_what_the_layers_are(each_set):
    model, _ = make("biased")
    small = vimamba.quantize(model)
    weights = [layer.joined() for layer in small.layers]
    assert weights[0].in_scales is not None
    assert weights[0].out_bias is not None
    stream = torch.randn(2, 21, model.embed_dim)
    scale = small.layers[0].mixer.merge_scale
    for dtype, bound in ((torch.float32, 0.01), (torch.bfloat16, 0.02)):
        one, twin = (blocks(stream, weights, scale, dtype=dtype, backend=of) for of in ("cpu", "torch"))
        assert (one - twin).norm() / twin.norm() < bound


def test_a_quantized_models_state_is_loaded_and_never_stale():
    model, x = make("vim_nano")
    small = vimamba.quantize(model)
    with torch.no_grad():
        y = small(x)
        other = vimamba.quantize(timm.create_model("vim_nano"))
        assert not torch.equal(other(x), y)
        other.load_state_dict(small.state_dict())
        assert torch.equal(other(x), y)
        small.layers[0].mixer.out_proj.weight[0, 0] += 1
        assert not torch.equal(small(x), y)


def test_a_model_of_other_layers_or_quantized_already_is_refused():
    with pytest.raises(UserError, match="has no BidirectionalMixer"):
        vimamba.quantize(nn.Linear(3, 3))
    model, _ = make("vim_nano")
    with pytest.raises(UserError, match="quantised already"):
        vimamba.quantize(vimamba.quantize(model))
    assert isinstance(model.layers[0].norm, RMSNorm)

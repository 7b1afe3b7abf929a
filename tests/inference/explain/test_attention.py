"""Hidden attention in linear time against the explicit matrix of length × length."""

from __future__ import annotations

import pytest
import torch

import vimamba
from vimamba import VisionMamba
from vimamba.inference.explain.attention import attention, look, read_weights, rollout, to_grid
from vimamba.inference.explain.frozen import _Linear, frozen
from vimamba.inference.explain.layer import softplus

SMALL = dict(img_size=64, patch_size=8, embed_dim=16, depth=2, d_state=4, num_classes=5)  # 64 patches
TOLERANCE = dict(rtol=1e-4, atol=1e-5)
DESIGNS = [
    *(dict(bidirectional=mode) for mode in ("none", "layer", "ssm", "ssm_conv")),
    *(dict(class_token=place) for place in ("head", "middle", "double", "none")),
    *(dict(paths=paths) for paths in (["row", "column"], ["snake"], ["window4"], ["column:backward"])),
    dict(merge="sum", num_registers=2, global_pool="registers"),
    dict(merge="gate", paths=["row", "column"], gate="token"),
    dict(merge="gate", gate="image", global_pool="mean"),
    dict(bidirectional="none", alternate=True, pooled_token=True, global_pool="last", class_token="none"),
    dict(bidirectional="layer", layer_pairs=True, rope="patches", norm="layer", conv="2d", global_pool="max"),
]


def small(**options) -> VisionMamba:
    torch.manual_seed(0)
    model = VisionMamba(**{**SMALL, **options}).eval()
    for name, weight in model.named_parameters():  # gates that choose, B and C that are not small
        if "gate" in name or "x_proj" in name:
            torch.nn.init.normal_(weight)
    return model


def images(batch: int = 2, side: int = 64) -> torch.Tensor:
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1))


def matrices(layer, absolute: bool = False) -> list[torch.Tensor]:
    """Of each direction (batch, dim, length, length) between tokens in their own order, times what it counts."""
    return [matrix(layer, i, absolute) for i in range(len(layer.mixer.scans))]


def matrix(layer, index: int, absolute: bool) -> torch.Tensor:
    carried = layer.carried(index)
    B, C = (t.abs().double() if absolute else t.double() for t in (carried.B_BNL, carried.C_BNL))
    delta, A = carried.delta_BDL.double(), carried.A_DN.double()
    way = carried.reverse
    B, C, delta = (t.flip(-1) if way else t for t in (B, C, delta))
    fall = delta[:, :, None].mul(A[..., None]).cumsum(-1)  # (batch, dim, state, length)
    causal = torch.ones(delta.shape[-1], delta.shape[-1]).tril().bool()
    decay = (fall[..., :, None] - fall[..., None, :]).masked_fill(~causal, -torch.inf).exp()
    alpha = torch.einsum("bni,bdnij,bdj,bnj->bdij", C, decay, delta, B)
    alpha = alpha.flip(-1, -2) if way else alpha
    if (found := layer.route(index)) is not None:
        alpha = alpha[:, :, found.rank][..., found.rank]
    weight = layer.weight(index)
    return alpha * (weight[:, None] if isinstance(weight, torch.Tensor) else weight)


def test_softplus_keeps_the_digits_of_small_and_large_numbers():
    x = torch.cat([torch.linspace(-30, 30, 1001), torch.tensor([-80.0, 0.0, 1e4])])
    torch.testing.assert_close(softplus(x).double(), torch.log1p(x.double().exp()).where(x < 30, x), rtol=3e-7, atol=0)


@pytest.mark.parametrize("options", DESIGNS, ids=str)
def test_the_row_of_the_read_token_is_that_of_the_explicit_matrix(options):
    model = small(**options)
    layers = look(model, images())
    assert len(layers) == 2
    for layer in layers:
        found, explicit = attention(model, layer), matrices(layer)
        if layer.pooled_at is not None:
            inside = slice(1, None) if layer.pooled_at == 0 else slice(None, -1)
            explicit = [each[:, :, inside, inside] for each in explicit]
        read = read_weights(model, _plain(model))
        assert read.sum() == pytest.approx(1)
        rows = [torch.einsum("i,bdij->bdj", read.double(), each) for each in explicit]
        expected = torch.stack([*rows, sum(rows)], 1).abs().mean(2)
        torch.testing.assert_close(found.double(), expected, **TOLERANCE)
        assert expected.max() > 1e-3  # the tolerance means something


@pytest.mark.parametrize("options", DESIGNS, ids=str)
def test_rollout_is_the_product_of_explicit_matrices(options):
    model = small(**options)
    layers = look(model, images())
    left = iter(layers)
    product = None
    for step in model.steps:
        of_step = []
        for _ in step:
            layer = next(left)
            total = sum(matrices(layer, absolute=True)).mean(1)
            total = (torch.eye(total.shape[-1]) + total / total.sum(-1, keepdim=True)) / 2
            if layer.pooled_at is not None:
                inside = slice(1, None) if layer.pooled_at == 0 else slice(None, -1)
                total = total[:, inside, inside]
            of_step.append(total)
        mixed = sum(of_step) / len(of_step)
        product = mixed if product is None else mixed @ product
    expected = torch.einsum("i,bij->bj", read_weights(model, _plain(model)).double(), product)
    torch.testing.assert_close(rollout(model, layers).double(), expected, **TOLERANCE)


@pytest.mark.parametrize("options", DESIGNS, ids=str)
def test_holding_constant_changes_no_value_and_leaves_no_trace(options):
    model = small(**options)
    with torch.no_grad():
        expected = model(images())
        with frozen(model):
            torch.testing.assert_close(model(images()), expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(model(images()), expected)
    assert not any({"_merged", "forward"} & module.__dict__.keys() for module in model.modules())


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("options", DESIGNS, ids=str)
def test_gradients_are_those_of_the_model_with_its_choices_constant(options, fused, monkeypatch):
    """Against the same model whose scans autograd differentiates, with delta, B, C, gates and SiLUs detached."""
    if not fused:  # as on a GPU
        monkeypatch.setattr("vimamba.inference.explain.frozen.frozen_backward", lambda *arguments: None)
    model = small(**options)
    tokens = torch.randn(2, 64, SMALL["embed_dim"], generator=torch.Generator().manual_seed(2)).requires_grad_()
    model.patch_embed.register_forward_hook(lambda *_: tokens)
    with frozen(model):
        (found,) = torch.autograd.grad(model(images())[:, 1].sum(), tokens)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Linear, "apply", staticmethod(lambda u, layer, merged: held(u, layer)))
        with frozen(model):
            (expected,) = torch.autograd.grad(model(images())[:, 1].sum(), tokens)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)
    assert all(weight.requires_grad for name, weight in model.named_parameters())


def test_the_activations_of_a_stem_are_their_input_times_a_constant():
    model = small(stem="conv")
    x = torch.randn(9, requires_grad=True)
    with frozen(model):
        y = model.patch_embed.convs[0][2](x)
    torch.testing.assert_close(y, torch.nn.functional.gelu(x))
    torch.testing.assert_close(x * torch.autograd.grad(y.sum(), x)[0], y)


def held(u, layer):
    """`_merged` with its choices constant, out of operations that autograd knows."""
    x_BLD, z_BLD = u.chunk(2, dim=-1)
    total = 0
    for i, scan in enumerate(layer.mixer.scans):
        convolved_BDL = layer.convolved(i, layer.along(x_BLD, i).transpose(1, 2))
        u_BDL = convolved_BDL * convolved_BDL.detach().sigmoid()
        D = getattr(layer.mixer, layer.mixer.names[scan.weights].D)
        y_BDL = layer.carried(i).scan(u_BDL) + D[:, None] * u_BDL
        total = total + layer.back(y_BDL.transpose(1, 2), i) * layer.weight(i)
    return total * torch.nn.functional.silu(z_BLD).detach()


class Adapted(torch.nn.Module):
    """A projection with an update beside it, as LoRA puts one in its place."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear
        update = torch.randn(linear.weight.shape, generator=torch.Generator().manual_seed(3))
        self.update = torch.nn.Parameter(update)

    @property
    def weight(self):
        return self.linear.weight

    def forward(self, x):
        return self.linear(x) + torch.nn.functional.linear(x, self.update)


def adapted(merged: bool):
    """A model with an update of its projections, beside them or in their weights."""
    model = small()
    for block in model.layers:
        for name in ("in_proj", "x_proj", "dt_proj_b", "out_proj"):
            module = Adapted(block.mixer._modules[name])
            if merged:
                with torch.no_grad():
                    module.linear.weight += module.update
            else:
                setattr(block.mixer, name, module)
    return model


@pytest.mark.parametrize("method", ["attribution", "attention", "rollout", "directions"])
def test_what_stands_in_the_place_of_a_projection_takes_part(method):
    found, expected = (vimamba.explain(adapted(merged), images(), method, [1, 2]) for merged in (False, True))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    assert not torch.allclose(found, vimamba.explain(small(), images(), method, [1, 2]), rtol=1e-2)


def test_any_size_gives_a_map_of_its_grid():
    model = small()
    layers = look(model, torch.randn(1, 3, 40, 96))
    assert to_grid(rollout(model, layers), layers[0].layout).shape == (1, 5, 12)


def _plain(model):
    from vimamba.layers.grid import token_layout

    return token_layout(model.class_token, model.grid, model.num_registers)

"""Hidden attention in linear time against the explicit matrix of length × length."""

from __future__ import annotations

import pytest
import torch

from vimamba import VisionMamba
from vimamba.inference.explain.attention import attention, look, read_weights, rollout, to_grid
from vimamba.inference.explain.frozen import frozen

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


def test_shares_of_directions_sum_to_one_and_a_silenced_one_has_none():
    model = small(paths=["row", "column"])
    with torch.no_grad():
        model.layers[1].mixer.D_b.zero_()
        model.layers[1].mixer.x_proj_b.weight.zero_()
    first, second = (layer.shares() for layer in look(model, images()))
    torch.testing.assert_close(first.sum(1), torch.ones(2))
    assert (first > 0).all()
    assert (second[:, 1] == 0).all()


def test_any_size_gives_a_map_of_its_grid():
    model = small()
    layers = look(model, torch.randn(1, 3, 40, 96))
    assert to_grid(rollout(model, layers), layers[0].layout).shape == (1, 5, 12)


def _plain(model):
    from vimamba.layers.grid import token_layout

    return token_layout(model.class_token, model.grid, model.num_registers)

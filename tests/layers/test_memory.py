"""Long sequences keep less for the backward pass and give the same gradients."""

from __future__ import annotations

import pytest
import torch

from vimamba.layers import memory
from vimamba.layers.block import Block
from vimamba.layers.grid import Layout
from vimamba.layers.mixers import BidirectionalMixer
from vimamba.layers.norm import NORMS


def gradients(monkeypatch, long: int, dtype: torch.dtype, norm: str = "rms") -> tuple[list[torch.Tensor], int]:
    """Gradients of a block's input and parameters, and the bytes that autograd kept for them."""
    monkeypatch.setattr(memory, "LONG", long)
    torch.manual_seed(0)
    block = Block(BidirectionalMixer(16, bias=True), NORMS[norm](16))
    torch.nn.init.normal_(block.norm.weight)
    x = torch.randn(2, 50, 16, generator=torch.Generator().manual_seed(1), requires_grad=True)
    kept: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    autocast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
    with autocast, torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
        out, residual = block.step(x, x.cos())
    (out.float().square().sum() + residual.sum()).backward()
    return [x.grad, *(p.grad for p in block.parameters())], sum(kept.values())


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_kept_activations(monkeypatch, dtype, norm):
    kept, _ = gradients(monkeypatch, 51, dtype, norm)
    again, _ = gradients(monkeypatch, 50, dtype, norm)
    for a, b in zip(kept, again, strict=True):
        torch.testing.assert_close(a, b)


def test_neither_the_norm_nor_the_projection_is_kept(monkeypatch):
    kept, again = (gradients(monkeypatch, long, torch.float32)[1] for long in (51, 50))
    assert kept - again >= 2 * 50 * (16 + 64) * 4


@pytest.mark.parametrize(
    "options", [{"conv": "2d"}, {"pooled_token": True, "mode": "none"}, {"paths": ["row", "column"]}]
)
def test_what_stands_between_projection_and_scan_is_not_lost(monkeypatch, options):
    torch.manual_seed(0)
    block = Block(BidirectionalMixer(16, **options), NORMS["rms"](16))
    x = torch.randn(2, 48, 16)
    grads = []
    for long in (1000, 40):
        monkeypatch.setattr(memory, "LONG", long)
        out = block(x, layout=Layout((6, 8), ()))
        grads.append(torch.autograd.grad(out.square().sum(), list(block.parameters())))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)

"""Long sequences keep less for the backward pass and give the same gradients."""

from __future__ import annotations

import pytest
import torch

from vimamba.layers import recompute
from vimamba.layers.mixer import BidirectionalMixer


def gradients(monkeypatch, long: int, dtype: torch.dtype) -> tuple[list[torch.Tensor], int]:
    """Gradients of a mixer's input and parameters, and the bytes that autograd kept for them."""
    monkeypatch.setattr(recompute, "LONG", long)
    torch.manual_seed(0)
    mixer = BidirectionalMixer(16, bias=True)
    x = torch.randn(2, 50, 16, generator=torch.Generator().manual_seed(1), requires_grad=True)
    kept: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    autocast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
    with autocast, torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
        out = mixer(x)
    out.float().square().sum().backward()
    return [x.grad, *(p.grad for p in mixer.parameters())], sum(kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_a_kept_projection(monkeypatch, dtype):
    kept, _ = gradients(monkeypatch, 51, dtype)
    again, _ = gradients(monkeypatch, 50, dtype)
    for a, b in zip(kept, again, strict=True):
        torch.testing.assert_close(a, b)


def test_the_projection_is_not_kept(monkeypatch):
    kept, again = (gradients(monkeypatch, long, torch.float32)[1] for long in (51, 50))
    assert kept - again >= 2 * 50 * 64 * 4

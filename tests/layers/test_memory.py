"""What is computed again is kept less, where it is asked for, and the gradients stay the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from vimamba import VisionMamba, VisionMambaPyramid
from vimamba.layers.block import Block
from vimamba.layers.grid import Layout
from vimamba.layers.memory import LONG, RECOMPUTE
from vimamba.layers.mixers import BidirectionalMixer
from vimamba.layers.norm import NORMS


def kept_by(step: Callable[[], Any]) -> tuple[int, Any]:
    """Bytes that a step allocates and does not free while its result lives, and that result."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = step()
    return sum(event.self_cpu_memory_usage for event in profile.events()), result


def block(recompute: str, norm: str = "rms", **options) -> Block:
    torch.manual_seed(0)
    made = Block(BidirectionalMixer(16, bias=True, recompute=recompute, **options), NORMS[norm](16))
    torch.nn.init.normal_(made.norm.weight)
    return made


def gradients(recompute: str, dtype: torch.dtype, norm: str = "rms") -> tuple[list[torch.Tensor], int]:
    """Gradients of a block's input and parameters, and the bytes that autograd kept for them."""
    made = block(recompute, norm)
    x = torch.randn(2, 50, 16, generator=torch.Generator().manual_seed(1), requires_grad=True)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        kept, (out, residual) = kept_by(lambda: made.step(x, x.cos()))
    (out.float().square().sum() + residual.sum()).backward()
    return [x.grad, *(p.grad for p in made.parameters())], kept


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_kept_activations(dtype, norm):
    never, always = (gradients(recompute, dtype, norm)[0] for recompute in ("never", "always"))
    assert all(a.equal(b) for a, b in zip(never, always, strict=True))


def test_neither_the_norm_nor_the_projection_is_kept():
    never, long, always = (gradients(recompute, torch.float32)[1] for recompute in ("never", "long", "always"))
    assert long == never
    assert never - always >= 2 * 50 * (16 + 64) * 4


@pytest.mark.parametrize(("length", "saves"), [(LONG - 1, False), (LONG, True)])
def test_long_is_from_a_number_of_tokens_on(length, saves):
    x, kept = torch.randn(1, length, 16), {}
    for recompute in RECOMPUTE:
        made = block(recompute)
        kept[recompute], _ = kept_by(lambda made=made: made(x))
    assert kept["always"] < kept["never"]
    assert kept["long"] == kept["always" if saves else "never"]


@pytest.mark.parametrize(
    "options", [{"conv": "2d"}, {"pooled_token": True, "mode": "none"}, {"paths": ["row", "column"]}]
)
def test_what_stands_between_projection_and_scan_is_not_lost(options):
    x, grads = torch.randn(2, 48, 16), []
    for recompute in ("never", "always"):
        made = block(recompute, **options)
        out = made(x, layout=Layout((6, 8), ()))
        grads.append(torch.autograd.grad(out.square().sum(), list(made.parameters())))
    assert all(a.equal(b) for a, b in zip(*grads, strict=True))


def test_a_graph_may_run_backward_twice():
    made = block("always")
    total = made(torch.randn(2, 50, 16)).square().sum()
    first, second = (torch.autograd.grad(total, list(made.parameters()), retain_graph=True) for _ in range(2))
    assert all(a.equal(b) for a, b in zip(first, second, strict=True))


SMALL = dict(img_size=64, patch_size=8, embed_dim=16, depth=2, num_classes=3)
PYRAMID = dict(dims=(8, 8, 16, 16), depths=(1, 1, 1, 1), num_classes=3)


@pytest.mark.parametrize(("model_class", "sizes"), [(VisionMamba, SMALL), (VisionMambaPyramid, PYRAMID)])
def test_a_model_hands_it_to_its_mixers(model_class, sizes):
    images, kept, grads = torch.randn(2, 3, 64, 64), {}, {}
    for recompute in RECOMPUTE:
        torch.manual_seed(0)
        model = model_class(**sizes, recompute=recompute)
        kept[recompute], out = kept_by(lambda model=model: model(images))
        grads[recompute] = torch.autograd.grad(out.square().sum(), list(model.parameters()))
    assert kept["always"] < kept["long"] == kept["never"]
    for recompute in ("long", "always"):
        assert all(a.equal(b) for a, b in zip(grads["never"], grads[recompute], strict=True))


def test_a_checkpoint_around_it_decides_over_all_that_is_kept():
    images, kept, grads = torch.randn(2, 3, 64, 64), {}, []
    for recompute in ("never", "always"):
        torch.manual_seed(0)
        model = VisionMamba(**SMALL, recompute=recompute)
        model.set_grad_checkpointing()
        kept[recompute], out = kept_by(lambda model=model: model(images))
        grads.append(torch.autograd.grad(out.square().sum(), list(model.parameters())))
    model.set_grad_checkpointing(False)
    assert kept["always"] == kept["never"] < kept_by(lambda: model(images))[0]
    assert all(a.equal(b) for a, b in zip(*grads, strict=True))


def test_an_unknown_word_is_refused():
    with pytest.raises(ValueError, match="recompute must be one of 'long', 'always', 'never'"):
        VisionMamba(**SMALL, recompute="sometimes")

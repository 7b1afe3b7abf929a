"""Initial values: after a model was made without memory, `init_weights` sets every one of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from vimamba import VisionMamba, VisionMambaPyramid

TOKENS = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_classes=5)
MAPS = dict(dims=(16, 16, 32, 32), depths=(1, 1, 2, 1), num_classes=5)
DESIGNS = [
    (VisionMamba, TOKENS),
    (
        VisionMamba,
        TOKENS | dict(merge="gate", rope="patches", bias=True, layer_scale=0.1, norm="layer", num_registers=2),
    ),
    (VisionMamba, TOKENS | dict(stem="conv", conv="2d", class_token="double", bidirectional="ssm", dt_init="constant")),
    (VisionMamba, TOKENS | dict(paths=["row", "column"], dt_min=0.01, dt_max=0.02, pos_embed="sincos")),
    (VisionMambaPyramid, MAPS | dict(attention=(1, 0), merge="gate")),
]


def spread(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and deviation of every weight and buffer of a hundred numbers or more; of the others, the mean alone."""
    return {
        name: (tensor.double().mean(), tensor.double().std() if tensor.numel() >= 100 else torch.zeros(()))
        for name, tensor in model.state_dict().items()
    }


@pytest.mark.parametrize(("kind", "options"), DESIGNS, ids=str)
def test_a_model_made_without_memory_starts_as_any_other(kind, options):
    torch.manual_seed(0)
    usual = kind(**options)
    model = kind(**options, device="meta").to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.fill_(float("nan") if tensor.is_floating_point() else 7)
    model.init_weights()
    assert all(tensor.isfinite().all() for tensor in (*model.parameters(), *model.buffers()))
    found, expected = spread(model), spread(usual)
    for name, (mean, deviation) in expected.items():
        scale = deviation if deviation > 0 else usual.state_dict()[name].double().abs().max().clamp(min=0.2)
        assert abs(found[name][0] - mean) <= 0.5 * scale, name
        assert abs(found[name][1] - deviation) <= 0.3 * deviation, name
    for name, tensor in usual.state_dict().items():
        if name.split(".")[-1].startswith(("A_", "D", "gamma", "running", "num_batches")) or ".gate." in name:
            assert torch.equal(model.state_dict()[name], tensor), name
    x = torch.randn(2, 3, 64, 64)
    assert model.eval()(x).isfinite().all()


@pytest.mark.parametrize(("low", "high"), [(0.001, 0.1), (0.01, 0.02)])
def test_step_sizes_start_in_their_range_again(low, high):
    model = VisionMamba(**TOKENS, dt_min=low, dt_max=high)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    model.init_weights()
    for layer in model.layers:
        steps = nn.functional.softplus(layer.mixer.dt_proj_b.bias)
        assert low * 0.99 < steps.min() < steps.max() < high * 1.01


def test_weights_that_exist_are_not_drawn_twice():
    torch.manual_seed(0)
    model = VisionMamba(**TOKENS)
    before = model.layers[0].mixer.x_proj.weight.clone()
    model.init_weights(needs_reset=False)
    assert torch.equal(model.layers[0].mixer.x_proj.weight, before)
    model.init_weights()
    assert not torch.equal(model.layers[0].mixer.x_proj.weight, before)

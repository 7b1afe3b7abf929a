"""The hierarchical model, as timm's users meet it."""

from __future__ import annotations

import pytest
import timm
import torch

import vimamba
from vimamba.models.pyramid import VisionMambaPyramid
from vimamba.models.registry import count_parameters

SMALL = dict(dims=(8, 8, 16, 16), depths=(1, 1, 2, 2), head_dim=8, num_classes=5, d_state=4)


def small(**options) -> VisionMambaPyramid:
    torch.manual_seed(0)
    return VisionMambaPyramid(**{**SMALL, **options}).eval()


def images(height: int = 64, width: int = 96) -> torch.Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("size", "least", "most"), [("nano", 1.5, 3), ("tiny", 5, 8), ("small", 20, 32)])
def test_sizes_are_registered(size, least, most):
    name = f"vim_pyramid_{size}"
    assert name in vimamba.list_models()
    assert least * 1e6 < count_parameters(timm.create_model(name)) < most * 1e6


def test_features_only_gives_four_maps():
    model = timm.create_model("vim_pyramid_nano", features_only=True).eval()
    assert model.feature_info.reduction() == [4, 8, 16, 32]
    with torch.no_grad():
        maps = model(images())
    assert [tuple(m.shape[1:]) for m in maps] == [
        (channels, 64 // reduction, 96 // reduction)
        for channels, reduction in zip(model.feature_info.channels(), (4, 8, 16, 32), strict=True)
    ]
    some = timm.create_model("vim_pyramid_nano", features_only=True, out_indices=(1, 2)).eval()
    assert [m.shape[-1] for m in some(images())] == [12, 6]
    assert len(some.model.stages) == 3  # what nobody reads is gone


@pytest.mark.parametrize(
    "options",
    [{}, dict(attention=(1, 2)), dict(paths=["row", "column"]), dict(mode="ssm", conv="2d"), dict(merge="gate")],
)
def test_it_learns_whatever_its_blocks(options):
    model = small(**options, drop_path_rate=0.1).train()
    model.set_grad_checkpointing()
    model(images()).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.no_weight_decay() <= dict(model.named_parameters()).keys()


def test_intermediates_agree_with_the_features():
    model = small()
    last, maps = model.forward_intermediates(images(), norm=True)
    torch.testing.assert_close(last, model.forward_features(images()))
    torch.testing.assert_close(maps[-1], last)
    assert len(model.forward_intermediates(images(), 1, stop_early=True, intermediates_only=True)) == 1


def test_the_classifier_can_be_replaced():
    model = small()
    model.reset_classifier(3)
    assert model(images(50, 70)).shape == (2, 3)  # and any size will do
    model.reset_classifier(0)
    assert model(images()).shape == (2, model.num_features)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (dict(depths=(1, 1, 1)), "depths"),
        (dict(attention=(3, 0)), "attention"),
        (dict(attention=(1, 0), head_dim=7), "head_dim"),
        (dict(paths=["diagonal"]), "paths"),
        (dict(global_pool="max"), "global_pool"),
    ],
)
def test_impossible_arguments_are_refused_by_name(options, named):
    with pytest.raises(ValueError, match="^" + named):
        small(**options)


def test_gradients_of_narrow_images_are_right_in_bfloat16():
    model = small().train()
    narrow = images(48, 16)  # the last halving is of a map of one column
    for _ in range(10):
        spoilt = [torch.full((n,), torch.nan) for n in (1152, 2304, 4608)]  # what memory that is not written holds
        del spoilt
        model.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(narrow)
        logits.float().square().mean().backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
        gradient = model.stages[3].downsample[0].weight.grad
        assert gradient[..., 1].any()
        assert not gradient[..., (0, 2)].any()

"""Hooks, explanations and summaries: other people's code that looks into a model."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from vimamba import VisionMamba

SMALL = dict(img_size=32, patch_size=8, embed_dim=16, depth=4, d_state=4, num_classes=5)


def small(**options) -> VisionMamba:
    torch.manual_seed(0)
    return VisionMamba(**{**SMALL, **options}).eval()


def images(batch: int = 2, height: int = 32, width: int = 40) -> torch.Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


DESIGNS = [{}, dict(bidirectional="layer"), dict(rope="patches"), dict(norm="layer", paths=["row", "column"])]


@torch.no_grad()
@pytest.mark.parametrize("options", DESIGNS, ids=str)
def test_a_hook_sees_the_stream_after_a_block_and_changes_nothing(options):
    model, seen = small(**options), {}
    expected = model(images())
    taps = model.forward_intermediates(images(), output_fmt="NLC", intermediates_only=True, return_prefix_tokens=True)
    for name, module in model.named_modules():
        module.register_forward_hook(lambda m, args, out, name=name: seen.__setitem__(name, out))
    torch.testing.assert_close(model(images()), expected, rtol=1e-5, atol=1e-6)
    assert seen.keys() >= {"layers.0", "layers.3", "layers.3.norm", "layers.3.mixer.x_proj", "norm_f", "patch_embed"}
    assert all(isinstance(out, torch.Tensor) for out in seen.values())
    patches, _ = taps[2]
    if options.get("bidirectional") != "layer":  # whose stream is the sum of two blocks
        prefix = 10  # class token in the middle of 4 × 5 patches
        found = torch.cat([seen["layers.2"][:, :prefix], seen["layers.2"][:, prefix + 1 :]], 1)
        torch.testing.assert_close(found, patches, rtol=1e-5, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("name", ["layers.1", "layers.1.norm", "layers.1.mixer", "layers.1.mixer.dt_proj", "norm_f"])
def test_what_a_hook_returns_is_taken(name):
    model = small()
    before = model(images())
    handle = model.get_submodule(name).register_forward_hook(lambda m, args, out: out * 1.5)
    assert not torch.allclose(model(images()), before)
    handle.remove()
    assert torch.equal(model(images()), before)  # and the fused path is back


def test_hooks_on_all_modules_see_the_blocks():
    model, seen = small(), []
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, out: seen.append(type(m).__name__))
    with torch.no_grad():
        model(images())
    handle.remove()
    assert seen.count("Block") == 4
    assert seen.count("RMSNorm") == 5


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_half_precision_with_and_without_hooks(norm):
    model, x = small(norm=norm).bfloat16(), images().bfloat16()
    with torch.no_grad():
        plain = model(x)
        model.layers[1].register_forward_hook(lambda m, args, out: None)
        model.layers[3].norm.register_forward_hook(lambda m, args, out: None)
        hooked = model(x)
    assert plain.dtype == hooked.dtype == torch.bfloat16
    torch.testing.assert_close(hooked, plain, rtol=0.05, atol=0.05)


def test_gradcam_shows_where():
    cam = pytest.importorskip("pytorch_grad_cam")
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    def to_map(tokens: torch.Tensor) -> torch.Tensor:
        patches = torch.cat([tokens[:, :10], tokens[:, 11:]], 1)
        return patches.transpose(1, 2).unflatten(2, (4, 5))

    model = small(global_pool="mean")
    for layer in (model.layers[2], model.norm_f, model.layers[3].norm):
        with cam.GradCAM(model, [layer], reshape_transform=to_map) as explain:
            shown = explain(images(), [ClassifierOutputTarget(1)] * 2)
        assert shown.shape == (2, 32, 40)
        assert shown.std() > 0


def test_captum_attributes_a_layer():
    attr = pytest.importorskip("captum.attr")
    model = small()
    activation = attr.LayerActivation(model, model.layers[1]).attribute(images())
    assert activation.shape == (2, 21, 16)
    conductance = attr.LayerGradientXActivation(model, model.norm_f).attribute(images(), target=2)
    assert conductance.shape == (2, 21, 16)
    assert conductance[:, 10].abs().sum() > 0  # the class token's
    saliency = attr.Saliency(model).attribute(images().requires_grad_(), target=0)
    assert saliency.abs().sum() > 0


def test_smp_dense_prediction_reads_the_class_token():
    smp = pytest.importorskip("segmentation_models_pytorch")
    decoder = dict(decoder_readout="cat", decoder_intermediate_channels=(8, 8, 8, 8), decoder_fusion_channels=8)
    model = smp.DPT("tu-vim_nano", encoder_depth=4, encoder_weights=None, classes=3, stride=4, img_size=32, **decoder)
    read = []
    block = model.decoder.projection_blocks[3]
    block.register_forward_pre_hook(lambda m, args: read.append(args[1][:, 0]))
    out = model(images(2, 64, 64))
    assert out.shape == (2, 3, 64, 64)
    encoder = model.encoder.model
    stream = encoder.forward_intermediates(images(2, 64, 64), [5], output_fmt="NLC", norm=True, intermediates_only=True)
    assert stream[0].shape == (2, 256, 64)
    pooled = encoder.forward_head(encoder.forward_features(images(2, 64, 64)), pre_logits=True)
    torch.testing.assert_close(encoder.norm_f(read[0]), pooled)
    out.sum().backward()
    assert encoder.cls_token.grad.abs().sum() > 0


def test_smp_unet_on_the_pyramid():
    smp = pytest.importorskip("segmentation_models_pytorch")
    model = smp.Unet("tu-vim_pyramid_nano", encoder_weights=None, classes=3, decoder_channels=(16, 8, 8, 8, 8))
    out = model(images(2, 64, 96))
    assert out.shape == (2, 3, 64, 96)
    out.sum().backward()


def test_the_class_token_comes_first_of_the_prefix_tokens():
    model = small(class_token="middle", num_registers=2)
    assert (model.num_prefix_tokens, model.has_class_token) == (3, True)
    assert (small(class_token="none").num_prefix_tokens, small(class_token="none").has_class_token) == (0, False)
    with torch.no_grad():
        last = model.forward_intermediates(images(), [3], True, norm=True, intermediates_only=True)[0]
        pooled = model.forward_head(model.forward_features(images()), pre_logits=True)
    assert last[1].shape == (2, 3, 16)
    torch.testing.assert_close(last[1][:, 0], pooled)


@pytest.mark.parametrize("name", ["vim_nano", "vim_pyramid_nano"])
def test_symbolic_traces_take_any_size(name):
    from torchvision.models.feature_extraction import create_feature_extractor

    model = timm.create_model(name).eval()
    layers = ["layers.0", "layers.5"] if name == "vim_nano" else ["stages.1", "stages.3"]
    extract = create_feature_extractor(model, [*layers, "head"])
    with torch.no_grad():
        for size in ((28, 28), (64, 40)):
            out = extract(images(1, *size))
            torch.testing.assert_close(out["head"], model(images(1, *size)), rtol=1e-4, atol=1e-5)
            assert out.keys() == {*layers, "head"}
    by_fx = timm.create_model(name, features_only=True, feature_cls="fx", out_indices=(0, 1)).eval()
    assert len(by_fx(images(1, 64, 64))) == 2


DESIGNS_FX = [
    dict(merge="gate", paths=["row", "column"], gate="token"),
    dict(conv="2d", class_token="double", num_registers=2, global_pool="registers"),
    dict(bidirectional="none", alternate=True, pooled_token=True, stem="conv", pos_embed="sincos", rope="hustvl"),
    dict(bidirectional="layer", class_token="none", norm="layer"),
]


@torch.no_grad()
@pytest.mark.parametrize("options", DESIGNS_FX, ids=str)
def test_every_design_can_be_traced_symbolically(options):
    model = small(**options)
    traced = torch.fx.symbolic_trace(model)
    for size in ((32, 40), (48, 32)):
        torch.testing.assert_close(traced(images(2, *size)), model(images(2, *size)), rtol=1e-4, atol=1e-5)

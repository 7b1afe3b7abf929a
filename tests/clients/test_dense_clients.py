"""Other people's segmentation and detection models on ours, by their names: a forward and a backward pass."""

from __future__ import annotations

from typing import Any

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
import transformers
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork

import vimamba  # noqa: F401 - registers the models

HEIGHT, WIDTH, CLASSES = 64, 96, 4
SMALL_DPT = dict(decoder_intermediate_channels=(16,) * 4, decoder_fusion_channels=16)
SMALL_DETR: dict[str, Any] = dict(
    d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16, decoder_ffn_dim=16, encoder_attention_heads=2,
    decoder_attention_heads=2, num_queries=5,
)  # fmt: skip
SMALL_MASK2FORMER: dict[str, Any] = dict(
    hidden_dim=32, feature_size=32, mask_feature_size=32, encoder_layers=1, decoder_layers=2, num_attention_heads=2,
    dim_feedforward=16, encoder_feedforward_dim=16, num_queries=5,
)  # fmt: skip


def images() -> Tensor:
    return torch.rand(2, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0))


def without_gradient(model: nn.Module, loss: Tensor) -> list[str]:
    """The parameters that a step leaves alone."""
    loss.backward()
    assert loss.isfinite()
    return [name for name, parameter in model.named_parameters() if parameter.grad is None]


@pytest.mark.parametrize("architecture", ["Unet", "UnetPlusPlus", "FPN", "UPerNet", "Linknet", "Segformer"])
def test_segmentation_models_pytorch_on_a_pyramid(architecture):
    model = getattr(smp, architecture)("tu-vim_pyramid_nano", encoder_weights=None, classes=CLASSES).train()
    logits = model(images())
    assert logits.shape == (2, CLASSES, HEIGHT, WIDTH)
    assert not without_gradient(model, logits.square().mean())


@pytest.mark.parametrize(
    ("readout", "class_token", "num_registers"),
    [("cat", "middle", 0), ("add", "double", 2), ("ignore", "none", 0)],
)
def test_dpt_reads_prefix_tokens(readout, class_token, num_registers):
    of_trunk = dict(embed_dim=16, class_token=class_token, num_registers=num_registers)
    model = smp.DPT(
        "tu-vim_tiny_patch16_224",
        encoder_weights=None,
        classes=CLASSES,
        decoder_readout=readout,
        **SMALL_DPT,
        **of_trunk,
    ).train()
    logits = model(images())
    assert logits.shape == (2, CLASSES, HEIGHT, WIDTH)
    unused = without_gradient(model, logits.square().mean())
    assert all(name.startswith(("encoder.model.norm_f", "encoder.model.head")) for name in unused)  # which DPT keeps


class Maps(nn.Module):
    """A features_only model below torchvision's pyramid network."""

    def __init__(self, name: str, **model_args: Any) -> None:
        super().__init__()
        self.body = timm.create_model(name, features_only=True, **model_args)
        self.out_channels = 16
        self.fpn = FeaturePyramidNetwork(self.body.feature_info.channels(), self.out_channels)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.fpn({str(level): maps for level, maps in enumerate(self.body(x))})


@pytest.mark.parametrize(
    ("detector", "anchors", "name", "model_args"),
    [
        (FasterRCNN, "rpn_anchor_generator", "vim_pyramid_nano", {}),
        (RetinaNet, "anchor_generator", "vim_pyramid_nano", {}),
        (RetinaNet, "anchor_generator", "vim_nano", dict(depth=4, out_indices=(0, 1, 2, 3))),
    ],
)
def test_torchvision_detects_on_maps(detector, anchors, name, model_args):
    sizes = AnchorGenerator(tuple((16 << level,) for level in range(4)), ((0.5, 1.0, 2.0),) * 4)
    model = detector(Maps(name, **model_args), CLASSES, min_size=HEIGHT, max_size=WIDTH, **{anchors: sizes}).train()
    target = {"boxes": torch.tensor([[5.0, 5.0, 40.0, 40.0]]), "labels": torch.tensor([1])}
    assert not without_gradient(model, sum(model(list(images()), [target, target]).values()))
    assert {*model.eval()(list(images()))[0]} == {"boxes", "labels", "scores"}


def timm_backbone(name: str, layers: list[int]) -> transformers.TimmBackboneConfig:
    return transformers.TimmBackboneConfig(backbone=name, out_indices=layers, use_pretrained_backbone=False)


@pytest.mark.parametrize(("name", "layers"), [("vim_pyramid_nano", [0, 1, 2, 3]), ("vim_nano", [1, 2, 4, 5])])
def test_transformers_upernet(name, layers):
    backbone = timm_backbone(name, layers)
    channels = timm.create_model(name).feature_info[layers[2]]["num_chs"]
    config = transformers.UperNetConfig(
        backbone_config=backbone, hidden_size=16, auxiliary_in_channels=channels, num_labels=CLASSES
    )
    model = transformers.UperNetForSemanticSegmentation(config).train()
    given = model(images(), labels=torch.zeros(2, HEIGHT, WIDTH, dtype=torch.long))
    assert given.logits.shape == (2, CLASSES, HEIGHT, WIDTH)
    assert not without_gradient(model, given.loss)


@pytest.mark.parametrize(("name", "layers"), [("vim_pyramid_nano", [3]), ("vim_nano", [5])])
def test_transformers_detr(name, layers):
    options = dict(use_timm_backbone=False, use_pretrained_backbone=False, num_labels=CLASSES)
    config = transformers.DetrConfig(backbone_config=timm_backbone(name, layers), **options, **SMALL_DETR)
    model = transformers.DetrForObjectDetection(config).train()
    target = {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}
    given = model(images(), labels=[target, target])
    assert given.pred_boxes.shape == (2, 5, 4)
    assert not without_gradient(model, given.loss)


def test_transformers_mask2former():
    backbone = timm_backbone("vim_pyramid_nano", [0, 1, 2, 3])
    config = transformers.Mask2FormerConfig(backbone_config=backbone, num_labels=CLASSES, **SMALL_MASK2FORMER)
    model = transformers.Mask2FormerForUniversalSegmentation(config).train()
    mask = torch.zeros(1, HEIGHT, WIDTH)
    mask[:, 16:48, 16:48] = 1
    given = model(images(), mask_labels=[mask, mask], class_labels=[torch.tensor([1])] * 2)
    assert given.masks_queries_logits.shape == (2, 5, HEIGHT // 4, WIDTH // 4)
    assert not without_gradient(model, given.loss)

"""Backbones of dense tasks and what stands on them: where their maps lie, what learns, what is refused."""

from __future__ import annotations

import math
import sys

import pytest
import timm
import torch
from torch import Tensor, nn
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import box_iou

from vimamba.errors import UserError
from vimamba.layers.mixers.gate import collect_gates
from vimamba.models.checkpoints import load_weights
from vimamba.models.heads import (
    Backbone,
    SegmentationModel,
    TrainingLogits,
    build_detector,
    build_segmenter,
    detection,
    enlarge,
    paste,
    proposals,
)
from vimamba.tasks.optim import OptimOptions, parameter_groups

NANO = dict(depth=2)
SEGMENTERS = ("upernet", "fpn", "dpt", "linear")
DETECTORS = ("faster_rcnn", "mask_rcnn", "cascade_mask_rcnn")
SMALL_DETECTOR = dict(width=32, box_width=64, proposals=100, rois_per_image=32)
TRUNKS = [
    ("vim_nano", NANO),
    ("vim_nano", dict(depth=1, stem="conv", stride=4)),
    ("vim_tiny_patch16_stride8_224", dict(depth=3, embed_dim=32)),
    ("vim_pyramid_nano", dict(depths=(1, 1, 1, 1))),
    ("deit_tiny_patch16_224", dict(depth=5)),
    ("vit_small_patch14_reg4_dinov2", dict(depth=2, embed_dim=48, num_heads=3)),
    ("resnet18", {}),
]


def images(batch: int = 1, height: int = 97, width: int = 161) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def segmenter(name: str = "vim_nano", model_args: dict | None = None, **head_args) -> SegmentationModel:
    torch.manual_seed(0)
    return build_segmenter(name, NANO if model_args is None else model_args, 5, 3, (64, 64), dict(width=64) | head_args)


def detector(name: str = "vim_nano", model_args: dict | None = None, **head_args) -> detection.DetectionModel:
    torch.manual_seed(0)
    args = {**SMALL_DETECTOR, **head_args}
    return build_detector(name, NANO if model_args is None else model_args, 3, 3, (64, 64), args)


def scene(height: int, width: int, *boxes: tuple[int, int, int, int]) -> dict[str, Tensor]:
    """A target with these boxes, whose masks fill them, and classes 0, 1, 2 ..."""
    masks = torch.zeros(len(boxes), height, width, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes, strict=True):
        mask[top:bottom, left:right] = 1
    return {"boxes": torch.tensor(boxes).float().reshape(-1, 4), "labels": torch.arange(len(boxes)), "masks": masks}


# -- maps


@torch.no_grad()
@pytest.mark.parametrize(("name", "model_args"), TRUNKS)
@pytest.mark.parametrize("pyramid", ["deconv", "simple", "none"])
def test_maps_cover_an_image_of_any_size(name, model_args, pyramid):
    backbone = Backbone(name, 3, (64, 64), model_args, pyramid, width=24).eval()
    maps = backbone(images())
    if backbone.hierarchical or pyramid != "none":
        assert backbone.strides == [4, 8, 16, 32]
    assert [tuple(x.shape) for x in maps] == [
        (1, channels, 128 // stride, 192 // stride)
        for channels, stride in zip(backbone.channels, backbone.strides, strict=True)
    ]
    if pyramid == "simple" and not backbone.hierarchical:
        assert backbone.channels == [24] * 4


@torch.no_grad()
def test_patches_of_more_than_32_pixels_pad_an_image_to_their_own():
    backbone = Backbone("vim_nano", 3, (64, 64), dict(patch_size=64, stride=64, depth=1)).eval()
    assert [tuple(x.shape[2:]) for x in backbone(images(1, 30, 70))] == [(16, 32), (8, 16), (4, 8), (2, 4)]


def without_blocks(backbone: Backbone) -> Backbone:
    """Blocks give nothing, so that a map's place holds the token of its patch and no other."""
    for name, parameter in backbone.trunk.named_parameters():
        if name.endswith(("out_proj.weight", "attn.proj.weight", "attn.proj.bias", "fc2.weight", "fc2.bias")):
            nn.init.zeros_(parameter)
    return backbone


@torch.no_grad()
def changed_places(backbone: Backbone, rows: slice, columns: slice) -> Tensor:
    """How much each place of the maps, all of one stride, changes with a part of the image."""
    before = images(1, 64, 96)
    after = before.clone()
    after[..., rows, columns] += 1
    changes = [(a - b).abs().sum(1)[0] for a, b in zip(backbone(after), backbone(before), strict=True)]
    return torch.stack(changes).sum(0)


@pytest.mark.parametrize(
    ("name", "model_args", "tokens"),
    [
        *(
            ("vim_nano", dict(patch_size=16, stride=16, class_token=token, num_registers=3, depth=2), ["_token"])
            for token in ("middle", "head", "double", "none")
        ),
        ("deit_tiny_distilled_patch16_224", dict(depth=2), ["cls_token", "dist_token"]),
        ("vit_tiny_patch16_224", dict(depth=2, reg_tokens=4), ["cls_token", "reg_token"]),
    ],
)
def test_class_and_register_tokens_are_left_out(name, model_args, tokens):
    backbone = without_blocks(Backbone(name, 3, (64, 96), model_args, "none").eval())
    changed = changed_places(backbone, slice(16, 32), slice(48, 64))
    assert changed.nonzero().tolist() == [[1, 3]]
    before = backbone(images(1, 64, 96))
    with torch.no_grad():
        for key, parameter in backbone.trunk.named_parameters():
            if any(token in key for token in ("cls_token", "reg_token", "dist_token")):
                parameter.fill_(1e4)
    assert all(torch.equal(a, b) for a, b in zip(backbone(images(1, 64, 96)), before, strict=True))


def test_overlapping_patches_lie_on_the_places_of_their_map():
    args, seen = dict(depth=1, embed_dim=32), []
    backbone = without_blocks(Backbone("vim_tiny_patch16_stride8_224", 3, (64, 96), args, "none").eval())
    backbone.pyramid.register_forward_pre_hook(lambda module, args: seen.append(args[0][0].shape[2:]))
    changed = changed_places(backbone, slice(24, 32), slice(48, 56))  # row 3, column 6, and the patches around
    assert changed.nonzero().tolist() == [[row, column] for row in (2, 3, 4) for column in (5, 6, 7)]
    assert {*seen} == {(8, 12)}  # a patch for each place: none is stretched over another's


@pytest.mark.parametrize("name", ["vim_nano", "vit_small_patch14_dinov2"])
def test_maps_of_odd_strides_lie_where_those_of_powers_of_two_do(name):
    backbone = without_blocks(Backbone(name, 3, (64, 96), dict(depth=1), "none").eval())
    changed = changed_places(backbone, slice(42, 48), slice(70, 76))
    stride = backbone.strides[0]
    for axis, centre in ((0, 45), (1, 73)):
        profile = changed.sum(1 - axis)
        places = torch.arange(len(profile)) * stride + stride / 2
        assert abs((profile * places).sum() / profile.sum() - centre) < stride


@pytest.mark.parametrize(
    ("depth", "expected"), [(1, [0, 0, 0, 0]), (2, [0, 0, 1, 1]), (3, [0, 1, 2, 2]), (6, [1, 2, 4, 5])]
)
def test_maps_come_from_the_ends_of_the_quarters(depth, expected):
    seen = []
    backbone = Backbone("vim_nano", 3, (32, 32), dict(depth=depth))
    backbone.pyramid.register_forward_pre_hook(lambda module, args: seen.extend(args[0]))
    backbone(images(1, 32, 32))
    taken = sorted(set(expected))
    taps = backbone.trunk.forward_intermediates(
        nn.functional.pad(images(1, 32, 32), (0, 2, 0, 2)), indices=taken, intermediates_only=True
    )
    assert all(torch.equal(tap, taps[taken.index(i)]) for tap, i in zip(seen, expected, strict=True))


@pytest.mark.parametrize(("pyramid", "layers", "left"), [("deconv", [0, 0, 1, 3], 4), ("simple", [2], 3)])
def test_what_lies_behind_the_last_map_is_dropped(pyramid, layers, left):
    backbone = Backbone("vim_nano", 3, (32, 32), dict(depth=6), pyramid, layers)
    assert len(backbone.trunk.layers) == left
    assert not [name for name, _ in backbone.trunk.named_parameters() if name.startswith(("norm_f", "head"))]


def test_a_trunk_takes_the_weights_of_a_classifier():
    whole = timm.create_model("vim_nano", img_size=32, depth=3, num_classes=7)
    backbone = Backbone("vim_nano", 3, (32, 32), dict(depth=3), layers=[0, 0, 1, 1])
    load_weights(backbone.trunk, backbone.kept(whole.state_dict()), "weights")
    assert torch.equal(backbone.trunk.layers[1].mixer.A_log, whole.layers[1].mixer.A_log)
    with pytest.raises(UserError, match="is of another model"):
        load_weights(backbone.trunk, backbone.kept(timm.create_model("vim_pyramid_nano").state_dict()), "weights")


# -- segmentation


@pytest.mark.parametrize(("name", "model_args"), [TRUNKS[0], *TRUNKS[3:5]])
@pytest.mark.parametrize("head", SEGMENTERS)
def test_segmenters_give_logits_and_all_their_parameters_learn(name, model_args, head):
    model = segmenter(name, model_args, head=head).train()
    given = model(images())
    stride = {"upernet": 4, "fpn": 4, "dpt": 2}.get(head, model.backbone.strides[0])
    size = (math.ceil(97 / stride), math.ceil(161 / stride))
    if head == "linear":
        assert isinstance(given, Tensor)
        given = (given,)
    else:
        assert isinstance(given, TrainingLogits)
        step = model.backbone.strides[2]
        assert given.auxiliary.shape == (1, 5, math.ceil(97 / step), math.ceil(161 / step))
    assert given[0].shape == (1, 5, *size)
    sum(x.square().mean() for x in given).backward()
    assert not [key for key, parameter in model.named_parameters() if parameter.grad is None]
    with torch.no_grad():
        assert enlarge(model.eval()(images()), (97, 161)).shape == (1, 5, 97, 161)


@pytest.mark.parametrize("head", SEGMENTERS)
def test_one_image_of_one_place_at_stride_32_is_a_batch(head):
    model = segmenter(head=head).train()
    sum(x.square().mean() for x in model(images(1, 32, 32))).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@torch.no_grad()
@pytest.mark.parametrize("head", SEGMENTERS)
def test_an_image_has_the_logits_in_a_batch_that_it_has_alone(head):
    model = segmenter(
        head=head, dropout=0.0, auxiliary=False
    ).train()  # no statistics over the batch in training either
    batch = images(2, 32, 48)
    torch.testing.assert_close(model(batch)[1:], model(batch[1:]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stride", [1, 2, 4, 8])
def test_enlarged_logits_lie_at_their_place(stride):
    ramp = torch.arange(64.0).expand(1, 1, 64, 64)
    low = nn.functional.avg_pool2d(ramp, stride)[..., : math.ceil(37 / stride), : math.ceil(45 / stride)]
    inside = slice(stride, 45 - stride)  # at the edges the outermost place goes on
    torch.testing.assert_close(enlarge(low, (37, 45))[..., inside], ramp[..., :37, inside])


@torch.no_grad()
def test_what_pads_an_image_is_not_in_its_logits():
    model = segmenter("resnet18", {}, head="linear").eval()
    logits = enlarge(model(images()), (97, 161))
    moved = enlarge(model(nn.functional.pad(images(), (0, 31, 0, 31))), (128, 192))[..., :97, :161]
    torch.testing.assert_close(logits[..., :90, :150], moved[..., :90, :150])


def test_options_of_segmenters_act():
    assert segmenter(auxiliary=False).auxiliary is None
    assert segmenter(head="linear", auxiliary=True).auxiliary is not None
    assert segmenter(dropout=0.5).classifier[0].p == 0.5
    assert segmenter(width=32).classifier[1].in_channels == 32
    assert segmenter(pyramid="simple").backbone.channels == [64] * 4
    assert segmenter(layers=[0, 0, 0, 0]).backbone.trunk.steps == [(0,)]


@pytest.mark.parametrize(("name", "model_args"), [TRUNKS[0], TRUNKS[3]])
def test_checkpointing_changes_no_bit(name, model_args):
    found = []
    for checkpointing in (False, True):
        model = segmenter(name, model_args, dropout=0.0).train()
        model.set_grad_checkpointing(checkpointing)
        model(images(2, 64, 64)).logits.square().mean().backward()
        found.append([parameter.grad for key, parameter in model.named_parameters() if "auxiliary" not in key])
    assert all(torch.equal(plain, again) for plain, again in zip(*found, strict=True))


@pytest.mark.parametrize("name", ["vim_nano", "vim_pyramid_nano", "resnet18", "inception_v4", "caformer_s18"])
def test_layers_further_down_learn_slower_and_heads_at_the_full_rate(name):
    with torch.device("meta"):
        try:
            model = segmenter(name, {})
        except NotImplementedError:
            pytest.fail("built from a description, a model has no tensors to compute with")
    names = {id(parameter): key for key, parameter in model.named_parameters()}
    rates = {
        names[id(p)]: group["lr_scale"]
        for group in parameter_groups(model, OptimOptions(layer_decay=0.5))
        for p in group["params"]
    }
    assert rates.keys() == {*names.values()}
    assert {rate for key, rate in rates.items() if not key.startswith("backbone.trunk.")} == {1.0}
    assert max(rate for key, rate in rates.items() if key.startswith("backbone.trunk.")) == 0.5
    if name == "vim_nano":
        scales = [rates[f"backbone.trunk.layers.{i}.mixer.in_proj.weight"] for i in range(6)]
        assert scales == [0.5 ** (6 - i) for i in range(6)]
        assert rates["backbone.trunk.pos_embed"] == 0.5**7


def test_the_trunk_exempts_parameters_from_weight_decay():
    model = segmenter()
    assert model.no_weight_decay() >= {"backbone.trunk.pos_embed", "backbone.trunk.layers.0.mixer.A_log"}
    names = {id(parameter): key for key, parameter in model.named_parameters()}
    decayed = {
        names[id(p)]
        for group in parameter_groups(model, OptimOptions())
        if group["weight_decay"]
        for p in group["params"]
    }
    assert not decayed & model.no_weight_decay()
    assert {"classifier.1.weight", "backbone.trunk.layers.0.mixer.in_proj.weight"} <= decayed


def test_the_loss_of_the_trunks_gates_is_the_models():
    model = segmenter(model_args=dict(depth=2, merge="gate", gate_sparsity=0.5)).train()
    with collect_gates() as gates:
        model(images(1, 32, 32))
    assert model.gate_loss(gates) == model.backbone.trunk.gate_loss(gates) > 0


# -- detection


@pytest.mark.parametrize(("name", "model_args"), [TRUNKS[0], TRUNKS[3]])
@pytest.mark.parametrize("head", DETECTORS)
@pytest.mark.parametrize("boxes", [[(10, 20, 50, 60), (60, 4, 90, 40)], []], ids=["objects", "empty"])
def test_detectors_learn_with_all_their_parameters(name, model_args, head, boxes):
    model = detector(name, model_args, head=head).train()
    losses = model([images(1, 70, 97)[0]], [scene(70, 97, *boxes)])
    of_masks = {"loss_mask"} if head != "faster_rcnn" else set()
    assert losses.keys() == {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg"} | of_masks
    assert all(loss.isfinite() for loss in losses.values())
    if not boxes:
        assert losses["loss_box_reg"] == losses["loss_rpn_box_reg"] == losses.get("loss_mask", 0) == 0
    sum(losses.values()).backward()
    assert not [key for key, parameter in model.named_parameters() if parameter.grad is None]


@torch.no_grad()
@pytest.mark.parametrize("head", DETECTORS)
def test_detections_lie_in_their_images(head):
    model = detector(head=head).eval()
    for found, (height, width) in zip(
        model([images(1, 33, 97)[0], images(1, 70, 40)[0]]), [(33, 97), (70, 40)], strict=True
    ):
        boxes = found["boxes"]
        assert len(boxes) > 0
        assert (boxes >= 0).all()
        assert (boxes[:, 2:] <= torch.tensor([width, height])).all()
        assert {*found["labels"].tolist()} <= {0, 1, 2}
        assert found["scores"].tolist() == sorted(found["scores"].tolist(), reverse=True)
        assert ("masks" in found) == (head != "faster_rcnn")
        if "masks" in found:
            assert found["masks"].shape == (len(boxes), 1, 28, 28)
            assert paste(found, (height, width)).shape == (len(boxes), height, width)


def test_an_image_has_the_objects_beside_others_that_it_has_alone():
    """Others of its size and of another, which would pad it."""
    model, given = detector().eval(), [*images(2, 33, 97), *images(1, 70, 40), images(1, 33, 97)[0] + 1]
    for together, alone in zip(model(given), (model([one])[0] for one in given), strict=True):
        assert len(alone["boxes"]) > 0
        for name, expected in alone.items():
            torch.testing.assert_close(together[name], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("head", DETECTORS)
def test_boxes_stay_exact_in_bfloat16(head):
    model, seen = detector(head=head).train(), []
    model.rpn.register_forward_hook(lambda module, args, out: seen.append(out[0][0]))
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(list(images(2, 64, 64)), [scene(64, 64, (10, 20, 50, 60)), scene(64, 64)])
        with torch.no_grad():
            found = model.eval()(list(images(2, 64, 64)))[0]
    sum(losses.values()).backward()
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    for boxes in (*seen, found["boxes"]):
        assert boxes.dtype == torch.float32
        assert not torch.equal(boxes, boxes.bfloat16().float())


@pytest.mark.slow
@pytest.mark.parametrize("head", ["mask_rcnn", "cascade_mask_rcnn"])
def test_two_objects_are_learned(head):
    image, target = torch.zeros(3, 64, 64), scene(64, 64, (4, 8, 28, 30), (36, 30, 60, 58))
    image[0, 8:30, 4:28], image[1, 30:58, 36:60] = 3, 3
    few = dict(anchor_sizes=[16, 24, 32, 48, 64], rois_per_image=16, proposals=40)
    model = detector(model_args=dict(depth=1), head=head, **few).train()
    optimizer = torch.optim.AdamW(model.parameters(), 6e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50)
    for _ in range(50):
        optimizer.zero_grad()
        sum(model([image], [target]).values()).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        (found,) = model.eval()([image])
    best = [found["labels"].tolist().index(label) for label in (0, 1)]  # the highest score comes first
    pasted, wanted = paste(found, (64, 64))[best], target["masks"]
    assert found["scores"][best].mean() > 0.25
    # Over seeds, the two boxes came to 0.54 to 0.94 on average, and their masks to 0.56 to 0.94.
    assert box_iou(found["boxes"][best], target["boxes"]).diag().mean() > 0.4
    assert ((pasted & wanted).sum((1, 2)) / (pasted | wanted).sum((1, 2))).mean() > 0.4


def test_a_target_without_area_is_no_object():
    model = detector(head="mask_rcnn").train()
    losses = model([images(1, 64, 64)[0]], [scene(64, 64, (10, 20, 50, 60), (5, 5, 5, 30))])
    assert all(loss.isfinite() for loss in losses.values())


def test_training_needs_targets():
    with pytest.raises(ValueError, match="needs targets"):
        detector().train()([images(1, 64, 64)[0]])


@torch.no_grad()
def test_options_of_detectors_act():
    batch, seen = list(images(1, 64, 64)), {}

    def found(**head_args) -> dict[str, Tensor]:
        model = detector(**head_args).eval()
        model.heads.stages[-1].box_head.register_forward_pre_hook(lambda m, args: seen.update(rois=len(args[0])))
        return model(batch)[0]

    plain = found()
    assert seen["rois"] > 10
    assert len(found(detections=3)["boxes"]) == 3
    assert not len(found(score_threshold=0.9)["boxes"])
    assert len(found(nms=0.1)["boxes"]) < len(found(nms=0.9)["boxes"])
    found(proposals=10)
    assert seen["rois"] == 10
    assert not torch.equal(found(anchor_sizes=[8, 16, 32, 64, 128])["boxes"], plain["boxes"])
    model = detector(rois_per_image=8, box_width=48).train()
    model.heads.stages[0].box_head.register_forward_hook(lambda m, args, out: seen.update(out=out.shape))
    model(batch, [scene(64, 64, (10, 20, 50, 60))])
    assert seen["out"] == (8, 48)
    assert isinstance(detector(pyramid="deconv").neck, detection.FeaturePyramidNetwork)


@torch.no_grad()
def test_proposals_are_torchvisions_and_of_equal_ones_the_first():
    rpn, counts, draw = detector(proposals=20).eval().rpn, [90, 30], torch.Generator().manual_seed(0)
    corners = 60 * torch.rand(2, 120, 2, generator=draw)
    boxes = torch.cat([corners, corners + 1 + 30 * torch.rand(2, 120, 2, generator=draw)], 2)
    logits, sizes = torch.randn(2, 120, generator=draw), [(64, 64), (50, 40)]
    found, scores = rpn.filter_proposals(boxes, logits, sizes, counts)
    wanted, shares = RegionProposalNetwork.filter_proposals(rpn, boxes, logits, sizes, counts)
    for ours, theirs in zip((*found, *(x.sigmoid() for x in scores)), (*wanted, *shares), strict=True):
        assert len(ours) > 10
        assert torch.equal(ours, theirs)

    apart = torch.arange(120.0)[:, None] * 2 + torch.tensor([0.0, 0.0, 1.0, 1.0])
    for level in (0.0, 30.0, -200.0):  # of the last two the sigmoids of all are alike, near enough
        logits = torch.full((1, 120), level)
        logits[0, [7, 100]] += torch.tensor([1.0, 2.0])
        (kept,), _ = rpn.filter_proposals(apart[None], logits, [(300, 300)], counts)
        assert (kept[:, 0] / 2).tolist() == [100, 7, *range(7), *range(8, 19)]


@pytest.mark.parametrize(("img_size", "smallest"), [((256, 256), 16), ((256, 800), 32), (None, 32)])
def test_anchors_are_small_for_small_images(img_size, smallest):
    model = build_detector("vim_nano", NANO, 3, 3, img_size, SMALL_DETECTOR)
    assert [size for (size,) in model.rpn.anchor_generator.sizes] == [smallest << i for i in range(5)]


def test_anchors_stand_at_the_true_strides_on_maps_of_odd_size():
    anchors = proposals.Anchors(((16,), (64,)), ((1.0,), (1.0,)))
    maps = [torch.zeros(1, 1, 24, 24), torch.zeros(1, 1, 12, 12)]
    (found,) = anchors(detection.ImageList(torch.zeros(1, 3, 90, 90), [(90, 90)]), maps)
    centres = (found[24 * 24 :, 0] + found[24 * 24 :, 2]) / 2
    assert centres[:12].tolist() == [8.0 * i for i in range(12)]


@pytest.mark.parametrize("side", [33, 40, 64])
def test_boxes_are_read_at_their_place_on_small_images(side):
    place = torch.arange(16.0).expand(1, 1, 16, 16)
    maps = {str(level): nn.functional.avg_pool2d(place, 2**level) for level in range(4)}
    pooled = detection.Align(("0", "1", "2", "3"), 7, 2)(maps, [torch.tensor([[8.0, 8.0, 24.0, 24.0]])], [(side, side)])
    torch.testing.assert_close(pooled.mean(), torch.tensor(16 / 4.0))


def test_stages_of_a_cascade_ask_for_more_overlap():
    model = detector(head="cascade_mask_rcnn")
    target = [{"boxes": torch.tensor([[0.0, 0.0, 100.0, 100.0]]), "labels": torch.tensor([2])}]
    boxes = [torch.tensor([[0.0, 0.0, 100.0, side] for side in (45.0, 55.0, 65.0, 75.0)])]
    labels = [detection._matched(stage, boxes, target)[0][0].tolist() for stage in model.heads.stages]
    assert labels == [[0, 2, 2, 2], [0, 0, 2, 2], [0, 0, 0, 2]]


def test_masks_are_pasted_where_the_boxes_are():
    found = {"boxes": torch.tensor([[8.0, 16.0, 40.0, 48.0]]), "masks": torch.ones(1, 1, 28, 28)}
    (mask,) = paste(found, (60, 50))
    assert mask.dtype == torch.uint8
    rows, columns = mask.nonzero(as_tuple=True)
    assert [rows.min(), rows.max(), columns.min(), columns.max()] == pytest.approx([16, 47, 8, 39], abs=1)
    assert paste({**found, "masks": found["masks"] * 0.4}, (60, 50)).sum() == 0
    assert paste({**found, "masks": found["masks"] * 0.4}, (60, 50), threshold=0.3).sum() > 0
    assert paste({"boxes": torch.zeros(0, 4), "masks": torch.zeros(0, 1, 28, 28)}, (60, 50)).shape == (0, 60, 50)


# -- from a description


@pytest.mark.parametrize("head", [*SEGMENTERS, *DETECTORS])
@pytest.mark.parametrize("name", ["vim_nano", "vim_pyramid_nano"])
def test_models_are_built_without_memory(name, head):
    with torch.device("meta"):
        model = (segmenter if head in SEGMENTERS else detector)(name, {}, head=head)
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}
    weights = (segmenter if head in SEGMENTERS else detector)(name, {}, head=head).state_dict()
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in weights.items()}


@pytest.mark.parametrize(
    ("build", "head_args", "said"),
    [
        (build_segmenter, dict(widht=3), "'widht'.*did you mean width"),
        (build_segmenter, dict(backbone="vim_nano"), "'backbone'"),
        (build_segmenter, dict(width="64"), "width='64'; it must be a whole number"),
        (build_segmenter, dict(width=True), "width=True"),
        (build_segmenter, dict(width=0), "width must"),
        (build_segmenter, dict(head="unet"), "head must be one of"),
        (build_segmenter, dict(head=["fpn"]), "head=.'fpn'."),
        (build_segmenter, dict(head="fpn", width=96), "multiple of 64"),
        (build_segmenter, dict(dropout=2), "dropout must"),
        (build_segmenter, dict(pyramid="fpn"), "pyramid='fpn'"),
        (build_segmenter, dict(layers=[0, 1]), r"`layers` is \[0, 1\]; give 4 of vim_nano's, from 0 to 1"),
        (build_segmenter, dict(layers=[0, 0, 0, 2]), "`layers`"),
        (build_segmenter, dict(layers=[0, 0, 0, -1]), "`layers`"),
        (build_segmenter, dict(anchor_sizes=[1] * 5), "anchor_sizes"),
        (build_detector, dict(auxiliary=True), "auxiliary"),
        (build_detector, dict(anchor_sizes=[16, 32]), "anchor_sizes must be 5 numbers"),
        (build_detector, dict(anchor_sizes=[0, 1, 2, 3, 4]), "anchor_sizes must"),
        (build_detector, dict(pyramid="none"), 'pyramid="simple"'),
        (build_detector, dict(nms=1.5), "nms must"),
        (build_detector, dict(score_threshold=-1), "score_threshold must"),
        *(
            (build_detector, {name: 0}, f"{name} must")
            for name in ("proposals", "rois_per_image", "box_width", "detections")
        ),
    ],
)
def test_arguments_of_heads_are_refused_by_name(build, head_args, said):
    with pytest.raises(UserError, match=said) as refused:
        build("vim_nano", NANO, 5, 3, (32, 32), head_args)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "head_args", "said"),
    [
        ("levit_128", {}, "maps at strides 16, 32, 64"),
        ("vim_pyramid_nano", dict(pyramid="deconv"), "leave `pyramid` out"),
        ("vim_pyramid_nano", dict(layers=[0, 1, 2, 3]), "leave `layers` out"),
    ],
)
def test_trunks_that_do_not_go_with_the_arguments_are_refused(name, head_args, said):
    with pytest.raises(UserError, match=said):
        build_segmenter(name, {}, 5, 3, (64, 64), head_args)


def test_a_trunk_of_one_size_says_so():
    model = build_segmenter("cait_xxs24_224", dict(depth=2), 5, 3, (33, 64), dict(head="linear")).eval()
    with torch.no_grad():
        assert model(images(1, 50, 60)).shape == (1, 5, 4, 4)
        with pytest.raises(UserError, match="takes no images of this size"):
            model(images(1, 97, 64))


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", None)
    with pytest.raises(UserError, match=r"segmentation-models-pytorch; run pip install 'vimamba\[dense\]'"):
        segmenter()
    assert segmenter(head="linear")

"""Any timm model as maps of an image at several strides, for the heads of dense tasks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from timm.layers import LayerNorm2d
from timm.models import group_parameters
from torch import Tensor, nn
from torch.nn import functional as F

from vimamba.errors import UserError, one_line, require, shown
from vimamba.layers.options import check_choice, check_whole
from vimamba.layers.products import in_quick_type
from vimamba.models.checkpoints import classifiers
from vimamba.models.description import create

STRIDES = (4, 8, 16, 32)
PYRAMIDS = ("deconv", "simple", "none")
# What lets a timm model take images of other sizes than it was made for.
ANY_SIZE: tuple[dict[str, bool], ...] = ({"dynamic_img_size": True}, {"strict_img_size": False})


class Backbone(nn.Module):
    """A timm model without its classifier, and what makes a pyramid of its maps.

    A hierarchical trunk's own maps at strides 4, 8, 16 and 32 are taken as they are. A plain one, whose layers all have
    one stride, gets `pyramid` on some of its layers; class and register tokens are left out. What the trunk has behind
    the last map that is taken is dropped.

    Args:
        name: of the trunk, as `timm.create_model` takes it.
        in_chans: image channels.
        img_size: height and width that images usually have, pixels, for trunks that are made for one; any size runs.
        model_args: further arguments of the trunk.
        pyramid: for a plain trunk: "deconv", four layers' maps scaled by transposed convolutions and pooling
            (BEiT, arXiv 2106.08254); "simple", the last map scaled to all four strides (ViTDet, arXiv 2203.16527); or
            "none", four layers' maps at the trunk's own stride.
        layers: which layers of a plain trunk give the maps: four, for "simple" one; by default the ends of the four
            quarters, or the last.
        width: channels of the maps of "simple".
        pretrained: load the trunk's published weights.

    Raises:
        UserError: the trunk has no such maps, or the layers are not its own.
        ValueError: an argument is impossible.
    """

    def __init__(
        self,
        name: str,
        in_chans: int = 3,
        img_size: tuple[int, int] | None = None,
        model_args: Mapping[str, Any] | None = None,
        pyramid: str = "deconv",
        layers: Sequence[int] | None = None,
        width: int = 256,
        pretrained: bool = False,
    ) -> None:
        super().__init__()
        check_choice("pyramid", pyramid, PYRAMIDS)
        check_whole("width", width)
        of_trunk = dict(in_chans=in_chans, pretrained=pretrained, num_classes=0)
        self.trunk: Any = _trunk(name, img_size, {**(model_args or {}), **of_trunk})
        self._whole = frozenset(self.trunk.state_dict())
        reductions = [int(info["reduction"]) for info in self.trunk.feature_info]
        self.hierarchical = len(set(reductions)) > 1
        """Whether the trunk has maps at all four strides by itself."""
        if self.hierarchical:
            self._check_hierarchical(name, reductions, layers)
            self._order = [len(reductions) - 1 - reductions[::-1].index(stride) for stride in STRIDES]
        else:
            self._order = _chosen_layers(name, len(reductions), 1 if pyramid == "simple" else 4, layers)
        self._taken = sorted(set(self._order))
        self.channels = [int(self.trunk.feature_info[i]["num_chs"]) for i in self._order]
        """Channels of each map."""
        self.strides = list(STRIDES)
        """Pixels of the image from one place of each map to the next."""
        self.pyramid: PlainPyramid | None = None
        if not self.hierarchical:
            self.pyramid = PlainPyramid(self.channels, reductions[0], pyramid, width)
            self.channels, self.strides = self.pyramid.channels, self.pyramid.strides
        self.trunk.prune_intermediate_layers(self._taken, prune_norm=True, prune_head=True)

    @staticmethod
    def _check_hierarchical(name: str, reductions: list[int], layers: Sequence[int] | None) -> None:
        require(
            set(STRIDES) <= set(reductions),
            f"{name} has maps at strides {', '.join(map(str, reductions))}; a backbone needs 4, 8, 16 and 32, "
            "or one stride in all layers",
        )
        require(layers is None, f"{name} has maps at all strides by itself: leave `layers` out")

    def forward(self, images_BCHW: Tensor) -> list[Tensor]:
        """Images (batch, in_chans, height, width) to maps (batch, channels, rows, columns) at `strides`.

        The maps cover the image as if height and width were the next multiples of 32 (or of a larger stride).
        """
        unit = STRIDES[-1] if self.pyramid is None else max(self.pyramid.base, STRIDES[-1])
        height, width = (_up(size, unit) for size in images_BCHW.shape[2:])
        if self.pyramid is None:
            return self._maps(padded(images_BCHW, height, width))
        step = self.pyramid.step
        before, after = self._overlap()
        images_BCHW = F.pad(padded(images_BCHW, _up(height, step), _up(width, step)), (before, after) * 2)
        return self.pyramid(self._maps(images_BCHW), (height, width))

    def _maps(self, images_BCHW: Tensor) -> list[Tensor]:
        """The trunk's maps, in the order of the strides."""
        take: dict[str, Any] = dict(indices=self._taken, stop_early=True, intermediates_only=True)
        try:
            found = self.trunk.forward_intermediates(images_BCHW, **take)
        except AssertionError as error:  # timm's, of architectures that are made for one size
            raise UserError(f"the backbone takes no images of this size: {one_line(error)}") from error
        by_layer = dict(zip(self._taken, found, strict=True))
        return [by_layer[i] for i in self._order]

    def _overlap(self) -> tuple[int, int]:
        """Pixels before and after the image by which overlapping patches look over its edge: they stay centred."""
        proj = getattr(getattr(self.trunk, "patch_embed", None), "proj", None)
        if not isinstance(proj, nn.Conv2d):
            return 0, 0
        overlap = max(0, proj.kernel_size[0] - proj.stride[0] - 2 * int(proj.padding[0]))
        return overlap // 2, overlap - overlap // 2

    def kept(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A classifier's state dict without what this trunk dropped: its head, its norm, layers behind the last map."""
        heads = classifiers(self.trunk)
        gone = self._whole - set(self.trunk.state_dict())
        return {k: v for k, v in tensors.items() if k not in gone and k.rpartition(".")[0] not in heads}


class PlainPyramid(nn.Module):
    """Maps at strides 4, 8, 16 and 32, or at one power of two, from those of a trunk that has one stride.

    Each map is normed first: the residual stream grows from layer to layer.

    Args:
        dims: channels of each map that comes in: four, or one for "simple".
        step: their stride, pixels.
        kind: "deconv", "simple" or "none", as of `Backbone`.
        width: channels of the maps of "simple".
    """

    def __init__(self, dims: Sequence[int], step: int, kind: str, width: int) -> None:
        super().__init__()
        self.step, self.kind = step, kind
        self.base = 2 ** round(math.log2(step))  # the stride that the maps are brought to before they are scaled
        self.norms = nn.ModuleList(LayerNorm2d(dim) for dim in dims)
        self.levels = nn.ModuleList()
        if kind == "none":
            self.channels, self.strides = list(dims), [self.base] * len(dims)
            return
        self.channels, self.strides = [], list(STRIDES)
        for dim, stride in zip(dims if kind == "deconv" else [dims[0]] * len(STRIDES), STRIDES, strict=True):
            layers, dim = _scaling(dim, round(math.log2(self.base / stride)), halve=kind == "simple")
            if kind == "simple":
                layers += [nn.Conv2d(dim, width, 1, bias=False), LayerNorm2d(width)]
                layers += [nn.Conv2d(width, width, 3, padding=1, bias=False), LayerNorm2d(width)]
                dim = width
            self.levels.append(nn.Sequential(*layers))
            self.channels.append(dim)

    def forward(self, maps: Sequence[Tensor], size: tuple[int, int]) -> list[Tensor]:
        """Maps at stride `step` that cover at least `size` pixels, to maps that cover just those."""
        bases = [self._at_base(norm(x_BCHW), size) for norm, x_BCHW in zip(self.norms, maps, strict=True)]
        if not self.levels:
            return bases
        each = bases if len(bases) > 1 else bases * len(self.levels)
        return [in_quick_type(level, x_BCHW) for level, x_BCHW in zip(self.levels, each, strict=True)]

    def _at_base(self, x_BCHW: Tensor, size: tuple[int, int]) -> Tensor:
        rows, columns = size[0] // self.base, size[1] // self.base
        if self.step != self.base:
            x_BCHW = F.interpolate(x_BCHW, scale_factor=self.step / self.base, mode="bilinear")[..., :rows, :columns]
        if x_BCHW.shape[2:] != (rows, columns):  # a trunk with a stem of its own way with edges
            x_BCHW = F.interpolate(x_BCHW, (rows, columns), mode="bilinear")
        return x_BCHW


def _scaling(dim: int, doublings: int, halve: bool) -> tuple[list[nn.Module], int]:
    """Modules that scale a map by 2 ** doublings, and the channels behind them."""
    if doublings < 0:
        return [nn.MaxPool2d(2**-doublings)], dim
    layers: list[nn.Module] = []
    for i in range(doublings):
        layers += [LayerNorm2d(dim), nn.GELU()] if i else []
        wide, dim = dim, max(1, dim // 2) if halve else dim
        layers.append(nn.ConvTranspose2d(wide, dim, 2, 2))
    return layers, dim


def _trunk(name: str, img_size: tuple[int, int] | None, given: dict[str, Any]) -> Any:
    """The timm model, one that takes images of any size where the architecture can.

    Raises:
        UserError: it does not give the maps of its layers.
    """
    unit = STRIDES[-1]
    img_size = img_size and (_up(img_size[0], unit), _up(img_size[1], unit))  # which is what it will see
    for free in ANY_SIZE:
        try:
            trunk = create(name, img_size, **{**free, **given})
            break
        except (TypeError, ValueError):  # no such option; what else is wrong, the model says without it
            continue
    else:
        trunk = create(name, img_size, **given)
    if not (hasattr(trunk, "forward_intermediates") and hasattr(trunk, "prune_intermediate_layers")):
        raise UserError(f"{name} does not give the maps of its layers (timm's forward_intermediates): take another")
    return trunk


def _chosen_layers(name: str, depth: int, count: int, layers: Sequence[int] | None) -> list[int]:
    """Indices of the layers of a plain trunk that give its maps.

    Raises:
        UserError: there are no such layers, or too few or too many.
    """
    if layers is None:
        return [math.ceil(depth * (i + 1) / count) - 1 for i in range(count)]
    own = all(isinstance(i, int) and 0 <= i < depth for i in layers)
    if not own or len(layers) != count:
        raise UserError(f"`layers` is {shown(list(layers))}; give {count} of {name}'s, from 0 to {depth - 1}")
    return list(layers)


def _up(size: int, unit: int) -> int:
    return (size + unit - 1) // unit * unit  # of no negative number: ONNX rounds those up


def padded(images: Tensor, height: int, width: int) -> Tensor:
    """Images (..., height, width) with zeros at the right and at the bottom: the mean colour, once normalised."""
    return F.pad(images, (0, width - images.shape[-1], 0, height - images.shape[-2]))


class DenseModel(nn.Module):
    """A backbone with a head, as optimisers and trainers see it."""

    backbone: Backbone

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay must leave alone."""
        named: Any = getattr(self.backbone.trunk, "no_weight_decay", set)
        return {f"backbone.trunk.{name}" for name in named()}

    def group_matcher(self, coarse: bool = False) -> Any:
        """For timm's layer-wise learning rates: the trunk's own groups, and one above them of all that is no trunk."""
        trunk = self.backbone.trunk
        groups = trunk.group_matcher(coarse) if hasattr(trunk, "group_matcher") else {"trunk": ""}
        layer_of = {f"backbone.trunk.{k}": layer for k, layer in group_parameters(trunk, groups, reverse=True).items()}
        return lambda name: layer_of.get(name, math.inf)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep less of the trunk in training and compute the rest again in the backward pass."""
        self.backbone.trunk.set_grad_checkpointing(enable)

    def gate_loss(self, gates: Sequence[Tensor]) -> Tensor | float:
        """The trunk's term for the loss, see `vimamba.models.contract.TimmModel.gate_loss`."""
        return self.backbone.trunk.gate_loss(gates)

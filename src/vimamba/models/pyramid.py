"""A hierarchical Vision Mamba: four stages of maps, for those who use timm's features_only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, LayerNorm2d, Mlp
from timm.layers.attention import Attention
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vimamba.layers.grid import Layout
from vimamba.layers.mixers import DirectionalMixer, mixer_of
from vimamba.layers.mixers.directional import MODES
from vimamba.layers.options import check_choice, check_number, check_sizes, check_whole
from vimamba.layers.products import in_quick_type
from vimamba.models.build import build
from vimamba.models.contract import TimmModel, drop_path_rates, mixer_args

REDUCTIONS = (4, 8, 16, 32)
__all__ = ["VisionMambaPyramid", "vim_pyramid_nano", "vim_pyramid_small", "vim_pyramid_tiny"]


class HalvingConv2d(nn.Conv2d):
    """A 3×3 convolution of stride 2 whose weight gradient is right on maps of a single column too."""

    def __init__(self, inside: int, outside: int, **factory: Any) -> None:
        super().__init__(inside, outside, 3, 2, 1, bias=False, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, inside, rows, columns) to (batch, outside, rows / 2, columns / 2), rounded up."""
        if self.training and isinstance(x, Tensor) and x.shape[-1] == 1:  # a symbolic trace has no sizes to ask for
            # In bfloat16 on a CPU, PyTorch 2.15 leaves the outer columns of the gradient unwritten: memory as it was.
            x = nn.functional.pad(x, (0, 1))  # with the zeros that the padding would be
        return super().forward(x)


def _conv_norm(inside: int, outside: int, stride: int, **factory: Any) -> nn.Sequential:
    if stride == 2:
        conv: nn.Conv2d = HalvingConv2d(inside, outside, **factory)
    else:
        conv = nn.Conv2d(inside, outside, 3, 1, 1, bias=False, **factory)
    return nn.Sequential(conv, nn.BatchNorm2d(outside, **factory))


class ConvBlock(nn.Module):
    """Two 3×3 convolutions beside a skip: for the early stages, whose maps are large and whose patterns are local."""

    def __init__(self, dim: int, drop_path: float = 0.0, **factory: Any) -> None:
        super().__init__()
        self.convs = nn.Sequential(_conv_norm(dim, dim, 1, **factory), nn.GELU(), _conv_norm(dim, dim, 1, **factory))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, dim, rows, columns) to the same."""
        return x + self.drop_path(in_quick_type(self.convs, x))


class TokenBlock(nn.Module):
    """A mixer of tokens and an MLP, each behind a norm and beside a skip: for the late stages."""

    def __init__(self, dim: int, mixer: DirectionalMixer | Attention, drop_path: float = 0.0, **factory: Any) -> None:
        super().__init__()
        self.norm1, self.mixer = nn.LayerNorm(dim, **factory), mixer
        self.norm2, self.mlp = nn.LayerNorm(dim, **factory), Mlp(dim, 4 * dim, **factory)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, dim, rows, columns) to the same."""
        grid = (x.shape[2], x.shape[3])
        tokens = x.flatten(2).transpose(1, 2)
        normed = self.norm1(tokens)
        if isinstance(self.mixer, DirectionalMixer):
            mixed = self.mixer(normed, layout=Layout(grid))
        else:
            mixed = in_quick_type(self.mixer, normed)
        tokens = tokens + self.drop_path(mixed)
        tokens = tokens + self.drop_path(in_quick_type(self.mlp, self.norm2(tokens)))
        return tokens.transpose(1, 2).unflatten(2, grid)


class Stage(nn.Module):
    """A halving of the grid, where there is one, and the blocks of one stage."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """(batch, dim before, rows, columns) to (batch, dim, rows / 2, columns / 2)."""
        x = in_quick_type(self.downsample, x)
        if not (self.grad_checkpointing and self.training):
            return self.blocks(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x


class VisionMambaPyramid(TimmModel):
    """Four stages at strides 4, 8, 16 and 32: convolution blocks in the first two, bidirectional blocks in the others.

    Takes images of any height and width.

    Args:
        img_size: the size that images usually have, pixels, for timm; nothing depends on it.
        in_chans: image channels.
        num_classes: outputs of the classifier; 0 for none.
        dims: channels of each stage.
        depths: blocks of each stage.
        attention: how many of the last blocks of the third and of the fourth stage are attention (arXiv 2407.08083).
        head_dim: channels of an attention head.
        global_pool: "avg", or "" for the last map.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block, rising linearly.
        bidirectional: "none", "ssm" or "ssm_conv", as of `VisionMamba`, for every block.
        gate_sparsity: factor of the gates' entropy in `gate_loss`.
        recurrence: what runs along the directions, as of `VisionMamba`.
        device, dtype: of the weights.
        **options: of the mixers; for "mamba" those of `BidirectionalMixer`: paths, merge, d_state ...

    Raises:
        ValueError: an argument is impossible; the message names it.
        TypeError: there is no such argument.
    """

    POOLS = ("avg", "")

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        dims: tuple[int, int, int, int] = (64, 128, 256, 512),
        depths: tuple[int, int, int, int] = (1, 2, 6, 2),
        attention: tuple[int, int] = (0, 0),
        head_dim: int = 32,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        bidirectional: str = "ssm_conv",
        gate_sparsity: float = 0.0,
        recurrence: str | Callable[..., nn.Module] = "mamba",
        device: Any = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        former = options.pop("mode", bidirectional)  # its name in version 0.1
        if bidirectional not in (former, "ssm_conv"):
            raise ValueError(f"mode={former!r} is the former name of bidirectional={bidirectional!r}: give one")
        bidirectional = former
        make_mixer = mixer_of(recurrence)
        of_directions = ("merge", "paths", "path_weights", "gate", "pooled_token", "layer_scale", "recompute")
        options = mixer_args(VisionMambaPyramid, make_mixer, options, of_directions)
        for name, value, length, least in (
            ("dims", dims, 4, 2),
            ("depths", depths, 4, 1),
            ("attention", attention, 2, 0),
        ):
            if not isinstance(value, Sequence) or len(value) != length:
                raise ValueError(f"{name} must have {length} entries, got {value!r}")
            for entry in value:
                check_whole(name, entry, least)
        check_whole("in_chans", in_chans)
        check_whole("head_dim", head_dim)
        check_choice("bidirectional", bidirectional, MODES)
        for stage, count in zip((2, 3), attention, strict=True):
            if count > depths[stage]:
                raise ValueError(f"attention must be 0 to {depths[stage]} blocks in stage {stage + 1}, got {count}")
            if count and dims[stage] % head_dim:
                raise ValueError(f"head_dim={head_dim} does not divide the {dims[stage]} channels of stage {stage + 1}")
        check_number("gate_sparsity", gate_sparsity)
        check_number("drop_rate", drop_rate, 0, 1)
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        self.img_size = check_sizes("img_size", img_size, 2)
        self.in_chans, self.num_classes = in_chans, num_classes
        self.global_pool = self._check_pool(global_pool)
        self.gate_sparsity = gate_sparsity
        self.num_features = self.head_hidden_size = dims[-1]
        half = dims[0] // 2
        self.stem = nn.Sequential(
            _conv_norm(in_chans, half, 2, **dd), nn.GELU(), _conv_norm(half, dims[0], 2, **dd), nn.GELU()
        )
        rates = iter(drop_path_rates(drop_path_rate, sum(depths)))
        stages = []
        for i, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
            attending = attention[i - 2] if i >= 2 else 0
            blocks: list[nn.Module] = []
            for block in range(depth):
                rate = next(rates)
                if i < 2:
                    blocks.append(ConvBlock(dim, rate, **dd))
                elif block >= depth - attending:
                    blocks.append(TokenBlock(dim, Attention(dim, dim // head_dim, qkv_bias=True, **dd), rate, **dd))
                else:
                    mixer = make_mixer(dim, mode=bidirectional, **options, **dd)
                    blocks.append(TokenBlock(dim, mixer, rate, **dd))
            stages.append(Stage(nn.Identity() if i == 0 else _conv_norm(dims[i - 1], dim, 2, **dd), blocks))
        self.stages = nn.ModuleList(stages)
        self.norm = LayerNorm2d(dims[-1], **dd)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = self._make_head(num_classes, **dd)
        self.feature_info = [
            {"num_chs": dim, "reduction": reduction, "module": f"stages.{i}"}
            for i, (dim, reduction) in enumerate(zip(dims, REDUCTIONS, strict=True))
        ]
        self.init_weights(needs_reset=False)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that sort parameters into stem and stages, or blocks, for layer-wise learning rates."""
        fine = [(r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None), (r"^norm", (99999,))]
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else fine}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only each block's input in training and compute the rest again in the backward pass."""
        for stage in self.stages:
            assert isinstance(stage, Stage)
            stage.grad_checkpointing = enable

    def _stack(self) -> nn.ModuleList:
        return self.stages

    def _taps(
        self, x: Tensor, take: Sequence[int], last: int | None, norm: bool, output_fmt: str
    ) -> tuple[Tensor, list[Any]]:
        taps: list[Any] = []
        x, normed = in_quick_type(self.stem, x), None
        for i, stage in enumerate(self.stages[: None if last is None else last + 1]):
            x = stage(x)
            normed = self.norm(x) if i == len(REDUCTIONS) - 1 else None
            if i in take:
                taps.append(normed if norm and normed is not None else x)
        return x if normed is None else normed, taps

    def _prune(self, last: int, prune_norm: bool) -> None:
        self.stages = self.stages[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()  # type: ignore[assignment]

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (batch, in_chans, height, width) to the normalised last map, at stride 32."""
        x = in_quick_type(self.stem, x)
        for stage in self.stages:
            x = stage(x)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The last map to logits (batch, num_classes), or to pooled features; without pooling, to maps of them."""
        x = self.head_drop(x.mean((2, 3)) if self.global_pool == "avg" else x)
        if pre_logits or self.num_classes == 0:
            return x
        return self.head(x) if self.global_pool == "avg" else self.head(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


_CFG = dict(
    num_classes=1000, input_size=(3, 224, 224), pool_size=(7, 7), fixed_input_size=False, crop_pct=0.9,
    interpolation="bicubic", mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD, first_conv="stem.0.0",
    classifier="head", license="apache-2.0",
)  # fmt: skip
default_cfgs = generate_default_cfgs({f"vim_pyramid_{size}.untrained": _CFG for size in ("nano", "tiny", "small")})


def _create(variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    return build(VisionMambaPyramid, variant, pretrained, (0, 1, 2, 3), **kwargs)


@register_model
def vim_pyramid_nano(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """2 M parameters."""
    sizes = dict(dims=(24, 48, 96, 192), depths=(1, 2, 4, 2), attention=(1, 1))
    return _create("vim_pyramid_nano", pretrained, **{**sizes, **kwargs})


@register_model
def vim_pyramid_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """About the size of DeiT-Ti and Vim-Ti."""
    sizes = dict(dims=(40, 80, 160, 320), depths=(1, 2, 6, 2), attention=(2, 1))
    return _create("vim_pyramid_tiny", pretrained, **{**sizes, **kwargs})


@register_model
def vim_pyramid_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """About the size of DeiT-S and Vim-S."""
    sizes = dict(dims=(64, 128, 256, 512), depths=(2, 3, 10, 4), attention=(4, 2))
    return _create("vim_pyramid_small", pretrained, **{**sizes, **kwargs})

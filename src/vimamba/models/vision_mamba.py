"""The Vision Mamba backbone and classifier (arXiv 2401.09417): its options, and what they construct."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from vimamba.layers.block import Block
from vimamba.layers.embed.position import Rope, resize_pos_embed
from vimamba.layers.mixers import mixer_of
from vimamba.layers.norm import NORMS
from vimamba.layers.options import check_choice, check_number, check_sizes, check_whole
from vimamba.models.contract import drop_path_rates, mixer_args
from vimamba.models.designs import layer_designs, layer_modes, layer_steps
from vimamba.models.token_model import TokenModel

try:
    from timm.models._input import update_model_input_size
except ImportError:  # timm before 1.0.31 keeps no record of the size
    update_model_input_size = None  # type: ignore[assignment]

__all__ = ["VisionMamba", "resize_pos_embed"]

ROPES = ("none", "patches", "hustvl")


class VisionMamba(TokenModel):
    """Vision Mamba: patches, class token and position embedding through blocks of bidirectional state space mixers.

    Takes images of any height and width from one patch up; the position embedding is interpolated.

    Args:
        img_size: height and width the position embedding is made for, pixels.
        patch_size: height and width of a patch, pixels.
        stride: distance between patches, pixels; the patch size by default.
        in_chans: image channels.
        num_classes: outputs of the classifier; 0 for none.
        embed_dim: token channels.
        depth: number of blocks.
        d_state: state size of each channel.
        d_conv: width of the causal convolution in the mixer.
        expand: inner channels of the mixer per token channel.
        dt_rank: rank of the step-size projection; "auto" is ceil(embed_dim / 16).
        bidirectional: "none", "layer" (layers in pairs, the second over the flipped sequence, both residual streams
            added, so that the stream doubles with each pair), "ssm" (v1), "ssm_conv" (v2, the published models), a
            sequence of `depth` of them, or a rule for which layers are "ssm_conv" among others that are "none":
            "every 2nd", "first 4", "last 8" ("ssm last 8" for "ssm").
        layer_pairs: pair the layers as "layer" does, whatever `bidirectional` is.
        merge: "mean" or "sum" of the directions, or "gate": weighed by a learned gate, see `set_gate_threshold`.
        paths: the orders in which the patches are read: "row", "column", "snake", "window4" ..., each in the senses
            that `bidirectional` says or in its own ("column:backward"); or `depth` such sequences.
        path_weights: "own" weights for each path, or "shared" ones.
        gate: "image" or "token": what the gates are computed for.
        gate_sparsity: factor of the gates' entropy in `gate_loss`.
        alternate: every second layer of one direction runs backwards.
        pooled_token: layers of one direction read the mean of the tokens first.
        conv: "1d", the causal convolution of each direction, or "2d", one of 3×3 on the grid for all directions.
        stem: "patch", one convolution, or "conv", one of 3×3 and stride 2 for each halving.
        num_registers: learned tokens spread evenly among the patches.
        class_token: "middle", "head", "double" (one at either end) or "none".
        global_pool: what the classifier reads: "token", "mean" (over patches), "max" (the largest logit over tokens),
            "last" (token), "registers" (their mean) or "" (every token). By default the class token, or the mean where
            there is none.
        pos_embed: "learned" (or True), "sincos", which is fixed and covers the patches, or "none" (or False).
        rope: "none", "patches" (rotate each patch token by its place) or "hustvl" (as the official code does: the
            first token is the one left out, wherever the class token stands).
        rope_residual: rotate the residual stream too.
        rope_grid: rows and columns that rope's positions are scaled to.
        norm: "rms" or "layer".
        norm_eps: added to the mean square.
        layer_scale: initial value of a learned factor on each block's output channels, or None.
        recompute: when training trades time for memory: the backward pass computes each block's norm and input
            projection again instead of keeping them, in "long" sequences (from 2048 tokens on), "always" or "never".
            `set_grad_checkpointing` does that with whole blocks.
        drop_rate: dropout before the classifier.
        pos_drop_rate: dropout after the position embedding.
        drop_path_rate: stochastic depth of the last block, rising linearly.
        recurrence: what runs along the directions, by name or as `DirectionalMixer` takes it. d_state, d_conv, expand,
            dt_rank and conv are options of "mamba".
        device, dtype: of the weights.
        **options: of the recurrence; for "mamba" those of `BidirectionalMixer`: dt_min, conv_bias ...

    Raises:
        ValueError: an option is unknown or impossible; the message names it.
        TypeError: there is no such argument.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        stride: int | tuple[int, int] | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 192,
        depth: int = 24,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | str = "auto",
        bidirectional: str | Sequence[str] = "ssm_conv",
        layer_pairs: bool = False,
        merge: str = "mean",
        class_token: str = "middle",
        global_pool: str | None = None,
        paths: Sequence[str] | Sequence[Sequence[str]] = ("row",),
        path_weights: str = "own",
        gate: str = "image",
        gate_sparsity: float = 0.0,
        alternate: bool = False,
        pooled_token: bool = False,
        conv: str = "1d",
        stem: str = "patch",
        num_registers: int = 0,
        pos_embed: bool | str = True,
        rope: str = "none",
        rope_residual: bool = False,
        rope_grid: int = 14,
        norm: str = "rms",
        norm_eps: float = 1e-5,
        layer_scale: float | None = None,
        recompute: str = "long",
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        recurrence: str | Callable[..., nn.Module] = "mamba",
        device: Any = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        images = 2  # axes
        super().__init__(
            check_sizes("img_size", img_size, images), patch_size, stride, in_chans, embed_dim, stem, class_token,
            num_registers, pos_embed, pos_drop_rate, **dd,
        )  # fmt: skip
        mixer = mixer_of(recurrence)
        of_mamba = dict(d_state=d_state, d_conv=d_conv, expand=expand, dt_rank=dt_rank, conv=conv)
        options = mixer_args(VisionMamba, mixer, {**of_mamba, **options})
        check_choice("rope", rope, ROPES)
        check_choice("norm", norm, tuple(NORMS))
        check_whole("depth", depth)
        check_number("gate_sparsity", gate_sparsity)
        check_number("drop_rate", drop_rate, 0, 1)
        modes = layer_modes(bidirectional, depth)
        self.steps = layer_steps(modes, layer_pairs)
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = embed_dim
        self.gate_sparsity = gate_sparsity
        self.grad_checkpointing = False
        self.global_pool = self._check_pool(global_pool)
        self.rope = Rope(embed_dim, images, rope_grid) if rope != "none" else None
        self.rope_first = rope == "hustvl"
        self.rope_residual = rope_residual
        common = dict(gate=gate, layer_scale=layer_scale, recompute=recompute, **options, **dd)
        designs = layer_designs(modes, self.grid, paths, path_weights, merge, alternate, pooled_token)
        self.layers = nn.ModuleList(
            Block(
                mixer(embed_dim, **vars(design), **common),
                NORMS[norm](embed_dim, norm_eps, **dd),
                rate,
            )
            for design, rate in zip(designs, drop_path_rates(drop_path_rate, depth), strict=True)
        )
        self.norm_f = NORMS[norm](embed_dim, norm_eps, **dd)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = self._make_head(num_classes, **dd)
        reduction = max(self.patch_embed.stride)
        self.feature_info = [
            {"num_chs": embed_dim, "reduction": reduction, "module": f"layers.{i}"} for i in range(depth)
        ]
        self.init_weights(needs_reset=False)

    def set_input_size(
        self,
        img_size: int | tuple[int, int] | None = None,
        patch_size: int | tuple[int, int] | None = None,
    ) -> None:
        """Make the position embedding (and the patches) for another size, interpolating the learned weights."""
        self.resize(img_size, patch_size)
        for info in self.feature_info:
            info["reduction"] = max(self.patch_embed.stride)
        if update_model_input_size is not None:  # for `timm.data` and for saving
            update_model_input_size(self, self.img_size, patch_size=patch_size)

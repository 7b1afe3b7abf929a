"""The Vision Mamba backbone and classifier (arXiv 2401.09417)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import DropPath, resample_patch_embed, to_2tuple, trunc_normal_
from timm.layers.weight_init import lecun_normal_
from timm.models import checkpoint
from torch import Tensor, nn

from vimamba.layers.block import Block
from vimamba.layers.gate import LEVELS
from vimamba.layers.mixer import CONVS, MERGES, PATH_WEIGHTS, BidirectionalMixer
from vimamba.layers.norm import NORMS
from vimamba.layers.patch_embed import PatchEmbed
from vimamba.layers.plan import check_choice, layer_modes, plan_layers, schedule
from vimamba.layers.pos_embed import resize_pos_embed, sincos_pos_embed
from vimamba.layers.rope import Rope
from vimamba.layers.stem import ConvStem
from vimamba.layers.tokens import (
    CLASS_TOKENS,
    Layout,
    Places,
    class_positions,
    insert_tokens,
    split_tokens,
    token_places,
)
from vimamba.models.contract import TimmBackbone

__all__ = ["VisionMamba", "resize_pos_embed"]

POOLS = ("token", "mean", "max", "last", "registers", "")
POS_EMBEDS = ("learned", "sincos", "none")
ROPES = ("none", "patches", "hustvl")


class VisionMamba(TimmBackbone):
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
        drop_rate: dropout before the classifier.
        pos_drop_rate: dropout after the position embedding.
        drop_path_rate: stochastic depth of the last block, rising linearly.
        **mixer_args: further arguments of `BidirectionalMixer`.

    Raises:
        ValueError: an option is unknown or impossible; the message names it.
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
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        **mixer_args: Any,
    ) -> None:
        super().__init__()
        if isinstance(pos_embed, bool):
            pos_embed = "learned" if pos_embed else "none"
        for name, value, allowed in (
            ("merge", merge, MERGES),
            ("path_weights", path_weights, PATH_WEIGHTS),
            ("gate", gate, LEVELS),
            ("conv", conv, CONVS),
            ("stem", stem, ("patch", "conv")),
            ("pos_embed", pos_embed, POS_EMBEDS),
            ("class_token", class_token, tuple(CLASS_TOKENS)),
            ("rope", rope, ROPES),
            ("norm", norm, tuple(NORMS)),
        ):
            check_choice(name, value, allowed)
        modes = layer_modes(bidirectional, depth)
        self.schedule = schedule(modes, layer_pairs)
        self.img_size = to_2tuple(img_size)
        self.num_classes = num_classes
        self.embed_dim = self.num_features = self.head_hidden_size = embed_dim
        self.class_token = class_token
        self.num_registers = num_registers
        self.gate_sparsity = gate_sparsity
        self.grad_checkpointing = False
        self.global_pool = self._check_pool(global_pool)

        self.patch_embed = _patch_embed(stem, in_chans, embed_dim, to_2tuple(patch_size), stride)
        self.grid = self.patch_embed.grid_size(*self.img_size)
        if not 0 <= num_registers <= self.grid[0] * self.grid[1]:
            raise ValueError(f"num_registers must be from 0 to the number of patches, got {num_registers}")
        plans = plan_layers(modes, paths, path_weights, merge, alternate, pooled_token, self.grid)
        tokens = CLASS_TOKENS[class_token]
        if class_token == "double":
            self.cls_token_head = nn.Parameter(torch.zeros(1, 1, embed_dim))
            self.cls_token_tail = nn.Parameter(torch.zeros(1, 1, embed_dim))
        elif class_token != "none":
            self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.reg_tokens = nn.Parameter(torch.zeros(1, num_registers, embed_dim)) if num_registers else None
        patches = self.grid[0] * self.grid[1]
        learned = pos_embed == "learned"
        self.pos_embed = nn.Parameter(torch.zeros(1, patches + tokens, embed_dim)) if learned else None
        self.sincos = pos_embed == "sincos"
        if self.sincos and embed_dim % 4:
            raise ValueError(f'pos_embed="sincos" needs embed_dim divisible by 4, got {embed_dim}')
        self.pos_drop = nn.Dropout(pos_drop_rate)
        self.rope = Rope(embed_dim, rope_grid) if rope != "none" else None
        self.rope_first = rope == "hustvl"
        self.rope_residual = rope_residual

        rates = [0.0, *torch.linspace(0, drop_path_rate, depth).tolist()]
        self.layers = nn.ModuleList(
            Block(
                BidirectionalMixer(
                    embed_dim,
                    d_state,
                    d_conv,
                    expand,
                    dt_rank,
                    plan.mode,
                    plan.merge,
                    plan.paths,
                    path_weights,
                    gate,
                    conv,
                    plan.pooled_token,
                    layer_scale=layer_scale,
                    **mixer_args,
                ),
                NORMS[norm](embed_dim, norm_eps),
                rates[i],
            )
            for i, plan in enumerate(plans)
        )
        self.drop_path = DropPath(drop_path_rate) if drop_path_rate > 0 else nn.Identity()
        self.norm_f = NORMS[norm](embed_dim, norm_eps)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes > 0 else nn.Identity()
        stride_h, stride_w = self.patch_embed.stride
        self.feature_info = [
            {"num_chs": embed_dim, "reduction": max(stride_h, stride_w), "module": f"layers.{i}"} for i in range(depth)
        ]
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Set the initial values of the official code; the mixers set their own."""
        lecun_normal_(self.patch_embed.proj.weight)
        assert self.patch_embed.proj.bias is not None
        nn.init.zeros_(self.patch_embed.proj.bias)
        for token in (*self._class_tokens(), self.reg_tokens, self.pos_embed):
            if token is not None:
                trunc_normal_(token, std=0.02)
        for module in self.layers.modules():
            if isinstance(module, BidirectionalMixer):
                module.out_proj.weight.div_(len(self.layers) ** 0.5)
                for linear in (module.in_proj, module.out_proj):
                    if linear.bias is not None:
                        nn.init.zeros_(linear.bias)
        self._init_head()

    def _init_head(self) -> None:
        if isinstance(self.head, nn.Linear):
            trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    def _class_tokens(self) -> list[nn.Parameter]:
        if self.class_token == "double":
            return [self.cls_token_head, self.cls_token_tail]
        return [self.cls_token] if self.class_token != "none" else []

    def _check_pool(self, pool: str | None) -> str:
        if pool is None:
            return "mean" if self.class_token == "none" else "token"
        pool = "mean" if pool == "avg" else pool
        check_choice("global_pool", pool, POOLS)
        if pool == "registers" and not self.num_registers:
            raise ValueError('global_pool="registers" needs register tokens, but num_registers=0')
        if pool == "token" and self.class_token == "none":
            raise ValueError('global_pool="token" needs a class token, but class_token="none"')
        return pool

    @torch.no_grad()
    def set_input_size(
        self,
        img_size: int | tuple[int, int] | None = None,
        patch_size: int | tuple[int, int] | None = None,
    ) -> None:
        """Make the position embedding (and the patches) for another size, interpolating the learned weights."""
        embed = self.patch_embed
        if patch_size is not None and to_2tuple(patch_size) != embed.patch_size:
            if isinstance(embed, ConvStem):
                raise ValueError('patch_size cannot be changed with stem="conv"')
            size = to_2tuple(patch_size)
            stride = size if embed.stride == embed.patch_size else embed.stride
            fresh = PatchEmbed(embed.proj.in_channels, self.embed_dim, size, stride).to(embed.proj.weight)
            fresh.proj.weight.copy_(resample_patch_embed(embed.proj.weight, list(size)))
            assert fresh.proj.bias is not None
            assert embed.proj.bias is not None
            fresh.proj.bias.copy_(embed.proj.bias)
            self.patch_embed = fresh
        self.img_size = to_2tuple(img_size) if img_size is not None else self.img_size
        grid = self.patch_embed.grid_size(*self.img_size)
        if self.pos_embed is not None:
            self.pos_embed = nn.Parameter(self._pos_embed(grid).clone())
        self.grid = grid

    def _pos_embed(self, grid: tuple[int, int]) -> Tensor:
        """The position embedding for `grid`; class tokens keep their own and the patches' is interpolated."""
        assert self.pos_embed is not None
        return resize_pos_embed(self.pos_embed, self.grid, grid, self.class_token)

    def embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Images (batch, in_chans, height, width) to tokens with class tokens and positions, and the grid."""
        tokens, grid = self.patch_embed(x)
        if self.sincos:
            tokens = tokens + sincos_pos_embed(self.embed_dim, grid, self.grid, tokens.device).to(tokens.dtype)
        own = self._class_tokens()
        if own:
            classes = torch.cat(list(own), dim=1).expand(tokens.shape[0], -1, -1).to(tokens.dtype)
            tokens = insert_tokens(tokens, classes, class_positions(self.class_token, tokens.shape[1]))
        if self.pos_embed is not None:
            tokens = tokens + self._pos_embed(grid)
        if self.reg_tokens is not None:
            registers = self.reg_tokens.expand(tokens.shape[0], -1, -1).to(tokens.dtype)
            tokens = insert_tokens(tokens, registers, self._places(grid[0] * grid[1]).registers)
        return self.pos_drop(tokens), grid

    def _places(self, patches: int) -> Places:
        return token_places(self.class_token, patches, self.num_registers)

    def _angles(self, grid: tuple[int, int]) -> tuple[Tensor, Tensor] | None:
        if self.rope is None:
            return None
        positions = self._places(grid[0] * grid[1]).extras
        if self.rope_first and len(positions) == 1:
            positions = (0,)
        return self.rope.angles(grid, positions)

    def _step(
        self, indices: tuple[int, ...], hidden: Tensor, residual: Tensor | None, layout: Layout
    ) -> tuple[Tensor, Tensor]:
        """One block, or a pair of them that read the sequence in opposite senses."""
        if len(indices) == 1:
            return self.layers[indices[0]](hidden, residual, layout=layout)
        hidden_f, residual_f = self.layers[indices[0]](hidden, residual, layout=layout)
        hidden_b, residual_b = self.layers[indices[1]](hidden, residual, reverse=True, layout=layout)
        return hidden_f + hidden_b, residual_f + residual_b

    def _blocks(
        self, hidden: Tensor, grid: tuple[int, int], take: Sequence[int] = (), last: int | None = None
    ) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """Run the blocks up to index `last`; the stream after each block in `take` comes along."""
        residual: Tensor | None = None
        taken: list[Tensor] = []
        angles = self._angles(grid)
        layout = Layout(grid, self._places(grid[0] * grid[1]).extras)
        for indices in self.schedule:
            if last is not None and indices[0] > last:
                break
            if angles is not None:
                hidden = Rope.rotate(hidden, angles)
                if residual is not None and self.rope_residual:
                    residual = Rope.rotate(residual, angles)
            if self.grad_checkpointing and self.training and torch.is_grad_enabled():
                hidden, residual = checkpoint(self._step, indices, hidden, residual, layout)
            else:
                hidden, residual = self._step(indices, hidden, residual, layout)
            taken += [residual + hidden for i in indices if i in take]
        return hidden, residual, taken

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (batch, in_chans, height, width) to normalised tokens (batch, length, embed_dim)."""
        tokens, grid = self.embed(x)
        hidden, residual, _ = self._blocks(tokens, grid)
        return self.norm_f(self.drop_path(hidden), residual)[0]

    def pool(self, x: Tensor) -> Tensor:
        """Tokens (batch, length, embed_dim) to what the classifier reads, (batch, embed_dim) for most poolings."""
        places = self._places(x.shape[1] - CLASS_TOKENS[self.class_token] - self.num_registers)
        if self.global_pool == "token":
            classes = places.classes
            return x[:, list(classes)].mean(1) if len(classes) > 1 else x[:, classes[0]]
        if self.global_pool == "mean":
            return split_tokens(x, places.extras)[0].mean(1)
        if self.global_pool == "registers":
            return x[:, list(places.registers)].mean(1)
        return x[:, -1] if self.global_pool == "last" else x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens (batch, length, embed_dim) to logits (batch, num_classes), or to pooled features."""
        x = self.head_drop(self.pool(x))
        if not pre_logits:
            x = self.head(x)
        return x.amax(1) if self.global_pool == "max" else x

    def forward(self, x: Tensor) -> Tensor:
        """Images (batch, in_chans, height, width) to logits (batch, num_classes)."""
        return self.forward_head(self.forward_features(x))


def _patch_embed(
    stem: str, in_chans: int, embed_dim: int, patch_size: tuple[int, int], stride: int | tuple[int, int] | None
) -> PatchEmbed | ConvStem:
    if stem == "patch":
        return PatchEmbed(in_chans, embed_dim, patch_size, to_2tuple(stride if stride is not None else patch_size))
    if stride is not None and to_2tuple(stride) != patch_size:
        raise ValueError(f'stem="conv" needs stride to be the patch_size, got {stride}')
    return ConvStem(in_chans, embed_dim, patch_size)

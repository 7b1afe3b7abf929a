"""The Vision Mamba backbone and classifier (arXiv 2401.09417)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import resample_patch_embed, trunc_normal_
from timm.layers.weight_init import lecun_normal_
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vimamba.layers.block import Block
from vimamba.layers.intact import intact, watched
from vimamba.layers.mixer import BidirectionalMixer
from vimamba.layers.norm import NORMS, add_norm, compute_dtype, widen
from vimamba.layers.options import check_choice, check_number, check_pair, check_whole
from vimamba.layers.patch_embed import PatchEmbed
from vimamba.layers.plan import layer_modes, plan_layers, schedule
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
    take_tokens,
    token_places,
)
from vimamba.models.contract import TokenBackbone, check_mixer_args, drop_path_rates

for _leaf in (
    "compute_dtype",
    "insert_tokens",
    "resize_pos_embed",
    "sincos_pos_embed",
    "split_tokens",
    "take_tokens",
    "token_places",
    "widen",
):
    torch.fx.wrap(_leaf)  # a symbolic trace calls these as they are

__all__ = ["VisionMamba", "resize_pos_embed"]

POOLS = ("token", "mean", "max", "last", "registers", "")
POS_EMBEDS = ("learned", "sincos", "none")
ROPES = ("none", "patches", "hustvl")


class VisionMamba(TokenBackbone):
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
        device, dtype: of the weights.
        **mixer_args: further arguments of `BidirectionalMixer`: dt_min, conv_bias ...

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
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **mixer_args: Any,
    ) -> None:
        super().__init__()
        check_mixer_args(VisionMamba, mixer_args, own=("mode", "merge", "paths", "path_weights", "pooled_token"))
        if isinstance(pos_embed, bool):
            pos_embed = "learned" if pos_embed else "none"
        for name, value, allowed in (
            ("stem", stem, ("patch", "conv")),
            ("pos_embed", pos_embed, POS_EMBEDS),
            ("class_token", class_token, tuple(CLASS_TOKENS)),
            ("rope", rope, ROPES),
            ("norm", norm, tuple(NORMS)),
        ):
            check_choice(name, value, allowed)
        check_whole("depth", depth)
        for name, number, most in (
            ("gate_sparsity", gate_sparsity, math.inf),
            ("drop_rate", drop_rate, 1.0),
            ("pos_drop_rate", pos_drop_rate, 1.0),
        ):
            check_number(name, number, 0, most)
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        modes = layer_modes(bidirectional, depth)
        self.schedule = schedule(modes, layer_pairs)
        self.img_size = check_pair("img_size", img_size)
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.embed_dim = self.num_features = self.head_hidden_size = embed_dim
        self.class_token = class_token
        self.num_registers = num_registers
        self.num_prefix_tokens = CLASS_TOKENS[class_token] + num_registers
        """Tokens that are no patches; where they stand, only `forward_intermediates` knows."""
        self.has_class_token = class_token != "none"
        self.gate_sparsity = gate_sparsity
        self.grad_checkpointing = False
        self.global_pool = self._check_pool(global_pool)

        patch = check_pair("patch_size", patch_size)
        self.patch_embed = _patch_embed(stem, in_chans, embed_dim, patch, stride, **dd)
        self.grid = self.patch_embed.grid_size(*self.img_size)
        patches = self.grid[0] * self.grid[1]
        check_whole("num_registers", num_registers, 0)
        if num_registers > patches:
            raise ValueError(f"num_registers must be from 0 to the number of patches, {patches}, got {num_registers}")
        plans = plan_layers(modes, paths, path_weights, merge, alternate, pooled_token, self.grid)
        tokens = CLASS_TOKENS[class_token]
        if class_token == "double":
            self.cls_token_head = nn.Parameter(torch.zeros(1, 1, embed_dim, **dd))
            self.cls_token_tail = nn.Parameter(torch.zeros(1, 1, embed_dim, **dd))
        elif class_token != "none":
            self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim, **dd))
        self.reg_tokens = nn.Parameter(torch.zeros(1, num_registers, embed_dim, **dd)) if num_registers else None
        learned = pos_embed == "learned"
        self.pos_embed = nn.Parameter(torch.zeros(1, patches + tokens, embed_dim, **dd)) if learned else None
        self.sincos = pos_embed == "sincos"
        if self.sincos and embed_dim % 4:
            raise ValueError(f'pos_embed="sincos" needs embed_dim divisible by 4, got {embed_dim}')
        self.pos_drop = nn.Dropout(pos_drop_rate)
        self.rope = Rope(embed_dim, rope_grid, device=device) if rope != "none" else None
        self.rope_first = rope == "hustvl"
        self.rope_residual = rope_residual

        self.layers = nn.ModuleList(
            Block(
                BidirectionalMixer(
                    embed_dim,
                    d_state,
                    d_conv,
                    expand,
                    dt_rank,
                    mode=plan.mode,
                    merge=plan.merge,
                    paths=plan.paths,
                    path_weights=path_weights,
                    gate=gate,
                    conv=conv,
                    pooled_token=plan.pooled_token,
                    layer_scale=layer_scale,
                    **mixer_args,
                    **dd,
                ),
                NORMS[norm](embed_dim, norm_eps, **dd),
                rate,
            )
            for plan, rate in zip(plans, drop_path_rates(drop_path_rate, depth), strict=True)
        )
        self.norm_f = NORMS[norm](embed_dim, norm_eps, **dd)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = self._make_head(num_classes, **dd)
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
        size = embed.patch_size if patch_size is None else check_pair("patch_size", patch_size)
        if size != embed.patch_size:
            if isinstance(embed, ConvStem):
                raise ValueError('patch_size cannot be changed with stem="conv"')
            weight, bias = embed.proj.weight, embed.proj.bias
            assert bias is not None
            stride = size if embed.stride == embed.patch_size else embed.stride
            fresh = PatchEmbed(self.in_chans, self.embed_dim, size, stride, weight.device, weight.dtype)
            fresh.proj.weight = nn.Parameter(resample_patch_embed(weight, list(size)), weight.requires_grad)
            fresh.proj.bias = bias
            self.patch_embed = fresh.train(self.training)
            for info in self.feature_info:
                info["reduction"] = max(stride)
        self.img_size = check_pair("img_size", img_size) if img_size is not None else self.img_size
        grid = self.patch_embed.grid_size(*self.img_size)
        if self.pos_embed is not None:
            self.pos_embed = nn.Parameter(self._pos_embed(grid).clone(), self.pos_embed.requires_grad)
        self.grid = grid
        self._record_input_size(patch_size)

    def _pos_embed(self, grid: tuple[int, int]) -> Tensor:
        """The position embedding for `grid`; class tokens keep their own and the patches' is interpolated."""
        assert self.pos_embed is not None
        return resize_pos_embed(self.pos_embed, self.grid, grid, self.class_token)

    def embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Images (batch, in_chans, height, width) to tokens with class tokens and positions, and the grid."""
        grid = self.patch_embed.grid_size(x.shape[2], x.shape[3])
        tokens = self.patch_embed(x)
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
        if self.rope_first and self.num_prefix_tokens == 1:
            positions = (0,)
        return self.rope.angles(grid, positions)

    def _block(
        self, index: int, hidden: Tensor, stream: Tensor | None, reverse: bool, layout: Layout
    ) -> tuple[Tensor, Tensor | None]:
        """A block: joined with its neighbours, or, if it was replaced or is hooked or looked at, called."""
        block = self.layers[index]
        if isinstance(block, Block) and intact(block, Block) and not watched(hidden):
            return block.step(hidden, stream, reverse, layout)
        before = widen(hidden) if stream is None else stream + hidden
        after = block(before, reverse=reverse, layout=layout)
        if self.rope is not None and not self.rope_residual:  # which turns what the block gave, but not the stream
            return after - before, before
        return after, None

    def _step(
        self, indices: tuple[int, ...], hidden: Tensor, stream: Tensor | None, layout: Layout
    ) -> tuple[Tensor, Tensor | None]:
        """One block, or a pair of them that read the sequence in opposite senses and whose streams are added."""
        hidden_f, stream_f = self._block(indices[0], hidden, stream, False, layout)
        if len(indices) == 1:
            return hidden_f, stream_f
        hidden_b, stream_b = self._block(indices[1], hidden, stream, True, layout)
        if stream_f is None or stream_b is None:
            return hidden_f + hidden_b, stream_b if stream_f is None else stream_f
        return hidden_f + hidden_b, stream_f + stream_b

    def _blocks(
        self, tokens: Tensor, layout: Layout, take: Sequence[int] = (), last: int | None = None
    ) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """Run the blocks up to index `last`: what the last one gave, the residual stream without it, and the streams
        after the blocks in `take`. A stream of None is nothing: all of it is in the other part.
        """
        hidden, stream = tokens, None
        taken: list[Tensor] = []
        angles = self._angles(layout.grid)
        for indices in self.schedule:
            if last is not None and indices[0] > last:
                break
            if angles is not None:
                hidden = Rope.rotate(hidden, angles)
                if stream is not None and self.rope_residual:
                    stream = Rope.rotate(stream, angles)
            if self.grad_checkpointing and self.training and torch.is_grad_enabled():
                hidden, stream = checkpoint(self._step, indices, hidden, stream, layout, use_reentrant=False)
            else:
                hidden, stream = self._step(indices, hidden, stream, layout)
            taken += [hidden if stream is None else stream + hidden for i in indices if i in take]
        return hidden, stream, taken

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (batch, in_chans, height, width) to normalised tokens (batch, length, embed_dim)."""
        tokens, grid = self.embed(x)
        hidden, stream, _ = self._blocks(tokens, Layout(grid, self._places(grid[0] * grid[1]).extras))
        return add_norm(self.norm_f, hidden, stream, compute_dtype(tokens))[0]

    def pool(self, x: Tensor) -> Tensor:
        """Tokens (batch, length, embed_dim) to what the classifier reads, (batch, embed_dim) for most poolings."""
        places = self._places(x.shape[1] - CLASS_TOKENS[self.class_token] - self.num_registers)
        if self.global_pool == "token":
            classes = take_tokens(x, places.classes)
            return classes.mean(1) if self.class_token == "double" else classes[:, 0]
        if self.global_pool == "mean":
            return split_tokens(x, places.extras)[0].mean(1)
        if self.global_pool == "registers":
            return take_tokens(x, places.registers).mean(1)
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
    stem: str,
    in_chans: int,
    embed_dim: int,
    patch_size: tuple[int, int],
    stride: int | tuple[int, int] | None,
    **factory: Any,
) -> PatchEmbed | ConvStem:
    step = patch_size if stride is None else check_pair("stride", stride)
    if stem == "patch":
        return PatchEmbed(in_chans, embed_dim, patch_size, step, **factory)
    if step != patch_size:
        raise ValueError(f'stem="conv" needs stride to be the patch_size, got {stride}')
    return ConvStem(in_chans, embed_dim, patch_size, **factory)

"""The Vision Mamba backbone and classifier (arXiv 2401.09417)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import DropPath, resample_abs_pos_embed, resample_patch_embed, to_2tuple, trunc_normal_
from timm.layers.weight_init import lecun_normal_
from timm.models import checkpoint
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from vimamba.errors import nearest
from vimamba.layers.block import Block
from vimamba.layers.mixer import MERGES, MODES, BidirectionalMixer
from vimamba.layers.norm import NORMS
from vimamba.layers.patch_embed import PatchEmbed
from vimamba.layers.rope import Rope
from vimamba.layers.tokens import CLASS_TOKENS, class_positions, insert_tokens, split_tokens

POOLS = ("token", "mean", "max", "last", "")
ROPES = ("none", "patches", "hustvl")


class VisionMamba(nn.Module):
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
            added, so that the stream doubles with each pair), "ssm" (v1), "ssm_conv" (v2, the published models), or a
            sequence of `depth` of them.
        layer_pairs: pair the layers as "layer" does, whatever `bidirectional` is.
        merge: "mean" or "sum" of the directions.
        class_token: "middle", "head", "double" (one at either end) or "none".
        global_pool: what the classifier reads: "token", "mean" (over patches), "max" (the largest logit over tokens),
            "last" (token) or "" (every token). By default the class token, or the mean where there is none.
        pos_embed: a learned embedding of each position.
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
        pos_embed: bool = True,
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
        for name, value, allowed in (
            ("merge", merge, MERGES),
            ("class_token", class_token, tuple(CLASS_TOKENS)),
            ("rope", rope, ROPES),
            ("norm", norm, tuple(NORMS)),
        ):
            _check_choice(name, value, allowed)
        modes, self.schedule = _schedule(bidirectional, depth, layer_pairs)
        self.img_size = to_2tuple(img_size)
        self.num_classes = num_classes
        self.embed_dim = self.num_features = self.head_hidden_size = embed_dim
        self.class_token = class_token
        self.grad_checkpointing = False
        self.global_pool = self._check_pool(global_pool)

        self.patch_embed = PatchEmbed(
            in_chans,
            embed_dim,
            to_2tuple(patch_size),
            to_2tuple(stride if stride is not None else patch_size),
        )
        self.grid = self.patch_embed.grid_size(*self.img_size)
        tokens = CLASS_TOKENS[class_token]
        if class_token == "double":
            self.cls_token_head = nn.Parameter(torch.zeros(1, 1, embed_dim))
            self.cls_token_tail = nn.Parameter(torch.zeros(1, 1, embed_dim))
        elif class_token != "none":
            self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        patches = self.grid[0] * self.grid[1]
        self.pos_embed = nn.Parameter(torch.zeros(1, patches + tokens, embed_dim)) if pos_embed else None
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
                    mode,
                    merge,
                    layer_scale=layer_scale,
                    **mixer_args,
                ),
                NORMS[norm](embed_dim, norm_eps),
                rates[i],
            )
            for i, mode in enumerate(modes)
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
        for token in (*self._class_tokens(), self.pos_embed):
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
        _check_choice("global_pool", pool, POOLS)
        if pool == "token" and self.class_token == "none":
            raise ValueError('global_pool="token" needs a class token, but class_token="none"')
        return pool

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay must leave alone."""
        names = {"pos_embed", "cls_token", "cls_token_head", "cls_token_tail"}
        for prefix, module in self.named_modules():
            if isinstance(module, BidirectionalMixer):
                names |= {f"{prefix}.{name}" for name in module.no_weight_decay()}
        return names

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that sort parameters into stem and blocks, for layer-wise learning rates."""
        return {
            "stem": r"^cls_token|^pos_embed|^patch_embed",
            "blocks": [(r"^layers\.(\d+)", None), (r"^norm_f", (99999,))],
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only each block's input in training and compute the rest again in the backward pass."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The classifier."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a fresh one, and the pooling where it is given."""
        self.num_classes = num_classes
        if global_pool is not None:
            self.global_pool = self._check_pool(global_pool)
        device, dtype = self.norm_f.weight.device, self.norm_f.weight.dtype
        head = nn.Linear(self.embed_dim, num_classes) if num_classes > 0 else nn.Identity()
        self.head = head.to(device=device, dtype=dtype)
        with torch.no_grad():
            self._init_head()

    @torch.no_grad()
    def set_input_size(
        self,
        img_size: int | tuple[int, int] | None = None,
        patch_size: int | tuple[int, int] | None = None,
    ) -> None:
        """Make the position embedding (and the patches) for another size, interpolating the learned weights."""
        embed = self.patch_embed
        if patch_size is not None and to_2tuple(patch_size) != embed.patch_size:
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
        own = self._class_tokens()
        if own:
            classes = torch.cat(list(own), dim=1).expand(tokens.shape[0], -1, -1).to(tokens.dtype)
            tokens = insert_tokens(tokens, classes, class_positions(self.class_token, tokens.shape[1]))
        if self.pos_embed is not None:
            tokens = tokens + self._pos_embed(grid)
        return self.pos_drop(tokens), grid

    def _angles(self, grid: tuple[int, int]) -> tuple[Tensor, Tensor] | None:
        if self.rope is None:
            return None
        positions = class_positions(self.class_token, grid[0] * grid[1])
        if self.rope_first and len(positions) == 1:
            positions = (0,)
        return self.rope.angles(grid, positions)

    def _step(self, indices: tuple[int, ...], hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """One block, or a pair of them that read the sequence in opposite senses."""
        if len(indices) == 1:
            return self.layers[indices[0]](hidden, residual)
        hidden_f, residual_f = self.layers[indices[0]](hidden, residual)
        hidden_b, residual_b = self.layers[indices[1]](hidden, residual, reverse=True)
        return hidden_f + hidden_b, residual_f + residual_b

    def _blocks(
        self, hidden: Tensor, grid: tuple[int, int], take: Sequence[int] = (), last: int | None = None
    ) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """Run the blocks up to index `last`; the stream after each block in `take` comes along."""
        residual: Tensor | None = None
        taken: list[Tensor] = []
        angles = self._angles(grid)
        for indices in self.schedule:
            if last is not None and indices[0] > last:
                break
            if angles is not None:
                hidden = Rope.rotate(hidden, angles)
                if residual is not None and self.rope_residual:
                    residual = Rope.rotate(residual, angles)
            if self.grad_checkpointing and self.training and torch.is_grad_enabled():
                hidden, residual = checkpoint(self._step, indices, hidden, residual)
            else:
                hidden, residual = self._step(indices, hidden, residual)
            taken += [residual + hidden for i in indices if i in take]
        return hidden, residual, taken

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (batch, in_chans, height, width) to normalised tokens (batch, length, embed_dim)."""
        tokens, grid = self.embed(x)
        hidden, residual, _ = self._blocks(tokens, grid)
        return self.norm_f(self.drop_path(hidden), residual)[0]

    def pool(self, x: Tensor) -> Tensor:
        """Tokens (batch, length, embed_dim) to what the classifier reads, (batch, embed_dim) for most poolings."""
        positions = class_positions(self.class_token, x.shape[1] - CLASS_TOKENS[self.class_token])
        if self.global_pool == "token":
            return x[:, list(positions)].mean(1) if len(positions) > 1 else x[:, positions[0]]
        if self.global_pool == "mean":
            return split_tokens(x, positions)[0].mean(1)
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

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Run the model and collect the residual stream after some of its blocks.

        Args:
            x: images, (batch, in_chans, height, width).
            indices: the last n blocks, or which ones; all by default.
            return_prefix_tokens: also return the class tokens with each map.
            norm: apply the final norm to each.
            stop_early: do not run blocks after the last one asked for.
            output_fmt: "NCHW" maps or "NLC" tokens.
            intermediates_only: return the list alone.

        Returns:
            The list, each (batch, embed_dim, rows, columns), or the normalised tokens and the list.
        """
        _check_choice("output_fmt", output_fmt, ("NCHW", "NLC"))
        take, last = feature_take_indices(len(self.layers), indices)
        tokens, grid = self.embed(x)
        hidden, residual, taken = self._blocks(tokens, grid, take, last if stop_early else None)
        outputs: list[Any] = []
        for stream in taken:
            stream = self.norm_f(stream)[0] if norm else stream
            patches, classes = split_tokens(stream, class_positions(self.class_token, grid[0] * grid[1]))
            if output_fmt == "NCHW":
                patches = patches.transpose(1, 2).unflatten(2, grid).contiguous()
            outputs.append((patches, classes) if return_prefix_tokens else patches)
        if intermediates_only:
            return outputs
        return self.norm_f(self.drop_path(hidden), residual)[0], outputs

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the blocks after the last one of `indices`, and the norm and the classifier where asked."""
        take, last = feature_take_indices(len(self.layers), indices)
        kept = [step for step in self.schedule if step[0] <= last]
        self.schedule = kept
        self.layers = self.layers[: kept[-1][-1] + 1]
        if prune_norm:
            self.norm_f = _PassThrough()  # type: ignore[assignment]
        if prune_head:
            self.head = nn.Identity()
        return take


class _PassThrough(nn.Module):
    """Stands for a norm that was pruned: the sum with the residual stream, not normalised."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        total = x if residual is None else x + residual
        return total, total


def _check_choice(name: str, value: Any, allowed: Sequence[str]) -> None:
    if value not in allowed:
        choices = ", ".join(repr(a) for a in allowed)
        raise ValueError(f"{name} must be one of {choices}, got {value!r}{nearest(value, allowed)}")


def _schedule(
    bidirectional: str | Sequence[str], depth: int, layer_pairs: bool
) -> tuple[list[str], list[tuple[int, ...]]]:
    """The mixer mode of each layer, and the layers in the order they run, paired ones together."""
    modes = [bidirectional] * depth if isinstance(bidirectional, str) else list(bidirectional)
    if len(modes) != depth:
        raise ValueError(f"bidirectional has {len(modes)} entries for depth={depth}; give one mode, or one a layer")
    steps: list[tuple[int, ...]] = []
    i = 0
    while i < depth:
        _check_choice("bidirectional", modes[i], (*MODES, "layer"))
        paired = layer_pairs or modes[i] == "layer"
        if paired and (i + 1 == depth or modes[i + 1] != modes[i]):
            raise ValueError(f'bidirectional: layer {i} is "layer" but has no second layer to pair with')
        steps.append((i, i + 1) if paired else (i,))
        i += len(steps[-1])
    return ["none" if mode == "layer" else mode for mode in modes], steps


def resize_pos_embed(pos_embed: Tensor, old: tuple[int, int], new: tuple[int, int], class_token: str) -> Tensor:
    """Interpolate a position embedding (1, length, dim) from one grid to another; class tokens keep their own."""
    if old == new:
        return pos_embed
    patches, classes = split_tokens(pos_embed, class_positions(class_token, old[0] * old[1]))
    resized = resample_abs_pos_embed(patches, list(new), list(old), num_prefix_tokens=0)
    return insert_tokens(resized, classes, class_positions(class_token, new[0] * new[1]))

"""From a signal on a grid of any rank to (tokens, layout): patches, class and register tokens, positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import resample_patch_embed, trunc_normal_
from timm.layers.weight_init import lecun_normal_
from torch import Tensor, nn

from vimamba.layers.embed.patch import ConvStem, PatchEmbed
from vimamba.layers.embed.position import check_divisible, resize_pos_embed, sincos_pos_embed
from vimamba.layers.grid import CLASS_TOKENS, Layout, class_positions, insert_tokens, token_layout
from vimamba.layers.options import check_choice, check_number, check_sizes, check_whole

for _leaf in ("class_positions", "insert_tokens", "resize_pos_embed", "sincos_pos_embed", "token_layout"):
    torch.fx.wrap(_leaf)  # a symbolic trace calls these as they are

POS_EMBEDS = ("learned", "sincos", "none")


class TokenEmbedding(nn.Module):
    """Patches in row order, class and register tokens among them, and positions.

    Models inherit from it, so that its weights have the official names; they call `init_embedding` when they are made.

    Args:
        img_size: length of the signal along each axis (steps, pixels or voxels), for which the position embedding is
            made; as many axes as the grid will have: one, two or three.
        patch_size: length of a patch, one number or one for each axis.
        stride: distance between patches; the patch size by default.
        in_chans: channels of the signal.
        embed_dim: token channels.
        stem: "patch", one convolution, or "conv", on images: one of 3×3 and stride 2 for each halving.
        class_token: "middle", "head", "double" (one at either end) or "none".
        num_registers: learned tokens spread evenly among the patches.
        pos_embed: "learned" (or True), "sincos", which is fixed and covers the patches, or "none" (or False).
        pos_drop_rate: dropout after the position embedding.
        device, dtype: of the weights.

    Raises:
        ValueError: an argument is impossible; the message names it.
    """

    def __init__(
        self,
        img_size: Sequence[int],
        patch_size: int | Sequence[int],
        stride: int | Sequence[int] | None = None,
        in_chans: int = 3,
        embed_dim: int = 192,
        stem: str = "patch",
        class_token: str = "middle",
        num_registers: int = 0,
        pos_embed: bool | str = True,
        pos_drop_rate: float = 0.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if isinstance(pos_embed, bool):
            pos_embed = "learned" if pos_embed else "none"
        check_choice("pos_embed", pos_embed, POS_EMBEDS)
        check_choice("class_token", class_token, tuple(CLASS_TOKENS))
        check_number("pos_drop_rate", pos_drop_rate, 0, 1)
        check_whole("num_registers", num_registers, 0)
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        self.img_size = check_sizes("img_size", img_size, len(img_size))
        self.in_chans, self.embed_dim = in_chans, embed_dim
        self.class_token, self.num_registers = class_token, num_registers
        self.num_prefix_tokens = CLASS_TOKENS[class_token] + num_registers
        """Tokens that are no patches; where they stand, the layout says."""
        self.has_class_token = class_token != "none"
        patch = check_sizes("patch_size", patch_size, len(self.img_size))
        self.patch_embed = _patch_embed(stem, in_chans, embed_dim, patch, stride, **dd)
        self.grid = self.patch_embed.grid_size(self.img_size)
        patches = token_layout(class_token, self.grid).patches
        if num_registers > patches:
            raise ValueError(f"num_registers must be from 0 to the number of patches, {patches}, got {num_registers}")

        def learned(count: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(1, count, embed_dim, **dd))

        if class_token == "double":
            self.cls_token_head, self.cls_token_tail = learned(1), learned(1)
        elif class_token != "none":
            self.cls_token = learned(1)
        self.reg_tokens = learned(num_registers) if num_registers else None
        self.pos_embed = learned(patches + CLASS_TOKENS[class_token]) if pos_embed == "learned" else None
        self.sincos = pos_embed == "sincos"
        if self.sincos:
            check_divisible('pos_embed="sincos"', embed_dim, len(self.grid))
        self.pos_drop = nn.Dropout(pos_drop_rate)

    @torch.no_grad()
    def init_embedding(self) -> None:
        """Set the initial values of the official code."""
        lecun_normal_(self.patch_embed.proj.weight)
        assert self.patch_embed.proj.bias is not None
        nn.init.zeros_(self.patch_embed.proj.bias)
        for token in (*self._class_tokens(), self.reg_tokens, self.pos_embed):
            if token is not None:
                trunc_normal_(token, std=0.02)

    def _class_tokens(self) -> list[Tensor]:
        if self.class_token == "double":
            return [self.cls_token_head, self.cls_token_tail]
        return [self.cls_token] if self.has_class_token else []

    @torch.no_grad()
    def resize(self, img_size: Any = None, patch_size: Any = None) -> None:
        """Make the position embedding (and the patches of images) for another size, interpolating learned weights.

        Raises:
            ValueError: a size is impossible, or the patches cannot be resized.
        """
        embed, rank = self.patch_embed, len(self.grid)
        size = embed.patch_size if patch_size is None else check_sizes("patch_size", patch_size, rank)
        if size != embed.patch_size:
            if isinstance(embed, ConvStem) or rank != 2:
                raise ValueError('patch_size can be changed on images with stem="patch" only')
            weight, bias = embed.proj.weight, embed.proj.bias
            assert bias is not None
            stride = size if embed.stride == embed.patch_size else embed.stride
            fresh = PatchEmbed(self.in_chans, self.embed_dim, size, stride, weight.device, weight.dtype)
            fresh.proj.weight = nn.Parameter(resample_patch_embed(weight, list(size)), weight.requires_grad)
            fresh.proj.bias = bias
            self.patch_embed = fresh.train(self.training)
        if img_size is not None:
            self.img_size = check_sizes("img_size", img_size, rank)
        grid = self.patch_embed.grid_size(self.img_size)
        if self.pos_embed is not None:
            self.pos_embed = nn.Parameter(self._pos_embed(grid).clone(), self.pos_embed.requires_grad)
        self.grid = grid

    def _pos_embed(self, grid: tuple[int, ...]) -> Tensor:
        """The position embedding for `grid`; class tokens keep their own and the patches' is interpolated."""
        assert self.pos_embed is not None
        return resize_pos_embed(self.pos_embed, self.grid, grid, self.class_token)

    def embed(self, x: Tensor) -> tuple[Tensor, Layout]:
        """A signal (batch, in_chans, *size) to tokens (batch, length, embed_dim), and where they stand."""
        grid = self.patch_embed.grid_size(x.shape[2:])
        layout = token_layout(self.class_token, grid, self.num_registers)
        tokens = self.patch_embed(x)
        if self.sincos:
            tokens = tokens + sincos_pos_embed(self.embed_dim, grid, self.grid, tokens.device).to(tokens.dtype)
        if self.has_class_token:
            classes = torch.cat(self._class_tokens(), dim=1).expand(tokens.shape[0], -1, -1).to(tokens.dtype)
            tokens = insert_tokens(tokens, classes, class_positions(self.class_token, tokens.shape[1]))
        if self.pos_embed is not None:
            tokens = tokens + self._pos_embed(grid)
        if self.reg_tokens is not None:
            registers = self.reg_tokens.expand(tokens.shape[0], -1, -1).to(tokens.dtype)
            tokens = insert_tokens(tokens, registers, layout.registers)
        return self.pos_drop(tokens), layout


def _patch_embed(
    stem: str, in_chans: int, embed_dim: int, patch_size: tuple[int, ...], stride: Any, **factory: Any
) -> PatchEmbed | ConvStem:
    check_choice("stem", stem, ("patch", "conv"))
    step = patch_size if stride is None else check_sizes("stride", stride, len(patch_size))
    if stem == "patch":
        return PatchEmbed(in_chans, embed_dim, patch_size, step, **factory)
    if step != patch_size:
        raise ValueError(f'stem="conv" needs stride to be the patch_size, got {stride}')
    return ConvStem(in_chans, embed_dim, patch_size, **factory)

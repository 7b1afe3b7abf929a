"""The forward pass of models that are a stack of blocks over one grid of tokens; constructors are in other files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vimamba.layers.block import Block, run_joined
from vimamba.layers.embed.position import Rope
from vimamba.layers.embed.tokens import TokenEmbedding
from vimamba.layers.grid import CLASS_TOKENS, Layout, split_tokens, take_tokens, token_layout
from vimamba.layers.intact import intact, watched
from vimamba.layers.norm import add_norm
from vimamba.models.contract import TimmModel
from vimamba.ops.arguments import widen
from vimamba.ops.backends import compute_dtype

for _leaf in ("compute_dtype", "split_tokens", "take_tokens", "token_layout", "widen"):
    torch.fx.wrap(_leaf)  # a symbolic trace calls these as they are


class TokenModel(TokenEmbedding, TimmModel):
    """Tokens, blocks one after the other or in pairs, a norm and a classifier; a subclass constructs them."""

    POOLS = ("token", "mean", "max", "last", "registers", "")
    FORMATS = ("NCHW", "NLC")
    layers: nn.ModuleList
    steps: list[tuple[int, ...]]
    """The layers in the order they run; two that are a pair read the same tokens."""
    norm_f: nn.Module
    head_drop: nn.Dropout
    rope: Rope | None
    rope_first: bool
    rope_residual: bool
    grad_checkpointing: bool

    def _check_pool(self, pool: str | None) -> str:
        if pool is None:
            return "token" if self.has_class_token else "mean"
        pool = super()._check_pool("mean" if pool == "avg" else pool)
        if pool == "registers" and not self.num_registers:
            raise ValueError('global_pool="registers" needs register tokens, but num_registers=0')
        if pool == "token" and not self.has_class_token:
            raise ValueError('global_pool="token" needs a class token, but class_token="none"')
        return pool

    def _init_trunk(self) -> None:
        """The initial values of the official code."""
        self.init_embedding()
        for name, parameter in self.layers.named_parameters():
            if name.endswith("out_proj.weight"):
                parameter.div_(len(self.layers) ** 0.5)
            elif name.endswith(("in_proj.bias", "out_proj.bias")):
                nn.init.zeros_(parameter)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay must leave alone."""
        tokens = {"pos_embed", "cls_token", "cls_token_head", "cls_token_tail", "reg_tokens"}
        return tokens | super().no_weight_decay()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that sort parameters into stem and blocks, for layer-wise learning rates."""
        return {
            "stem": r"^cls_token|^reg_tokens|^pos_embed|^patch_embed",
            "blocks": [(r"^layers\.(\d+)", None), (r"^norm_f", (99999,))],
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only each block's input in training and compute the rest again in the backward pass."""
        self.grad_checkpointing = enable

    def _angles(self, tokens: Tensor, layout: Layout) -> tuple[Tensor, Tensor] | None:
        if self.rope is None:
            return None
        first = self.rope_first and self.num_prefix_tokens == 1
        return self.rope.angles(tokens, Layout(layout.grid, (0,)) if first else layout)

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
        """One block, or a pair of them that read the sequence in opposite ways round and whose streams are added."""
        hidden_f, stream_f = self._block(indices[0], hidden, stream, False, layout)
        if len(indices) == 1:
            return hidden_f, stream_f
        hidden_b, stream_b = self._block(indices[1], hidden, stream, True, layout)
        if stream_f is None or stream_b is None:
            return hidden_f + hidden_b, stream_b if stream_f is None else stream_f
        return hidden_f + hidden_b, stream_f + stream_b

    def _untapped(self, steps: Sequence[tuple[int, ...]], take: Sequence[int]) -> Iterator[nn.Module]:
        """The layers that run one after the other up to the first whose stream is taken."""
        for step in steps:
            if len(step) > 1:
                return
            yield self.layers[step[0]]
            if step[0] in take:
                return

    def _blocks(
        self, tokens: Tensor, layout: Layout, take: Sequence[int] = (), last: int | None = None
    ) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """Run the blocks up to index `last`: what the last one gave, the residual stream without it, and the streams
        after the blocks in `take`. A stream of None is nothing: all of it is in the other part.
        """
        hidden, stream = tokens, None
        taken: list[Tensor] = []
        angles = self._angles(tokens, layout)
        steps = [step for step in self.steps if last is None or step[0] <= last]
        while steps:
            done, joined = 0, hidden
            if angles is None:
                done, joined = run_joined(self._untapped(steps, take), hidden, stream)
            else:
                hidden = Rope.rotate(hidden, angles)
                if stream is not None and self.rope_residual:
                    stream = Rope.rotate(stream, angles)
            if done:
                hidden, stream = joined, None
            elif self.grad_checkpointing and self.training and torch.is_grad_enabled():
                hidden, stream = checkpoint(self._step, steps[0], hidden, stream, layout, use_reentrant=False)
            else:
                hidden, stream = self._step(steps[0], hidden, stream, layout)
            done = max(done, 1)
            taken += [hidden if stream is None else stream + hidden for i in steps[done - 1] if i in take]
            steps = steps[done:]
        return hidden, stream, taken

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (batch, in_chans, height, width) to normalised tokens (batch, length, embed_dim)."""
        tokens, layout = self.embed(x)
        hidden, stream, _ = self._blocks(tokens, layout)
        return add_norm(self.norm_f, hidden, stream, compute_dtype(tokens))[0]

    def pool(self, x: Tensor) -> Tensor:
        """Tokens (batch, length, embed_dim) to what the classifier reads, (batch, embed_dim) for most poolings."""
        patches = x.shape[1] - CLASS_TOKENS[self.class_token] - self.num_registers
        layout = token_layout(self.class_token, (patches,), self.num_registers)
        if self.global_pool == "token":
            classes = take_tokens(x, layout.classes)
            return classes.mean(1) if self.class_token == "double" else classes[:, 0]
        if self.global_pool == "mean":
            return split_tokens(x, layout.extras)[0].mean(1)
        if self.global_pool == "registers":
            return take_tokens(x, layout.registers).mean(1)
        return x[:, -1] if self.global_pool == "last" else x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens (batch, length, embed_dim) to logits (batch, num_classes), or to pooled features."""
        x = self.head_drop(self.pool(x))
        if not pre_logits:
            x = self.head(x)
        return x.amax(1) if self.global_pool == "max" else x

    def _stack(self) -> nn.ModuleList:
        return self.layers

    def forward_intermediates(  # type: ignore[override]  # the argument stands where vision transformers have it
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """`TimmModel.forward_intermediates` of the residual stream after blocks.

        With `return_prefix_tokens`, each comes with its class tokens and then its register tokens.
        """
        how = dict(return_prefix_tokens=return_prefix_tokens)
        return super().forward_intermediates(x, indices, norm, stop_early, output_fmt, intermediates_only, **how)

    def _taps(
        self,
        x: Tensor,
        take: Sequence[int],
        last: int | None,
        norm: bool,
        output_fmt: str,
        return_prefix_tokens: bool = False,
    ) -> tuple[Tensor, list[Any]]:
        tokens, layout = self.embed(x)
        hidden, stream, taken = self._blocks(tokens, layout, take, last)
        taps: list[Any] = []
        for tap in taken:
            tap = self.norm_f(tap) if norm else tap
            patches, _ = split_tokens(tap, layout.extras)
            if output_fmt == "NCHW":
                patches = patches.transpose(1, 2).unflatten(2, layout.grid).contiguous()
            prefix = layout.classes + layout.registers
            taps.append((patches, take_tokens(tap, prefix)) if return_prefix_tokens else patches)
        return add_norm(self.norm_f, hidden, stream, compute_dtype(tokens))[0], taps

    def _prune(self, last: int, prune_norm: bool) -> None:
        self.steps = [step for step in self.steps if step[0] <= last]
        self.layers = self.layers[: self.steps[-1][-1] + 1]
        if prune_norm:
            self.norm_f = nn.Identity()

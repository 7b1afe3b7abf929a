"""What timm expects of a backbone, beside its forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from timm.layers import DropPath
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from vimamba.layers.gate import DirectionGate
from vimamba.layers.mixer import BidirectionalMixer
from vimamba.layers.norm import LayerNorm, NoNorm, RMSNorm
from vimamba.layers.plan import check_choice
from vimamba.layers.tokens import Places, split_tokens


class TimmBackbone(nn.Module):
    """A stack of blocks on one grid of tokens, as `VisionMamba` is: everything around its forward pass."""

    layers: nn.ModuleList
    schedule: list[tuple[int, ...]]
    norm_f: RMSNorm | LayerNorm | NoNorm
    drop_path: DropPath | nn.Identity
    head: nn.Module
    embed_dim: int
    num_classes: int
    gate_sparsity: float

    if TYPE_CHECKING:

        def embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]: ...
        def _places(self, patches: int) -> Places: ...
        def _check_pool(self, pool: str | None) -> str: ...
        def _init_head(self) -> None: ...
        def _blocks(
            self, hidden: Tensor, grid: tuple[int, int], take: Sequence[int] = (), last: int | None = None
        ) -> tuple[Tensor, Tensor | None, list[Tensor]]: ...

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay must leave alone."""
        names = {"pos_embed", "cls_token", "cls_token_head", "cls_token_tail", "reg_tokens"}
        for prefix, module in self.named_modules():
            if isinstance(module, BidirectionalMixer):
                names |= {f"{prefix}.{name}" for name in module.no_weight_decay()}
        return names

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that sort parameters into stem and blocks, for layer-wise learning rates."""
        return {
            "stem": r"^cls_token|^reg_tokens|^pos_embed|^patch_embed",
            "blocks": [(r"^layers\.(\d+)", None), (r"^norm_f", (99999,))],
        }

    def _gates(self) -> list[DirectionGate]:
        return [module for module in self.modules() if isinstance(module, DirectionGate)]

    def set_gate_threshold(self, threshold: float) -> None:
        """In evaluation, skip each direction of a layer whose gate for an image is under `threshold` (0 to 1).

        Raises:
            ValueError: there are no gates, or they are the tokens', not the image's.
        """
        if not self._gates() or self._gates()[0].level != "image":
            raise ValueError('merge="gate" with gate="image" is needed to skip directions')
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold must be from 0 to 1, got {threshold}")
        for gate in self._gates():
            gate.threshold = threshold

    def gate_loss(self) -> Tensor | float:
        """`gate_sparsity` times the mean entropy of the latest gates, to be added to the loss; 0 without gates.

        It is lowest where each layer has chosen one direction for each image, so that skipping the others costs little.
        """
        entropies = [entropy for gate in self._gates() if (entropy := gate.indecision()) is not None]
        return self.gate_sparsity * torch.stack(entropies).mean() if entropies and self.gate_sparsity else 0.0

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
        anchor = next(self.parameters())
        head = nn.Linear(self.embed_dim, num_classes) if num_classes > 0 else nn.Identity()
        self.head = head.to(device=anchor.device, dtype=anchor.dtype)
        with torch.no_grad():
            self._init_head()

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
            return_prefix_tokens: also return the class and register tokens with each map.
            norm: apply the final norm to each.
            stop_early: do not run blocks after the last one asked for.
            output_fmt: "NCHW" maps or "NLC" tokens.
            intermediates_only: return the list alone.

        Returns:
            The list, each (batch, embed_dim, rows, columns), or the normalised tokens and the list.
        """
        check_choice("output_fmt", output_fmt, ("NCHW", "NLC"))
        take, last = feature_take_indices(len(self.layers), indices)
        tokens, grid = self.embed(x)
        hidden, residual, taken = self._blocks(tokens, grid, take, last if stop_early else None)
        outputs: list[Any] = []
        for stream in taken:
            stream = self.norm_f(stream)[0] if norm else stream
            patches, extras = split_tokens(stream, self._places(grid[0] * grid[1]).extras)
            if output_fmt == "NCHW":
                patches = patches.transpose(1, 2).unflatten(2, grid).contiguous()
            outputs.append((patches, extras) if return_prefix_tokens else patches)
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
            self.norm_f = NoNorm()
        if prune_head:
            self.head = nn.Identity()
        return take

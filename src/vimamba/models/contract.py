"""What timm and other people's code expect of a backbone, beside its forward pass."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from timm.layers import trunc_normal_
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from vimamba.layers.gate import GatedModel
from vimamba.layers.mixer import BidirectionalMixer
from vimamba.layers.norm import add_norm, compute_dtype
from vimamba.layers.options import check_choice, check_names, check_number, check_whole
from vimamba.layers.tokens import Layout, Places, split_tokens, take_tokens

try:
    from timm.models._input import update_model_input_size
except ImportError:  # timm before 1.0.31 keeps no record of the size
    update_model_input_size = None  # type: ignore[assignment]


def check_mixer_args(owner: type[nn.Module], given: Mapping[str, Any], own: Sequence[str] = ()) -> None:
    """Raise TypeError if `given` holds a name that is an argument neither of `owner` nor of its mixers.

    `own` are the mixers' arguments that `owner` sets itself.
    """
    mixers = inspect.signature(BidirectionalMixer).parameters.keys() - {"dim", "device", "dtype", *own}
    accepted = [n for n in inspect.signature(owner).parameters if n != "mixer_args"]
    unknown = [name for name in given if name not in mixers]
    check_names(owner.__name__, unknown, [*accepted, *sorted(mixers)])


def drop_path_rates(rate: float, depth: int) -> list[float]:
    """Stochastic depth of each block, rising linearly to `rate`.

    Raises:
        ValueError: the rate is not from 0 to 1.
    """
    check_number("drop_path_rate", rate, 0, 1)
    return [rate * i / max(depth - 1, 1) for i in range(depth)]


class TimmModel(GatedModel):
    """A backbone with a classifier."""

    head: nn.Module
    num_features: int
    num_classes: int
    global_pool: str

    if TYPE_CHECKING:

        def _check_pool(self, pool: str | None) -> str: ...

    def _make_head(self, num_classes: int, **factory: Any) -> nn.Module:
        """A classifier, or nothing for 0 classes."""
        check_whole("num_classes", num_classes, 0)
        return nn.Linear(self.num_features, num_classes, **factory) if num_classes else nn.Identity()

    @torch.no_grad()
    def _init_head(self) -> None:
        if isinstance(self.head, nn.Linear):
            trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay must leave alone."""
        return {
            f"{prefix}.{name}"
            for prefix, module in self.named_modules()
            if isinstance(module, BidirectionalMixer)
            for name in module.no_weight_decay()
        }

    def get_classifier(self) -> nn.Module:
        """The classifier."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a fresh one, and the pooling where it is given."""
        anchor = next(self.parameters())
        head = self._make_head(num_classes, device=anchor.device, dtype=anchor.dtype).train(self.training)
        if global_pool is not None:
            self.global_pool = self._check_pool(global_pool)
        self.num_classes, self.head = num_classes, head
        self._init_head()


class TokenBackbone(TimmModel):
    """A stack of blocks on one grid of tokens, as `VisionMamba` is: everything around its forward pass."""

    layers: nn.ModuleList
    schedule: list[tuple[int, ...]]
    norm_f: nn.Module
    img_size: tuple[int, int]

    if TYPE_CHECKING:

        def embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]: ...
        def _places(self, patches: int) -> Places: ...
        def _blocks(
            self, tokens: Tensor, layout: Layout, take: Sequence[int] = (), last: int | None = None
        ) -> tuple[Tensor, Tensor | None, list[Tensor]]: ...

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

    def _record_input_size(self, patch_size: Any = None) -> None:
        """Tell timm the size that images have from now on, for `timm.data` and for saving."""
        if update_model_input_size is not None:
            update_model_input_size(self, self.img_size, patch_size=patch_size)

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
            return_prefix_tokens: also return the class tokens, then the register tokens with each map.
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
        places = self._places(grid[0] * grid[1])
        hidden, stream, taken = self._blocks(tokens, Layout(grid, places.extras), take, last if stop_early else None)
        outputs: list[Any] = []
        for tap in taken:
            tap = self.norm_f(tap) if norm else tap
            patches, _ = split_tokens(tap, places.extras)
            if output_fmt == "NCHW":
                patches = patches.transpose(1, 2).unflatten(2, grid).contiguous()
            prefix = take_tokens(tap, places.classes + places.registers) if return_prefix_tokens else None
            outputs.append(patches if prefix is None else (patches, prefix))
        if intermediates_only:
            return outputs
        return add_norm(self.norm_f, hidden, stream, compute_dtype(tokens))[0], outputs

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the blocks after the last one of `indices`, and the norm and the classifier where asked."""
        take, last = feature_take_indices(len(self.layers), indices)
        kept = [step for step in self.schedule if step[0] <= last]
        self.schedule = kept
        self.layers = self.layers[: kept[-1][-1] + 1]
        if prune_norm:
            self.norm_f = nn.Identity()
        if prune_head:
            self.head = nn.Identity()
        return take

"""What timm and other people's code expect of a backbone with a classifier, whatever its trunk is."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from timm.layers import trunc_normal_
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from vimamba.layers.mixers import DirectionalMixer, recurrence_options
from vimamba.layers.mixers.gate import DirectionGate, indecision
from vimamba.layers.options import check_choice, check_names, check_number, check_whole


def mixer_args(
    owner: type[nn.Module],
    mixer: Callable[..., DirectionalMixer],
    given: Mapping[str, Any],
    of_directions: Collection[str] = (),
) -> dict[str, Any]:
    """Those of the arguments `given` to a model that its mixers take: their recurrence's, and `of_directions`.

    Raises:
        TypeError: one is an argument neither of the model nor of its mixers.
        ValueError: one is not as the model has it by default, and the recurrence has no use for it.
    """
    known = recurrence_options(mixer) | set(of_directions)
    accepted = {n: parameter.default for n, parameter in inspect.signature(owner).parameters.items()}
    unused = [name for name in given if name not in known]
    check_names(owner.__name__, [name for name in unused if name not in accepted], [*accepted, *sorted(known)])
    for name in unused:
        if given[name] != accepted[name]:
            raise ValueError(f"{name}={given[name]!r} is no option of this model's recurrence: leave {name} out")
    return {name: value for name, value in given.items() if name in known}


def drop_path_rates(rate: float, depth: int) -> list[float]:
    """Stochastic depth of each block, rising linearly to `rate`.

    Raises:
        ValueError: the rate is not from 0 to 1.
    """
    check_number("drop_path_rate", rate, 0, 1)
    return [rate * i / max(depth - 1, 1) for i in range(depth)]


class TimmModel(nn.Module):
    """A backbone of numbered blocks or stages, with a classifier. Its trunk defines what raises NotImplementedError."""

    POOLS: Sequence[str]
    FORMATS: Sequence[str] = ("NCHW",)
    head: nn.Module
    num_features: int
    num_classes: int
    global_pool: str
    gate_sparsity: float
    feature_info: list[dict[str, Any]]

    def _check_pool(self, pool: str | None) -> str:
        check_choice("global_pool", pool, self.POOLS)
        return str(pool)

    def _stack(self) -> nn.ModuleList:
        """The blocks or stages that features are taken from."""
        raise NotImplementedError

    def _taps(self, *args: Any, **kwargs: Any) -> tuple[Tensor, list[Any]]:
        """The normalised output and what the blocks in `take` gave, with none run after `last` unless it is None.

        Takes x, take, last, norm, output_fmt and what else a trunk's `forward_intermediates` has.
        """
        raise NotImplementedError

    def _prune(self, last: int, prune_norm: bool) -> None:
        """Drop the blocks after number `last`, and the norm behind them where asked."""
        raise NotImplementedError

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (batch, in_chans, height, width) to the trunk's normalised output."""
        raise NotImplementedError

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The trunk's output to logits, or to pooled features."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Images (batch, in_chans, height, width) to logits (batch, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def _make_head(self, num_classes: int, **factory: Any) -> nn.Module:
        """A classifier, or nothing for 0 classes."""
        check_whole("num_classes", num_classes, 0)
        return nn.Linear(self.num_features, num_classes, **factory) if num_classes else nn.Identity()

    @torch.no_grad()
    def init_weights(self, needs_reset: bool = True) -> None:
        """Set the initial values, after `to_empty` for one; as timm's, without the reset that modules did when made."""
        if needs_reset:
            for module in reversed(list(self.modules())):  # a mixer's after those of its modules
                reset: Any = getattr(module, "reset_parameters", None)
                if reset is not None:
                    reset()
        self._init_trunk()
        self._init_head()

    def _init_trunk(self) -> None:
        """Set those initial values that modules do not set themselves."""

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
            if isinstance(module, DirectionalMixer)
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

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        **how: Any,
    ) -> Any:
        """Run the model and collect what some of its blocks (of a pyramid: stages) gave.

        Args:
            x: images, (batch, in_chans, height, width).
            indices: the last n blocks, or which ones; all by default.
            norm: apply the final norm to each (of a pyramid: to the last stage's).
            stop_early: do not run blocks after the last one asked for.
            output_fmt: "NCHW" maps, or "NLC" tokens where the trunk has them.
            intermediates_only: return the list alone.
            **how: of the trunk.

        Returns:
            The list, each (batch, channels, rows, columns), or the model's normalised output and the list.
        """
        check_choice("output_fmt", output_fmt, self.FORMATS)
        take, last = feature_take_indices(len(self._stack()), indices)
        output, taps = self._taps(x, take, last if stop_early else None, norm, output_fmt, **how)
        return taps if intermediates_only else (output, taps)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the blocks after the last one of `indices`, and the norm and the classifier where asked."""
        take, last = feature_take_indices(len(self._stack()), indices)
        self._prune(last, prune_norm)
        if prune_head:
            self.reset_classifier(0)
        return take

    def _gates(self) -> list[DirectionGate]:
        return [module for module in self.modules() if isinstance(module, DirectionGate)]

    def set_gate_threshold(self, threshold: float) -> None:
        """In evaluation, skip each direction of a layer whose gate for an image is under `threshold` (0 to 1).

        Raises:
            ValueError: there are no gates, or they are the tokens', not the image's.
        """
        if not self._gates() or self._gates()[0].level != "image":
            raise ValueError('merge="gate" with gate="image" is needed to skip directions')
        check_number("threshold", threshold, 0, 1)
        for gate in self._gates():
            gate.threshold = threshold

    def gate_loss(self, gates: Sequence[Tensor]) -> Tensor | float:
        """`gate_sparsity` times the mean entropy of gates from `collect_gates`, for the loss; 0 if there are none.

            with collect_gates() as gates:
                logits = model(images)
            loss = cross_entropy(logits, targets) + model.gate_loss(gates)

        It is lowest where each layer has chosen one direction for each image, so that skipping the others costs little.
        """
        return self.gate_sparsity * indecision(gates) if gates and self.gate_sparsity else 0.0

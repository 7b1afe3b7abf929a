"""Directions: in which orders tokens are read, which way round, and how what a recurrence makes of each is merged.

Nothing here knows a recurrence, and no recurrence knows an order: it takes one sequence and gives one back.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vimamba.layers.grid import Layout, ScanPath, parse_paths, route, with_token
from vimamba.layers.memory import RECOMPUTE
from vimamba.layers.mixers.gate import LEVELS, DirectionGate
from vimamba.layers.options import check_choice, check_number, check_whole
from vimamba.ops import BlockWeights

for _leaf in ("route", "with_token"):
    torch.fx.wrap(_leaf)  # a symbolic trace calls these as they are

MODES = ("none", "ssm", "ssm_conv")
MERGES = ("mean", "sum", "gate")
PATH_WEIGHTS = ("own", "shared")


class Scan(NamedTuple):
    """One direction: the path it reads, which way round, and the endings of its weights' names."""

    path: ScanPath
    reverse: bool
    weights: str
    projections: str
    """The ending of those weights that mode "ssm" shares between both ways round: all but the decay."""


def scans_of(paths: Sequence[ScanPath], mode: str, path_weights: str) -> tuple[Scan, ...]:
    """Every direction that `paths` and `mode` make; the first path has the official names."""
    scans = []
    for i, path in enumerate(paths):
        ending = "" if i == 0 or path_weights == "shared" else f"_{path.name}"
        scans.append(Scan(path, bool(path.reverse), ending, ending))
        if path.reverse is None and mode != "none":
            scans.append(Scan(path, True, f"{ending}_b", ending if mode == "ssm" else f"{ending}_b"))
    return tuple(scans)


class DirectionalMixer(nn.Module):
    """Mix tokens by a recurrence along several directions, and merge what they give.

    A recurrence is a module whose forward takes (batch, length, dim) and `reverse`, and gives the same shape: at each
    step from what came before, or, reversed, from what comes after. `BidirectionalMixer` is this mixer over Mamba's,
    with the official names and all the directions of a path in one kernel.

    Args:
        dim: token channels.
        recurrence: makes the recurrence of a direction, from `dim`, `device`, `dtype` and `recurrence_args`. Or None:
            a subclass defines `along_path`.
        mode: "none" is one direction; "ssm_conv" has a recurrence of its own for each way round; "ssm", the decay
            only, for recurrences that know to share the rest.
        merge: "mean" or "sum" of the directions, or "gate": their mean, each weighed by a learned gate.
        paths: the orders in which the grid is read, see `layers.grid.ScanPath`; each is read both ways round or not,
            as `mode` says, unless it says so itself.
        path_weights: "own" weights for each path, or those of the first "shared" by all.
        gate: "image" or "token": what a gate is computed for.
        pooled_token: put the mean of the tokens in front of those a single direction reads (arXiv 2410.07599).
        layer_scale: initial value of a learned factor on each output channel, or None for no such factor.
        recompute: when the backward pass computes the norm in front of the mixer again, and what else a recurrence
            makes cheaply of its input, instead of keeping it: "long" (from 2048 tokens on), "always" or "never".
        device, dtype: of the weights.
        **recurrence_args: for each recurrence.

    Raises:
        ValueError: an argument is impossible; the message names it.
    """

    gate: DirectionGate | None
    gamma: nn.Parameter | None

    def __init__(
        self,
        dim: int,
        recurrence: Callable[..., nn.Module] | None,
        mode: str = "ssm_conv",
        merge: str = "mean",
        paths: Sequence[str | ScanPath] = ("row",),
        path_weights: str = "own",
        gate: str = "image",
        pooled_token: bool = False,
        layer_scale: float | None = None,
        recompute: str = "long",
        device: Any = None,
        dtype: torch.dtype | None = None,
        **recurrence_args: Any,
    ) -> None:
        super().__init__()
        for name, value, allowed in (
            ("mode", mode, MODES),
            ("merge", merge, MERGES),
            ("path_weights", path_weights, PATH_WEIGHTS),
            ("gate", gate, LEVELS),
            ("recompute", recompute, RECOMPUTE),
        ):
            check_choice(name, value, allowed)
        check_whole("dim", dim)
        if layer_scale is not None:
            check_number("layer_scale", layer_scale, -math.inf)
        self.mode, self.merge, self.pooled_token, self.layer_scale = mode, merge, pooled_token, layer_scale
        self.recompute = recompute
        self.paths = parse_paths(paths)
        self.scans = scans_of(self.paths, mode, path_weights)
        of_paths = [[scan for scan in self.scans if scan.path == path] for path in self.paths]
        firsts = itertools.accumulate((len(scans) for scans in of_paths), initial=0)
        self.scans_of_paths = list(zip(self.paths, firsts, of_paths, strict=False))
        """Each path, the number of its first scan, and its scans."""
        if pooled_token and (len(self.scans) > 1 or not self.paths[0].along_rows):
            raise ValueError("pooled_token stands in front of one direction along the rows, but the mixer has others")
        if merge == "gate" and len(self.scans) == 1:
            raise ValueError('merge="gate" needs two directions or more to choose from, but the mixer has one')
        if recurrence is None:
            return
        if mode == "ssm":
            raise ValueError('mode="ssm" shares projections that this recurrence does not have: give "ssm_conv"')
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        for ending in dict.fromkeys(scan.weights for scan in self.scans):
            setattr(self, f"recurrence{ending}", recurrence(dim, **recurrence_args, **dd))
        self._add_merge(dim, gate, **dd)

    def _add_merge(self, dim: int, gate: str, **factory: Any) -> None:
        """The weights of the merge: gates, and the factor on each channel."""
        self.gate = DirectionGate(dim, len(self.scans), gate, **factory) if self.merge == "gate" else None
        scale = self.layer_scale
        self.gamma = None if scale is None else nn.Parameter(torch.full((dim,), float(scale), **factory))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the initial values again of what is the mixer's own; its modules reset themselves."""
        if self.gamma is not None:
            nn.init.constant_(self.gamma, float(self.layer_scale))  # type: ignore[arg-type]

    @property
    def first_weight(self) -> Any:
        """The weight that meets the tokens first, in whose type they are wanted; None if there is none."""
        return next(self.parameters(), None)

    def joined(self, norm: Tensor) -> BlockWeights | None:
        """The weights with which `ops.blocks` computes the mixer behind a norm; None where it cannot."""
        return None

    def no_weight_decay(self) -> set[str]:
        """Parameters that keep their scale: biases, and those that a recurrence names."""
        kept = {name for name, _ in self.named_parameters() if name.endswith("bias")}
        for prefix, module in self.named_children():
            for name in getattr(module, "no_weight_decay", set)():
                kept.add(f"{prefix}.{name}")
        return kept

    def forward(
        self,
        x: Tensor,
        reverse: bool = False,
        layout: Layout | None = None,
        compute: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        """Mix the tokens of a sequence.

        Args:
            x: (batch, length, dim).
            reverse: give what the flipped sequence would give, flipped back.
            layout: where the tokens stand on the grid; without one they may only be read in "row" order.
            compute: computes x again, so that the backward pass need not keep it.

        Returns:
            (batch, length, dim).

        Raises:
            ValueError: a path needs the layout and there is none, or it is that of another sequence.
        """
        gates = self.gate(x) if self.gate is not None else None
        backward = self.scans[0].reverse != reverse
        if self.pooled_token:
            mean = x.mean(1, keepdim=True)
            x, compute = torch.cat([x, mean] if backward else [mean, x], dim=1), None
            layout = None if layout is None else with_token(layout, x.shape[1] - 1 if backward else 0)
        weights = self._weights(gates)
        out = self.around(lambda u: self._merged(u, weights, reverse, layout), x, layout, compute)
        if self.pooled_token:
            out = out[:, :-1] if backward else out[:, 1:]
        return out if self.gamma is None else out * self.gamma

    def around(
        self, directions: Callable[[Tensor], Tensor], x: Tensor, layout: Layout | None, compute: Any = None
    ) -> Tensor:
        """What stands around the directions and knows no order, such as projections in front and behind: nothing."""
        return directions(x)

    def along_path(
        self, u: Tensor, scans: Sequence[Scan], reverse: bool, scale: float, weights: Tensor | None
    ) -> Tensor:
        """The weighted sum of directions over tokens in their order, times `scale`; (batch, length, ...) to that.

        Under a weight of 0 a direction is computed all the same: what its modules do may be wanted.
        """
        total: Tensor | None = None
        for i, scan in enumerate(scans):
            y = self.one_direction(u, scan, reverse)
            y = y if weights is None else y * weights[..., i : i + 1].to(y.dtype)
            total = y if total is None else total + y
        assert total is not None
        return total * scale

    def one_direction(self, u: Tensor, scan: Scan, reverse: bool) -> Tensor:
        """One direction over tokens in their order; `reverse` turns it round."""
        return self._modules[f"recurrence{scan.weights}"](u, reverse=scan.reverse != reverse)  # type: ignore[misc]

    def _weights(self, gates_BLG: Tensor | None) -> Tensor | None:
        """What each direction counts, 1 where all count alike; in evaluation 0 for those under the threshold.

        The directions that are kept then stand for the others: together they weigh as much as all would.
        """
        if gates_BLG is None or self.gate is None:
            return None
        if self.skips:
            kept_BLG = gates_BLG * (gates_BLG >= self.gate.threshold)
            total_BL1 = kept_BLG.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
            all_kept_BL1 = (kept_BLG > 0).all(-1, keepdim=True)
            gates_BLG = torch.where(all_kept_BL1, gates_BLG, kept_BLG / total_BL1)
        return len(self.scans) * gates_BLG

    @property
    def skips(self) -> bool:
        """Whether directions whose weight is 0 need not be computed."""
        return self.gate is not None and self.gate.threshold > 0 and not self.training

    @property
    def merge_scale(self) -> float:
        """What every direction counts in the merge, beside its weight."""
        return 1.0 if self.merge == "sum" else 1 / len(self.scans)

    def _merged(self, u: Tensor, weights_BLG: Tensor | None, reverse: bool, layout: Layout | None) -> Tensor:
        """The sum or mean over all directions: one call, and at most one gather each way, for each path."""
        scale = self.merge_scale
        total: Tensor | None = None
        for path, first, scans in self.scans_of_paths:
            weights = None if weights_BLG is None else weights_BLG[..., first : first + len(scans)]
            if path.along_rows:
                y = self.along_path(u, scans, reverse, scale, weights)
            else:
                found = route(path, needed(layout, f'paths: "{path.name}"'), u)
                if weights is not None and self.gate is not None and self.gate.level == "token":
                    weights = weights.index_select(1, found.order)
                y = self.along_path(u.index_select(1, found.order), scans, reverse, scale, weights)
                y = y.index_select(1, found.rank)
            total = y if total is None else total + y
        assert total is not None
        return total


def needed(layout: Layout | None, what: str) -> Layout:
    """The layout; raise ValueError if there is none."""
    if layout is None:
        raise ValueError(f"{what} needs the grid, but the mixer was called without a layout")
    return layout

"""The bidirectional Mamba mixer: input projection, the directions, output projection."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vimamba.layers import composed, recompute
from vimamba.layers.gate import LEVELS, DirectionGate
from vimamba.layers.intact import intact, watched
from vimamba.layers.options import check_choice, check_number, check_whole
from vimamba.layers.paths import Path, parse_paths, route
from vimamba.layers.tokens import Layout, insert_tokens, split_tokens, with_token
from vimamba.ops import Direction, linear, mixer

for _leaf in ("insert_tokens", "mixer", "route", "split_tokens", "with_token"):
    torch.fx.wrap(_leaf)  # a symbolic trace calls these as they are

MODES = ("none", "ssm", "ssm_conv")
MERGES = ("mean", "sum", "gate")
PATH_WEIGHTS = ("own", "shared")
CONVS = ("1d", "2d")


class Way(NamedTuple):
    """One direction of a mixer: its path, the names of its weights, and the sense of its two recurrences."""

    path: Path
    conv1d: str
    x_proj: str
    dt_proj: str
    D: str
    A_log: str
    conv_reverse: bool
    scan_reverse: bool


def _way(path: Path, suffix: str, A_log: str, conv_reverse: bool, scan_reverse: bool) -> Way:
    conv1d, x_proj, dt_proj, D = (f"{name}{suffix}" for name in ("conv1d", "x_proj", "dt_proj", "D"))
    return Way(path, conv1d, x_proj, dt_proj, D, A_log, conv_reverse, scan_reverse)


def ways_of(paths: Sequence[Path], mode: str, path_weights: str) -> list[Way]:
    """Every direction that `paths` and `mode` make; the first path has the official names."""
    ways = []
    for i, path in enumerate(paths):
        own = "" if i == 0 or path_weights == "shared" else f"_{path.name}"
        forward, back_A = f"A{own}_log", f"A{own}_b_log"
        if path.sense != "both" or mode == "none":
            backward = path.sense == "backward"
            ways.append(_way(path, own, forward, backward, backward))
        elif mode == "ssm":
            ways += [_way(path, own, forward, False, False), _way(path, own, back_A, False, True)]
        else:
            ways += [_way(path, own, forward, False, False), _way(path, f"{own}_b", back_A, True, True)]
    return ways


class BidirectionalMixer(nn.Module):
    """Mix tokens along the sequence forwards and backwards (arXiv 2401.09417, section 3.3, algorithm 1).

    Args:
        dim: token channels.
        d_state: state size of each channel.
        d_conv: width of the causal convolution.
        expand: inner channels per token channel.
        dt_rank: rank of the step-size projection; "auto" is ceil(dim / 16).
        mode: "none" is one direction; "ssm" scans back with its own A over the same convolution and projections
            (the official v1); "ssm_conv" has everything of its own for each direction (v2, the published models).
        merge: "mean" or "sum" of the directions, or "gate": their mean, each weighed by a learned gate.
        paths: the orders in which the grid is read, see `layers.paths`; each is read in the senses that `mode` says,
            unless it names its own.
        path_weights: "own" weights for each path, or those of the first "shared" by all.
        gate: "image" or "token": what a gate is computed for.
        conv: "1d", the causal convolution of each direction, or "2d": one of 3×3 on the grid in front of all of them;
            tokens that are not patches pass it by.
        pooled_token: put the mean of the tokens in front of those a single direction reads (arXiv 2410.07599).
        dt_min, dt_max: range of the initial step sizes.
        dt_init: "random" or "constant" initial weights of the step-size projection.
        dt_scale, dt_init_floor: scale of those weights, and lower bound of the initial step sizes.
        conv_bias: bias of the convolution.
        bias: bias of the input and output projections.
        layer_scale: initial value of a learned factor on each output channel, or None for no such factor.
        device, dtype: of the weights.

    Raises:
        ValueError: an argument is impossible; the message names it.
    """

    def __init__(
        self,
        dim: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | str = "auto",
        mode: str = "ssm_conv",
        merge: str = "mean",
        paths: Sequence[str | Path] = ("row",),
        path_weights: str = "own",
        gate: str = "image",
        conv: str = "1d",
        pooled_token: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        layer_scale: float | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value, allowed in (
            ("mode", mode, MODES),
            ("merge", merge, MERGES),
            ("path_weights", path_weights, PATH_WEIGHTS),
            ("gate", gate, LEVELS),
            ("conv", conv, CONVS),
            ("dt_init", dt_init, ("random", "constant")),
        ):
            check_choice(name, value, allowed)
        for name, size in (("dim", dim), ("d_state", d_state), ("d_conv", d_conv)):
            check_whole(name, size)
        for name, number in (("expand", expand), ("dt_min", dt_min), ("dt_max", dt_max), ("dt_scale", dt_scale)):
            check_number(name, number, above=True)
        check_number("dt_init_floor", dt_init_floor)
        if layer_scale is not None:
            check_number("layer_scale", layer_scale, -math.inf)
        if dt_max < dt_min:
            raise ValueError(f"dt_max must not be below dt_min={dt_min}, got {dt_max}")
        inner = int(expand * dim)
        if inner < 1:
            raise ValueError(f"expand={expand} leaves no inner channel of dim={dim}")
        if dt_rank != "auto":
            check_whole("dt_rank", dt_rank)
        rank = math.ceil(dim / 16) if dt_rank == "auto" else int(dt_rank)
        self.mode, self.merge = mode, merge
        self.paths = parse_paths(paths)
        self.ways = ways_of(self.paths, mode, path_weights)
        self.pooled_token = pooled_token
        if pooled_token and (len(self.ways) > 1 or not self.paths[0].along_rows):
            raise ValueError("pooled_token stands in front of one direction along the rows, but the mixer has others")
        if merge == "gate" and len(self.ways) == 1:
            raise ValueError('merge="gate" needs two directions or more to choose from, but the mixer has one')
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        self.in_proj = nn.Linear(dim, 2 * inner, bias=bias, **dd)
        for way in {way.D: way for way in self.ways}.values():
            if conv == "1d":
                causal = nn.Conv1d(inner, inner, d_conv, groups=inner, padding=d_conv - 1, bias=conv_bias, **dd)
                setattr(self, way.conv1d, causal)
            dt_proj = nn.Linear(rank, inner, **dd)
            _init_dt(dt_proj, dt_min, dt_max, dt_init, dt_scale, dt_init_floor)
            setattr(self, way.x_proj, nn.Linear(inner, rank + 2 * d_state, bias=False, **dd))
            setattr(self, way.dt_proj, dt_proj)
            setattr(self, way.D, nn.Parameter(torch.ones(inner, **dd)))
        for name in dict.fromkeys(way.A_log for way in self.ways):
            steps = torch.arange(1, d_state + 1, dtype=torch.float32, device=device)
            setattr(self, name, nn.Parameter(steps.log().repeat(inner, 1).to(dtype or torch.get_default_dtype())))
        two = conv == "2d"
        self.conv2d = nn.Conv2d(inner, inner, 3, groups=inner, padding=1, bias=conv_bias, **dd) if two else None
        self.gate = DirectionGate(dim, len(self.ways), gate, **dd) if merge == "gate" else None
        self.out_proj = nn.Linear(inner, dim, bias=bias, **dd)
        self.gamma = None if layer_scale is None else nn.Parameter(torch.full((dim,), float(layer_scale), **dd))

    def no_weight_decay(self) -> set[str]:
        """Parameters that keep their scale: A and D of every direction, and the biases that set the time scale."""
        kept = {name for way in self.ways for name in (way.A_log, way.D)}
        return {n for n, _ in self.named_parameters() if n in kept or n.endswith("bias")}

    def _direction(self, way: Way, reverse: bool) -> Direction:
        modules: dict[str, Any] = self._modules  # getattr for a module takes ten times as long
        D = getattr(self, way.D)
        x_proj, dt_proj = modules[way.x_proj], modules[way.dt_proj]
        if self.conv2d is not None:  # its output only has its SiLU to come: a convolution of width 1
            taps, bias = D.new_ones(D.shape[0], 1), D.new_zeros(D.shape[0])
        else:
            conv = modules[way.conv1d]
            taps = conv.weight
            bias = conv.bias if conv.bias is not None else taps.new_zeros(taps.shape[0])
        return Direction(
            conv_weight=taps,
            conv_bias=bias,
            x_proj_weight=x_proj.weight,
            dt_proj_weight=dt_proj.weight,
            dt_bias=dt_proj.bias,
            A_log=getattr(self, way.A_log),
            D=D,
            conv_reverse=way.conv_reverse != reverse,
            scan_reverse=way.scan_reverse != reverse,
        )

    def directions(self, reverse: bool = False) -> list[Direction]:
        """The weights and sense of each direction; `reverse` turns all of them round."""
        return [self._direction(way, reverse) for way in self.ways]

    def forward(
        self,
        x: Tensor,
        reverse: bool = False,
        layout: Layout | None = None,
        again: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        """(batch, length, dim) to the same; `reverse` gives what the flipped sequence would, flipped back.

        `layout` says where the tokens stand on the grid; only paths other than "row" and conv="2d" need it. `again`
        computes x again, so that the backward pass of a long sequence need not keep it.
        """
        gates = self.gate(x) if self.gate is not None else None
        backward = self.ways[0].scan_reverse != reverse
        if self.pooled_token:
            mean = x.mean(1, keepdim=True)
            x, again = torch.cat([x, mean] if backward else [mean, x], dim=1), None
            layout = None if layout is None else with_token(layout, x.shape[1] - 1 if backward else 0)
        xz = _project(self.in_proj, x)
        if self.conv2d is not None:
            xz = self._convolve_grid(xz, _needed(layout, 'conv="2d"'))
        keeping: AbstractContextManager = nullcontext()
        if recompute.pays(x) and self.conv2d is None and intact(self.in_proj, nn.Linear):
            keeping = recompute.instead_of(xz, self._projection(x, again, xz.dtype))
        with keeping:
            y = self._merged(xz, self._weights(gates), reverse, layout)
        out = _project(self.out_proj, y)
        if self.pooled_token:
            out = out[:, :-1] if backward else out[:, 1:]
        return out if self.gamma is None else out * self.gamma

    def _projection(self, x: Tensor, again: Callable[[], Tensor] | None, dtype: torch.dtype) -> Callable[[], Tensor]:
        """Computes in_proj again, in the type that autocast gave it."""
        kept = x.detach() if again is None else None

        def project() -> Tensor:
            source = again() if kept is None else kept  # type: ignore[misc]
            bias = None if self.in_proj.bias is None else self.in_proj.bias.to(dtype)
            with torch.autocast(source.device.type, enabled=False):
                return F.linear(source.to(dtype), self.in_proj.weight.to(dtype), bias)

        return project

    def _convolve_grid(self, xz_BLE: Tensor, layout: Layout) -> Tensor:
        """The 2-D convolution of the patches' input half; the gate and the other tokens stay."""
        assert self.conv2d is not None
        x_BLD, z_BLD = xz_BLE.chunk(2, dim=-1)
        patches, others = split_tokens(x_BLD, layout.extras)
        patches = self.conv2d(patches.transpose(1, 2).unflatten(2, layout.grid)).flatten(2).transpose(1, 2)
        return torch.cat([insert_tokens(patches, others, layout.extras), z_BLD], dim=-1)

    def _weights(self, gates_BLG: Tensor | None) -> Tensor | None:
        """What each direction counts, 1 where all count alike; in evaluation 0 for those under the threshold.

        The directions that are kept then stand for the others: together they weigh as much as all would.
        """
        if gates_BLG is None or self.gate is None:
            return None
        if self._skips():
            kept_BLG = gates_BLG * (gates_BLG >= self.gate.threshold)
            total_BL1 = kept_BLG.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
            all_kept_BL1 = (kept_BLG > 0).all(-1, keepdim=True)
            gates_BLG = torch.where(all_kept_BL1, gates_BLG, kept_BLG / total_BL1)
        return len(self.ways) * gates_BLG

    def _skips(self) -> bool:
        return self.gate is not None and self.gate.threshold > 0 and not self.training

    def _merged(self, xz_BLE: Tensor, weights_BLG: Tensor | None, reverse: bool, layout: Layout | None) -> Tensor:
        """The sum or mean over all directions: one call, and at most one gather each way, for each path."""
        total: Tensor | None = None
        for path in self.paths:
            along = [i for i, way in enumerate(self.ways) if way.path is path]
            gates = None if weights_BLG is None else weights_BLG[..., along[0] : along[-1] + 1]
            ways = [self.ways[i] for i in along]
            if path.along_rows:
                y = self._mixed(xz_BLE, ways, gates, reverse)
            else:
                way = route(path, _needed(layout, f'paths: "{path.name}"'), xz_BLE)
                assert way is not None
                if gates is not None and self.gate is not None and self.gate.level == "token":
                    gates = gates.index_select(1, way.order)
                y = self._mixed(xz_BLE.index_select(1, way.order), ways, gates, reverse).index_select(1, way.rank)
            total = y if total is None else total + y
        assert total is not None
        return total

    def _mixed(self, xz_BLE: Tensor, ways: list[Way], gates: Tensor | None, reverse: bool) -> Tensor:
        """The directions of one path, whose tokens lie in order: fused, unless a module was replaced or is hooked."""
        scale = 1.0 if self.merge == "sum" else 1 / len(self.ways)
        if all(self._fusible(way) for way in ways):
            return mixer(xz_BLE, [self._direction(way, reverse) for way in ways], scale, gates, skip=self._skips())
        modules: dict[str, Any] = self._modules
        parts = [
            composed.Modules(
                modules[way.conv1d] if self.conv2d is None else None,
                modules[way.x_proj],
                modules[way.dt_proj],
                getattr(self, way.A_log),
                getattr(self, way.D),
                way.conv_reverse != reverse,
                way.scan_reverse != reverse,
            )
            for way in ways
        ]
        return composed.mixer(xz_BLE, parts, scale, gates)

    def _fusible(self, way: Way) -> bool:
        modules: dict[str, Any] = self._modules
        return (
            intact(modules[way.x_proj], nn.Linear)
            and intact(modules[way.dt_proj], nn.Linear)
            and (self.conv2d is not None or intact(modules[way.conv1d], nn.Conv1d))
        )


def _project(module: nn.Module, x: Tensor) -> Tensor:
    """A linear layer, by the kernels of `ops.linear` where it is one."""
    if isinstance(module, nn.Linear) and intact(module, nn.Linear) and not watched(x):
        return linear(x, module.weight, module.bias)
    return module(x)


def _needed(layout: Layout | None, what: str) -> Layout:
    if layout is None:
        raise ValueError(f"{what} needs the grid, but the mixer was called without a layout")
    return layout


def _init_dt(
    dt_proj: nn.Linear, dt_min: float, dt_max: float, dt_init: str, dt_scale: float, dt_init_floor: float
) -> None:
    """Weights that keep the variance, and a bias whose softplus is log-uniform in [dt_min, dt_max]."""
    bound = dt_proj.in_features**-0.5 * dt_scale
    if dt_init == "constant":
        nn.init.constant_(dt_proj.weight, bound)
    else:
        nn.init.uniform_(dt_proj.weight, -bound, bound)
    low, high = math.log(dt_min), math.log(dt_max)
    random = torch.rand(dt_proj.out_features, dtype=torch.float32, device=dt_proj.bias.device)
    dt = torch.exp(random * (high - low) + low).clamp(min=dt_init_floor)
    with torch.no_grad():
        dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus

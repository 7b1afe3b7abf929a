"""The bidirectional Mamba mixer: input projection, the directions, output projection."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vimamba.ops import Direction, mixer

MODES = ("none", "ssm", "ssm_conv")
MERGES = ("mean", "sum")


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
        merge: "mean" or "sum" of the directions.
        dt_min, dt_max: range of the initial step sizes.
        dt_init: "random" or "constant" initial weights of the step-size projection.
        dt_scale, dt_init_floor: scale of those weights, and lower bound of the initial step sizes.
        conv_bias: bias of the convolution.
        bias: bias of the input and output projections.
        layer_scale: initial value of a learned factor on each output channel, or None for no such factor.
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
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        layer_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.mode, self.merge = mode, merge
        inner = int(expand * dim)
        rank = math.ceil(dim / 16) if dt_rank == "auto" else int(dt_rank)
        self.in_proj = nn.Linear(dim, 2 * inner, bias=bias)
        for suffix in ("", "_b") if mode == "ssm_conv" else ("",):
            conv = nn.Conv1d(inner, inner, d_conv, groups=inner, padding=d_conv - 1, bias=conv_bias)
            dt_proj = nn.Linear(rank, inner)
            _init_dt(dt_proj, dt_min, dt_max, dt_init, dt_scale, dt_init_floor)
            setattr(self, f"conv1d{suffix}", conv)
            setattr(self, f"x_proj{suffix}", nn.Linear(inner, rank + 2 * d_state, bias=False))
            setattr(self, f"dt_proj{suffix}", dt_proj)
            setattr(self, f"D{suffix}", nn.Parameter(torch.ones(inner)))
        for name in ("A_log",) if mode == "none" else ("A_log", "A_b_log"):
            steps = torch.arange(1, d_state + 1, dtype=torch.float32)
            setattr(self, name, nn.Parameter(steps.log().repeat(inner, 1)))
        self.out_proj = nn.Linear(inner, dim, bias=bias)
        self.gamma = None if layer_scale is None else nn.Parameter(torch.full((dim,), float(layer_scale)))

    def no_weight_decay(self) -> set[str]:
        """Parameters that keep their scale: A and D of every direction, and the biases that set the time scale."""
        kept = ("A_log", "A_b_log", "D", "D_b")
        return {n for n, _ in self.named_parameters() if n in kept or n.endswith("bias")}

    def _direction(self, suffix: str, name_A: str, conv_reverse: bool, scan_reverse: bool) -> Direction:
        conv = getattr(self, f"conv1d{suffix}")
        dt_proj = getattr(self, f"dt_proj{suffix}")
        log_A = getattr(self, name_A)
        return Direction(
            conv_weight=conv.weight.squeeze(1),
            conv_bias=conv.bias if conv.bias is not None else conv.weight.new_zeros(conv.weight.shape[0]),
            x_proj_weight=getattr(self, f"x_proj{suffix}").weight,
            dt_proj_weight=dt_proj.weight,
            dt_bias=dt_proj.bias,
            A=-torch.exp(log_A if log_A.dtype == torch.float64 else log_A.float()),
            D=getattr(self, f"D{suffix}"),
            conv_reverse=conv_reverse,
            scan_reverse=scan_reverse,
        )

    def directions(self, reverse: bool = False) -> list[Direction]:
        """The weights and sense of each direction; `reverse` turns all of them round."""
        ways = [self._direction("", "A_log", reverse, reverse)]
        if self.mode == "ssm":
            ways.append(self._direction("", "A_b_log", reverse, not reverse))
        elif self.mode == "ssm_conv":
            ways.append(self._direction("_b", "A_b_log", not reverse, not reverse))
        return ways

    def forward(self, x: Tensor, reverse: bool = False) -> Tensor:
        """(batch, length, dim) to the same; `reverse` gives what the flipped sequence would, flipped back."""
        ways = self.directions(reverse)
        y = mixer(self.in_proj(x), ways, 1 / len(ways) if self.merge == "mean" else 1.0)
        out = self.out_proj(y)
        return out if self.gamma is None else out * self.gamma


def _init_dt(
    dt_proj: nn.Linear, dt_min: float, dt_max: float, dt_init: str, dt_scale: float, dt_init_floor: float
) -> None:
    """Weights that keep the variance, and a bias whose softplus is log-uniform in [dt_min, dt_max]."""
    bound = dt_proj.in_features**-0.5 * dt_scale
    if dt_init == "constant":
        nn.init.constant_(dt_proj.weight, bound)
    elif dt_init == "random":
        nn.init.uniform_(dt_proj.weight, -bound, bound)
    else:
        raise ValueError(f'dt_init must be "random" or "constant", got {dt_init!r}')
    low, high = math.log(dt_min), math.log(dt_max)
    dt = torch.exp(torch.rand(dt_proj.out_features) * (high - low) + low).clamp(min=dt_init_floor)
    with torch.no_grad():
        dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus

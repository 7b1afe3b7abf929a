"""The official model's arithmetic, written a second time from its description: flips, no fused ops, no classes.

It follows the published code's results with its quirks, for every switch of its constructor, so that `load_hustvl` has
something to be compared with beyond the golden file.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def scan(c: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """c, delta (batch, length, dim), B, C (batch, length, state)."""
    h = torch.zeros(c.shape[0], c.shape[2], A.shape[1], dtype=c.dtype)
    ys = []
    for t in range(c.shape[1]):
        step = delta[:, t, :, None]
        h = torch.exp(step * A) * h + step * B[:, t, None] * c[:, t, :, None]
        ys.append((h * C[:, t, None]).sum(-1) + D * c[:, t])
    return torch.stack(ys, dim=1)


def inner(xz: Tensor, w: dict[str, Tensor], suffix: str, A_names: list[str]) -> Tensor:
    """Convolution, projections and the scan with each of `A_names`, the second over the flipped sequence."""
    x, z = xz.chunk(2, dim=-1)
    weight, bias = w[f"conv1d{suffix}.weight"], w.get(f"conv1d{suffix}.bias")
    padded = F.pad(x.transpose(1, 2), (weight.shape[-1] - 1, 0))
    c = F.silu(F.conv1d(padded, weight, bias, groups=weight.shape[0])).transpose(1, 2)
    rank, state = w[f"dt_proj{suffix}.weight"].shape[1], w["A_log"].shape[1]
    dt, B, C = F.linear(c, w[f"x_proj{suffix}.weight"]).split([rank, state, state], dim=-1)
    delta = F.softplus(F.linear(dt, w[f"dt_proj{suffix}.weight"], w[f"dt_proj{suffix}.bias"]))
    inputs = [c, delta, B, C]
    total = torch.zeros_like(c)
    for i, name in enumerate(A_names):
        if i:
            inputs = [t.flip(1) for t in inputs]
        y = scan(inputs[0], inputs[1], -torch.exp(w[name]), inputs[2], inputs[3], w[f"D{suffix}"])
        total = total + (y.flip(1) if i else y)
    return total * F.silu(z)


def mixer(x: Tensor, w: dict[str, Tensor], kind: str, divide: bool) -> Tensor:
    xz = F.linear(x, w["in_proj.weight"], w.get("in_proj.bias"))
    if kind == "v2":
        y = inner(xz, w, "", ["A_log"]) + inner(xz.flip(1), w, "_b", ["A_b_log"]).flip(1)
        y = y / 2 if divide else y
    else:
        y = inner(xz, w, "", ["A_log", "A_b_log"] if kind == "v1" else ["A_log"])
    out = F.linear(y, w["out_proj.weight"], w.get("out_proj.bias"))
    return out * w["gamma"] if "gamma" in w else out


def norm(x: Tensor, w: dict[str, Tensor], name: str, eps: float) -> Tensor:
    if f"{name}.bias" in w:
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * w[f"{name}.weight"]


def rope(x: Tensor, side: int, pretrained_side: int) -> Tensor:
    """Every token is rotated, or all but the first where their number is odd."""
    half = x.shape[-1] // 2
    frequencies = 1.0 / 10000 ** (torch.arange(0, half, 2, dtype=x.dtype) / half)
    angle = (torch.arange(side, dtype=x.dtype) / side * pretrained_side)[:, None] * frequencies
    angle = angle.repeat_interleave(2, dim=1)
    grid = torch.cat([angle[:, None].expand(-1, side, -1), angle[None].expand(side, -1, -1)], dim=-1)
    angles = grid.reshape(side * side, -1)
    kept, turned = (x[:, :1], x[:, 1:]) if x.shape[1] % 2 else (x[:, :0], x)
    pairs = torch.stack((-turned[..., 1::2], turned[..., ::2]), dim=-1).flatten(-2)
    return torch.cat([kept, turned * angles.cos() + pairs * angles.sin()], dim=1)


def tokens_of(images: Tensor, w: dict[str, Tensor], config: dict[str, Any]) -> tuple[Tensor, list[int]]:
    x = F.conv2d(images, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], config.get("stride", 16))
    x = x.flatten(2).transpose(1, 2)
    batch, patches, _ = x.shape
    places: list[int] = []
    if "cls_token_head" in w:
        ends = (w["cls_token_head"].expand(batch, -1, -1), w["cls_token_tail"].expand(batch, -1, -1))
        x, places = torch.cat([ends[0], x, ends[1]], dim=1), [0, patches + 1]
    elif "cls_token" in w:
        place = patches // 2 if config.get("use_middle_cls_token", True) else 0
        x = torch.cat([x[:, :place], w["cls_token"].expand(batch, -1, -1), x[:, place:]], dim=1)
        places = [place]
    return (x + w["pos_embed"] if "pos_embed" in w else x), places


def layer(i: int, hidden, residual, w, config):
    residual = hidden if residual is None else residual + hidden
    prefix = f"layers.{i}.mixer."
    mine = {k.removeprefix(prefix): v for k, v in w.items() if k.startswith(prefix)}
    normed = norm(residual, w, f"layers.{i}.norm", config.get("norm_epsilon", 1e-5))
    return mixer(normed, mine, config["bimamba_type"], config.get("if_divide_out", True)), residual


def forward(images: Tensor, w: dict[str, Tensor], config: dict[str, Any], depth: int) -> Tensor:
    """Logits."""
    hidden, places = tokens_of(images, w, config)
    side = round((hidden.shape[1] - len(places)) ** 0.5)
    residual = None
    pairs = config.get("if_bidirectional", False)
    for i in range(0, depth, 2 if pairs else 1):
        if config.get("if_rope"):
            hidden = rope(hidden, side, config.get("pt_hw_seq_len", 14))
            if residual is not None and config.get("if_rope_residual"):
                residual = rope(residual, side, config.get("pt_hw_seq_len", 14))
        before = residual
        out, residual_f = layer(i, hidden, before, w, config)
        residual = residual_f
        if pairs:
            flipped = None if before is None else before.flip(1)
            out_b, residual_b = layer(i + 1, hidden.flip(1), flipped, w, config)
            out, residual = out + out_b.flip(1), residual_f + residual_b.flip(1)
        hidden = out
    x = norm(residual + hidden, w, "norm_f", config.get("norm_epsilon", 1e-5))
    head = (w["head.weight"], w["head.bias"])
    if places:
        return F.linear(x[:, places].mean(1), *head)
    pool = config.get("final_pool_type", "none")
    if pool in ("max", "all"):
        logits = F.linear(x, *head)
        return logits.amax(1) if pool == "max" else logits
    return F.linear(x[:, -1] if pool == "none" else x.mean(1), *head)

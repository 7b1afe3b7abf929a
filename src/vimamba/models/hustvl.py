"""Checkpoints of the official code (hustvl/Vim) as VisionMamba models."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from torch import Tensor

from vimamba.errors import UserError, nearest
from vimamba.layers.tokens import CLASS_TOKENS
from vimamba.models.checkpoints import load_weights, read_checkpoint, state_dict_of
from vimamba.models.vision_mamba import VisionMamba

# The official constructor's keyword arguments and defaults. None: the tensors tell.
OFFICIAL = {
    "img_size": None, "patch_size": None, "stride": 16, "depth": None, "embed_dim": None, "d_state": None,
    "channels": None, "num_classes": None, "ssm_cfg": None, "drop_rate": 0.0, "drop_path_rate": 0.0,
    "norm_epsilon": 1e-5, "rms_norm": None, "initializer_cfg": None, "fused_add_norm": True,
    "residual_in_fp32": True, "device": None, "dtype": None, "ft_seq_len": None, "pt_hw_seq_len": 14,
    "if_bidirectional": False, "final_pool_type": "none", "if_abs_pos_embed": None, "if_rope": False,
    "if_rope_residual": False, "flip_img_sequences_ratio": -1.0, "if_bimamba": False, "bimamba_type": None,
    "if_cls_token": None, "if_divide_out": True, "if_devide_out": True, "init_layer_scale": None,
    "use_double_cls_token": None, "use_middle_cls_token": True,
}  # fmt: skip
POOLS = {"none": "last", "mean": "mean", "max": "max", "all": ""}
MODES = {"none": "none", "v1": "ssm", "v2": "ssm_conv"}


def load_hustvl(checkpoint: str | Path | dict[str, Any], **hustvl_kwargs: Any) -> VisionMamba:
    """Build the model of an official checkpoint and load it, ready to use, in evaluation mode.

    Sizes are read from the tensors. What they cannot tell comes from the official constructor's own keyword
    arguments, with its defaults: stride, use_middle_cls_token, final_pool_type, if_divide_out, if_bidirectional,
    if_rope, if_rope_residual, pt_hw_seq_len, norm_epsilon, and drop_rate and drop_path_rate, which are 0 unless given.
    Others are checked against the tensors. (`if_devide_out`, misspelt in the official base model, does nothing there
    or here.)

    Args:
        checkpoint: path of a .pth or .safetensors file, a checkpoint read from one, or a state dict.
        **hustvl_kwargs: keyword arguments of the official VisionMamba.

    Raises:
        UserError: the file cannot be read safely, or tensors and arguments do not fit each other.
    """
    source = checkpoint if isinstance(checkpoint, (str, Path)) else "state dict"
    contents = read_checkpoint(checkpoint) if isinstance(checkpoint, (str, Path)) else checkpoint
    unknown = hustvl_kwargs.keys() - OFFICIAL.keys()
    if unknown:
        name = min(unknown)
        raise UserError(f"{name} is not an argument of the official VisionMamba{nearest(name, OFFICIAL)}")
    tensors = {k: v for k, v in state_dict_of(contents).items() if not k.startswith("rope.")}
    args = contents.get("args")
    if isinstance(args, argparse.Namespace) and "stride8" in str(getattr(args, "model", "")):
        hustvl_kwargs = {"stride": 8, **hustvl_kwargs}
    if "patch_embed.proj.weight" not in tensors or "layers.0.mixer.A_log" not in tensors:
        raise UserError(f"{source}: not a Vision Mamba checkpoint (no patch_embed.proj.weight or layers.0.mixer.A_log)")
    model = VisionMamba(**_constructor_args(tensors, hustvl_kwargs))
    load_weights(model, tensors, source)
    return model.eval()


def _constructor_args(tensors: dict[str, Tensor], given: dict[str, Any]) -> dict[str, Any]:
    """VisionMamba's arguments for these tensors and official keyword arguments."""
    told = _sizes(tensors)
    for name, value in told.items():
        if name in given and given[name] is not None and given[name] != value:
            raise UserError(f"{name}={given[name]!r} does not fit the checkpoint, whose tensors say {value!r}")
    official = {**OFFICIAL, **given, **told}
    if official["flip_img_sequences_ratio"] > 0:
        raise UserError("flip_img_sequences_ratio > 0 flips sequences at random even in evaluation: not supported")
    ssm = dict(official["ssm_cfg"] or {})
    mode = MODES[official["bimamba_type"]]
    tokens = "double" if told["use_double_cls_token"] else "middle" if official["use_middle_cls_token"] else "head"
    class_token = tokens if told["if_cls_token"] else "none"
    prefix = "layers.0.mixer."
    embed_dim = official["embed_dim"]
    return dict(
        img_size=_img_size(tensors, official, class_token),
        patch_size=official["patch_size"],
        stride=official["stride"],
        in_chans=official["channels"],
        num_classes=official["num_classes"],
        embed_dim=embed_dim,
        depth=official["depth"],
        d_state=official["d_state"],
        d_conv=tensors[prefix + "conv1d.weight"].shape[-1],
        expand=tensors[prefix + "D"].shape[0] / embed_dim,
        dt_rank=tensors[prefix + "dt_proj.weight"].shape[1],
        bidirectional=mode,
        layer_pairs=official["if_bidirectional"],
        merge="mean" if mode == "ssm_conv" and official["if_divide_out"] else "sum",
        class_token=class_token,
        global_pool="token" if class_token != "none" else POOLS[official["final_pool_type"]],
        pos_embed=told["if_abs_pos_embed"],
        rope="hustvl" if official["if_rope"] else "none",
        rope_residual=official["if_rope_residual"],
        rope_grid=official["pt_hw_seq_len"],
        norm="rms" if told["rms_norm"] else "layer",
        norm_eps=official["norm_epsilon"],
        layer_scale=1.0 if prefix + "gamma" in tensors else None,
        pos_drop_rate=official["drop_rate"],
        drop_path_rate=official["drop_path_rate"],
        conv_bias=prefix + "conv1d.bias" in tensors,
        bias=prefix + "in_proj.bias" in tensors,
        **{k: v for k, v in ssm.items() if k in ("dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor")},
    )


def _sizes(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """What the tensors tell, under the official names."""
    patch = tensors["patch_embed.proj.weight"]
    prefix = "layers.0.mixer."
    mode = "v2" if prefix + "conv1d_b.weight" in tensors else "v1" if prefix + "A_b_log" in tensors else "none"
    double = "cls_token_head" in tensors
    return {
        "embed_dim": patch.shape[0],
        "channels": patch.shape[1],
        "patch_size": patch.shape[2] if patch.shape[2] == patch.shape[3] else tuple(patch.shape[2:]),
        "depth": 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("layers.")),
        "d_state": tensors[prefix + "A_log"].shape[1],
        "num_classes": tensors["head.weight"].shape[0] if "head.weight" in tensors else 0,
        "bimamba_type": mode,
        "if_cls_token": double or "cls_token" in tensors,
        "use_double_cls_token": double,
        "if_abs_pos_embed": "pos_embed" in tensors,
        "rms_norm": "norm_f.bias" not in tensors,
    }


def _img_size(tensors: dict[str, Tensor], official: dict[str, Any], class_token: str) -> Any:
    """The image size given, or that of the square grid that the position embedding covers."""
    if official["img_size"] is not None or "pos_embed" not in tensors:
        return official["img_size"] or 224
    patches = tensors["pos_embed"].shape[1] - CLASS_TOKENS[class_token]
    side = round(patches**0.5)
    if side * side != patches:
        raise UserError(f"pos_embed covers {patches} patches, which is not a square grid: give img_size")
    patch = official["patch_size"]
    patch_h, patch_w = patch if isinstance(patch, tuple) else (patch, patch)
    stride_h, stride_w = official["stride"] if isinstance(official["stride"], tuple) else [official["stride"]] * 2
    return (side - 1) * stride_h + patch_h, (side - 1) * stride_w + patch_w

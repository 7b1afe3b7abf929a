"""Checkpoints of the official code (hustvl/Vim) as VisionMamba models."""

from __future__ import annotations

import argparse
import math
import re
import warnings
from pathlib import Path
from typing import Any

from torch import Tensor

from vimamba.errors import UserError, naming, nearest, one_line
from vimamba.layers.grid import CLASS_TOKENS
from vimamba.models.checkpoints import load_weights, read_checkpoint, state_dict_of
from vimamba.models.vision_mamba import VisionMamba

# The official constructor's keyword arguments and defaults. None: the checkpoint tells, or they are asked for.
OFFICIAL = {
    "img_size": None, "patch_size": None, "stride": None, "depth": None, "embed_dim": None, "d_state": None,
    "channels": None, "num_classes": None, "ssm_cfg": None, "drop_rate": 0.0, "drop_path_rate": 0.0,
    "norm_epsilon": 1e-5, "rms_norm": None, "initializer_cfg": None, "fused_add_norm": True,
    "residual_in_fp32": True, "device": None, "dtype": None, "ft_seq_len": None, "pt_hw_seq_len": 14,
    "if_bidirectional": False, "final_pool_type": None, "if_abs_pos_embed": None, "if_rope": False,
    "if_rope_residual": False, "flip_img_sequences_ratio": -1.0, "if_bimamba": False, "bimamba_type": None,
    "if_cls_token": None, "if_divide_out": True, "if_devide_out": True, "init_layer_scale": None,
    "use_double_cls_token": None, "use_middle_cls_token": True,
}  # fmt: skip
POOLS = {"none": "last", "mean": "mean", "max": "max", "all": ""}
MODES = {"none": "none", "v1": "ssm", "v2": "ssm_conv"}


def load_hustvl(checkpoint: str | Path | dict[str, Any], **hustvl_kwargs: Any) -> VisionMamba:
    """Build the model of an official checkpoint and load it, ready to use, in evaluation mode.

    Sizes are read from the tensors, and the model's official name from the checkpoint's `args`: it tells the stride,
    the pooling and the place of the class token. What neither tells comes from the official constructor's own keyword
    arguments: stride, use_middle_cls_token, final_pool_type, if_divide_out, if_bidirectional, if_rope,
    if_rope_residual, pt_hw_seq_len, norm_epsilon, and drop_rate and drop_path_rate, which are 0 unless given. Arguments
    that the tensors tell are checked against them. (`if_devide_out`, misspelt in the official base model, does nothing
    there or here.)

    A bare state dict with neither is taken as the published models are: a stride for which its patches cover 224
    pixels, else that of whole patches, the class token in the middle, the mean of the directions. A warning says so.
    Without a class token, what is pooled must be told; so must if_rope, where there are rotary frequencies.

    Args:
        checkpoint: path of a .pth or .safetensors file, a checkpoint read from one, or a state dict.
        **hustvl_kwargs: keyword arguments of the official VisionMamba.

    Raises:
        UserError: the file cannot be read safely, tensors and arguments do not fit each other, or one is needed.
    """
    source = checkpoint if isinstance(checkpoint, (str, Path)) else "state dict"
    contents = read_checkpoint(checkpoint) if isinstance(checkpoint, (str, Path)) else checkpoint
    unknown = hustvl_kwargs.keys() - OFFICIAL.keys()
    if unknown:
        name = min(unknown)
        raise UserError(f"{name} is not an argument of the official VisionMamba{nearest(name, OFFICIAL)}")
    tensors = state_dict_of(contents)
    if "patch_embed.proj.weight" not in tensors or "layers.0.mixer.A_log" not in tensors:
        raise UserError(f"{source}: not a Vision Mamba checkpoint (no patch_embed.proj.weight or layers.0.mixer.A_log)")
    with naming(source):
        try:
            known = {**_of_the_name(contents.get("args")), **hustvl_kwargs}
            known = {name: value for name, value in known.items() if value is not None}
            model = VisionMamba(**_constructor_args(tensors, {**_assumed(tensors, known, source), **known}))
        except UserError:
            raise
        except (KeyError, IndexError, ValueError, TypeError, RuntimeError) as error:
            raise UserError(f"no model is described by these tensors and arguments ({one_line(error)})") from error
    load_weights(model, {k: v for k, v in tensors.items() if not k.startswith("rope.")}, source)
    return model.eval()


def _of_the_name(args: Any) -> dict[str, Any]:
    """What the official name in a checkpoint's `args` tells, such as vim_tiny_patch16_stride8_224_bimambav2_..."""
    name = getattr(args, "model", None) if isinstance(args, argparse.Namespace) else None
    if not isinstance(name, str) or not name.startswith("vim_"):
        return {}
    stride, patch = re.search(r"_stride(\d{1,3})_", name), re.search(r"_patch(\d{1,3})_", name)
    pool = re.search(r"_final_pool_(none|mean|max|all)(_|$)", name)
    known: dict[str, Any] = {"final_pool_type": pool[1] if pool else None}
    if stride or patch:
        known["stride"] = int((stride or patch)[1])  # type: ignore[index]
    if re.search("midclstok|middle_cls", name):
        known["use_middle_cls_token"] = True
    if "div2" in name:
        known["if_divide_out"] = True
    if "_rope" in name:
        known |= {"if_rope": True, "if_rope_residual": "rope_also_residual" in name}
    return known


def _assumed(tensors: dict[str, Tensor], known: dict[str, Any], source: Any) -> dict[str, Any]:
    """Values for what nothing tells: refused where the published models have no common one, else said in a warning."""
    if "final_pool_type" not in known and not tensors.keys() & {"cls_token", "cls_token_head"}:
        raise UserError(
            "has no class token, and does not tell what is pooled: give final_pool_type, "
            "none (the last token), mean, max or all"
        )
    if "if_rope" not in known and any(name.startswith("rope.") for name in tensors):
        raise UserError("has rotary frequencies: give if_rope=True and if_rope_residual, or if_rope=False")
    stride, sure = _stride(tensors, known)
    taken: dict[str, Any] = {} if "stride" in known else {"stride": stride}
    unsure = [] if "stride" in known or sure else ["stride"]
    for name, tensor in (("use_middle_cls_token", "cls_token"), ("if_divide_out", "layers.0.mixer.conv1d_b.weight")):
        if tensor in tensors and name not in known:
            taken[name] = True
            unsure.append(name)
    if unsure:
        listed = ", ".join(f"{name}={taken[name]}" for name in unsure)
        warnings.warn(f"{source}: taken as the published models are, {listed}; give what is not so", stacklevel=3)
    return taken


def _stride(tensors: dict[str, Tensor], known: dict[str, Any]) -> tuple[int, bool]:
    """The stride for which the position embedding covers img_size, else 224, and whether that is plain.

    Whole patches on 224 pixels are what the published models have; 27 × 27 are strides of 8 there, or of 16 on 432.
    """
    patch = int(tensors["patch_embed.proj.weight"].shape[2])
    size = known.get("img_size", 224)
    if "pos_embed" not in tensors or not isinstance(size, int):
        return patch, "img_size" in known
    classes = len(tensors.keys() & {"cls_token", "cls_token_head", "cls_token_tail"})
    side = math.isqrt(max(0, tensors["pos_embed"].shape[1] - classes))
    likely = range(patch, 0, -1) if "img_size" in known else [max(1, patch // part) for part in (1, 2, 4)]
    fitting = [stride for stride in likely if (size - patch) // stride + 1 == side]
    return (fitting[0], "img_size" in known or fitting[0] == patch) if fitting else (patch, False)


def _constructor_args(tensors: dict[str, Tensor], given: dict[str, Any]) -> dict[str, Any]:
    """VisionMamba's arguments for these tensors and official keyword arguments."""
    sizes = _sizes(tensors)
    for name, value in sizes.items():
        if name in given and given[name] is not None and given[name] != value:
            raise UserError(f"{name}={given[name]!r} does not fit the checkpoint, whose tensors say {value!r}")
    official = {**OFFICIAL, **given, **sizes}
    if official["flip_img_sequences_ratio"] > 0:
        raise UserError("flip_img_sequences_ratio > 0 flips sequences at random even in evaluation: not supported")
    ssm = dict(official["ssm_cfg"] or {})
    mode = MODES[official["bimamba_type"]]
    tokens = "double" if sizes["use_double_cls_token"] else "middle" if official["use_middle_cls_token"] else "head"
    class_token = tokens if sizes["if_cls_token"] else "none"
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
        pos_embed=sizes["if_abs_pos_embed"],
        rope="hustvl" if official["if_rope"] else "none",
        rope_residual=official["if_rope_residual"],
        rope_grid=official["pt_hw_seq_len"],
        norm="rms" if sizes["rms_norm"] else "layer",
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

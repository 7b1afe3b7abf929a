"""A value other than the default for every option of every command, and the options of train that meet.

A new option is a line here; without it test_every_option.py fails by its name.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Value:
    """A value, as it is typed, and what becomes of the command with it.

    Args:
        words: the value; nothing for a switch. $photos and the like are the places of test_every_option.py.
        beside: what else is typed, with the value and in the command that it is compared with
        acts: whether what the command leaves and prints is another with it; if not, it is the same to the bit
        refused: the sentence, where it cannot run here
        over: whether there is an earlier run in the output folder
        bare: whether nothing else is given to the command
    """

    words: str = ""
    beside: str = ""
    acts: bool = True
    refused: str = ""
    over: bool = False
    bare: bool = False


def same(words: str, beside: str = "") -> Value:
    """A value that changes nothing of what is found."""
    return Value(words, beside, acts=False)


SWITCH = Value()

# Runs on masks and on objects, of a second each.
SMALL = "--img_size 32 --batch_size 4"
HEAD = "{width: 8, box_width: 16, proposals: 16, rois_per_image: 8, anchor_sizes: [4, 8, 16, 24, 32]}"
SEGMENT = f"--task segment --data $masks {SMALL} --head linear"
DETECT = f"--task detect --data $objects {SMALL} --head_args '{HEAD}'"
HELP = {"help": [SWITCH]}
ASKS = {**HELP, "print_config": [SWITCH]}

BENCH = "--models vim_nano --sizes 32 --repeats 5 --seconds 0"

# A model by its name, whose weights are those of $trained.
UNNAMED = "vim_nano --checkpoint $trained/model.safetensors --format onnx --output $out/model.onnx"
NAMED = "vim_nano --model_args '{depth: 1, embed_dim: 16, d_state: 4, num_classes: 3, img_size: 16}' --format onnx"
NAMED += " --output $out/model.onnx"

# What each command is given beside the value.
GIVEN = {
    "train": "--data $photos --model vim_nano --model_args '{depth: 1, embed_dim: 16, d_state: 4}' --output $out/run "
    "--img_size 16 --num_workers 0 --batch_size 6 --epochs 2 --accelerator cpu",
    "eval": "$trained --output $out",
    "predict": "$trained $photos/val",
    "export": "$trained --format onnx --output $out/model.pt2",
    "serve": "$trained",
    "explain": "$trained $photos/val/blue/0.png --output $out",
    "bench": f"{BENCH} --against test_vit --memory false --json $out/bench.json",
    "models": "nano",
    "ablate": "--data digits --model_args '{depth: 1, embed_dim: 16, d_state: 4}' --designs none --seeds 1 "
    "--epochs 1 --batch_size 300 --lr 0.003 --output $out/ablate-digits",
    "info": "",
}

# What --config names.
CONFIGS = {
    "train": "epochs: 1",
    "eval": "split: all",
    "predict": "top: 1",
    "export": "dynamic_size: true",
    "serve": "max_batch: 3",
    "explain": "curves: false",
    "bench": "sizes: [48]",
}

DEVICE = {
    "device": [same("cpu")],
    "precision": [Value("bf16-mixed"), Value("int8")],
    "batch_size": [same("5")],
    "num_workers": [same("1")],
}

VALUES: dict[str, dict[str, list[Value]]] = {
    "train": {
        "config": [Value("$config")],
        "data": [Value("$other"), Value("$flat"), Value("wds/$shards", "--class_names $names")],
        "model": [Value("vit_tiny_patch16_224", "--model_args '{depth: 1, embed_dim: 12, patch_size: 8}'")],
        "task": [Value("nonsense", refused="--task nonsense: ")],
        "output": [Value("$out/elsewhere")],
        "model_args": [Value("'{depth: 2, embed_dim: 16, d_state: 4}'")],
        "pretrained": [Value(beside="--model local-dir:$published --img_size 28")],
        "checkpoint": [Value("$trained/model.safetensors")],
        "img_size": [Value("20"), Value("16,24")],
        "in_chans": [Value("1")],
        "val_fraction": [Value("0.4", "--data $flat")],
        "class_names": [Value("$names", "--data wds/$shards")],
        "num_workers": [same("1")],
        "max_undecodable": [Value("0.5", "--data $broken")],
        "checkpoint_every": [Value("2steps"), same("null")],
        "logger": [Value("csv"), Value("none")],
        "seed": [Value("1")],
        "epochs": [Value("1")],
        "batch_size": [Value("5")],
        "opt": [Value("sgd"), Value("nmuon")],
        "lr": [Value("1e-3")],
        "weight_decay": [Value("0.5")],
        "schedule": [Value("constant"), Value("poly")],
        "warmup_epochs": [Value("1")],
        "min_lr": [Value("1e-3")],
        "layer_decay": [Value("0.5")],
        "clip_grad": [Value("null"), Value("0.01")],
        "accumulate": [Value("2")],
        "patience": [Value("1", "--epochs 4 --lr 1e-9")],
        "ema": [Value("0.9")],
        "augment": [Value("none"), Value("affine"), same("crop")],
        "crop_scale": [Value("'[0.9, 1.0]'")],
        "hflip": [Value("0.0")],
        "color_jitter": [Value("0.0")],
        "auto_augment": [Value("rand-m9-mstd0.5-inc1")],
        "random_erasing": [Value("0.5")],
        "mixup": [Value("0.4")],
        "cutmix": [Value("0.4")],
        "label_smoothing": [Value("0.0")],
        "repeated_augmentation": [Value("3")],
        "scale_jitter": [Value("'[0.9, 1.1]'", SEGMENT), Value("'[0.9, 1.1]'", DETECT)],
        "head": [Value("fpn", f"{SEGMENT} --head_args '{{width: 64}}'"), Value("faster_rcnn", DETECT)],
        "head_args": [
            Value("'{dropout: 0.5}'", SEGMENT),
            Value(f"'{HEAD.replace('box_width: 16', 'box_width: 24')}'", DETECT),
        ],
        "short_side": [Value("24", SEGMENT), Value("24", DETECT)],
        "long_side": [Value("24", SEGMENT), Value("24", DETECT)],
        "ignore_index": [Value("2", f"{SEGMENT} --data $full")],
        "dice": [Value("0.0", SEGMENT)],
        "aux_weight": [Value("0.0", f"{SEGMENT} --head upernet --head_args '{{width: 8, auxiliary: true}}'")],
        "class_mix": [Value("0.5", SEGMENT)],
        "accelerator": [same("cpu")],
        "devices": [same("1")],
        "strategy": [same("ddp")],
        # Two machines: test_keeping.py.
        "num_nodes": [Value("2", refused="--num_nodes 2: would wait for the other machines for ever")],
        "precision": [Value("bf16-mixed")],
        "compile": [Value("true")],
        "grad_checkpointing": [same("true")],
        "resume": [Value("$out/run", "--epochs 7", over=True, bare=True)],
        "overwrite": [Value(over=True)],
        **ASKS,
    },
    "eval": {
        "config": [Value("$config")],
        "data": [Value("$other")],
        "split": [Value("all"), same("val")],
        "class_names": [Value("$names", "--data wds/$shards")],
        "ignore_index": [Value("2", "$segmented --data $full --json", bare=True)],
        "max_undecodable": [Value("0.5", "--data $broken")],
        "output": [Value("$out/elsewhere")],
        "window": [Value("whole", "$segmented --data $large --split val --json", bare=True)],
        "flip": [Value("true", "$segmented --json", bare=True)],
        **DEVICE,
        "json": [SWITCH],
        **ASKS,
    },
    "predict": {
        "config": [Value("$config")],
        **DEVICE,
        "output": [Value("$out/pictures"), Value("$out/pictures", "$detected $objects/val2017", bare=True)],
        "top": [Value("1")],
        "min_score": [Value("0.1", "$detected $objects/val2017", bare=True)],
        "json": [SWITCH],
        "csv": [SWITCH],
        "tile": [Value("48", "$segmented $large/val/images --output $out --json", bare=True)],
        "overlap": [Value("20", "$segmented $large/val/images --output $out --json --tile 48", bare=True)],
        "window": [Value("whole", "$segmented $large/val/images --json", bare=True)],
        "flip": [Value("true", "$segmented $large/val/images --json", bare=True)],
        **ASKS,
    },
    "export": {
        "config": [Value("$config")],
        "format": [Value("pt2"), Value("aoti"), Value("web", "--output $out/page")],
        "output": [Value("$out/elsewhere.onnx")],
        "checkpoint": [Value("$trained/model.safetensors", NAMED, bare=True)],
        "model_args": [
            Value("'{depth: 1, embed_dim: 16, d_state: 4, num_classes: 3, img_size: 16}'", UNNAMED, bare=True)
        ],
        "img_size": [Value("24"), Value("'[16, 24]'")],
        "dynamic_size": [Value("true")],
        "with_preprocessing": [Value("true")],
        "portable": [Value("true")],
        "operator": [Value("vimamba"), Value("microsoft"), Value("standard")],
        "int8": [Value("true", "--data $photos")],
        "data": [same("$other")],
        "runtime": [Value("$out", "--format web", refused="--runtime $out: has no ort.wasm.bundle.min.mjs; ")],
        **ASKS,
    },
    # With a server that tells what it was given; tests/serve has each option at work.
    "serve": {
        "config": [Value("$config")],
        "host": [Value("0.0.0.0")],
        "port": [Value("0")],
        "workers": [Value("2")],
        "max_batch": [Value("2")],
        "max_wait_ms": [Value("0")],
        "max_queue": [Value("3")],
        "max_upload_mb": [Value("1")],
        "max_megapixels": [Value("0.5")],
        "max_memory_mb": [Value("100")],
        "max_connections": [Value("10")],
        "timeout_s": [Value("1.5")],
        "device": [Value("cpu")],
        "precision": [Value("bf16-mixed"), Value("int8")],
        "window": [Value("whole")],
        "flip": [Value("true")],
        **ASKS,
    },
    "explain": {
        "config": [Value("$config")],
        "output": [Value("$out/further")],
        "method": [Value("'[gradcam, integrated_gradients, receptive_field]'")],
        "target": [Value("red")],
        "curves": [Value("false")],
        "compare": [Value("test_resnet", beside="--method receptive_field")],
        "device": [same("cpu:0")],
        **ASKS,
    },
    "bench": {
        "config": [Value("$config")],
        "models": [Value("vim_nano vim_pyramid_nano")],
        "against": [Value("test_efficientnet"), Value("")],
        "sizes": [Value("32 48")],
        "batch": [Value("1 2")],
        "dtype": [Value("float32 bfloat16")],
        "passes": [Value("forward train")],
        "attention": [Value("fused eager")],
        "device": [same("cpu:0")],
        "mode": [Value("compile", "--models test_vit --against --sizes 160")],
        "threads": [Value("3")],
        "repeats": [Value("2")],
        "seconds": [Value("0.5")],
        "memory": [
            Value("false", "--models vim_nano --against --sizes 32 --seconds 0 --json $out/bench.json", bare=True)
        ],
        "json": [Value("$out/elsewhere.json")],
        "plot": [Value("$out/bench.svg")],
        **ASKS,
    },
    "models": {"all": [Value(beside="test_vit2", bare=True)], "json": [SWITCH], **HELP},
    "ablate": {
        "data": [Value("digits", "--data mnist --batch_size 2000")],
        "model": [Value("vim_tiny_patch16_224", "--model_args '{depth: 1, embed_dim: 16, d_state: 4, patch_size: 4}'")],
        "model_args": [Value("'{depth: 1, embed_dim: 24, d_state: 4}'")],
        "designs": [Value("none,gate")],
        "seeds": [Value("2")],
        "equal": [Value("steps")],
        "epochs": [Value("2")],
        "batch_size": [Value("200")],
        "lr": [Value("0.001,0.003")],
        "output": [Value("$out/elsewhere")],
        "page": [Value("$out/page.md", "--designs '[none, ssm_conv]'")],
        **HELP,
    },
    "info": {"json": [SWITCH], **HELP},
}

# -- train's options that meet

MODELS = {
    "vim": "vim_nano --model_args '{depth: 1, embed_dim: 16, d_state: 4}'",
    "gated vim": "vim_nano --model_args '{depth: 1, embed_dim: 16, d_state: 4, merge: gate, gate_sparsity: 0.1}'",
    "pyramid": "vim_pyramid_nano --model_args '{dims: [8, 8, 16, 16], depths: [1, 1, 2, 1], head_dim: 8, d_state: 4}'",
    "vit": "vit_tiny_patch16_224 --model_args '{depth: 1, embed_dim: 12, num_heads: 2, patch_size: 8}'",
}
FACTORS = {
    "model": tuple(MODELS),
    "augment": ("none", "affine", "crop"),
    "resumed": ("no", "yes"),
    "precision": ("32-true", "bf16-mixed"),
    "opt": ("adamw", "nmuon"),
    "grad_checkpointing": ("false", "true"),
    "patience": ("null", "5"),
    "logger": ("none", "tensorboard,csv"),
    "clip_grad": ("null", "1.0"),
    "accumulate": ("1", "3"),
    "ema": ("null", "0.9"),
    "mixup": ("0", "0.4"),
    "cutmix": ("0", "0.4"),
    "layer_decay": ("null", "0.7"),
    "schedule": ("cosine", "constant"),
    "warmup_epochs": ("0", "1"),
    "auto_augment": ("null", "rand-m9-mstd0.5-inc1"),
    "random_erasing": ("0", "0.5"),
    "repeated_augmentation": ("1", "3"),
    "label_smoothing": ("0", "0.1"),
    "num_workers": ("0", "1"),
    "batch_size": ("5", "8"),
    "val_fraction": ("0.2", "0.5"),
    "in_chans": ("1", "3"),
    "img_size": ("16", "[24, 32]"),
    "checkpoint_every": ("null", "2steps"),
    "model_args.drop_path_rate": ("0.0", "0.2"),
}
POLICY = ("auto_augment", "rand-m9-mstd0.5-inc1")
FORBIDDEN = {
    frozenset(
        {POLICY, ("augment", kind)}
    ): f"--auto_augment {POLICY[1]}: goes with --augment crop, and here it is {kind}"
    for kind in ("none", "affine")
}

# -- and those of dense tasks

DENSE_MODELS = {name: MODELS[name] for name in ("vim", "pyramid")}
DENSE_FACTORS = {
    "head": ("linear", "upernet", "dpt", "fpn", "faster_rcnn", "mask_rcnn", "cascade_mask_rcnn"),
    "model": tuple(DENSE_MODELS),
    "augment": ("none", "auto"),
    "resumed": ("no", "yes"),
    "precision": ("32-true", "bf16-mixed"),
    "grad_checkpointing": ("false", "true"),
    "accumulate": ("1", "2"),
    "ema": ("null", "0.9"),
    "opt": ("adamw", "nmuon"),
    "layer_decay": ("null", "0.7"),
    "schedule": ("cosine", "poly"),
    "scale_jitter": ("null", "[0.9, 1.1]"),
    "repeated_augmentation": ("1", "2"),
    "short_side": ("null", "24"),
    "num_workers": ("0", "1"),
    "batch_size": ("3", "4"),
    "in_chans": ("1", "3"),
    "img_size": ("32", "[24, 40]"),
    "checkpoint_every": ("null", "2steps"),
}

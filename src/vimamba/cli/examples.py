"""What the help of each command ends with."""

EXAMPLES = {
    "train": (
        "vimamba train --data mnist --model vim_nano --epochs 12 --output runs/demo",
        "vimamba train --data photos/ --model vim_tiny_patch16_224 --checkpoint vim_t_midclstok_76p1acc.pth",
        "vimamba train --config recipes/vim_tiny.yaml --data imagenet/ --devices 8 --strategy ddp",
        "vimamba train --config recipes/scenes_seg.yaml --output runs/scenes-seg",
        "vimamba train --config recipes/scenes_det.yaml --output runs/scenes-det",
        "vimamba train --resume runs/demo",
    ),
    "eval": (
        "vimamba eval runs/demo",
        "vimamba eval runs/photos --data other_photos/ --output reports/other --json",
    ),
    "predict": (
        "vimamba predict runs/photos new/*.jpg",
        "vimamba predict runs/photos new/ --top 3 --json",
        "vimamba predict runs/scenes-seg new/ --output pictures/",
        "vimamba predict runs/scenes-seg large.tif --tile 1024 --overlap 128 --output pictures/",
    ),
    "export": (
        "vimamba export runs/photos --format onnx --output photos.onnx",
        "vimamba export vim_t_midclstok_76p1acc.pth --format onnx --output vim_tiny.onnx --img_size 256",
    ),
    "serve": (
        "vimamba serve runs/photos",
        "vimamba serve runs/photos --host 0.0.0.0 --port 80 --workers 4",
    ),
    "explain": (
        "vimamba explain runs/photos new/*.jpg --output explained/",
        "vimamba explain runs/photos new/ --method gradcam,integrated_gradients --output explained/",
    ),
    "bench": (
        "vimamba bench --sizes 224 512 1248 --attention fused eager",
        "vimamba bench --models vim_tiny_patch16_224 --passes train --plot bench.png",
    ),
    "models": ("vimamba models", "vimamba models 'vit_tiny*' --all"),
    "ablate": ("vimamba ablate --data mnist",),
    "info": ("vimamba info", "vimamba info --json"),
}

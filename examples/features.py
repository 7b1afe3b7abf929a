"""A Vision Mamba as a backbone: maps of features for images of any size, through timm's own functions."""

from __future__ import annotations

import timm
import torch

import vimamba  # noqa: F401 - registers the models with timm


def main() -> None:
    torch.manual_seed(0)
    images = torch.randn(1, 3, 320, 480)

    # One map for each chosen layer, all of the patches' grid.
    plain = timm.create_model("vim_tiny_patch16_224", features_only=True, out_indices=[5, 11, 23]).eval()
    # Four stages, each half as fine as the one before: what detectors and segmenters expect.
    pyramid = timm.create_model("vim_pyramid_nano", features_only=True).eval()
    for name, model in (("vim_tiny_patch16_224", plain), ("vim_pyramid_nano", pyramid)):
        with torch.no_grad():
            maps = model(images)
        for size, step, channels in zip(
            maps, model.feature_info.reduction(), model.feature_info.channels(), strict=True
        ):
            assert size.shape == (1, channels, 320 // step, 480 // step)
            print(f"{name}: {channels} channels, every {step} pixels: {tuple(size.shape)}")

    # One vector an image, for a search or a classifier of your own.
    model = timm.create_model("vim_tiny_patch16_224", num_classes=0).eval()
    with torch.no_grad():
        print("one vector an image:", tuple(model(images).shape))


if __name__ == "__main__":
    main()

"""A backend of your own: three functions, and every model runs on it; here they also count the steps of the scans."""

from __future__ import annotations

import torch

import vimamba
from vimamba.ops import backends, reference


class Counting(backends.Backend):
    """The plain loops; put your kernels in their place."""

    name = "counting"
    differentiable = True  # ordinary PyTorch: gradients come from autograd
    steps = 0

    def scan_forward(self, u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse, save_states):
        self.steps += u.shape[0] * u.shape[-1]
        out, last = reference.selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, True, reverse=reverse)
        return out, last, A.new_empty(0)

    def conv_forward(self, x, weight, bias, silu, reverse):
        return reference.causal_conv1d(x, weight, bias, "silu" if silu else None, reverse=reverse)

    def norm_forward(self, x, residual, weight, eps, out_dtype):
        total = x if residual is None else x + residual
        rstd = (total.square().mean(-1) + eps).rsqrt()
        return (total * rstd[..., None] * weight).to(out_dtype), total, rstd


def main() -> None:
    torch.manual_seed(0)
    model = vimamba.VisionMamba(img_size=32, patch_size=8, embed_dim=16, depth=4, num_classes=5).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(images)
        counting = Counting()
        backends.register(counting, fastest_on=["cpu"])
        found = model(images)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    # 2 images of 16 patches and a class token, through 4 layers in 2 directions.
    print(f"{counting.steps} steps, as 2 * 17 * 4 * 2 = {2 * 17 * 4 * 2}; the largest logit is {found.max():.3f}")


if __name__ == "__main__":
    main()

"""Lower precision in training: what a CPU has is in test_option_pairs.py; the rest is refused, or needs a GPU."""

import math

import pytest
import torch

from tests.cli.runs import train_arguments
from tests.cli.test_train import metrics


@pytest.mark.parametrize(
    ("precision", "message"),
    [
        ("16-mixed", "--precision 16-mixed: needs a GPU; on the CPU give bf16-mixed"),
        *((wrong, f"--precision: expected 32-true or bf16-mixed or 16-mixed, got {wrong}")
          for wrong in ("16", "bf16", "32", "64", "16-true", "bf16-true", "64-true", "8-bit", "transformer-engine")),
    ],
)  # fmt: skip
def test_other_precisions_are_refused_before_anything_is_written(vimamba, photos, tmp_path, precision, message):
    status, _, err = vimamba(*train_arguments(photos, tmp_path / "run", "--precision", precision))
    assert status == 2
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
@pytest.mark.parametrize("clip", ["null", "1.0"])
@pytest.mark.parametrize("more", [[], ["--accumulate", "2"], ["--ema", "0.9"]], ids=["plain", "accumulate", "ema"])
def test_mixed_precision_on_a_gpu(vimamba, photos, tmp_path, precision, clip, more):
    options = ("--accelerator", "gpu", "--devices", 1, "--precision", precision, "--clip_grad", clip, *more)
    status, _, err = vimamba(*train_arguments(photos, tmp_path / "run", *options))
    assert status == 0, err
    assert all(math.isfinite(float(row["train_loss"])) for row in metrics(tmp_path / "run"))

"""ONNX files that stock ONNX Runtime runs, or any runtime."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from vimamba.data.samples import Samples
from vimamba.data.transforms import MAX_SIDE
from vimamba.errors import UserError, one_line, require
from vimamba.export import lowering
from vimamba.export.check import Comparison, compare, example_images
from vimamba.export.outputs import Outputs
from vimamba.export.source import Source, load_source
from vimamba_command import package_version

OPSET, PORTABLE_OPSET = 21, 18  # of the default domain
TOLERANCE = 1e-4
INSTALL = "pip install 'vimamba[export]'"


def export_onnx(
    source: Source | str | os.PathLike[str], path: str | os.PathLike[str], *,
    img_size: int | tuple[int, int] | None = None, dynamic_size: bool = False, with_preprocessing: bool = False,
    portable: bool = False, samples: Samples | None = None,
) -> Comparison:  # fmt: skip
    """Write a model as an ONNX file, once its outputs have been held against PyTorch's.

    The graph's input is `images` and its output `logits`, or `probabilities`. The batch may be of any size.

    Args:
        source: what `load_source` gives or takes.
        path: of the file; weights of more than 2 GB lie beside it under its name with ".data" at the end.
        img_size: height and width of the images, pixels; the model's own if not given.
        dynamic_size: take images of any size from half the model's own up.
        with_preprocessing: take uint8 RGB (batch, height, width, 3) that has its size, and give probabilities.
        portable: use standard operators only, no operator of ONNX Runtime's own.
        samples: images to check with; built-in digits if not given.

    Raises:
        UserError: a package is missing, the model cannot be exported like that, the file cannot be written, or the
            outputs differ.
    """
    _check_packages()
    source = (source if isinstance(source, Source) else load_source(source)).sized(img_size)
    require(source.task in ("classification", "segment"), f"`task` {source.task}: models that find objects stay in "
            "PyTorch; export one that classifies or segments")  # fmt: skip
    path = Path(path)
    with _placed(path) as folder:
        module = Outputs(source, with_preprocessing).eval()
        images = example_images(source, with_preprocessing, samples)
        program = _program(module, images, dynamic_size, with_preprocessing, portable)
        program.model.metadata_props.update(_metadata(source, with_preprocessing))
        program.model.producer_name, program.model.producer_version = "vimamba", package_version()
        program.save(folder / path.name)
        batches = [images, images[:1]]
        if dynamic_size:
            batches.append(_smaller(images, with_preprocessing))
        return compare(_runner(folder / path.name), module, batches, TOLERANCE)


def _check_packages() -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        require(find_spec(name) is not None, f"`format` onnx needs the package {name}; run {INSTALL}")


def _program(
    module: nn.Module, images: Tensor, dynamic_size: bool, with_preprocessing: bool, portable: bool
) -> torch.onnx.ONNXProgram:
    sizes: dict[int, Any] = {0: Dim("batch")}
    if dynamic_size:
        height, width = (1, 2) if with_preprocessing else (2, 3)
        smallest = [max(2, images.shape[axis] // 2) for axis in (height, width)]
        sizes |= {
            height: Dim("height", min=smallest[0], max=MAX_SIDE),
            width: Dim("width", min=smallest[1], max=MAX_SIDE),
        }
    scan = lowering.chunked if portable else lowering.linear_attention
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            graph = torch.export.export(module, (images[:2],), dynamic_shapes=(sizes,))
        except (ValueError, RuntimeError) as error:  # what depends on the size in a way that no graph holds
            raise UserError(f"the model cannot be exported ({one_line(error)})") from error
        found = torch.onnx.export(
            graph.run_decompositions(lowering.decompositions(scan)), (), dynamo=True, verbose=False,
            opset_version=PORTABLE_OPSET if portable else OPSET, input_names=["images"],
            output_names=["probabilities" if with_preprocessing else "logits"],
        )  # fmt: skip
    assert found is not None
    return found


def _metadata(source: Source, with_preprocessing: bool) -> dict[str, str]:
    """What a user of the file must know of the model."""
    known = {
        "model": source.name, "task": source.task, "license": source.license, "class_names": source.class_names,
        "preprocessing": asdict(source.preprocessing), "with_preprocessing": with_preprocessing,
    }  # fmt: skip
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in known.items() if value}


def _smaller(images: Tensor, with_preprocessing: bool) -> Tensor:
    """Images of another size: a part of them."""
    height, width = images.shape[1:3] if with_preprocessing else images.shape[2:]
    rows, columns = slice(0, height - height // 4), slice(0, width - width // 5)
    return images[:, rows, columns] if with_preprocessing else images[:, :, rows, columns]


def _runner(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.contiguous().numpy()})[0])


@contextlib.contextmanager
def _placed(path: Path) -> Iterator[Path]:
    """A folder beside `path` whose files take their places when the block ends; gone, with them, if it fails.

    Raises:
        UserError: nothing can be written there.
    """
    require(not path.is_dir(), f"`output` {path}: is a folder; give a file")
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        try:
            yield folder
            for file in sorted(folder.iterdir(), key=lambda file: file.name == path.name):  # the model itself last
                os.replace(file, path.parent / file.name)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        raise UserError(f"`output` {path}: cannot be written ({error.strerror or error})") from error

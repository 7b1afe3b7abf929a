"""A folder of a page that runs a model in the browser, by onnxruntime-web."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

from vimamba.data.samples import Samples
from vimamba.data.steps import MAX_ASPECT
from vimamba.data.transforms import MAX_SIDE
from vimamba.errors import UserError, require
from vimamba.export.check import Comparison
from vimamba.export.onnx import export_onnx
from vimamba.export.source import Source, load_source
from vimamba.export.writing import placed
from vimamba.serve.options import largest
from vimamba.serve.page import page, with_rules

VERSION = "1.30.0"
CDN = "https://cdn.jsdelivr.net"
SCRIPT, WASM = "ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"
# Of that version's files in the package onnxruntime-web: a browser refuses any others.
INTEGRITY = {
    SCRIPT: "sha384-PLWz+nHEVHpjwBsO0YVdvQj6n5814Iv8E3b8FG0Rp/uIAtjFMCKOpP66iPzedrIG",
    WASM: "sha384-vjBJ1z7qrhkTyYsNqKeF6c7N+nOJSU94czEo+tvZcu8G75JparGq9kB+kTnEUNVM",
}


def export_web(
    source: Source | str | os.PathLike[str], folder: str | os.PathLike[str], *,
    img_size: int | tuple[int, int] | None = None, runtime: str | os.PathLike[str] | None = None,
    samples: Samples | None = None,
) -> Comparison:  # fmt: skip
    """Write a page, index.html, and the model that it runs, model.onnx; any server of static files can serve them.

    All of it or, if the model's check fails, nothing: what lies there stays as it is.

    Images are prepared as `vimamba predict` does it, and a model that segments or detects looks at them as that does,
    at images of any size.

    Args:
        source: what `load_source` gives or takes.
        folder: to write to.
        img_size, samples: as of `export_onnx`.
        runtime: folder with onnxruntime-web's files, of which two are copied; the page fetches them from a CDN
            if not given.

    Raises:
        UserError: `img_size` is given of a model that segments or detects, the runtime is not there, the folder cannot
            be written, or as of `export_onnx`.
    """
    files = [Path(runtime) / name for name in (SCRIPT, WASM)] if runtime is not None else []
    for file in files:
        require(file.is_file(), f"`runtime` {runtime}: has no {file.name}; give node_modules/onnxruntime-web/dist")
    folder = Path(folder)
    require(not folder.exists() or folder.is_dir(), f"`output` {folder}: is a file; give a folder")
    source = load_source(source)
    dense = source.task != "classification"
    require(not dense or img_size is None, "`img_size`: the page of a dense model takes any size; leave it out")
    source = source.sized(img_size)
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        require(False, f"`output` {folder}: cannot be made ({error.strerror})")
    web: dict[str, Any] = {
        "model": "model.onnx", "script": SCRIPT, "wasm": WASM, "max_aspect": MAX_ASPECT,
        "max_side": MAX_SIDE, "max_pixels": largest(source.task, len(source.class_names)),
        "preprocessing": dataclasses.asdict(source.preprocessing),
        "runtime": "./" if files else f"{CDN}/npm/onnxruntime-web@{VERSION}/dist/",
        "integrity": {file.name: integrity(file) for file in files} or INTEGRITY,
    }  # fmt: skip
    text = with_rules(page(source.name, source.task, source.class_names, web=web), "" if files else CDN)
    try:
        with placed(folder / "index.html") as index:
            model = index.with_name("model.onnx")
            try:
                found = export_onnx(source, model, with_preprocessing=True, dynamic_size=dense, samples=samples)
            except UserError as error:  # of a file that goes by another name
                raise UserError(str(error).replace(str(model.parent), str(folder))) from error
            for file in files:
                shutil.copyfile(file, index.with_name(file.name))
            index.write_text(text, encoding="utf-8")
    except BaseException:
        if made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise
    return found


def integrity(file: Path) -> str:
    """By what a browser knows a file."""
    return f"sha384-{base64.b64encode(hashlib.sha384(file.read_bytes()).digest()).decode()}"

"""Install what `make wheels` made into clean environments without a compiler, and run the tests of the operators there.

    python -m tests.installed dist python3.10 python3.13

Each Python gets the newest PyTorch; the first of them also the oldest that is supported, the wheel without kernels, and
the source distribution, which is built there. Pythons that this machine has not are named and left out.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
OLDEST = re.search(r'"torch>=([\d.]+)",\n    "torchvision', (ROOT / "pyproject.toml").read_text())[1]  # type: ignore[index]
COMPILERS = ("cc", "c++", "gcc", "g++", "clang", "clang++")
VERSIONS = "import platform, torch; print('Python', platform.python_version(), 'PyTorch', torch.__version__)"
KERNELS = """from vimamba.ops.cpu import library
print(library.UNAVAILABLE, *(library.instruction_sets() if library.UNAVAILABLE is None else ()))"""


class Environment:
    """A virtual environment in a folder that is removed, whose programs see nothing but it."""

    def __init__(self, folder: Path, python: str):
        self.folder, self.bin = folder, folder / "bin"
        self.around = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIMAMBA"))}
        subprocess.run([python, "-m", "venv", str(folder)], check=True)

    def run(self, *arguments: str | Path, compiler: bool = False) -> str:
        """Run its Python, from its folder; what that prints."""
        path = f"{self.bin}{os.pathsep}{os.environ['PATH']}" if compiler else str(self.bin)
        assert compiler or not any(shutil.which(name, path=path) for name in COMPILERS)
        around = {**self.around, "PATH": path, "OMP_NUM_THREADS": "1"}
        command = [self.bin / "python", *map(str, arguments)]
        done = subprocess.run(command, cwd=self.folder, env=around, text=True, stdout=subprocess.PIPE, check=False)
        if done.returncode:
            raise SystemExit(f"{done.stdout}\n{' '.join(map(str, arguments))}: exit status {done.returncode}")
        return done.stdout

    def install(self, *what: str | Path) -> None:
        self.run("-m", "pip", "install", "--quiet", "--only-binary", ":all:", *what)

    def test(self) -> str:
        """The tests of the operators, apart from those that are interpreted; their last line."""
        for name in ("tests/ops", "benchmarks"):  # of which test_triton.py calls one
            shutil.copytree(ROOT / name, self.folder / name, dirs_exist_ok=True)
        (self.folder / "tests" / "__init__.py").touch()
        quiet = ("-q", "-p", "no:cacheprovider", "-o", "markers=gpu", "--ignore", "tests/ops/interpreted")
        return self.run("-m", "pytest", *quiet, "tests/ops").splitlines()[-1]

    def kernels(self) -> str:
        """The instruction sets of the kernels, which must be there."""
        unavailable, *sets = self.run("-c", KERNELS).split()
        if unavailable != "None":
            raise SystemExit(f"no kernels: {unavailable} {' '.join(sets)}")
        return " ".join(sets)


def the_one(folder: Path, pattern: str) -> Path:
    found = [path.resolve() for path in folder.glob(pattern)]
    if len(found) != 1:
        raise SystemExit(f"{folder}: holds {len(found)} files {pattern}, not one; run make wheels")
    return found[0]


def check(dist: Path, python: str, torch: str, first: bool) -> None:
    """Install and test with one Python and one PyTorch."""
    wheel, pure = (the_one(dist, name) for name in (f"*manylinux*_{platform.machine()}.whl", "*-none-any.whl"))
    with tempfile.TemporaryDirectory() as folder:
        there = Environment(Path(folder), python)
        there.install(wheel, torch, "pytest")
        versions = there.run("-c", VERSIONS).strip()
        print(f"{versions}: {wheel.name}: {there.kernels()}: {there.test()}", flush=True)
        if not first:
            return
        there.install("--force-reinstall", "--no-deps", pure)
        print(f"{versions}: {pure.name}: {there.test()}", flush=True)
        there.install("scikit-build-core", "cmake", "ninja")
        source, how = the_one(dist, "*.tar.gz"), ("--quiet", "--no-build-isolation", "--no-deps", "--force-reinstall")
        there.run("-m", "pip", "install", *how, source, compiler=True)
        print(f"{versions}: {source.name}: {there.kernels()}", flush=True)


def usable(python: str) -> bool:
    """Whether it is here; the stand-ins that pyenv leaves for versions that are not in use are not."""
    found = shutil.which(python)
    return found is not None and subprocess.run([found, "-V"], capture_output=True, check=False).returncode == 0


if __name__ == "__main__":
    folder, *wanted = sys.argv[1:]
    here = [python for python in wanted if usable(python)]
    for python in (python for python in wanted if python not in here):
        print(f"{python}: is not on this machine, left out", flush=True)
    if not here:
        raise SystemExit("no Python to install into")
    check(Path(folder), here[0], f"torch~={OLDEST}.0", first=True)
    for python in here:
        check(Path(folder), python, "torch", first=False)

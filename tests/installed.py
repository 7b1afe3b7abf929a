"""Install what `make wheels` made into clean environments without a compiler, and run the tests of the operators there.

    python -m tests.installed dist python3.10 python3.13

Each Python gets the oldest PyTorch that is supported and the newest; the first of them, with the oldest, also the wheel
without kernels and the source distribution, which is built there. Pythons that this machine has not are named and left
out. What fails does not stop the rest; a table at the end says what ran where.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
# From one place at once, as they fit each other; pip would try every torchvision with an old PyTorch.
OLDEST = re.findall(r'^    "(torch|torchvision)>=([\d.]+)",$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
PYTORCHS = {"oldest": [f"{name}~={version}.0" for name, version in OLDEST], "newest": ["torch", "torchvision"]}
BUILD = ("scikit-build-core", "cmake", "ninja")
COMPILERS = ("cc", "c++", "gcc", "g++", "clang", "clang++")
VERSIONS = "import platform, torch; print(platform.python_version(), torch.__version__)"
KERNELS = """from vimamba.ops.cpu import library
print(*(library.instruction_sets() if library.UNAVAILABLE is None else ()))"""
HEAD = ("Python", "PyTorch", "installed", "kernels", "tests of the operators")


class ProgramError(Exception):
    """What a program that failed in an environment printed last."""


class Environment:
    """A virtual environment in a folder that is removed, whose programs see nothing but it."""

    def __init__(self, folder: Path, python: str):
        self.folder, self.bin = folder, folder / "bin"
        self.around = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIMAMBA"))}
        self.call([python, "-m", "venv", folder], self.around)

    def call(self, command: list[str | Path], around: dict[str, str]) -> str:
        done = subprocess.run(command, cwd=self.folder, env=around, text=True, stdout=subprocess.PIPE, check=False)
        if done.returncode:
            print(done.stdout, flush=True)
            last = done.stdout.strip().rpartition("\n")[-1]
            raise ProgramError(
                f"{' '.join(map(str, command[1:4]))}: exit status {done.returncode}: {last or 'see above'}"
            )
        return done.stdout.strip()

    def run(self, *arguments: str | Path, compiler: bool = False) -> str:
        """Run its Python, from its folder; what that prints."""
        path = f"{self.bin}{os.pathsep}{os.environ['PATH']}" if compiler else str(self.bin)
        assert compiler or not any(shutil.which(name, path=path) for name in COMPILERS)
        return self.call([self.bin / "python", *arguments], {**self.around, "PATH": path, "OMP_NUM_THREADS": "1"})

    def install(self, *what: str | Path) -> None:
        self.run("-m", "pip", "install", "--quiet", "--only-binary", ":all:", *what)

    def replace(self, package: Path) -> None:
        """Install a wheel, or build a source distribution, in the place of what is there."""
        built_here = package.suffix != ".whl"
        if built_here:
            self.install(*BUILD)
        how = ("--quiet", "--no-build-isolation", "--no-deps", "--force-reinstall")
        self.run("-m", "pip", "install", *how, package, compiler=built_here)

    def kernels(self, package: Path) -> str:
        """The instruction sets of the kernels, which the package has unless it is the pure one."""
        sets = self.run("-c", KERNELS)
        if bool(sets) == package.name.endswith("-none-any.whl"):
            raise ProgramError(f"kernels: {sets or 'none'}")
        return sets or "none"

    def test(self) -> str:
        """The tests of the operators, apart from those that are interpreted; their last line."""
        for name in ("tests/ops", "benchmarks"):  # of which test_triton.py calls one
            shutil.copytree(ROOT / name, self.folder / name, dirs_exist_ok=True)
        (self.folder / "tests" / "__init__.py").touch()
        quiet = ("-q", "-p", "no:cacheprovider", "-o", "markers=gpu", "--ignore", "tests/ops/interpreted")
        return self.run("-m", "pytest", *quiet, "tests/ops").rpartition("\n")[-1]


def the_one(folder: Path, pattern: str) -> Path:
    found = [path.resolve() for path in folder.glob(pattern)]
    if len(found) != 1:
        raise SystemExit(f"{folder}: holds {len(found)} files {pattern}, not one; run make wheels")
    return found[0]


def check(python: str, pytorch: str, packages: list[Path]) -> Iterator[tuple[str, ...]]:
    """Install and test packages with one Python and one PyTorch; the table's rows."""
    row = (Path(python).name, pytorch)
    with tempfile.TemporaryDirectory() as folder:
        try:
            there = Environment(Path(folder), python)
            there.install(packages[0], *PYTORCHS[pytorch], "pytest")
            row = tuple(there.run("-c", VERSIONS).split())
        except ProgramError as error:
            yield (*row, packages[0].name, "", f"FAILED: {error}")
            return
        for package in packages:
            kernels = ""
            try:
                there.replace(package)
                kernels = there.kernels(package)
                yield (*row, package.name, kernels, there.test())
            except ProgramError as error:
                yield (*row, package.name, kernels, f"FAILED: {error}")


def find(python: str) -> str | None:
    """Where it is: on PATH, where pyenv leaves stand-ins for versions that are not in use, or kept by pyenv or uv."""
    kept = (
        Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions",
        Path(os.environ.get("UV_PYTHON_INSTALL_DIR", Path.home() / ".local/share/uv/python")),
    )
    for path in (shutil.which(python), *(path for folder in kept for path in sorted(folder.glob(f"*/bin/{python}")))):
        if path is not None and subprocess.run([path, "-V"], capture_output=True, check=False).returncode == 0:
            return str(path)
    return None


def main(dist: Path, wanted: list[str]) -> None:
    found = {python: find(python) for python in wanted}
    here = [path for path in found.values() if path is not None]
    for python in (python for python, path in found.items() if path is None):
        version = Path(python).name.removeprefix("python")
        get = f"`uv python install {version}` or `pyenv install {version}`"
        print(f"{python} is not on this machine and is left out: {get} gets it", flush=True)
    if not here:
        raise SystemExit("no Python to install into")
    names = (f"*manylinux*_{platform.machine()}.whl", "*-none-any.whl", "*.tar.gz")
    packages = [the_one(dist, name) for name in names]
    turns = [(here[0], "oldest", packages)]
    turns += [(python, "newest", packages[:1]) for python in here]
    turns += [(python, "oldest", packages[:1]) for python in here[1:]]
    rows = [HEAD, ("---",) * len(HEAD)]
    for turn in turns:
        print(f"{turn[0]}, {turn[1]} PyTorch", flush=True)
        for row in check(*turn):
            print(*row, sep=", ", flush=True)
            rows.append(row)
    rows += [(python, "", "", "", "left out: not on this machine") for python, path in found.items() if path is None]
    print("", *(f"| {' | '.join(row)} |" for row in rows), sep="\n")
    failed = sum("FAILED" in row[-1] for row in rows)
    if failed:
        raise SystemExit(f"{failed} failed")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])

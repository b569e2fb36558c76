"""Builds the wheel of this tree for each Python that is named, and checks it.

    python tests/wheel/build.py [--python python3.11 ...] [--twice] [--out dist]

The compiler is clang as PyPI's `ziglang` brings it, against glibc 2.28: the wheel is manylinux_2_28 on any Linux,
without a container. A wheel a Python: the stable ABI has no way to put a function into a type's slot or to look at a
frame, which is what a call of 2 us stands on (`_calls.pyx`). --twice builds each wheel from a second folder, too, and
compares the bytes. Run by `make wheel`, in an environment of tests/wheel/requirements.txt.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import ziglang

ROOT = Path(__file__).resolve().parent.parent.parent
BIN = Path(sys.executable).parent  # of the environment with the tools
TARGET, TAG = "x86_64-linux-gnu.2.28", "manylinux_2_28_x86_64"
LIMIT = 3 << 20  # bytes of a wheel


def run(*command: str | Path, **environment: str) -> str:
    done = subprocess.run(
        command, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{done.stdout}\n{' '.join(map(str, command))} ended with {done.returncode}")
    return done.stdout


def sources(folder: Path) -> Path:
    """A copy of what git knows of the tree: no objects, and no sources that Cython made."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    return folder


def build(python: str, tree: Path) -> Path:
    """The wheel as setuptools makes it, stripped; what it is made of depends on neither the folder nor the day."""
    compiler = (
        Path(ziglang.__file__).parent / "zig"
    )  # pip hides this environment from what it builds in, so by its path
    flags = f"-O2 -g0 -ffile-prefix-map={tree}=. -target {TARGET}"
    environment = {
        "CC": f"{compiler} cc",
        "CXX": f"{compiler} c++",
        "CFLAGS": flags,
        "CXXFLAGS": flags,
        "LDSHARED": f"{compiler} cc -shared",
        "LDCXXSHARED": f"{compiler} c++ -shared",
        "LDFLAGS": f"-target {TARGET} -s -Wl,--build-id=none",
        "SOURCE_DATE_EPOCH": "1767225600",
        "PIP_CONSTRAINT": str(ROOT / "tests/wheel/requirements.txt"),
        "PYTHONHASHSEED": "0",
    }
    made = tree / "made"
    run(python, "-m", "pip", "wheel", "-q", "--no-deps", "-w", made, tree, **environment)
    (wheel,) = made.glob("*.whl")
    return wheel


def check(wheel: Path, out: Path) -> Path:
    """The wheel under its tag of manylinux, where its size and all checkers agree to it."""
    environment = {"PATH": f"{BIN}:{os.environ['PATH']}", "SOURCE_DATE_EPOCH": "1767225600"}
    run(BIN / "auditwheel", "repair", "--plat", TAG, "-w", wheel.parent / "repaired", wheel, **environment)
    (repaired,) = (wheel.parent / "repaired").glob("*.whl")
    if TAG not in repaired.name or repaired.stat().st_size > LIMIT:
        sys.exit(f"{repaired.name} has {repaired.stat().st_size} bytes; wanted are {TAG} and at most {LIMIT}")
    run(BIN / "twine", "check", "--strict", repaired)
    run(BIN / "check-wheel-contents", repaired)
    out.mkdir(parents=True, exist_ok=True)
    return Path(shutil.move(repaired, out / repaired.name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", nargs="+", default=[sys.executable], help="interpreters with pip")
    parser.add_argument("--twice", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    options = parser.parse_args()
    for python in options.python:
        hashes = set()
        for name in ("one", "another") if options.twice else ("one",):
            with tempfile.TemporaryDirectory(prefix=name) as folder:
                wheel = check(build(python, sources(Path(folder, name))), options.out)
                hashes.add(hashlib.sha256(wheel.read_bytes()).hexdigest())
        if len(hashes) > 1:
            sys.exit(f"two builds of {wheel.name} differ")
        print(f"{wheel.name} {wheel.stat().st_size / 2**20:.2f} MiB sha256 {hashes.pop()}", flush=True)


if __name__ == "__main__":
    main()

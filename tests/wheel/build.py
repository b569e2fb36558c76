"""Builds a wheel of this tree for each Python that is named, and checks it.

    python tests/wheel/build.py [--python python3.11 ...] [--twice] [--out dist]

The compiler is clang as PyPI's `ziglang` brings it, against glibc 2.28: the wheel is manylinux_2_28 on any Linux,
without a container. A wheel a Python, for the stable ABI makes a small call 1.2 times as long, and has no way to look
at a frame or to put a function into a type's slot (CONTRIBUTING.md). What is built is the source distribution,
unpacked: so that is whole. --twice builds each wheel from a second folder, too, and compares the bytes. Where there is
ccache, units without Python in them are compiled once for all. Run by `make wheel`, with what requirements.txt pins.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import ziglang

ROOT = Path(__file__).resolve().parent.parent.parent
BIN = Path(sys.executable).parent  # of the environment with the tools
REQUIREMENTS = ROOT / "tests/wheel/requirements.txt"
TARGET, TAG = "x86_64-linux-gnu.2.28", "manylinux_2_28_x86_64"
LIMIT = 3 << 20  # bytes of a wheel
EPOCH = {"SOURCE_DATE_EPOCH": "1767225600"}  # the date of all files in an archive, whenever it is made


def run(*command: str | Path, cwd: Path = ROOT, **environment: str) -> str:
    environment = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}"} | environment
    done = subprocess.run(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{done.stdout}\n{' '.join(map(str, command))} ended with {done.returncode}")
    return done.stdout


def interpreters(named: list[str]) -> dict[str, str]:
    """Version -> program, of those named or of each CPython that pyproject.toml has wheels for and that is here."""
    wanted = run("cibuildwheel", "--print-build-identifiers", "--platform", "linux").split()
    found: dict[str, str] = {}
    for python in named or [f"python{each[2]}.{each[3:].split('-')[0]}" for each in wanted]:  # cp310-manylinux_x86_64
        ask = "import sys; print(sys.version_info.minor, sys.executable)"
        told = subprocess.run(["/bin/sh", "-c", f"{python} -c '{ask}'"], capture_output=True, text=True, check=False)
        if told.returncode == 0:
            version, program = told.stdout.strip().split(maxsplit=1)
            found[version] = program
        else:
            print(f"no wheel for {python}, which is not here", flush=True)
    return found


def source_distribution(out: Path) -> Path:
    """All that git knows, in an archive that is checked; what is built, tested and published comes from it."""
    run("validate-pyproject", "pyproject.toml")
    run("check-manifest")
    with tempfile.TemporaryDirectory() as folder:
        run("python", "-m", "build", "--sdist", "--outdir", folder, ROOT, PIP_CONSTRAINT=str(REQUIREMENTS), **EPOCH)
        (made,) = Path(folder).glob("*.tar.gz")
        run("twine", "check", "--strict", made)
        return Path(shutil.move(made, out / made.name))


def unpacked(archive: Path, folder: Path) -> Path:
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    (tree,) = folder.glob("fastlinear-*")
    return tree


def compilers(folder: Path) -> tuple[str, str]:
    """C's and C++'s, as programs, since ccache knows a compiler by its name."""
    zig, names = Path(ziglang.__file__).parent / "zig", ("clang", "clang++")
    for name, command in zip(names, ("cc", "c++"), strict=True):
        (folder / name).write_text(f'#!/bin/sh\nexec {zig} {command} -target {TARGET} "$@"\n')
        (folder / name).chmod(0o755)
    return str(folder / names[0]), str(folder / names[1])


def build(python: str, tree: Path, c: str, cxx: str) -> Path:
    """The wheel as setuptools makes it, stripped; what it is made of depends on neither the folder nor the day."""
    cached = "ccache " if shutil.which("ccache") else ""
    flags = f"-O2 -g0 -ffile-prefix-map={tree}=."
    environment = {
        "CC": f"{cached}{c}",
        "CXX": f"{cached}{cxx}",
        "CFLAGS": flags,
        "CXXFLAGS": flags,
        "LDSHARED": f"{c} -shared",
        "LDCXXSHARED": f"{cxx} -shared",
        "LDFLAGS": "-s -Wl,--build-id=none",
        "CCACHE_DIR": f"{tree.parent}/ccache",  # no second build of the same takes the first one's objects
        "PIP_CONSTRAINT": str(REQUIREMENTS),
        "PIP_BUILD_CONSTRAINT": str(REQUIREMENTS),
        "PYTHONHASHSEED": "0",
    }
    made = Path(tempfile.mkdtemp(dir=tree.parent))
    run("pip", "--python", python, "wheel", "-q", "--no-deps", "-w", made, tree, cwd=tree, **environment, **EPOCH)
    (wheel,) = made.glob("*.whl")
    return wheel


def checked(wheel: Path, out: Path) -> Path:
    """The wheel under its tag of manylinux, where its size and all checkers agree to it."""
    run("auditwheel", "repair", "--plat", TAG, "-w", wheel.parent / "repaired", wheel, **EPOCH)
    (repaired,) = (wheel.parent / "repaired").glob("*.whl")
    if TAG not in repaired.name or repaired.stat().st_size > LIMIT:
        sys.exit(f"{repaired.name} has {repaired.stat().st_size} bytes; wanted are {TAG} and at most {LIMIT}")
    run("twine", "check", "--strict", repaired)
    run("check-wheel-contents", repaired)
    return Path(shutil.move(repaired, out / repaired.name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", nargs="*", default=[], help="interpreters; all that there are wheels for")
    parser.add_argument("--twice", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    options = parser.parse_args()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fastlinear-wheel-") as name:
        folder = Path(name)
        archive = source_distribution(out)
        print(f"{archive.name} {archive.stat().st_size / 2**20:.2f} MiB", flush=True)
        c, cxx = compilers(folder)
        trees = [unpacked(archive, folder / each) for each in ("one", "another")[: 1 + options.twice]]
        for python in interpreters(options.python).values():
            hashes = set()
            for tree in trees:
                wheel = checked(build(python, tree, c, cxx), out)
                hashes.add(hashlib.sha256(wheel.read_bytes()).hexdigest())
            if len(hashes) > 1:
                sys.exit(f"two builds of {wheel.name} differ")
            print(f"{wheel.name} {wheel.stat().st_size / 2**20:.2f} MiB sha256 {hashes.pop()}", flush=True)


if __name__ == "__main__":
    main()

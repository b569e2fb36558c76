"""Builds the library for aarch64, and runs its C++ tests there, on CPUs that QEMU imitates.

    python tests/aarch64/run.py [--short]

Needs Debian's g++-aarch64-linux-gnu and qemu-user (`make aarch64-tools`). The C++ tests are those of the driver, of the
activations, and products on every scalar kernel, of which each bit is what x86-64 has. Then the extension modules are
compiled and linked, too: only Python itself is not there to import them. --short leaves the modules out, and of the
activations looks at fewer floats. Exits with 1 at the first failure.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
CROSS, NATIVE = "aarch64-linux-gnu-g++", os.environ.get("CXX", "g++")
FLAGS = ["-std=c++20", "-O2", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off", f"-I{ROOT / 'include'}"]
PORTABLE = [ROOT / "csrc/registry.cpp", ROOT / "csrc/scalar.cpp"]

# By the names that QEMU gives them: what the system says of them, of what the library looks at.
CPUS = {
    "cortex-a57": "aarch64 implementer 0x41, part 0xd07 41 d07 scalar asimd",
    "neoverse-n1": "aarch64 implementer 0x41, part 0xd0c 41 d0c scalar asimd asimdhp asimddp",
    "a64fx": "aarch64 implementer 0x46, part 0x001 46 1 scalar asimd asimdhp sve",
    "max": "scalar asimd asimdhp asimddp i8mm bf16 sve",
}


def compiled(compiler: str, unit: Path, folder: Path) -> Path:
    target = folder / f"{unit.stem}.o"
    subprocess.run([*compiler.split(), *FLAGS, "-c", unit, "-o", target], check=True)
    return target


def program(compiler: str, unit: str, folder: Path, units: Iterable[Path]) -> Path:
    """A test program, linked with the library's own sources."""
    folder.mkdir(exist_ok=True)
    target, sources = folder / Path(unit).stem, [ROOT / unit, *units]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda source: compiled(compiler, source, folder), sources))
    static = ["-static"] if compiler == CROSS else []
    subprocess.run([*compiler.split(), *static, *objects, "-o", target, "-ldl"], check=True)
    return target


def run(*command: str | Path) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"{done.stdout}\n{' '.join(map(str, command))} ended with {done.returncode}")
    return done.stdout


def tests(folder: Path, stride: int) -> None:
    """The C++ tests, each on the CPUs that could make a difference to it."""
    driver = program(CROSS, "tests/kernel/steps.cpp", folder / "driver", [])
    print("driver:", run("qemu-aarch64", driver).strip())

    activations = program(CROSS, "tests/kernel/activations.cpp", folder / "activations", PORTABLE)
    print("activations:", len(run("qemu-aarch64", activations, str(stride)).splitlines()), "cases hold")

    there = program(CROSS, "tests/aarch64/products.cpp", folder / "there", PORTABLE)
    here = program(NATIVE, "tests/aarch64/products.cpp", folder / "here", sorted(ROOT.glob("csrc/*.cpp")))
    *wanted, _ = run(here).splitlines()
    for cpu, says in CPUS.items():
        *products, machine = run("qemu-aarch64", "-cpu", cpu, there).splitlines()
        if products != wanted:
            sys.exit("\n".join([f"{cpu} computes", *products, "and x86-64", *wanted]))
        if not machine.endswith(says):
            sys.exit(f"{cpu} is taken for {machine!r}, but is {says!r}")
        print(f"products on {len(products)} kernels, {cpu}: the bits of x86-64;", machine)


def modules(folder: Path) -> None:
    """The extension modules, as setup.py builds them for aarch64 with this Python's headers."""
    target = {"_PYTHON_HOST_PLATFORM": "linux-aarch64", "CC": CROSS.replace("g++", "gcc"), "CXX": CROSS}
    shared = {"LDSHARED": f"{target['CC']} -shared", "LDCXXSHARED": f"{CROSS} -shared"}
    places = ["--build-lib", str(folder / "lib"), "--build-temp", str(folder / "temp")]
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", *places],
        cwd=ROOT,
        env=os.environ | target | shared | {"CFLAGS": "-g0"},
        check=True,
    )
    built = sorted((folder / "lib").rglob("*.so"))
    for path in built:
        said = run("readelf", "-h", path)
        if "AArch64" not in said:
            sys.exit(f"{path} is not for aarch64: {said}")
    print("modules:", ", ".join(path.name.split(".")[0] for path in built))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true")
    short = parser.parse_args().short
    with tempfile.TemporaryDirectory() as name:
        tests(Path(name), 4_000_037 if short else 65521)
        if not short:
            modules(Path(name))


if __name__ == "__main__":
    main()

"""Builds the package with a sanitizer, beside the usual build, and runs what is to be free of reports under it.

    python tests/sanitize/run.py address|thread [--short]

address: AddressSanitizer with UndefinedBehaviorSanitizer over the self-check, random products on every kernel and a
part of the suite. thread: ThreadSanitizer over 16 threads that call, train and freeze one model. Exits with the status
of the first that fails; a report is a failure. What lies in torch and CPython, which are not instrumented, is left out
by the lists beside this file. Needs GCC's libasan, libubsan and libtsan, which come with the compiler.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
SUITE = [f"tests/kernel/test_{name}.py" for name in ("pack", "kernel_errors", "formats")]
FLAGS = {"address": "-fsanitize=address,undefined -fno-sanitize-recover=undefined", "thread": "-fsanitize=thread"}
LIBRARIES = {"address": ["libasan.so", "libubsan.so"], "thread": ["libtsan.so"]}
OPTIONS = {
    # CPython and torch keep what they allocate until the process ends; what is allocated by one library may be freed by
    # another's operator delete.
    "ASAN_OPTIONS": "detect_leaks=0:alloc_dealloc_mismatch=0:detect_odr_violation=0:halt_on_error=1",
    "UBSAN_OPTIONS": f"print_stacktrace=1:halt_on_error=1:suppressions={HERE}/undefined.supp",
    "TSAN_OPTIONS": "ignore_noninstrumented_modules=1:exitcode=66:report_signal_unsafe=0:"
    f"suppressions={HERE}/thread.supp",
}


def build(kind: str) -> Path:
    """The package, instrumented, in a folder of its own."""
    folder = ROOT / "build" / "sanitize" / kind
    flags = f"{FLAGS[kind]} -O1 -g1 -fno-omit-frame-pointer"
    compiler = {name: os.environ.get(name, command) for name, command in (("CC", "gcc"), ("CXX", "g++"))}
    environment = os.environ | compiler | {"CFLAGS": flags, "CXXFLAGS": flags, "LDFLAGS": FLAGS[kind]}
    places = ["--build-base", str(folder), "--build-lib", str(folder / "lib")]
    subprocess.run([sys.executable, "setup.py", "-q", "build", *places], cwd=ROOT, env=environment, check=True)
    return folder / "lib"


def found(library: str) -> str:
    asked = [*os.environ.get("CXX", "g++").split(), f"-print-file-name={library}"]
    path = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    return os.path.realpath(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=FLAGS)
    parser.add_argument("--short", action="store_true", help="what continuous integration runs")
    options = parser.parse_args()
    package = build(options.kind)
    environment = (
        os.environ
        | OPTIONS
        | {
            "LD_PRELOAD": " ".join(map(found, LIBRARIES[options.kind])),
            "PYTHONPATH": os.pathsep.join(map(str, (package, ROOT / "tests"))),
            "PYTHONMALLOC": "malloc",  # else CPython's own pools hide what is freed
            "FASTLINEAR_CACHE_DIR": str(package.parent / "cache"),
        }
    )
    python = [sys.executable, "-P"]
    if options.kind == "thread":
        python = ["setarch", "-R", *python]  # ThreadSanitizer of GCC 12 knows no mapping with more random bits
        runs = [[*python, str(HERE / "threads.py"), "10" if options.short else "60"]]
    else:
        runs = [[*python, str(HERE / "sweep.py"), "60" if options.short else "1000"]]
        if not options.short:
            runs += [[*python, "-m", "pytest", "-q", "-x", *SUITE]]
    for run in runs:
        print(*run, flush=True)
        status = subprocess.run(run, cwd=ROOT, env=environment).returncode
        if status != 0:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())

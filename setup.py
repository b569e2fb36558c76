"""Builds fastlinear._kernels: Cython's glue and one translation unit an ISA, with no torch and no -march.

The wide instruction sets are switched on inside the sources, region by region (include/fastlinear/host/target.hpp), so
the flags here are those of the architecture's baseline and one library serves every CPU of it.
"""

import os
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from glob import glob

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# What is compiled, by architecture: of a unit that wide instructions need, only x86-64 has any as yet.
UNITS = {
    "linux-x86_64": sorted(glob("csrc/*.cpp")),
    "linux-aarch64": ["csrc/registry.cpp", "csrc/scalar.cpp"],
}
target = sysconfig.get_platform()  # not this machine, if it compiles for another one
if target not in UNITS:
    sys.exit(f"fastlinear builds on {' and '.join(UNITS)}; this is {target}")

# Flags given here come after the environment's, so an -O of the user's CFLAGS has to keep ours away.
optimize = [] if "-O" in os.environ.get("CFLAGS", "") else ["-O2"]

common = {
    "depends": glob("include/**/*.hpp", recursive=True),
    "include_dirs": ["include"],
    "libraries": ["dl"],
    "language": "c++",
    "extra_compile_args": ["-std=c++20", "-fvisibility=hidden", "-ffp-contract=off", *optimize],
}
modules = [os.path.basename(path).removesuffix(".pyx") for path in sorted(glob("fastlinear/_*.pyx"))]
units = {"_kernels": UNITS[target]}
extensions = [
    Extension(f"fastlinear.{name}", [f"fastlinear/{name}.pyx", *units.get(name, [])], **common) for name in modules
]


class ParallelBuild(build_ext):
    """setuptools compiles the sources of an extension one after another; they do not depend on each other."""

    def build_extensions(self):
        compile_in_turn = self.compiler.compile

        def compile_at_once(sources, **options):
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = pool.map(lambda source: compile_in_turn([source], **options), sources)
                return [name for names in objects for name in names]

        self.compiler.compile = compile_at_once
        super().build_extensions()


setup(ext_modules=cythonize(extensions, language_level=3), cmdclass={"build_ext": ParallelBuild})

"""Builds fastlinear._kernels: Cython's glue and one translation unit an ISA, with no torch and no -march.

The wide instruction sets are switched on inside the sources, region by region (include/fastlinear/target.hpp), so the
flags here are those of the x86-64 baseline and one library serves every CPU.
"""

import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from glob import glob

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

if sys.platform != "linux" or platform.machine() != "x86_64":
    sys.exit(f"fastlinear builds on Linux x86_64; this is {sys.platform} {platform.machine()}")

# Flags given here come after the environment's, so an -O of the user's CFLAGS has to keep ours away.
optimize = [] if "-O" in os.environ.get("CFLAGS", "") else ["-O2"]

common = {
    "depends": glob("include/**/*.hpp", recursive=True),
    "include_dirs": ["include"],
    "libraries": ["dl"],
    "language": "c++",
    "extra_compile_args": ["-std=c++20", "-fvisibility=hidden", "-ffp-contract=off", *optimize],
}
modules = ("_calls", "_cpu", "_engine", "_kernels", "_plans", "_products", "_rows", "_tensors", "_weights")
units = {"_kernels": sorted(glob("csrc/*.cpp"))}
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

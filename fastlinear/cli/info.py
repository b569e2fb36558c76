"""`fastlinear info`: what runs here, to be pasted into an issue."""

from __future__ import annotations

import argparse
import os
import platform
from importlib.metadata import version

import torch

import fastlinear._kernels as _kernels
from fastlinear.plan import decide


def info(_: argparse.Namespace) -> int:
    """Prints what an issue needs to tell: versions, CPU, threads, kernels, cache and overrides."""
    cpu = _kernels.cpu_info()
    caches = ", ".join(f"{name} {cpu[name] >> 10} KiB" for name in ("l1d", "l2", "l3"))
    attached = "torch's own pool" if _kernels.pool_attached else "torch's pool was not found: one thread"
    rows = [
        ("fastlinear", version("fastlinear")),
        ("torch", torch.__version__),
        ("python", platform.python_version()),
        ("system", platform.platform()),
        ("CPU", f"{cpu['model'] or platform.machine()} ({cpu['vendor']}), {caches}"),
        ("ISAs in use", " ".join(cpu["isas"])),
        *(("without", f"{isa}: {why}") for isa, why in cpu["refused"].items()),
        ("threads", f"{_kernels.num_threads()} of {os.cpu_count()}, {attached}"),
        ("tuning cache", _cache()),
    ]
    overrides = sorted((name, value) for name, value in os.environ.items() if name.startswith("FASTLINEAR_"))
    rows += [("override", f"{name}={value}") for name, value in overrides] or [("overrides", "none")]
    print(*(f"{name + ':':<14}{value}" for name, value in rows), "", sep="\n")
    print(f"{'kernel':<24}{'rows x columns':>15}  {'packed as':<12}{'runs here'}")
    for row in _kernels.kernels():
        tile = f"{row['mr']} x {row['columns']}"
        print(f"{row['name']:<24}{tile:>15}  {row['layout']:<12}{'yes' if row['runnable'] else 'no'}")
    return 0


def _cache() -> str:
    cache = decide.cache()
    return f"{cache.path}, {len(cache)} entries" if cache.path else "in memory only: there is no home folder"

"""`fastlinear info`: what runs here, to be pasted into an issue."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

import fastlinear._kernels as _kernels
import fastlinear._products as _products
from fastlinear.cli import limits, tables
from fastlinear.plan import decide

_PACKAGES = ("fastlinear", "torch", "numpy", "safetensors", "transformers")


def info(options: argparse.Namespace) -> int:
    """Prints what an issue needs to tell: versions, CPU, threads, limits, kernels, cache and overrides."""
    facts = collect()
    if options.json:
        print(json.dumps(facts, indent=2))
        return 0
    print(*(f"{name + ':':<15}{value}" for name, value in _lines(facts)), "", sep="\n")
    tables.show(("kernels", "rows x columns", "packed as", "run here"), [*_kernel_rows(facts)])
    return 0


def _kernel_rows(facts: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """One for those of an ISA that read the same weights, whose names are all of it: int8/avx2/6x8."""
    alike: dict[Any, list[str]] = {}
    for row in facts["kernels"]:
        family, _, tile = row["name"].rpartition("/")
        alike.setdefault((family, row["packed as"], row["runs here"]), []).append(tile)
    for (family, layout, runs), tiles in alike.items():
        yield f"{family}/", " ".join(tiles), layout, "yes" if runs else "no"


def collect() -> dict[str, Any]:
    """All of it as data that JSON can hold; memory in bytes."""
    cpu, cache = _kernels.cpu_info(), decide.cache()
    return {
        "versions": {**{name: _version(name) for name in _PACKAGES}, "python": platform.python_version()},
        "system": platform.platform(),
        "cpu": {
            "model": cpu["model"] or platform.machine(),
            **{key: cpu[key] for key in ("vendor", "family", "stepping")},
            "number": cpu["number"],
            "caches": {level: cpu[level] for level in ("l1d", "l2", "l3")},
        },
        "isas": {"used": [*cpu["isas"]], "refused": dict(cpu["refused"])},
        "threads": {
            "used": _products.num_threads(),
            "of torch": torch.get_num_threads(),
            "cpus": os.cpu_count(),
            "affinity": limits.affinity(),
            "quota": limits.cpu_quota(),
            "pool": "torch's own" if _products.pool_attached else "none: torch's was not found",
        },
        "memory": {"limit": limits.memory_limit()},
        "cache": {"file": None if cache.path is None else str(cache.path), "entries": len(cache)},
        "overrides": {name: value for name, value in sorted(os.environ.items()) if name.startswith("FASTLINEAR_")},
        "kernels": [
            {
                "name": row["name"],
                "rows": row["mr"],
                "columns": row["columns"],
                "packed as": row["layout"],
                "runs here": row["runnable"],
            }
            for row in _kernels.kernels()
        ],
    }


def warnings(threads: dict[str, Any]) -> list[str]:
    """What is wrong with the number of threads, each in one sentence."""
    used, told = threads["used"], []
    if used > threads["affinity"]:
        told.append(f"{used} threads share {threads['affinity']} CPUs (affinity), where they wait for one another")
    if threads["quota"] is not None and used > threads["quota"]:
        told.append(
            f"the cgroup grants {threads['quota']:g} CPUs, fewer than the {used} threads, which are stopped when "
            f"their time is used up: torch.set_num_threads({max(1, int(threads['quota']))})"
        )
    return told


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    cpu, threads, cache, overrides = (facts[key] for key in ("cpu", "threads", "cache", "overrides"))
    caches = ", ".join(f"{level} {size >> 10} KiB" for level, size in cpu["caches"].items())
    quota = "no CPU quota" if threads["quota"] is None else f"a quota of {threads['quota']:g} CPUs"
    limit = facts["memory"]["limit"]
    memory = "no memory limit" if limit is None else f"{limit / 2**30:.1f} GiB of memory"
    file, refused = cache["file"], dict[str, list[str]]()
    for isa, why in facts["isas"]["refused"].items():
        refused.setdefault(why, []).append(isa)
    cached = "in memory only: there is no home folder" if file is None else f"{file}, {cache['entries']} entries"
    return [
        *((name, text) for name, text in facts["versions"].items() if text is not None),
        ("system", facts["system"]),
        ("CPU", f"{cpu['model']} ({cpu['vendor']} {cpu['family']}/{cpu['number']}/{cpu['stepping']}), {caches}"),
        ("ISAs in use", " ".join(facts["isas"]["used"])),
        *(("without", f"{' '.join(isas)}: {why}") for why, isas in refused.items()),
        ("threads", f"{threads['used']} of {threads['affinity']} CPUs, {threads['pool']} pool"),
        ("container", f"{quota}, {memory}"),
        *(("warning", text) for text in warnings(threads)),
        ("tuning cache", cached),
        *([("override", f"{name}={value}") for name, value in overrides.items()] or [("overrides", "none")]),
    ]

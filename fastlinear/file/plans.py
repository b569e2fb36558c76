"""Plans that ship with an application: what was measured on one or several machines, in one JSON file.

    {"format": "fastlinear plans", "version": 1,
     "machines": [{"machine": {"cpu": ..., "isas": [...], "fastlinear": ..., "torch": ...}, "entries": {key: plan}}]}

Machines and entries are those of the tuning cache (`plan.memory`), and are believed as little.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

from torch import nn

from fastlinear.file.safetensors import AnyPath, FormatError
from fastlinear.layer import linear
from fastlinear.layer.fitness import is_transposed
from fastlinear.layer.frozen import shared_as
from fastlinear.model.arguments import check_module
from fastlinear.model.tuning import fast_layers
from fastlinear.plan import decide
from fastlinear.plan.problem import shape_of

_log = logging.getLogger("fastlinear")

_FORMAT, _VERSION = "fastlinear plans", 1
_MOST_BYTES = 64 << 20


def save_plans(model: nn.Module, path: AnyPath) -> int:
    """Write what was measured for the fast layers of `model` to a file, and return how many plans that were.

    A file that is there already keeps the plans of other machines, and those of this machine for other layers, so that
    one file may grow on several. It is replaced whole or not at all. Raises TypeError for anything but an nn.Module,
    FormatError where the file that is there holds something else, OSError as the system gives it.
    """
    check_module("save_plans", model)
    cache, entries = decide.cache(), {}
    for layer in fast_layers(model):
        for key in layer.problem_keys():
            if (found := cache.get(key)) is not None:
                entries[key] = found._asdict()
    machines = _read(path) if Path(path).exists() else []
    own = next((each for each in machines if each["machine"] == cache.machine), None)
    if own is None:
        machines.append({"machine": cache.machine, "entries": entries})
    else:
        own["entries"] = {**own["entries"], **entries}
    temporary = Path(f"{os.fspath(path)}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps({"format": _FORMAT, "version": _VERSION, "machines": machines}, indent=1))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return len(entries)


def load_plans(path: AnyPath, model: nn.Module | None = None) -> int:
    """Take the plans of a file that were measured on a machine like this one, for this process, and return how many
    these are; what this machine's own cache knows already stays.

    A machine is like this one with the same CPU, instruction sets, and versions of fastlinear and torch; what differs
    goes to the log where none is. Plans are checked one by one, and only ones that may run here are taken. Raises
    FormatError for a file that is something else, OSError as the system gives it.

    model: where processes share it, FormatError if the plans are for a whole layer of it, of which this process has a
        part; nothing of the file is taken then.
    """
    machines, cache = _read(path), decide.cache()
    if model is not None:
        check_module("load_plans", model)
        _check_parts(path, machines, model)
    for each in machines:
        if each["machine"] == cache.machine:
            return cache.learn(each["entries"])
    others = [[key for key, value in cache.machine.items() if each["machine"].get(key) != value] for each in machines]
    nearest = min(others, key=len, default=[])
    what = " and ".join(nearest) or "all"
    _log.info("%s has plans of %d machines, none like this one: the nearest differs in %s", path, len(machines), what)
    return 0


def _check_parts(path: AnyPath, machines: list[dict[str, Any]], model: nn.Module) -> None:
    known = {shape for each in machines for key in each["entries"] if (shape := shape_of(key)) is not None}
    for name, layer in model.named_modules():
        if not linear.is_fast(layer) or (shard := shared_as(layer)) is None:
            continue
        whole, part = (
            (*shape[::-1],) if is_transposed(layer) else (*shape,) for shape in (shard.shape, layer.weight_shape)
        )
        if whole in known and part not in known:
            raise FormatError(
                f"{os.fspath(path)} has plans for a weight of {whole[0]} x {whole[1]}, but of that of layer {name!r} "
                f"this process has {part[0]} x {part[1]}: tune and save plans of the model as the processes share it"
            )


def _read(path: AnyPath) -> list[dict[str, Any]]:
    with open(path, "rb") as file:
        data = file.read(_MOST_BYTES + 1)
    try:
        said = json.loads(data) if len(data) <= _MOST_BYTES else None
    except (ValueError, RecursionError):
        said = None
    if not isinstance(said, dict) or said.get("format") != _FORMAT:
        raise FormatError(f"{os.fspath(path)} is no file of plans, as fastlinear.save_plans writes it")
    if said.get("version") != _VERSION:
        raise FormatError(f"{os.fspath(path)} has plans of version {said.get('version')!r}, not {_VERSION}")
    machines: Any = said.get("machines")
    sound = isinstance(machines, list) and all(
        isinstance(each, dict) and isinstance(each.get("machine"), dict) and isinstance(each.get("entries"), dict)
        for each in machines
    )
    if not sound:
        raise FormatError(f"{os.fspath(path)} lists machines in another form than fastlinear.save_plans")
    return [*machines]

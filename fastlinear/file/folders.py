"""Folders of safetensors files with a quantization_config, as transformers saves them, and what lies in them."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastlinear.file import safetensors
from fastlinear.file.filling import Source
from fastlinear.file.safetensors import MAX_BYTES, AnyPath, Entry, Mapped, at_once, parse_json, shown
from fastlinear.layer import experts, pages
from fastlinear.spec.checkpoints import MIXTURES, SCHEMES
from fastlinear.spec.checkpoints.scheme import Mixture, Scheme
from fastlinear.spec.packed import Weight, stands_for

_COMPUTED = ".rotary_emb.inv_freq"  # a buffer that older models were saved with, and compute from their config
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


class Folder(NamedTuple):
    """config: the quantization_config; schemes: those of its method, mixture: that of its experts, if there is one;
    files: by the names of the tensors in them."""

    config: dict[str, Any]
    schemes: tuple[Scheme, ...]
    mixture: Mixture | None
    files: Mapping[str, Mapped]

    def entry(self, name: str) -> Entry:
        return self.files[name].contents.entries[name]

    def tensor(self, name: str) -> Tensor:
        return self.files[name].tensor(name)


def open_folder(path: AnyPath) -> Folder:
    """The files of a folder, of which no more than the headers are read; ValueError where they are not sound or of no
    known kind, OSError as the system gives it."""
    folder = os.fsdecode(path)
    names = sorted(os.listdir(folder))
    single = next((name for name in names if name.endswith(".gguf")), None)
    if single is not None and not any(name.endswith(".safetensors") for name in names):
        raise ValueError(f"it is a folder of GGUF files, of which one is to be named, such as {shown(single)}")
    config = _json(os.path.join(folder, "config.json"))
    told = config.get("quantization_config")
    if not isinstance(told, dict):
        raise ValueError("its config.json has no quantization_config")
    method = told.get("quant_method")
    if not isinstance(method, str) or method not in SCHEMES:
        raise ValueError(f"its quant_method is {shown(method)}, and read are {', '.join(SCHEMES)}")
    files: dict[str, Mapped] = {}
    for name in _names(folder):
        mapped = safetensors.open_mapped(os.path.join(folder, name))
        for tensor in mapped.contents.entries:
            if tensor in files:
                raise ValueError(f"two of its files have a tensor {shown(tensor)}")
            files[tensor] = mapped
    return Folder(told, SCHEMES[method], MIXTURES.get(method), files)


def _names(folder: str) -> list[str]:
    """The safetensors files of a model."""
    index = os.path.join(folder, _INDEX)
    if not os.path.exists(index):
        return [_SINGLE]
    places = _json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise ValueError(f"its {_INDEX} has no weight_map")
    names = sorted({*places.values()})
    for name in names:
        if os.path.basename(name) != name or name in ("", ".", "..") or "\0" in name:
            raise ValueError(f"its {_INDEX} names the file {shown(name)}, which is not in the folder")
    return names


def _json(path: str) -> dict[str, Any]:
    with open(path, "rb", opener=at_once) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_BYTES:
            raise ValueError(f"its {os.path.basename(path)} is no file of up to {MAX_BYTES} bytes")
        parsed = parse_json(f"its {os.path.basename(path)}", file.read(MAX_BYTES).decode())
    if not isinstance(parsed, dict):
        raise ValueError(f"its {os.path.basename(path)} is no JSON object")
    return parsed


def sources(folder: Folder, model: nn.Module) -> dict[str, Source]:
    """The tensors of a folder by their names in `model`."""
    found: dict[str, Source] = {}
    taken: set[str] = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            for scheme in folder.schemes:
                names = {part: f"{name}.{part}" for part in scheme.parts}
                if all(each in folder.files for each in names.values()):
                    more = {part: f"{name}.{part}" for part in scheme.optional}
                    names |= {part: each for part, each in more.items() if each in folder.files}
                    found[f"{name}.weight"] = _quantized(folder, scheme, names, name)
                    taken.update(names.values())
                    if module.bias is None and _is_zero(folder, f"{name}.bias"):
                        taken.add(f"{name}.bias")
                    break
        elif folder.mixture is not None and experts.are_experts(module):
            for own in experts.names_of(module):
                full = f"{name}.{own}" if name else own
                names = {part: f"{full}_{part}" for part in folder.mixture.parts}
                if all(each in folder.files for each in names.values()):
                    found[full] = _of_experts(folder, folder.mixture, names, full, experts.is_transposed(module))
                    taken.update(names.values())
    rest = (name for name in folder.files if name not in taken and not name.endswith(_COMPUTED))
    return found | {name: _plain(folder, name) for name in rest}


def _is_zero(folder: Folder, name: str) -> bool:
    """Whether there is such a tensor, and it does nothing: packers have written biases for layers that have none."""
    return name in folder.files and not bool(folder.tensor(name).any())


def _quantized(folder: Folder, scheme: Scheme, names: Mapping[str, str], layer: str) -> Source:
    parts = {part: folder.tensor(name) for part, name in names.items()}
    try:
        shape = scheme.shape(parts, folder.config)
    except ValueError as error:
        raise ValueError(f"its layer {shown(layer)}: {error}") from error
    return Source(
        shape,
        scheme.label,
        lambda: scheme.weight(parts, folder.config),
        release=lambda: pages.let_go(*parts.values()),
    )


def _of_experts(folder: Folder, mixture: Mixture, names: Mapping[str, str], full: str, transposed: bool) -> Source:
    parts = {part: folder.tensor(name) for part, name in names.items()}
    try:
        count, n, k = mixture.shape(parts, folder.config)
    except ValueError as error:
        raise ValueError(f"its {shown(full)}: {error}") from error
    shape = (count, k, n) if transposed else (count, n, k)

    def read() -> Weight:
        every = torch.stack([stands_for(mixture.weight(parts, expert)) for expert in range(count)])
        return every.mT if transposed else every

    return Source(
        shape,
        mixture.label,
        read,
        release=lambda: pages.let_go(*parts.values()),
        expert=lambda expert: mixture.weight(parts, expert),
    )


def _plain(folder: Folder, name: str) -> Source:
    entry = folder.entry(name)
    floating = entry.dtype in (torch.float32, torch.float16, torch.bfloat16)
    return Source(
        entry.shape,
        str(entry.dtype).removeprefix("torch."),
        lambda: folder.tensor(name),
        floating=floating,
        release=lambda: pages.let_go(folder.tensor(name)),
        part=lambda begin, end: folder.tensor(name)[begin:end],
    )

"""Folders of safetensors files with a quantization_config, as transformers saves them, and what lies in them."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastlinear.file import safetensors
from fastlinear.file.filling import Source
from fastlinear.file.safetensors import MAX_BYTES, AnyPath, Entry, Mapped, at_once, parse_json, shown
from fastlinear.layer import experts, mixture, pages
from fastlinear.spec.checkpoints import MIXTURES, SCHEMES, schemes_of
from fastlinear.spec.checkpoints.scheme import SCALES, Config, Mixture, Parts, Scheme, need
from fastlinear.spec.packed import Weight, joined, stands_for

_COMPUTED = ".rotary_emb.inv_freq"  # a buffer that older models were saved with, and compute from their config
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_RENAMED = ((".block_sparse_moe.", ".mlp."),)  # what checkpoints call otherwise than transformers does
# Of an expert that is stored by itself: its gate, what goes through that, and its second product.
_EXPERT = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))


class Place(NamedTuple):
    """Where a tensor is stored, and by what name."""

    file: Mapped
    name: str


class Folder(NamedTuple):
    """config: the quantization_config; schemes: those of its method, mixture: that of its experts, if there is one;
    files: by the names of the tensors in them."""

    config: dict[str, Any]
    schemes: tuple[Scheme, ...]
    mixture: Mixture | None
    files: Mapping[str, Place]

    def entry(self, name: str) -> Entry:
        file, stored = self.files[name]
        return file.contents.entries[stored]

    def tensor(self, name: str) -> Tensor:
        file, stored = self.files[name]
        return file.tensor(stored)


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
        raise ValueError("its config.json has no quantization_config: weights in floats are transformers' to read")
    method = told.get("quant_method")
    if not isinstance(method, str) or method not in SCHEMES:
        raise ValueError(f"its quant_method is {shown(method)}, and read are {', '.join(SCHEMES)}")
    schemes, files = schemes_of(method, told), dict[str, Place]()
    for name in _names(folder):
        mapped = safetensors.open_mapped(os.path.join(folder, name))
        for tensor in mapped.contents.entries:
            if tensor in files:
                raise ValueError(f"two of its files have a tensor {shown(tensor)}")
            files[tensor] = Place(mapped, tensor)
    return Folder(told, schemes, MIXTURES.get(method), files)


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
    folder = _renamed(folder, model)
    found: dict[str, Source] = {}
    taken: set[str] = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            stored = _stored(folder, name, folder.schemes)
            if stored is not None:
                found[f"{name}.weight"] = _quantized(stored)
                taken.update(stored.names)
                if module.bias is None and _is_zero(folder, f"{name}.bias"):
                    taken.add(f"{name}.bias")
        elif experts.are_experts(module):
            for own, layers in _one_by_one(folder, module, name).items():
                found[f"{name}.{own}"] = _joined(layers)
                taken.update(each for of_expert in layers for stored in of_expert for each in stored.names)
            for own in experts.names_of(module):
                full, scheme = f"{name}.{own}" if name else own, folder.mixture
                names = {} if scheme is None else {part: f"{full}{part}" for part in scheme.parts}
                if scheme is not None and all(each in folder.files for each in names.values()):
                    found[full] = _of_experts(folder, scheme, names, full, experts.is_transposed(module))
                    taken.update(names.values())
    rest = (name for name in folder.files if name not in taken and not name.endswith(_COMPUTED))
    return found | {name: _plain(folder, name) for name in rest}


def _is_zero(folder: Folder, name: str) -> bool:
    """Whether there is such a tensor, and it does nothing: packers have written biases for layers that have none."""
    return name in folder.files and not bool(folder.tensor(name).any())


def _renamed(folder: Folder, model: nn.Module) -> Folder:
    """With its tensors' names as this model has them."""
    modules = [f".{name}." for name, _ in model.named_modules()]
    files: dict[str, Place] = {}
    for name, place in folder.files.items():
        for old, new in _RENAMED:
            if old in name and not any(old in module for module in modules):
                name = name.replace(old, new)
        if name in files:
            raise ValueError(f"two of its tensors are {shown(name)} of this {type(model).__name__}")
        files[name] = place
    return folder._replace(files=files)


class Stored(NamedTuple):
    """A layer of a checkpoint. parts: what there is of those of its scheme; names: of these in the folder."""

    layer: str
    scheme: Scheme
    parts: Parts
    names: Sequence[str]
    config: Config

    def shape(self) -> tuple[int, int]:
        """N and K; ValueError, which names the layer, where its parts do not go together."""
        try:
            return self.scheme.shape(self.parts, self.config)
        except ValueError as error:
            raise ValueError(f"its layer {shown(self.layer)}: {error}") from error

    def weight(self) -> Weight:
        return self.scheme.weight(self.parts, self.config)

    def release(self) -> None:
        pages.let_go(*self.parts.values())


def _stored(folder: Folder, layer: str, schemes: Sequence[Scheme]) -> Stored | None:
    """The layer of this name by the first scheme that has all of its parts; None where there is none."""
    for scheme in schemes:
        names = {part: f"{layer}.{part}" for part in scheme.parts}
        if all(each in folder.files for each in names.values()):
            more = {part: f"{layer}.{part}" for part in scheme.optional}
            names |= {part: each for part, each in more.items() if each in folder.files}
            parts = {part: folder.tensor(name) for part, name in names.items()}
            return Stored(layer, scheme, parts, [*names.values()], folder.config)
    return None


def _quantized(stored: Stored) -> Source:
    return Source(stored.shape(), stored.scheme.label, stored.weight, release=stored.release)


def _floats_shape(parts: Parts, config: Config) -> tuple[int, int]:
    n, k = need(parts, "weight", SCALES, None, None).shape
    return n, k


_FLOATS = Scheme("floats", ("weight",), (), _floats_shape, lambda parts, config: parts["weight"])


def _one_by_one(folder: Folder, module: Any, name: str) -> dict[str, list[list[Stored]]]:
    """By the names of the parameters of experts, the layers of each expert that make one weight of it, gates first;
    empty where they are not stored so."""
    form = mixture.form_of(module)
    if isinstance(form, str) or form.transposed or form.interleaved:
        return {}
    (first, second), schemes = experts.names_of(module), (*folder.schemes, _FLOATS)
    for gate, through, out in _EXPERT:
        if _stored(folder, f"{name}.0.{out}", schemes) is None:
            continue
        own = {first: (gate, through) if module.has_gate else (through,), second: (out,)}
        layers = {
            key: [
                [_stored(folder, f"{name}.{expert}.{each}", schemes) for each in of_weight]
                for expert in range(experts.sizes_of(module)[1][0])
            ]
            for key, of_weight in own.items()
        }
        if all(each is not None for every in layers.values() for of_expert in every for each in of_expert):
            return layers  # type: ignore[return-value]
    return {}


def _joined(layers: list[list[Stored]]) -> Source:
    """The weights of all experts of one product."""
    shapes = [[stored.shape() for stored in of_expert] for of_expert in layers]
    k, n = shapes[0][0][1], sum(shape[0] for shape in shapes[0])
    for of_expert, own in zip(layers, shapes, strict=True):
        if any(shape[1] != k for shape in own) or sum(shape[0] for shape in own) != n:
            raise ValueError(
                f"its layer {shown(of_expert[0].layer)} is {own[0]}, and that of the first expert {shapes[0][0]}"
            )

    def expert(i: int) -> Weight:
        return joined([stored.weight() for stored in layers[i]])

    def release() -> None:
        for of_expert in layers:
            for stored in of_expert:
                stored.release()

    schemes = [stored.scheme for of_expert in layers for stored in of_expert]
    plain = all(scheme is _FLOATS for scheme in schemes)
    return Source(
        (len(layers), n, k),
        schemes[0].label,
        lambda: torch.stack([stands_for(expert(i)) for i in range(len(layers))]),
        floating=plain,
        release=release,
        expert=None if plain else expert,
    )


def _of_experts(folder: Folder, own: Mixture, names: Mapping[str, str], full: str, transposed: bool) -> Source:
    parts = {part: folder.tensor(name) for part, name in names.items()}
    try:
        count, n, k = own.shape(parts, folder.config)
    except ValueError as error:
        raise ValueError(f"its {shown(full)}: {error}") from error
    shape = (count, k, n) if transposed else (count, n, k)

    def read() -> Weight:
        every = torch.stack([stands_for(own.weight(parts, folder.config, expert)) for expert in range(count)])
        return every.mT if transposed else every

    return Source(
        shape,
        own.label,
        read,
        release=lambda: pages.let_go(*parts.values()),
        expert=lambda expert: own.weight(parts, folder.config, expert),
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

"""Save and load: a model with fast layers as one file, and a stock model made the same by such a file.

manifest.py is what the file says of the model, matching.py holds that against the model that loads it, safetensors.py
is the file.
"""

from __future__ import annotations

from collections.abc import Container, Hashable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

import fastlinear._fingerprints as _fingerprints
import fastlinear._tensors as _tensors
import fastlinear._weights as _weights
from fastlinear.file import manifest, matching, safetensors
from fastlinear.file.manifest import Fused, Layer, Manifest, StoredScheme, check_channels, member
from fastlinear.file.matching import Held, Match, tensors_of
from fastlinear.file.safetensors import AnyPath, Blob, Mapped, faults_of, shown
from fastlinear.layer import attention, embedding, experts, experts_frozen, linear, packs
from fastlinear.layer.fitness import dtype_of, why_unread
from fastlinear.layer.frozen import Frozen, hold, record_of, shared_as
from fastlinear.layer.shard import local, shard_of
from fastlinear.layer.shelf import Shelf, bytes_of, on_this_machine
from fastlinear.model import fusion
from fastlinear.model.agreement import agreed
from fastlinear.model.arguments import check_module
from fastlinear.model.encoders import forbid_bypasses
from fastlinear.plan import decide, rivals, table
from fastlinear.plan.memory import Remembered
from fastlinear.plan.problem import FROZEN
from fastlinear.spec.formats import DTYPES, FP32
from fastlinear.spec.int4 import coding_of
from fastlinear.spec.precision import Precision
from fastlinear.spec.programs import is_gated

Model = TypeVar("Model", bound=nn.Module)

_PACKED, _SMOOTH = "packed", "smooth"  # what the tensors of a layer are called that its module has not


# ---- save ----


def save(model: nn.Module, path: AnyPath) -> None:
    """Write `model` to one file, for `load`: the packed weights of its fast layers, frozen or not, and all else plain.

    The file is in the format of safetensors. It takes the place of an old one in a single step, so processes that have
    that one loaded keep it, and a save that fails or is killed leaves it. Tensors that share memory are stored once; a
    fast layer's weight that something else uses too, an embedding, say, is stored plain beside its pack. With it go the
    plans tuned so far, for machines like this one. Of a model that processes share, each saves its part. `model` stays
    as it is.

    Raises TypeError for what is no nn.Module, and for parameters, buffers and extra state that no file can hold;
    OSError as the system gives it.
    """
    check_module("save", model)
    modules = dict(model.named_modules())
    layers = {m: name for name, m in modules.items() if linear.is_fast(m) and why_unread(m) is None}
    mixtures = {m: name for name, m in modules.items() if experts.is_fast_experts(m) and experts.why_not(m) is None}
    tensors: dict[str, Tensor] = {}
    ties: dict[str, str] = {}
    stored: dict[Hashable, str] = {}  # what is in memory -> the name it is stored by
    transient = []
    _check_modules(modules)
    for held in tensors_of(model):
        if _is_packed(held, layers, mixtures):
            continue
        _check_storable(held)
        first = stored.setdefault(_identity(held.tensor), held.name)
        if first == held.name:
            tensors[first] = held.tensor
        else:
            ties[held.name] = first
        if held.kind == "transient":
            transient.append(held.name)
    fused = _fused(modules, layers)
    blobs: dict[str, Blob] = {}
    records = []
    panels: dict[Hashable, str] = {}
    for module, name in layers.items():
        blob, key = _blob(module)
        packed = panels.setdefault(key, member(name, _PACKED))
        blobs.setdefault(packed, blob)
        computed = module.activation if name in fused or linear.has_own_activation(module) else None
        records.append(_record(module, name, packed)._replace(activation=computed))
        if (smooth := module._precision.smooth) is not None:
            entry = packed.removesuffix(_PACKED) + _SMOOTH
            if tensors.setdefault(entry, smooth) is not smooth:
                raise ValueError(f"two tensors of the file would be called {entry!r}")
        weight = local(module._parameters.get("weight"))
        if weight is not None and _identity(weight) in stored:
            ties[member(name, "weight")] = stored[_identity(weight)]
    for name, frozen in ((name, embedding.pack_of(module)) for name, module in modules.items()):
        if frozen is not None:
            records.append(_lookup(name, frozen, panels, blobs))
    for record, blob in (_product_of(m, name, which) for m, name in mixtures.items() for which in (0, 1)):
        records.append(record)
        blobs[record.panels] = blob
    plans = {key: tuned._asdict() for module in layers for key, tuned in _plans(module)}
    plans |= {key: tuned._asdict() for module in mixtures for key, tuned in _plans_of_experts(module)}
    said = Manifest(tuple(records), tuple(fused.values()), ties, tuple(transient), decide.cache().machine, plans)
    safetensors.write(path, blobs, tensors, manifest.dump(said))


def _fused(modules: Mapping[str, nn.Module], layers: Mapping[Any, str]) -> dict[str, Fused]:
    """By the names of layers the places of the activations that they absorbed."""
    fused: dict[str, Fused] = {}
    for holder, module in modules.items():
        for slot, child in module._modules.items():
            if isinstance(child, fusion.Absorbed) and child.linear in layers:
                name = layers[child.linear]
                fused.setdefault(name, Fused(name, holder, slot))
    return fused


def _check_modules(modules: Mapping[str, nn.Module]) -> None:
    for name, module in modules.items():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise TypeError(f"{name!r} cannot be saved: a {type(module).__name__} has extra state beside its tensors")
        if embedding.is_packed(module) and embedding.pack_of(module) is None:
            raise TypeError(f"{name!r} cannot be saved: a {type(module).__name__} looks up rows of another file")


def _check_storable(held: Held) -> None:
    t, kind = held.tensor, type(held.tensor)
    if kind not in (Tensor, nn.Parameter) or t.layout is not torch.strided or t.is_nested or t.is_meta:
        what = f"a {kind.__name__} on device {t.device}" if t.is_meta else f"a {kind.__name__} and no dense tensor"
        raise TypeError(f"{held.name!r} cannot be saved: it is {what}")


def _identity(tensor: Tensor) -> Hashable:
    """Equal for tensors that are the same numbers in the same memory."""
    if tensor.numel() == 0:
        return id(tensor)
    views = tensor.is_conj(), tensor.is_neg()
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), views


def _blob(layer: Any) -> tuple[Blob, Hashable]:
    """The packed weight of a fast layer, made when it is written, and what is equal for layers that share it."""
    frozen = record_of(layer)
    if frozen is not None:
        data = frozen.packed.data
        return Blob(data.nbytes, lambda: data), id(frozen)
    weight, precision, transposed = local(layer._parameters["weight"]), layer.precision, layer._transposed
    layout = packs.layout_of(precision)
    nbytes = _weights.packed_nbytes(layout, *_shape(layer))
    key = _identity(weight), precision.packed, precision.coding, transposed, layer._gated, id(precision.smooth)
    return Blob(nbytes, lambda: packs.pack(weight, precision, transposed, gated=layer._gated).data), key


def _is_packed(held: Held, layers: Container[Any], mixtures: Container[Any]) -> bool:
    """Whether it is a weight that is stored as a pack."""
    if held.module in mixtures:
        return held.attribute in experts.names_of(held.module)
    return held.attribute == "weight" and (held.module in layers or embedding.is_packed(held.module))


def _lookup(name: str, frozen: Frozen, panels: dict[Hashable, str], blobs: dict[str, Blob]) -> Layer:
    """An embedding over a pack, which is added to what is written if no layer has it."""
    packed, held = frozen.packed, _tensors.FORMATS[frozen.dtype]
    entry = panels.setdefault(id(frozen), member(name, _PACKED))
    blobs.setdefault(entry, Blob(packed.nbytes, lambda: packed.data))
    form = packed.format, packed.layout, entry
    return Layer(name, packed.n, packed.k, held, *form, None, None, False, FP32, "lazy", lookup=True)


def _record(layer: Any, name: str, panels: str) -> Layer:
    frozen, packed = record_of(layer), layer.packed_as
    n, k = _shape(layer)
    return Layer(
        name=name,
        n=n,
        k=k,
        held=_tensors.FORMATS[dtype_of(layer)],
        packed=packed,
        layout=packs.layout_of(layer.precision) if frozen is None else frozen.packed.layout,
        panels=panels,
        bias=None if layer.bias is None else _tensors.FORMATS[layer.bias.dtype],
        activation=layer.activation,
        transposed=layer._transposed,
        accumulate=layer._precision.accumulate,
        tune=layer._tune,
        quantized=_scheme(layer._precision, panels),
        products=layer._precision.products,
    )


def _shape(layer: Any) -> tuple[int, int]:
    """n and k of what is packed."""
    n, k = layer.weight_shape[::-1] if layer._transposed else layer.weight_shape
    return n, k


def _product_of(module: Any, name: str, which: int) -> tuple[Layer, Blob]:
    """One of the two products of a mixture of experts."""
    own, (count, n, k) = module.names[which], experts.sizes_of(module)[which]
    frozen, precision, form = module._frozen_experts, module.precision, module._form
    shelf: Shelf | None = None if frozen is None else (frozen.first, frozen.second)[which]
    layout = packs.layout_of(precision) if shelf is None else shelf.layout
    bias, panels = module._parameters.get(f"{own}_bias"), f"{member(name, own)}.{_PACKED}"
    record = Layer(
        name=member(name, own),
        n=n,
        k=k,
        held=_tensors.FORMATS[module.held],
        packed=module.packed_as if shelf is None else shelf.format,  # a GGUF file may have another kind for each
        layout=layout,
        panels=panels,
        bias=None if bias is None else _tensors.FORMATS[bias.dtype],
        activation=None if which else form.program,
        transposed=form.transposed,
        accumulate=precision.accumulate,
        tune=module._tune,
        quantized=_scheme(precision, panels),
        products=precision.products,
        experts=count,
        interleaved=form.interleaved,
    )
    return record, Blob(count * bytes_of(layout, n, k), lambda: (shelf or module.packed(which)).panels.flatten())


def _plans_of_experts(module: Any) -> Iterator[tuple[str, Remembered]]:
    for plan, key in zip(module.decided, module.problem_keys(), strict=True):
        if plan.source in ("tuned", "equal", "cache"):
            yield key, Remembered(plan.name, {"threads": plan.plan_threads, "k_slices": plan.k_slices})


def _scheme(precision: Precision, panels: str) -> StoredScheme | None:
    if precision.rows is None:
        return None
    smooth = None if precision.smooth is None else panels.removesuffix(_PACKED) + _SMOOTH
    return StoredScheme(precision.rows._replace(smooth=None), precision.out, smooth)


def _plans(layer: Any) -> Iterator[tuple[str, Remembered]]:
    """What was measured for the kernels of a layer, by the keys under which a process that loads it will ask."""
    for (engine, *_), plan in list(layer._plans.items()):
        kept = not plan.refused and plan.name not in rivals.NAMES
        if kept and engine is layer._engine and plan.source in ("tuned", "equal", "cache"):
            problem = layer.problem(engine, engine.packed, plan.bucket, plan.x, plan.threads)
            problem = problem._replace(held=FROZEN, fallback=False)
            numbers = {"threads": plan.plan_threads, "k_slices": plan.k_slices}
            yield problem.key(), Remembered(plan.name, numbers)


# ---- load ----


def load(path: AnyPath, model: Model) -> Model:
    """Give `model` the tensors and fast layers of a file that `save` wrote, and return it.

    model: of the architecture that was converted and saved, on the meta device or with any weights, which go unread; or
        one that is converted in the same way. It may be in training or in eval mode, and stays so.

    Nothing is copied: all tensors are views of a mapping of the file, whose pages are read when they are first used and
    shared by all processes that load it. Replace such a file (as `save` does), never write into it. Parameters need no
    gradients. Writing to one changes it for this process alone. A layout that this CPU does not run is repacked here
    and now, which `report` tells. Buffers that no state dict has are taken from the file where the model's are on meta.

    Raises FormatError for a file that is damaged, newer, or of another model, whose missing and unexpected names it
    tells; OSError as the system gives it. The model is then as it was. Where processes share the model (its parameters
    are DTensors), each loads a file of its own, and where one raises, all do, with RuntimeError.
    """
    check_module("load", model)
    with agreed(model, "load"), faults_of(path), ExitStack() as undo:
        mapped = safetensors.open_mapped(path)
        said = manifest.parse(mapped.contents)
        for module in _attentions(model, said):
            attention.open_up(module)
            undo.callback(attention.close, module)
        match = matching.match(model, said, mapped.contents)
        undo.pop_all()
    with torch.inference_mode(False):
        with faults_of(path):
            frozen = _packs(said, mapped)
            shelves = {name: [_shelf(record, mapped) for record in both] for name, both in said.mixtures.items()}
        _assign(match, said, mapped)
        for record in said.linear:
            _become(match.modules[record.name], record, frozen[record.panels], record.weight in match.stored)
        for pair in match.pairs:
            fusion.absorb(pair)
        for record in said.lookups:
            embedding.look_up_pack(match.modules[record.name], frozen[record.panels])
        for name, products in said.mixtures.items():
            _become_experts(match.modules[name], name, products[0], shelves[name])
        for record in said.linear:
            if record.weight in match.stored:
                _take(match.modules[record.name], frozen[record.panels])
    forbid_bypasses(model)
    if said.machine == decide.cache().machine:
        decide.cache().learn(said.plans)
    return model


def _attentions(model: nn.Module, said: Manifest) -> list[nn.Module]:
    """Those whose projections are layers in the file, but not yet in the model."""
    names = {layer.name for layer in said.layers}
    found = [module for name, module in model.named_modules() if member(name, "in_proj") in names]
    return [module for module in found if attention.why_not_open(module) is None]


def _packs(said: Manifest, mapped: Mapped) -> dict[str, Frozen]:
    """The packed weights by their entries: in the mapping, or repacked where this machine has another layout."""
    frozen = {}
    layouts = {packed: table.layout(packed) for packed in {record.packed for record in said.layers}}
    for record in (*said.linear, *said.lookups):
        if record.panels not in frozen:
            data = mapped.blob(record.panels, _weights.packed_nbytes(record.layout, record.n, record.k))
            kind = packs.kind_of(is_gated(record.activation))
            packed, origin = kind.over(data, record.layout, record.n, record.k), ""
            check_channels(f"the layer {shown(record.name)}", packed, record.quantized)
            smooth = record.quantized and record.quantized.smooth
            if layouts[record.packed] != table.base(record.layout):
                packed, origin = packs.repack(packed, layouts[record.packed]), f"repacked from {record.layout}"
            frozen[record.panels] = Frozen(
                packed, DTYPES[record.held], origin=origin, smooth=mapped.tensor(smooth) if smooth else None
            )
    return frozen


def _assign(match: Match, said: Manifest, mapped: Mapped) -> None:
    """Gives the model what is stored plain; what shares an entry is one tensor."""
    parameters: dict[str, nn.Parameter] = {}
    for held in match.plain:
        name = said.ties.get(held.name, held.name)
        if name not in parameters:
            parameters[name] = nn.Parameter(mapped.tensor(name), requires_grad=False)
        tensor = parameters[name] if held.kind == "parameter" else parameters[name].data
        if (shard := shard_of(getattr(held.module, held.attribute))) is not None:
            tensor = nn.Parameter(shard.whole(parameters[name].data), requires_grad=False)
        if held.attribute == "weight" and embedding.is_packed(held.module):
            embedding.make_plain(held.module)
        setattr(held.module, held.attribute, tensor)


def _become(module: Any, record: Layer, frozen: Frozen, weight_is_plain: bool) -> None:
    """Makes a layer fast, and frozen unless its weight is stored plain, too; it then has that and its pack."""
    packed = None if record.packed == record.held else record.packed
    coding = coding_of(frozen.packed)
    frozen.shard = shared_as(module)
    precision = Precision(packed, record.accumulate, products=record.products, coding=coding)
    if record.quantized is not None:
        rows = record.quantized.rows._replace(smooth=frozen.smooth)
        precision = precision._replace(rows=rows, out=record.quantized.out)
    if not linear.is_fast(module):
        over = None if weight_is_plain else frozen
        linear.adopt(module, record.activation, record.tune, record.name, precision, over)
    else:
        linear.set_precision(module, precision)
        if not weight_is_plain:
            hold(module, frozen)


def _become_experts(module: Any, name: str, first: Layer, shelves: list[Shelf]) -> None:
    """Makes experts fast and frozen over what the file has of them; `first`: of the first product."""
    rows = None if first.quantized is None else first.quantized.rows
    packed = None if first.packed == first.held else first.packed
    coding = coding_of(shelves[0].packs[0])
    precision = Precision(packed, first.accumulate, rows=rows, products=first.products, coding=coding)
    if experts.is_fast_experts(module):
        experts.set_precision(module, precision)
    else:
        experts.adopt(module, first.tune, name, precision)
    origin = "" if shelves[0].layout == first.layout else f"repacked from {first.layout}"
    experts_frozen.hold(
        module, experts_frozen.Frozen(shelves[0], shelves[1], DTYPES[first.held], (False, False), origin)
    )


def _shelf(record: Layer, mapped: Mapped) -> Shelf:
    """The packs of one product, in the mapping, or repacked where this machine has another layout."""
    size = bytes_of(record.layout, record.n, record.k)
    data = torch.frombuffer(mapped.blob(record.panels, record.nbytes), dtype=torch.uint8)
    gated = is_gated(record.activation)
    shelf = Shelf(data.view(record.experts, size), record.layout, record.n, record.k, gated)
    for packed in shelf.packs:
        check_channels(f"the experts {shown(record.name)}", packed, record.quantized)
    return on_this_machine(shelf)


def _take(layer: Any, frozen: Frozen) -> None:
    """Spares a fast layer the packing of its weight."""
    for engine in filter(None, (layer._engine, layer._engine.elsewhere)):
        weight = local(layer.weight)
        engine.take(weight, _fingerprints.Fingerprint(weight), frozen.packed)

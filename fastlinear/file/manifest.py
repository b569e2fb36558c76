"""What a frozen file says of its model, beside its tensors: JSON in the metadata, written and, with distrust, read.

    {"schema": 1, "library": "0.2.0",
     "layers": [{"name": "encoder.fc1", "n": 3072, "k": 768, "layout": "fp32/32x1", "panels": "encoder.fc1.packed",
                 ...}],
     "fused": [{"layer": "encoder.fc1", "holder": "encoder", "slot": "act"}],
     "ties": {"decoder.bias": "bias"}, "transient": ["position_ids"],
     "machine": {"cpu": ...}, "plans": {key: {"name": "fp32/avx512/6x64", ...}}}

An int8 layer has one field more, which tells how its input and output are quantized; the last two may be null:

    "quantized": {"rows": ["static", 0.012, 3], "out": ["uint8", 0.1, 0], "smooth": "encoder.fc1.smooth"}

So has a layer that rounds its input to multiply it in 16 bits, and this says in which: "products": "bf16".

One product of a mixture of experts is a layer, too, by the name of its parameter, and says "experts": 8, how many packs
of n x k lie in its panels, each at a multiple of 64 bytes, and whether the module holds gates and what goes through
them in turns: "interleaved": false.

An embedding that looks up the channels of a pack is a layer that says "lookup": true.

All that it says is held against the entries of the file before anybody believes it; names are held against the model by
whoever loads it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping
from importlib.metadata import version
from typing import Any, NamedTuple

import torch

import fastlinear._kernels as _kernels
import fastlinear._plans as _plans
import fastlinear._tensors as _tensors
import fastlinear._weights as _weights
from fastlinear.file.safetensors import LIMIT, PAGE, Contents, Entry, parse_json, shown
from fastlinear.layer import linear
from fastlinear.layer.embedding import PACKED
from fastlinear.layer.shelf import bytes_of
from fastlinear.plan import table
from fastlinear.spec import int4, int8, programs
from fastlinear.spec.activations import Activation
from fastlinear.spec.formats import DTYPES, FP32, PRODUCTS, name_of, present
from fastlinear.spec.int4 import is_table
from fastlinear.spec.int8 import BYTES, Requantize, Rows, is_scale, is_zero
from fastlinear.spec.precision import epilogue, wanted

KEY = "fastlinear"
SCHEMA = 1  # of the newest files; another meaning of an old field takes another number


_SCHEME = ("rows", "out", "smooth")


class StoredScheme(NamedTuple):
    """rows: without smoothing, which is the fp32 [k] in the entry `smooth`, if there is one."""

    rows: Rows
    out: Requantize | None
    smooth: str | None

    def dump(self) -> dict[str, Any]:
        out = None if self.out is None else [name_of(self.out.dtype), *self.out[1:]]
        return dict(zip(_SCHEME, (self.rows[:3], out, self.smooth), strict=True))


class Layer(NamedTuple):
    """A converted layer y = activation(x W^T + b), W [n, k]. Its tensors are called as in the model: name.bias ..."""

    name: str
    n: int
    k: int
    held: str  # format of the parameter that was packed
    packed: str  # format of the pack
    layout: str
    panels: str  # entry with the packed bytes; layers that were tied have one between them
    bias: str | None  # format
    activation: Activation | None
    transposed: bool  # the module holds [k, n]
    accumulate: str
    tune: str
    quantized: StoredScheme | None = None
    products: str = FP32
    experts: int = 0  # how many weights there are, where this is one product of a mixture, by its parameter's name
    interleaved: bool = False
    lookup: bool = False  # this is an embedding over the pack

    @property
    def weight(self) -> str:
        """Name of the parameter, which is stored plain only where something else than fast layers uses it, too."""
        return self.name if self.experts else member(self.name, "weight")

    @property
    def bias_name(self) -> str:
        return f"{self.name}_bias" if self.experts else member(self.name, "bias")

    @property
    def nbytes(self) -> int:
        """Of the panels."""
        form = self.layout, self.n, self.k
        return self.experts * bytes_of(*form) if self.experts else _weights.packed_nbytes(*form)


class Fused(NamedTuple):
    """The layer computes the activation that the module `holder` has at `slot`."""

    layer: str
    holder: str
    slot: str


class Manifest(NamedTuple):
    layers: tuple[Layer, ...]
    fused: tuple[Fused, ...] = ()
    ties: Mapping[str, str] = {}  # further names of a plain tensor -> the name it is stored by
    transient: tuple[str, ...] = ()  # buffers that are in no state dict
    machine: Mapping[str, Any] = {}  # whom the plans are for
    plans: Mapping[str, Any] = {}  # as in the tuning cache
    library: str = ""  # version that wrote it

    @property
    def linear(self) -> tuple[Layer, ...]:
        """Those that are linear layers of the model."""
        return tuple(layer for layer in self.layers if not layer.experts and not layer.lookup)

    @property
    def lookups(self) -> tuple[Layer, ...]:
        """Those that are embeddings."""
        return tuple(layer for layer in self.layers if layer.lookup)

    @property
    def mixtures(self) -> dict[str, tuple[Layer, ...]]:
        """By the names of their modules the products of experts."""
        found: dict[str, tuple[Layer, ...]] = {}
        for layer in self.layers:
            if layer.experts:
                module = layer.name.rpartition(".")[0]
                found[module] = (*found.get(module, ()), layer)
        return found


def member(module: str, name: str) -> str:
    """The dotted name of what `module` calls `name`; the model itself is called ""."""
    return f"{module}.{name}" if module else name


def plain_names(manifest: Manifest, contents: Contents) -> dict[str, Entry]:
    """What is stored as it is, by all its names; the rest of the file is packed weights."""
    packed = {*packed_names(manifest)}
    plain = {name: entry for name, entry in contents.entries.items() if name not in packed}
    return plain | {name: plain[stored] for name, stored in manifest.ties.items()}


def packed_names(manifest: Manifest) -> Iterator[str]:
    """The entries that belong to fast layers alone, and have no name in the model."""
    for layer in manifest.layers:
        yield layer.panels
        if layer.quantized is not None and layer.quantized.smooth is not None:
            yield layer.quantized.smooth


def dump(manifest: Manifest) -> dict[str, str]:
    """The metadata of the file."""
    raw = {"schema": SCHEMA, **manifest._asdict(), "library": version("fastlinear")}
    raw["layers"] = [_dump_layer(layer) for layer in manifest.layers]
    raw["fused"] = [fused._asdict() for fused in manifest.fused]
    return {KEY: json.dumps(raw, ensure_ascii=False, separators=(",", ":"))}


def _dump_layer(layer: Layer) -> dict[str, Any]:
    raw = layer._asdict()
    scheme, products = raw.pop("quantized"), raw.pop("products")  # files without them are for older versions, too
    experts, interleaved = raw.pop("experts"), raw.pop("interleaved")
    raw |= {"experts": experts, "interleaved": interleaved} if experts else {}
    if not raw["lookup"]:
        del raw["lookup"]
    raw |= {} if scheme is None else {"quantized": scheme.dump()}
    return raw if products == FP32 else {**raw, "products": products}


def parse(contents: Contents) -> Manifest:
    """What the metadata says; ValueError where it is not what `dump` writes, or not of these entries."""
    if KEY not in contents.metadata:
        raise ValueError("it was not written by fastlinear.save")
    raw = parse_json("its metadata", contents.metadata[KEY])
    if not isinstance(raw, dict) or type(raw.get("schema")) is not int:
        raise ValueError("its metadata names no schema")
    if raw["schema"] != SCHEMA:
        library = shown(raw.get("library"))
        raise ValueError(f"it is of schema {raw['schema']}, by fastlinear {library}; this version reads {SCHEMA}")
    kinds = {"layers": list, "fused": list, "ties": dict, "transient": list, "machine": dict, "plans": dict}
    _check_fields("its metadata", raw, {"schema": int, "library": str, **kinds})
    layouts = {row["layout"]: row["format"] for row in _kernels.rows()}
    layers = tuple(_layer(layer, layouts) for layer in raw["layers"])
    for accumulate in {layer.accumulate for layer in layers}:
        wanted(None, accumulate)
    for fused in raw["fused"]:
        _check_fields("a fused activation", fused, dict.fromkeys(Fused._fields, str))
    for name in (*raw["ties"].values(), *raw["transient"]):
        if not isinstance(name, str):
            raise ValueError(f"its metadata has {shown(name)} where a tensor should be named")
    pairs = tuple(Fused(**fused) for fused in raw["fused"])
    rest = {key: raw[key] for key in ("ties", "machine", "plans", "library")}
    manifest = Manifest(layers, pairs, transient=tuple(raw["transient"]), **rest)
    _check_names(manifest, contents)
    _check_layers(manifest, contents)
    return manifest


def _layer(raw: Any, layouts: Mapping[str, str]) -> Layer:
    """One layer, as far as it can be checked by itself. layouts: those of the kernels, with their formats."""
    text, number = str, int
    kinds: dict[str, Any] = {"name": text, "n": number, "k": number, "held": text, "packed": text, "layout": text}
    kinds |= {"panels": text, "bias": (text, None), "activation": (list, None), "transposed": bool}
    kinds |= {"accumulate": text, "tune": text}
    optional = {"quantized": dict, "products": text, "experts": number, "interleaved": bool, "lookup": bool}
    kinds |= {key: optional[key] for key in optional if isinstance(raw, dict) and key in raw}
    _check_fields("a layer", raw, kinds)
    layer = Layer(**raw | {key: present(raw[key]) for key in ("packed", "layout")})
    who = f"the layer {shown(layer.name)}"
    base = table.base(layer.layout)
    if base not in layouts:
        raise ValueError(f"{who} is packed as {shown(layer.layout)}, which is none of {', '.join(layouts)}")
    try:
        _weights.packed_nbytes(layer.layout, 0, 0)
    except ValueError as error:
        raise ValueError(f"{who} is packed as {shown(layer.layout)}: {error}") from error
    if layouts[base] != layer.packed or layer.held not in DTYPES:
        raise ValueError(f"{who} is said to be {shown(layer.held)} packed in {shown(layer.packed)} as {layer.layout!r}")
    if layer.bias not in (None, _tensors.FORMATS[torch.float32], layer.held):
        raise ValueError(f"{who} cannot have a bias in {shown(layer.bias)}")
    if not (0 <= layer.n < LIMIT and 0 <= layer.k < LIMIT):
        raise ValueError(f"{who} cannot be of {layer.n} x {layer.k}")
    if layer.products not in DTYPES or (layer.products != FP32 and layer.packed in PRODUCTS):
        raise ValueError(f"{who}, packed in {layer.packed}, cannot have products in {shown(layer.products)}")
    quantized = _parse_scheme(who, raw.get("quantized"), layer.packed, layer.k)
    if layer.tune not in linear.TUNE_MODES:
        raise ValueError(f"{who} cannot be tuned {shown(layer.tune)}")
    activation = raw["activation"]
    if activation is not None:
        if len(activation) != 2 or not isinstance(activation[0], str) or not isinstance(activation[1], list):
            raise ValueError(f"{who} has no activation of the form [name, parameters]: {shown(activation)}")
        activation = programs.parsed(activation[0], activation[1])
    if programs.is_gated(activation) and layer.n % 2:
        raise ValueError(f"{who} is gated, but has {layer.n} channels")
    counted = "experts" in raw
    if counted != ("interleaved" in raw) or (counted and not 0 < layer.experts < LIMIT) or layer.nbytes >= LIMIT:
        raise ValueError(f"{who} cannot be of {layer.experts} experts")
    if layer.experts and quantized is not None and (quantized.out is not None or quantized.smooth is not None):
        raise ValueError(f"{who} is of experts, which have no smoothing and hand on no integers")
    _check_lookup(who, layer)
    return layer._replace(activation=activation, quantized=quantized)


def _check_lookup(who: str, layer: Layer) -> None:
    """ValueError where an embedding has what none has."""
    others = (layer.bias, layer.activation, layer.quantized)
    odd = layer.packed != PACKED or layer.transposed or layer.experts or any(each is not None for each in others)
    if layer.lookup and odd:
        raise ValueError(f"{who} is no embedding, which is packed in {PACKED} and nothing else")


def _check_fields(who: str, raw: object, kinds: Mapping[str, Any]) -> None:
    """`kinds`: for each field its type, or a type and None."""
    if not isinstance(raw, dict) or raw.keys() != kinds.keys():
        raise ValueError(f"{who} has not just the fields {', '.join(kinds)}")
    for field, kind in kinds.items():
        allowed = kind if isinstance(kind, tuple) else (kind,)
        if (None if raw[field] is None else type(raw[field])) not in allowed:
            raise ValueError(f"{who} has {shown(raw[field])} as its {field}")


def _check_names(manifest: Manifest, contents: Contents) -> None:
    """No name means two things, and none means nothing."""
    names = [layer.name for layer in manifest.layers]
    _check_single("layers", names)
    _check_single("fused activations", [fused.layer for fused in manifest.fused])
    _check_single("slots of activations", [(fused.holder, fused.slot) for fused in manifest.fused])
    active = {layer.name for layer in manifest.layers if layer.activation is not None}
    packed = {layer.panels for layer in manifest.layers}
    stored = contents.entries.keys() - {*packed_names(manifest)}
    every: list[tuple[str, str, Container[str]]] = [("panels", name, contents.entries) for name in packed]
    every += [("fused activations", fused.layer, active) for fused in manifest.fused]
    every += [("ties", name, stored) for name in manifest.ties.values()]
    every += [("transient buffers", name, {*stored, *manifest.ties}) for name in manifest.transient]
    for what, name, known in every:
        if name not in known:
            raise ValueError(f"{shown(name)}, named among its {what}, is not there")
    for name in manifest.ties:
        if name in contents.entries:
            raise ValueError(f"{shown(name)} is both stored and tied to another tensor")


def _check_single(what: str, names: Iterable[object]) -> None:
    for name, count in Counter(names).items():
        if count > 1:
            raise ValueError(f"{shown(name)} stands twice among its {what}")


def _check_layers(manifest: Manifest, contents: Contents) -> None:
    """Every pack has the bytes that its shape and layout take, and what is stored beside it fits."""
    plain = plain_names(manifest, contents)
    packs: dict[str, tuple[Any, ...]] = {}
    for layer in manifest.layers:
        who = f"the layer {shown(layer.name)}"
        entry = contents.entries[layer.panels]
        nbytes = layer.nbytes
        if (entry.dtype, entry.shape) != (torch.uint8, (-(-nbytes // PAGE) * PAGE,)) or entry.begin % PAGE:
            raise ValueError(
                f"{who}, {layer.n} x {layer.k} as {layer.layout}, takes {nbytes} bytes of U8 in whole pages, "
                f"but {shown(layer.panels)} is {entry.nbytes} bytes of {entry.dtype} at {entry.begin}"
            )
        _check_smoothing(who, layer.quantized, layer.k, contents)
        smooth = None if layer.quantized is None else layer.quantized.smooth
        gated = programs.is_gated(layer.activation)
        pack = (layer.n, layer.k, layer.layout, layer.held, layer.transposed, smooth, gated, layer.experts)
        if packs.setdefault(layer.panels, pack) != pack:
            raise ValueError(f"{who} shares {shown(layer.panels)} with a layer of another form")
        bias, of_bias = plain.get(layer.bias_name), (layer.experts, layer.n) if layer.experts else (layer.n,)
        if (bias and (bias.dtype, bias.shape)) != (layer.bias and (DTYPES[layer.bias], of_bias)):
            raise ValueError(f"{who} has another bias than it says")
        weight, shape = plain.get(layer.weight), (layer.k, layer.n) if layer.transposed else (layer.n, layer.k)
        if weight is not None and (weight.dtype, weight.shape) != (DTYPES[layer.held], shape):
            raise ValueError(f"{who} is stored unpacked in another dtype or shape")

    for module, products in manifest.mixtures.items():
        _check_mixture(f"the experts {shown(module)}", products)


def _check_mixture(who: str, products: tuple[Layer, ...]) -> None:
    """ValueError where these are not both products of one mixture."""
    alike = {(each.experts, each.held, each.transposed, each.tune, each.accumulate) for each in products}
    if len(products) != 2 or len(alike) != 1 or len({(p.products, p.quantized, p.interleaved) for p in products}) != 1:
        raise ValueError(f"{who} are not two products alike")
    first, second = products
    columns = first.n // 2 if programs.is_gated(first.activation) else first.n
    if second.activation is not None or second.k != columns:
        raise ValueError(f"{who} make {columns} numbers of a row, but take {second.k}, or another activation")
    if first.interleaved and not programs.is_gated(first.activation):
        raise ValueError(f"{who} have halves in turns, but no gate")


# ---- how an int8 layer quantizes ----


def _parse_scheme(who: str, raw: Any, packed: str, k: int) -> StoredScheme | None:
    """What `dump` wrote of a layer of k columns packed in that format; ValueError, calling the layer `who`, where it is
    not so, or the kernels would not take it."""
    if packed not in _tensors.GROUPED and (raw is None) != (packed not in PRODUCTS):
        raise ValueError(f"{who} is packed in {packed}, and quantized by {shown(raw)}")
    if raw is None:
        return None
    if not isinstance(raw, dict) or raw.keys() != {*_SCHEME} or type(raw["smooth"]) not in (str, type(None)):
        raise ValueError(f"{who} is quantized by {shown(raw)}, which has not just {', '.join(_SCHEME)}")
    kind, *affine = _triple(who, raw["rows"])
    if kind not in (int4.ROW_KINDS if packed in _tensors.GROUPED else int8.KINDS):
        raise ValueError(f"{who}, packed in {packed}, cannot have rows that are quantized {shown(kind)}")
    rows, out = Rows(kind, *affine), None
    dtypes = {name_of(dtype): dtype for dtype in BYTES}
    if raw["out"] is not None:
        name, *affine = _triple(who, raw["out"])
        if name not in dtypes:
            raise ValueError(f"{who} cannot quantize its output to {shown(name)}, but to {' or '.join(dtypes)}")
        out = Requantize(dtypes[name], *affine)
    try:
        _plans.RowQuantizer(*rows)
        epilogue(None, out)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{who} cannot be quantized as it says: {error}") from error
    if packed not in _tensors.GROUPED and k > _weights.dot_limit():
        raise ValueError(f"{who} has {k} columns, more than the {_weights.dot_limit()} that a sum of integers holds")
    return StoredScheme(rows, out, raw["smooth"])


def _check_smoothing(who: str, scheme: StoredScheme | None, k: int, contents: Contents) -> None:
    """ValueError where the file has no such smoothing."""
    if scheme is None or scheme.smooth is None:
        return
    entry = contents.entries.get(scheme.smooth)
    if entry is None or (entry.dtype, entry.shape) != (torch.float32, (k,)):
        raise ValueError(f"{who} is smoothed by {shown(scheme.smooth)}, which is no F32 of {k} numbers in this file")


def check_channels(who: str, packed: _weights.Packed, quantized: StoredScheme | None) -> None:
    """ValueError where the scales or zero points of a weight are none, or its codes no integers for integer rows."""
    if packed.grouped:  # the scales may be as odd as the numbers of a weight in floats
        if packed.table is not None and not is_table(tuple(packed.table.tolist())):
            raise ValueError(f"{who} has codes that stand for no numbers")
        coding = int4.coding_of(packed)
        if quantized is not None and (
            coding is None or not coding.is_whole or min(packed.k, coding.group) > _weights.dot_limit()
        ):
            raise ValueError(f"{who} has integer rows, and codes that are none, or too many of them in a group")
        return
    scale, zero = packed.scale, packed.zero
    if scale is not None and not is_scale(scale):
        raise ValueError(f"{who} has scales that are negative or not finite")
    if zero is not None and not is_zero(zero):
        raise ValueError(f"{who} has zero points beyond int8")
    if zero is not None and packed.k > _weights.dot_limit(True):
        raise ValueError(f"{who} has {packed.k} columns, more than a sum of integers with zero points holds")


def _triple(who: str, raw: Any) -> list[Any]:
    if not isinstance(raw, list) or [type(each) for each in raw] != [str, float, int]:
        raise ValueError(f"{who} is quantized by {shown(raw)}, which is no list of a name, a scale and a zero")
    return raw

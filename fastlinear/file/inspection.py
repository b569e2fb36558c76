"""What a frozen file holds, told from its header alone: layers, layouts, sizes, and whether this CPU runs them as they
are."""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator

from fastlinear.file import manifest, safetensors
from fastlinear.file.manifest import Layer, Manifest, StoredScheme
from fastlinear.file.safetensors import AnyPath, Contents, faults_of
from fastlinear.plan import decide, table
from fastlinear.spec.formats import FP32
from fastlinear.spec.int8 import Rows

_HEADER = ("layer", "n", "in x out", "weight", "packed as", "activation", "MiB", "here")
_SIDES = "<>><<<><"


def describe(path: AnyPath) -> str:
    """A table of the fast layers, those alike but in number in one row, and a summary of all else; errors as of
    `load`, but for those that need a model."""
    contents = safetensors.read(path)
    with faults_of(path):
        said = manifest.parse(contents)
    rows = [_HEADER, *_rows(said)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [" ".join(f"{c:{s}{w}}" for c, s, w in zip(row, _SIDES, widths, strict=True)).rstrip() for row in rows]
    return "\n".join((lines[0], "-" * max(map(len, lines)), *lines[1:], "", *_summary(path, said, contents)))


def _rows(said: Manifest) -> Iterator[tuple[str, ...]]:
    alike: dict[Layer, list[Layer]] = defaultdict(list)
    for layer in said.layers:
        likeness = re.sub(r"(?<![^.])\d+(?![^.])", "*", layer.name)
        alike[layer._replace(name=likeness, panels="", quantized=_likeness(layer.quantized))].append(layer)
    for kind, layers in alike.items():
        name = _plain(kind.name if len(layers) > 1 else layers[0].name) or "(the model)"
        weight = kind.held if kind.held == kind.packed else f"{kind.held} as {kind.packed}"
        weight += f" {kind.quantized.rows.kind}" if kind.quantized else ""
        weight += f" in {kind.products} products" if kind.products != FP32 else ""
        packs = {layer.panels: layer.nbytes for layer in layers}
        mib, here = f"{sum(packs.values()) / 2**20:.2f}", "mapped" if _is_mapped(kind) else "repacked"
        activation = kind.activation.name if kind.activation else ""
        shape = "x".join(map(str, [kind.experts] * bool(kind.experts) + [kind.k, kind.n]))
        yield (
            name,
            str(len(layers)),
            shape,
            weight,
            kind.layout,
            activation,
            mib,
            here,
        )


def _likeness(scheme: StoredScheme | None) -> StoredScheme | None:
    """Without the numbers, which no two layers share."""
    return scheme and StoredScheme(Rows(scheme.rows.kind), None, None)


def _summary(path: AnyPath, said: Manifest, contents: Contents) -> Iterator[str]:
    packed = {*manifest.packed_names(said)}
    plain = [entry for name, entry in contents.entries.items() if name not in packed]
    dtypes = Counter(str(entry.dtype).removeprefix("torch.") for entry in plain)
    kinds = f" ({', '.join(f'{n} {dtype}' for dtype, n in dtypes.items())})" if dtypes else ""
    mapped = sum(map(_is_mapped, said.layers))
    yield f"file: {os.stat(path).st_size / 2**20:.1f} MiB, written by fastlinear {_plain(said.library)}"
    yield f"fast layers: {len(said.layers)}, of which this CPU maps {mapped} and repacks {len(said.layers) - mapped}"
    yield f"other tensors: {len(plain)} in {sum(entry.nbytes for entry in plain) / 2**20:.1f} MiB{kinds}"
    for name, stored in said.ties.items():
        yield f"tied: {_plain(name)} is {_plain(stored)}"
    if said.plans:
        here = "as here" if said.machine == decide.cache().machine else "not as here: they go unused"
        words = (f"{key} {value}" for key, value in said.machine.items() if isinstance(value, str))
        yield f"plans: {len(said.plans)}, tuned with {_plain(', '.join(words))}, {here}"


def _is_mapped(layer: Layer) -> bool:
    return table.layout(layer.packed) == table.base(layer.layout)


def _plain(text: str) -> str:
    """What a file says may not steer the terminal."""
    return text if text.isprintable() else repr(text)

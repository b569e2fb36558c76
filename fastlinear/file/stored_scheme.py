"""How a layer of a frozen file quantises input and output: a field of the manifest, written and, with distrust, read.

    "quantized": {"rows": ["static", 0.012, 3], "out": ["uint8", 0.1, 0], "smooth": "encoder.fc1.smooth"}

The last two may be null; the field is there for integer products only.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

import fastlinear._kernels as _kernels
from fastlinear.file.header import Contents, shown
from fastlinear.spec.int8 import BYTES, Requantize, Rows, is_scale, is_zero
from fastlinear.spec.precision import PRODUCTS, epilogue, name_of

_FIELDS = ("rows", "out", "smooth")


class StoredScheme(NamedTuple):
    """rows: without smoothing, which is the fp32 [k] in the entry `smooth`, if there is one."""

    rows: Rows
    out: Requantize | None
    smooth: str | None

    def dump(self) -> dict[str, Any]:
        out = None if self.out is None else [name_of(self.out.dtype), *self.out[1:]]
        return dict(zip(_FIELDS, (self.rows[:3], out, self.smooth), strict=True))


def parse(who: str, raw: Any, packed: str, k: int) -> StoredScheme | None:
    """What `dump` wrote of a layer of k columns packed in that format; ValueError, calling the layer `who`, where it is
    not so, or the kernels would not take it."""
    if (raw is None) != (packed not in PRODUCTS):
        raise ValueError(f"{who} is packed in {packed}, and quantised by {shown(raw)}")
    if raw is None:
        return None
    if not isinstance(raw, dict) or raw.keys() != {*_FIELDS} or type(raw["smooth"]) not in (str, type(None)):
        raise ValueError(f"{who} is quantised by {shown(raw)}, which has not just {', '.join(_FIELDS)}")
    kind, *affine = _triple(who, raw["rows"])
    rows, out = Rows(kind, *affine), None
    dtypes = {name_of(dtype): dtype for dtype in BYTES}
    if raw["out"] is not None:
        name, *affine = _triple(who, raw["out"])
        if name not in dtypes:
            raise ValueError(f"{who} cannot quantise its output to {shown(name)}, but to {' or '.join(dtypes)}")
        out = Requantize(dtypes[name], *affine)
    try:
        _kernels.RowQuantizer(*rows)
        epilogue(None, out)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{who} cannot be quantised as it says: {error}") from error
    if k > _kernels.dot_limit():
        raise ValueError(f"{who} has {k} columns, more than the {_kernels.dot_limit()} that a sum of integers holds")
    return StoredScheme(rows, out, raw["smooth"])


def check_entry(who: str, scheme: StoredScheme | None, k: int, contents: Contents) -> None:
    """ValueError where the file has no such smoothing."""
    if scheme is None or scheme.smooth is None:
        return
    entry = contents.entries.get(scheme.smooth)
    if entry is None or (entry.dtype, entry.shape) != (torch.float32, (k,)):
        raise ValueError(f"{who} is smoothed by {shown(scheme.smooth)}, which is no F32 of {k} numbers in this file")


def check_channels(who: str, packed: _kernels.Packed) -> None:
    """ValueError where the scales or zero points of a weight are none."""
    scale, zero = packed.scale, packed.zero
    if scale is not None and not is_scale(scale):
        raise ValueError(f"{who} has scales that are negative or not finite")
    if zero is not None and not is_zero(zero):
        raise ValueError(f"{who} has zero points beyond int8")
    if zero is not None and packed.k > _kernels.dot_limit(True):
        raise ValueError(f"{who} has {packed.k} columns, more than a sum of integers with zero points holds")


def _triple(who: str, raw: Any) -> list[Any]:
    if not isinstance(raw, list) or [type(each) for each in raw] != [str, float, int]:
        raise ValueError(f"{who} is quantised by {shown(raw)}, which is no list of a name, a scale and a zero")
    return raw

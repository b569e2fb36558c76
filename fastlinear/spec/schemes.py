"""What may be asked for as `quantize=`, and what a calibration has to say about each layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

import fastlinear._kernels as _kernels
import fastlinear._tensors as _tensors
from fastlinear.spec.int4 import TABLES, Coding
from fastlinear.spec.int8 import Rows


@dataclass(frozen=True, eq=False)
class Observed:
    """The inputs x [..., K] that one layer was given while calibrating.

    scale, zero: x ~ scale * (u - zero) with u in uint8, for x after smoothing; zero is 128 where that was asked to be
    symmetric. smooth: fp32 [K] that x is to be multiplied by, and the columns of the weight divided by; None without
    smoothing. inputs: some rows of x, fp32 [at most 32, K], as they were.
    """

    scale: float
    zero: int
    smooth: Tensor | None
    inputs: Tensor


@dataclass(frozen=True, eq=False)
class Calibration:
    """What `calibrate` found: by the name of the layer, what it observed, or why it has nothing."""

    layers: Mapping[str, Observed]
    skipped: Mapping[str, str]

    def why_not(self, name: str) -> str | None:
        """Why there is nothing about a layer; None if there is."""
        return None if name in self.layers else self.skipped.get(name, "calibrate saw no layer of this name")

    def __deepcopy__(self, memo: dict[int, Any]) -> Calibration:
        return self  # it never changes, and copies of a model are to be quantized alike

    def __repr__(self) -> str:
        return f"Calibration({len(self.layers)} layers, {len(self.skipped)} skipped)"


class Scheme:
    """What every scheme answers. packed: the format that weights are packed in; the others: see the schemes."""

    packed = "int8"
    calibration: Calibration | None = None
    fallback: bool = False
    chain: bool = False
    integers: bool = False  # whether weights that could be multiplied as floats are multiplied as integers
    least: float | None = None  # dB that the weight of a layer must keep, or it is left alone

    def __post_init__(self) -> None:
        for each in fields(self):  # type: ignore[arg-type]
            value, name = getattr(self, each.name), f"{type(self).__name__}({each.name}=...)"
            if each.name == "calibration":
                if not isinstance(value, Calibration) and (value is not None or each.default is MISSING):
                    raise TypeError(f"{name} takes what fastlinear.calibrate returns, but was given {value!r}")
            elif not isinstance(value, bool):
                raise TypeError(f"{name} must be True or False, but is {value!r}")

    def observed(self, name: str) -> Observed | None:
        """What the calibration, if there is one, says of the layer of this name."""
        return None if self.calibration is None else self.calibration.layers.get(name)

    def rows(self, name: str) -> Rows | None:
        """How the layer of this name quantizes its input; None where it does not."""
        return None

    def coding(self) -> Coding | None:
        """How weights become codes of 4 bits; None where they do not."""
        return None

    def why_not(self, name: str) -> str | None:
        """Why the layer of this name cannot be quantized so; None if it can."""
        return None


@dataclass(frozen=True)
class Int8Dynamic(Scheme):
    """int8 weights, and inputs that each call quantizes to 8 bits, every row by its own range; integer products.

    asymmetric: from a row's minimum to its maximum instead of from -max |x| to max |x|: finer for inputs of one sign.
    fallback: where measuring says that fp32 or 16 bits are faster, a layer runs on those, with its own weight.
    calibration: smooths the layers that it knows, if it was made with `smooth=`, and lets `report` tell their error.
    Raises TypeError for other types.
    """

    asymmetric: bool = False
    fallback: bool = False
    calibration: Calibration | None = None

    def rows(self, name: str) -> Rows:
        observed = self.observed(name)
        kind = "asymmetric" if self.asymmetric else "symmetric"
        return Rows(kind, smooth=None if observed is None else observed.smooth)


@dataclass(frozen=True)
class Int8WeightOnly(Scheme):
    """int8 weights, multiplied by inputs in floating point: a quarter of the memory, and of the time to read it."""

    packed = "w8f"


@dataclass(frozen=True)
class _Grouped(Scheme):
    """What schemes of 4-bit weights in groups have in common."""

    group: int = 32
    table: str = "int4"
    offsets: bool = False
    scales: torch.dtype = torch.float16
    least: float | None = None

    packed = "int4"

    def __post_init__(self) -> None:
        name, tables = type(self).__name__, self.tables()
        if isinstance(self.group, bool) or not isinstance(self.group, int):
            raise TypeError(f"{name}(group=...) must be an int, but is {self.group!r}")
        if self.group not in _kernels.GROUP_SIZES:
            raise ValueError(f"{name}(group=...) must be a power of two from 16 on, but is {self.group}")
        if self.table not in tables:
            raise ValueError(f"{name}(table=...) must be {', '.join(map(repr, tables))}, but is {self.table!r}")
        if not isinstance(self.offsets, bool):
            raise TypeError(f"{name}(offsets=...) must be True or False, but is {self.offsets!r}")
        if self.scales not in _tensors.FORMATS:
            allowed = ", ".join(map(str, _tensors.FORMATS))
            raise ValueError(f"{name}(scales=...) must be one of {allowed}, but is {self.scales!r}")
        if self.least is not None and (isinstance(self.least, bool) or not isinstance(self.least, (int, float))):
            raise TypeError(f"{name}(least=...) must be a number of decibels or None, but is {self.least!r}")

    @classmethod
    def tables(cls) -> list[str]:
        """Those whose numbers it can multiply."""
        return [*TABLES]

    def coding(self) -> Coding:
        return Coding(self.group, TABLES[self.table], self.scales, self.offsets)


@dataclass(frozen=True)
class Int4WeightOnly(_Grouped):
    """4-bit weights, in groups of inputs that share a scale, multiplied by inputs in floating point: an eighth of the
    memory of fp32, and of the time to read it.

    group: inputs that share a scale, a power of two from 16 on; one from the number of inputs on has a scale a channel.
    table: what the 16 codes stand for: "int4" (-8 to 7), "nf4", "fp4" (E2M1, that of MXFP4) or "iq4_nl".
    offsets: whether each group has an offset, too, which serves weights that are not centered around 0.
    scales: the dtype of scales and offsets: torch.float16, torch.bfloat16 or torch.float32.
    least: decibels of signal to noise that the weight of a layer must keep. A layer that does not is left as it is, and
        `report` says so.
    Raises TypeError or ValueError for others.
    """


@dataclass(frozen=True)
class Int4Dynamic(_Grouped):
    """4-bit weights, in groups of inputs that share a scale, and inputs that each call quantizes to 8 bits in the same
    groups; integer products, the same bits on every CPU.

    group, offsets, scales, least: as of `Int4WeightOnly`.
    table: "int4", "fp4" or "iq4_nl", whose numbers are integers or halves.
    by_row: whether the inputs of a row share one scale, as with `Int8Dynamic`. One large input then costs all others
        of its row their precision, and not only those of its group.
    Raises TypeError or ValueError for others.
    """

    by_row: bool = False

    integers = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.by_row, bool):
            raise TypeError(f"{type(self).__name__}(by_row=...) must be True or False, but is {self.by_row!r}")

    def rows(self, name: str) -> Rows:
        return Rows("symmetric" if self.by_row else "groups")

    @classmethod
    def tables(cls) -> list[str]:
        return [name for name, numbers in TABLES.items() if Coding(table=numbers).is_whole]


@dataclass(frozen=True)
class Int8Static(Scheme):
    """int8 weights, and inputs quantized to 8 bits by ranges that `calibrate` has seen, one for each layer.

    calibration: layers that it has nothing about are left alone, and `report` says why.
    chain: where the output of one such layer goes into another and nowhere else, it is handed on in 8 bits.
    Raises TypeError for other types.
    """

    calibration: Calibration = field()  # must be given: it does not inherit None
    chain: bool = False

    def rows(self, name: str) -> Rows:
        observed = self.calibration.layers[name]
        return Rows("static", observed.scale, observed.zero, observed.smooth)

    def why_not(self, name: str) -> str | None:
        return self.calibration.why_not(name)


KINDS = {each.__name__: each for each in (Int8Dynamic, Int8WeightOnly, Int8Static, Int4WeightOnly, Int4Dynamic)}

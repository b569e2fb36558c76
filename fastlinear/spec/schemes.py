"""What may be asked for as `quantize=`, and what a calibration has to say about each layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from torch import Tensor

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

    packed = "int8wo"


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

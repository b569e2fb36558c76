"""What a layer's products are made of, as one value: the format of its packed weight, and what becomes integers."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

import fastlinear._kernels as _kernels
import fastlinear._plans as _plans
import fastlinear._tensors as _tensors
import fastlinear._weights as _weights
from fastlinear.spec.activations import Activation
from fastlinear.spec.formats import DTYPES, FP32, PRODUCTS, name_of, present
from fastlinear.spec.int4 import FP8, Coding
from fastlinear.spec.int8 import BYTES, Quantized, Requantize, Rows
from fastlinear.spec.programs import steps_of

if TYPE_CHECKING:
    from fastlinear.spec.schemes import Scheme


class Precision(NamedTuple):
    """What one layer computes in. Tensors in it make `==` useless: ask `is_as`.

    packed: the format of the packed weight, None for the parameter's own; accumulate: that of the least exact sums of
    floats that are welcome; rows: how x is quantized, None where it is not; out: what y is quantized to for the layer
    that reads it; fallback: whether the parameter's own format may run where it is faster; sample: inputs [m, k] to
    tell the error of such a layer by; products: the format that x of floats is rounded to before it is multiplied, fp32
    where it is not; coding: how the weight becomes codes of 4 bits, None where it does not.
    """

    packed: str | None = None
    accumulate: str = FP32
    rows: Rows | None = None
    out: Requantize | None = None
    fallback: bool = False
    sample: Tensor | None = None
    products: str = FP32
    coding: Coding | None = None

    @property
    def smooth(self) -> Tensor | None:
        """fp32 [k] that x is multiplied by, and the columns of the weight are divided by."""
        return None if self.rows is None else self.rows.smooth

    @property
    def scheme(self) -> str:
        """What makes a plan for it another one than for the same packed weight and x otherwise; "" for floats."""
        words = [] if self.rows is None else [self.rows.kind]
        words += [] if self.smooth is None else ["smooth"]
        return "-".join(words + ([] if self.out is None else [f"to-{name_of(self.out.dtype)}"]))

    def takes(self, x: torch.dtype) -> bool:
        """Whether kernels multiply an x of this dtype by a weight packed so; if that is fp32, x must be, too."""
        if x in BYTES:
            return self.rows is not None and self.rows.kind == "static"
        return x in _tensors.FORMATS and (x is torch.float32 or self.packed != FP32)

    def of_floats(self) -> Precision:
        """The same of a layer that has a Parameter, which is not rounded to fp8: that comes from checkpoints alone."""
        comes_so = self.packed is not None and _tensors.GROUPED.get(self.packed) is FP8
        return self._replace(packed=None) if comes_so else self

    def present(self) -> Precision:
        """The same, where an older version pickled it."""
        return self if self.packed is None else self._replace(packed=present(self.packed))

    def under(self, dtype: torch.dtype) -> str:
        """The format of the packed weight under autocast to `dtype`, which integers are deaf to."""
        return name_of(dtype) if self.packed is None or self.packed in DTYPES else self.packed

    def numbers(self, x: Tensor) -> Tensor:
        """The floating-point tensor that x stands for, if it is integers that this takes; x itself otherwise."""
        if self.rows is None or x.dtype not in BYTES or not self.takes(x.dtype):
            return x
        zero = self.rows.zero - (0 if x.dtype is torch.uint8 else 128)
        numbers = (x.float() - zero) * self.rows.scale
        return numbers if self.smooth is None else numbers / self.smooth

    def quantizer(self) -> _plans.RowQuantizer | None:
        if self.rows is not None:
            return _plans.RowQuantizer(*self.rows)
        return None if self.products == FP32 else _plans.RowQuantizer.rounding(DTYPES[self.products])

    def is_as(self, other: Precision) -> bool:
        """Whether layers of both compute the same."""
        a, b = (p._replace(rows=p.rows and p.rows._replace(smooth=None), sample=None) for p in (self, other))
        return a == b and is_same(self.smooth, other.smooth)


AS_HELD = Precision()  # in the parameter's own format


class Wanted(NamedTuple):
    """What `convert` was asked for: one precision for all layers, or what a scheme says of each. switched: the format
    of products that torch's own switch asks for in layers of fp32, where nobody has said anything else."""

    everywhere: Precision
    scheme: Scheme | None = None
    switched: str = FP32

    @property
    def packed(self) -> str | None:
        return self.everywhere.packed if self.scheme is None else self.scheme.packed

    def text(self) -> str:
        """What was asked for, in a few words."""
        words = [self.packed or "as it is"] if self.scheme is None else [type(self.scheme).__name__]
        products = self.switched if self.everywhere.products == FP32 else self.everywhere.products
        words += [] if products == FP32 else [f"{products} products"]
        return " with ".join(words + ([] if self.everywhere.accumulate == FP32 else ["fp16 sums"]))

    def of(self, name: str, held: torch.dtype) -> Precision:
        """That of the layer called `name`, of a parameter of this dtype, of which `why_not` has nothing to say."""
        if self.switched != FP32 and held is torch.float32:
            return self.everywhere._replace(packed=self.switched, products=self.switched)
        if self.scheme is None:
            return self.everywhere
        observed = self.scheme.observed(name)
        return self.everywhere._replace(
            packed=self.scheme.packed,
            rows=self.scheme.rows(name),
            fallback=self.scheme.fallback,
            coding=self.scheme.coding(),
            sample=None if observed is None else observed.inputs,
        )

    def why_not(self, name: str, k: int, theirs: Quantized | None = None) -> str | None:
        """Why the layer called `name`, of k input features, cannot be so; None if it can.

        theirs: its weight, where somebody else quantized that.
        """
        reason = None if self.scheme is None else self.scheme.why_not(name)
        if self.scheme is None or reason is not None:
            return reason
        if theirs is not None and self.scheme.coding() is not None:
            return "its weight is quantized already, to 8 bits"
        rows, zeros = self.scheme.rows(name), theirs is not None and theirs.zero is not None
        if rows is None:
            return f"{type(self.scheme).__name__} has no zero points, which its weight has" if zeros else None
        most, coding = _weights.dot_limit(zeros), self.scheme.coding()
        if (k if coding is None else min(k, coding.group)) > most:
            return f"its {k} input features are more than the {most} whose products an int32 sum holds"
        if rows.smooth is not None and theirs is not None:
            return "its weight is quantized already, and so cannot be smoothed: calibrate it as it is"
        observed = self.scheme.observed(name)
        if observed is not None and observed.inputs.shape[1] != k:
            return f"it was calibrated with {observed.inputs.shape[1]} input features, but has {k}"
        return None


ANYHOW = Wanted(AS_HELD)


def wanted(dtype: object = None, accumulate: object = FP32, quantize: object = None, products: object = None) -> Wanted:
    """The arguments of `convert`; TypeError or ValueError where weights cannot be packed in `dtype`, `accumulate` is no
    format of sums, `quantize` no scheme, `products` no format to multiply in, or two of them exclude each other."""
    narrow = [each for each in _tensors.FORMATS if each is not torch.float32]
    _check_dtype("dtype", dtype, [None, *narrow])
    _check_dtype("products", products, [None, torch.float32, *narrow])
    sums = sorted({row["accumulate"] for row in _kernels.rows()} & {*DTYPES} | {FP32}, reverse=True)
    if accumulate not in sums:
        raise ValueError(f"accumulate must be {' or '.join(map(repr, sums))}, but is {accumulate!r}")
    scheme = None if quantize is None else _checked(quantize)
    if scheme is not None and dtype is not None:
        raise ValueError(f"a weight is packed by dtype={dtype} or by quantize={scheme!r}, not by both")
    if products in narrow and dtype not in (None, products):
        raise ValueError(f"products={products} are of weights packed so, not by dtype={dtype}")
    if products in narrow and scheme is not None and (scheme.packed in PRODUCTS or scheme.integers):
        raise ValueError(f"products={products} are none of integers, which quantize={scheme!r} makes")
    if products in narrow and scheme is None:
        dtype = products
    switched = products is None and dtype is None and scheme is None and accumulate == FP32
    packed, rounded = (None if each is None else name_of(each) for each in (dtype, products))  # type: ignore[arg-type]
    precision = Precision(packed, str(accumulate), products=rounded or FP32)
    return Wanted(precision, scheme, switch_of_torch() if switched else FP32)


def _checked(quantize: object) -> Scheme:
    """A scheme as it is; TypeError for anything else."""
    from fastlinear.spec.schemes import KINDS, Scheme  # here: to make their classes is a quarter of `import fastlinear`

    if isinstance(quantize, Scheme):
        return quantize
    if isinstance(quantize, type) and issubclass(quantize, Scheme):
        name = quantize.__name__
        raise TypeError(f"quantize must be a scheme, such as {name}(...), but is the class {name} itself")
    raise TypeError(f"quantize must be None or one of fastlinear's {', '.join(KINDS)}, but is {quantize!r}")


def _check_dtype(what: str, given: object, allowed: list[torch.dtype | None]) -> None:
    """TypeError or ValueError where it is none of these."""
    if not any(given is each for each in allowed):
        error = ValueError if isinstance(given, torch.dtype) else TypeError
        raise error(f"{what} must be {', '.join(map(str, allowed[:-1]))} or {allowed[-1]}, but is {given!r}")


def switch_of_torch() -> str:
    """The format that torch is told to multiply matrices of fp32 in on a CPU: bf16 after
    torch.set_float32_matmul_precision("medium") or torch.backends.mkldnn.matmul.fp32_precision = "bf16". Its "tf32"
    is nothing that the kernels have."""
    told = getattr(getattr(torch.backends.mkldnn, "matmul", None), "fp32_precision", None)
    return "bf16" if told == "bf16" else FP32


def epilogue(program: Activation | None, out: Requantize | None) -> _plans.Epilogue:
    """What is done with the sums."""
    steps = () if program is None else steps_of(program)
    spelled = [(name, params) if operand is None else (name, params, operand) for name, params, operand in steps]
    return _plans.Epilogue(spelled, None if out is None else (out.dtype, out.scale, out.zero))


def is_same(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether both are None or equal tensors."""
    return a is b if a is None or b is None else a is b or torch.equal(a, b)

"""The question: what a plan is made for."""

from __future__ import annotations

import re
from typing import NamedTuple, Protocol

from fastlinear.plan.table import layout
from fastlinear.spec.activations import Activation
from fastlinear.spec.formats import DTYPES, FP32
from fastlinear.spec.precision import Precision
from fastlinear.spec.programs import is_gated

FROZEN = "none"  # what a frozen layer holds instead of a parameter of some format


class Problem(NamedTuple):
    """What a plan is made for. `m` is a bucket of M; `transposed` tells that the module holds its weight as [k, n].

    `layout` is that of the pack; "" for a weight that is yet to be packed, which will be as `layout()` says.
    `x`, `packed` and `held` are the formats of the activations, of the packed weight and of the parameter, FROZEN where
    there is none, and so no way for torch; `activation` is the whole program, `accumulate` the format of the least
    exact sums that are welcome, `scheme` how x and y are quantized (`Precision.scheme`), `fallback` whether the
    parameter's own format may run, too, and `products` what x is rounded to.
    """

    m: int
    n: int
    k: int
    x: str
    packed: str
    held: str
    accumulate: str
    bias: bool
    activation: Activation | None
    transposed: bool
    threads: int
    scheme: str = ""
    fallback: bool = False
    layout: str = ""
    products: str = FP32

    @property
    def columns(self) -> int:
        """Of y."""
        return self.n // 2 if is_gated(self.activation) else self.n

    @property
    def panels(self) -> str:
        """The layout that a kernel has to read."""
        return self.layout or layout(self.packed)

    @property
    def rows(self) -> str:
        """The format of the numbers that are multiplied, if these are floats: that of x, or narrower."""
        return self.x if self.products == FP32 else self.products

    @property
    def admits_torch(self) -> bool:
        """Whether torch's own ways compute the same: they need the weight, which they cast to the dtype of x, and
        neither integers nor an x, or a weight, that is rounded to something narrower before it is multiplied."""
        same = self.packed in DTYPES and self.packed in (self.held, self.x)
        return self.held != FROZEN and self.rows == self.x and (same or self.fallback)

    def unquantized(self) -> Problem:
        """The same on a weight packed in the parameter's own format."""
        return self._replace(packed=self.held, scheme="", fallback=False, layout="")

    def key(self) -> str:
        epilogue = (
            "_".join(map(str, (self.activation.name, *self.activation.params))) if self.activation else "identity"
        )
        flags = ("bias" if self.bias else "nobias") + ("-transposed" if self.transposed else "")
        formats = f"x={self.x},packed={self.panels},held={self.held},sums={self.accumulate}"
        formats += f",scheme={self.scheme}" * bool(self.scheme) + ",fallback" * self.fallback
        formats += f",products={self.products}" * (self.products != FP32)
        return f"{formats}/n{self.n}/k{self.k}/{flags}/{epilogue}/t{self.threads}/m{self.m}"


def shape_of(key: str) -> tuple[int, int] | None:
    """The (n, k) of the weight that a `Problem.key` is about; None for other words."""
    found = re.search(r"/n(\d+)/k(\d+)/", key)
    return None if found is None else (int(found[1]), int(found[2]))


class Packs(Protocol):
    """One packed weight [n, k], or several of a kind."""

    @property
    def format(self) -> str: ...
    @property
    def layout(self) -> str: ...
    @property
    def n(self) -> int: ...
    @property
    def k(self) -> int: ...


def asked_of(
    packed: Packs,
    precision: Precision,
    m: int,
    x: str,
    threads: int,
    *,
    bias: bool,
    activation: Activation | None,
    held: str = FROZEN,
    transposed: bool = False,
) -> Problem:
    """What a layer asks: for a bucket of m rows in the format `x`, on this weight, computed in `precision`."""
    return Problem(
        m=m,
        n=packed.n,
        k=packed.k,
        x=x,
        packed=packed.format,
        held=held,
        accumulate=precision.accumulate,
        bias=bias,
        activation=activation,
        transposed=transposed,
        threads=threads,
        scheme=precision.scheme,
        fallback=precision.fallback and held != FROZEN,
        layout=packed.layout,
        products=precision.products,
    )

"""The kernel table as test parameters, and one product on one row of it, whichever way that kernel runs here."""

import faulthandler
import itertools
import os
import random
import resource
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import emulator
import library
import oracle
import pytest
import torch
from library import Steps
from oracle import Dtypes, Result, Sums
from torch import Tensor

import fastlinear._kernels as _kernels
import fastlinear._plans as _plans
import fastlinear._products as _products
import fastlinear._tensors as _tensors
import fastlinear._weights as _weights
from fastlinear.spec.int8 import Quantized, Requantize, Rows

Kernel = dict[str, Any]
Note = Callable[[str], object]

DTYPES = _tensors.PACKED  # of weights, by format
FLOATS = list(_tensors.FORMATS)  # what x, biases and outputs may be
FP16_BLOCK = 64  # products that a kernel which accumulates in fp16 may add before it promotes the sum


def on(kernel: Kernel, layout: str) -> Kernel:
    """A kernel of the table on weights in `layout`: its own, or one that the driver widens for it.

    The table's own fields, but `format`, `layout` and `kr` are those of the weight, and beside them: `id`, the name as
    tests show it; `way`, how it runs here; `own`, the format that it reads unwidened; `of_x` and `of_bias`, the formats
    that these may have; `dtypes`, a few combinations in which each of them appears; `sums`, how it adds up.
    """
    format, shape = layout.split("/")
    weight, sums_integers = DTYPES[format], kernel["accumulate"] == "int32"
    any_x = sums_integers or (kernel["rows"] == "fp32" and weight != torch.float32)
    of_x = FLOATS if any_x else [DTYPES[kernel["rows"]]]
    of_bias = list(dict.fromkeys((weight, torch.float32))) if weight.is_floating_point else FLOATS
    return kernel | {
        "id": kernel["name"] if layout == kernel["reads"][0] else f"{kernel['name']} on {layout}",
        "way": library.way(kernel["isa"]),
        "own": kernel["name"].split("/")[0],
        "format": format,
        "layout": layout,
        "kr": int(shape.split("x")[1]),
        "dtypes": [Dtypes(x, weight, bias) for x, bias in together(of_x, of_bias)],
        "of_x": of_x,
        "of_bias": of_bias,
        "sums": Sums(FP16_BLOCK if kernel["accumulate"] == "fp16" else 0, flushes=kernel["rows"] == "bf16"),
    }


def together(*factors: Sequence[Any]) -> list[tuple[Any, ...]]:
    """As few rows of one value a factor as have every value of each."""
    return [tuple(factor[i % len(factor)] for factor in factors) for i in range(max(map(len, factors)))]


# Weights that are scaled in groups have tests of their own: test_groups.py.
ALL = [
    on(kernel, layout)
    for kernel in _kernels.kernels()
    for layout in kernel["reads"]
    if layout.split("/")[0] not in _tensors.GROUPED
]
INTEGER = [kernel for kernel in ALL if kernel["accumulate"] == "int32"]  # integer products; all others are floating
FLOATING = [kernel for kernel in ALL if kernel not in INTEGER]
TABLE = [kernel for kernel in FLOATING if kernel["id"] == kernel["name"]]
RUNNABLE = [kernel for kernel in FLOATING if kernel["runnable"]]
EXECUTED = [kernel for kernel in ALL if "skipped" not in kernel["way"]]
LAYOUTS = list(dict.fromkeys((k["layout"], DTYPES[k["format"]], k["nr"], k["kr"]) for k in ALL))
ACTIVATIONS = [*_kernels.activations().items()]


def parameter(kernel: Kernel, *more: Any, id: str = "") -> Any:
    """A pytest parameter that is skipped, with the kernel's name and the reason, where the kernel cannot run."""
    skip = pytest.mark.skip(reason=f"{kernel['name']} {kernel['way']}")
    return pytest.param(kernel, *more, id=id or kernel["id"], marks=[] if kernel in EXECUTED else [skip])


# `for every kernel of the table that sums floating-point products, on every layout that it reads`, and the others.
every_kernel = pytest.mark.parametrize("kernel", [parameter(kernel) for kernel in FLOATING])
every_integer_kernel = pytest.mark.parametrize("kernel", [parameter(kernel) for kernel in INTEGER])

products: Counter[str] = Counter()  # how many were computed on each row, for the report at the end


def run(
    kernel: Kernel,
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    steps: Steps = (),
    *,
    threads: int = 1,
    k_slices: int = 1,
    out: Tensor | None = None,
) -> Tensor:
    """steps(x [M, K] @ w [N, K].T + b [N]) on this kernel. `out` [M, N] is written if given, else a NaN tensor as x."""
    y = torch.full((x.shape[0], w.shape[0]), torch.nan, dtype=x.dtype) if out is None else out
    products[kernel["id"]] += 1
    return product(kernel, pack(w, kernel["layout"]), x, b, steps, threads, k_slices, y)


def integers(
    kernel: Kernel,
    x: Tensor,
    q: Quantized,
    rows: Rows,
    b: Tensor | None = None,
    steps: Steps = (),
    to: torch.dtype | Requantize | None = None,
    *,
    threads: int = 1,
    k_slices: int = 1,
    out: Tensor | None = None,
) -> Tensor:
    """`quantize.linear` on this integer kernel: x [M, K], q [N, K], `to` the dtype of the result, or what makes
    integers of it. `out` [M, N] is written if given."""
    requantize = to if isinstance(to, Requantize) else None
    dtype = requantize.dtype if requantize else to or (x.dtype if x.dtype.is_floating_point else torch.float32)
    y = torch.full((len(x), len(q.values)), 77, dtype=dtype) if out is None else out
    packed = pack(q.values, kernel["layout"], q.scale, q.zero)
    products[kernel["id"]] += 1
    return product(
        kernel,
        packed,
        x,
        b,
        steps,
        threads,
        k_slices,
        y,
        _plans.RowQuantizer(*rows),
        requantize and tuple(requantize),
    )


def pack(w: Tensor, layout: str, scale: Tensor | None = None, zero: Tensor | None = None) -> _weights.Packed:
    """w [N, K] in `layout`; int8 weights without a `scale` are integers."""
    if w.dtype == torch.int8 and scale is None:
        scale = torch.ones(len(w))
    return _weights.Packed(w, layout, scale, zero)


def product(
    kernel: Kernel,
    packed: _weights.Packed,
    x: Tensor,
    b: Tensor | None,
    steps: Steps,
    threads: int,
    k_slices: int,
    out: Tensor,
    rows: _plans.RowQuantizer | None = None,
    requantize: tuple[torch.dtype, float, int] | None = None,
) -> Tensor:
    """`run` or `integers` on a packed weight, into `out`."""
    with nullcontext() if kernel["runnable"] else emulator.running():
        plan, epilogue = (
            _plans.Plan(kernel["name"], threads, k_slices, library.caches()),
            _plans.Epilogue(steps, requantize),
        )
        _products.run(packed, plan, epilogue, x, b, out, rows)
    return out


def check(
    kernel: Kernel, y: Tensor, x: Tensor, w: Tensor, b: Tensor | None = None, activation: object = None, **how: bool
) -> Result:
    """`oracle.check` for the way this kernel adds up."""
    return oracle.check(y, x, w, b, activation, sums=kernel["sums"], **how)


def exact_case(kernel: Kernel, m: int, n: int, k: int, dtypes: Dtypes) -> tuple[Tensor, Tensor, Tensor]:
    """`oracle.exact_case` for the way this kernel adds up."""
    x, w, b = oracle.exact_case(m, n, k, dtypes, sums=kernel["sums"])
    assert b is not None
    return x, w, b


def random_case(m: int, n: int, k: int, dtypes: Dtypes) -> tuple[Tensor, Tensor, Tensor]:
    """`oracle.random_case` with a bias."""
    x, w, b = oracle.random_case(m, n, k, dtypes)
    assert b is not None
    return x, w, b


OF_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32}  # by the bytes of an element


def bits(values: Tensor) -> Tensor:
    """The bit patterns of values, so that NaN equals itself and -0 differs from 0."""
    return values.contiguous().view(OF_BITS[values.element_size()])


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal format, equal to the last bit; NaN payloads and the sign of zero count."""
    return a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def of_bits(patterns: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers of a format that have these bit patterns (any integers, of which the last bits count)."""
    return patterns.to(OF_BITS[dtype.itemsize]).view(dtype)


def blocks(rows: str) -> tuple[int, int, int]:
    """Bytes of a K block of panels, of a block of rows of this format and of prepared rows, so that tests which cross a
    block know where it ends."""
    alike = next(k["name"] for k in ALL if k["runnable"] and (k["rows"] == "fp32") == (rows == "fp32"))
    return _plans.Plan(alike, 1, 1, library.caches()).blocks


def pairwise(*factors: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Rows of one value a factor, in which every two values of different factors meet at least once; greedy, seeded."""
    rng = random.Random(0)
    indices = range(len(factors))
    wanted = [(i, a, j, b) for i, j in itertools.combinations(indices, 2) for a in factors[i] for b in factors[j]]
    missing = dict.fromkeys(wanted)
    rows = []

    def gain(row: list[Any]) -> int:
        return sum((i, row[i], j, row[j]) in missing for i, j in itertools.combinations(indices, 2))

    while missing:
        i, a, j, b = next(iter(missing))
        candidates = [[rng.choice(factor) for factor in factors] for _ in range(20)]
        for row in candidates:
            row[i], row[j] = a, b
        best = max(candidates, key=gain)
        rows.append(tuple(best))
        for p, q in itertools.combinations(indices, 2):
            missing.pop((p, best[p], q, best[q]), None)
    return rows


# How factors meet in the cases that one test walks over: every two of their values, or all.
meetings = pytest.mark.parametrize(
    "meeting", [pairwise, pytest.param(itertools.product, marks=pytest.mark.exhaustive)], ids=["pairs", "all"]
)
Meeting = Callable[..., Iterable[tuple[Any, ...]]]


def in_child(action: Callable[[Note], None]) -> None:
    """Runs action(note) in a forked process, where it may die; fails with its error, or with its last note."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            faulthandler.disable()
            action(lambda text: os.write(write, f"at {text}\n".encode()))
            status = 0
        except BaseException:  # whatever it is belongs to the parent, and pytest must not go on in the child
            os.write(write, traceback.format_exc().encode())
        finally:
            os._exit(status)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code == 0, f"the child ended with {code}\n{said[-4000:]}"

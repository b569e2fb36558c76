"""What the driver can be asked for beside one product into one matrix: segments, gathered and scattered rows, lists."""

import itertools
import subprocess
from pathlib import Path

import library
import native
import pytest
import torch
from native import Kernel
from torch import Tensor

import fastlinear._plans as _plans
import fastlinear._products as _products
from fastlinear.spec.int8 import Requantize


def kernels() -> list[Kernel]:
    """All that run here, on the weights that they read as they are."""
    return [kernel for kernel in native.ALL if kernel["runnable"] and kernel["id"] == kernel["name"]]


every_runnable = pytest.mark.parametrize("kernel", kernels(), ids=lambda kernel: kernel["id"])


class Product:
    """One product on random numbers, and its plain answer."""

    def __init__(self, kernel: Kernel, m: int, n: int, k: int, of_y: torch.dtype | None = None) -> None:
        dtypes = kernel["dtypes"][0]
        self.x = torch.randn(m, k).to(dtypes.x)
        integers = not dtypes.weight.is_floating_point
        w = torch.randint(-99, 99, (n, k), dtype=torch.int8) if integers else torch.randn(n, k).to(dtypes.weight)
        self.packed = native.pack(w, kernel["layout"], torch.rand(n) / 99 if integers else None)
        self.bias = torch.randn(n)
        self.rows = _plans.RowQuantizer("symmetric") if kernel["accumulate"] == "int32" else None
        self.of_y = of_y or dtypes.x
        out = (of_y, 0.05, 128) if of_y in (torch.uint8, torch.int8) else None
        self.epilogue = _plans.Epilogue([("relu", ())], out)

    def call(self, out: Tensor | list[Tensor], **more: Tensor) -> dict[str, object]:
        common = {"packed": self.packed, "epilogue": self.epilogue, "x": self.x, "bias": self.bias, "rows": self.rows}
        return common | {"out": out} | more

    def answer(self, plan: _plans.Plan, out: Tensor | list[Tensor] | None = None, **more: Tensor) -> Tensor:
        """`run` of it, into a new matrix unless `out` is given; returns that matrix."""
        y = torch.zeros(len(self.x), self.packed.n, dtype=self.of_y)
        _products.run(
            self.packed, plan, self.epilogue, self.x, self.bias, y if out is None else out, self.rows, (), **more
        )
        return y


@pytest.mark.parametrize("k_slices", [1, 3])
@every_runnable
def test_segments(kernel: Kernel, k_slices: int) -> None:
    """Columns go to as many matrices as they are cut into, wherever tiles end, of every format, and nowhere else."""
    torch.manual_seed(0)
    n, plan = 2 * kernel["columns"] + 7, _plans.Plan(kernel["name"], 2, k_slices)
    formats = [*native.FLOATS, torch.uint8, torch.int8]
    for of_y, cuts in itertools.product(formats, ([1], [5, 6], [kernel["columns"]], [3, n // 2, n - 1])):
        product = Product(kernel, kernel["mr"] + 1, n, 37, of_y)
        whole = product.answer(plan)
        around = [torch.full((len(whole), b - a + 9), 77, dtype=of_y) for a, b in itertools.pairwise([0, *cuts, n])]
        product.answer(plan, [part[:, 4:-5] for part in around])
        assert native.same_bits(torch.cat([part[:, 4:-5] for part in around], 1), whole)
        assert all((part[:, :4] == 77).all() and (part[:, -5:] == 77).all() for part in around)


@every_runnable
def test_segments_of_different_formats(kernel: Kernel) -> None:
    """One product may be stored in fp32 here, in bf16 there: each is what a product of that format alone would be."""
    torch.manual_seed(0)
    product, plan = Product(kernel, 5, 83, 21, torch.float32), _plans.Plan(kernel["name"])
    whole = product.answer(plan)
    parts = [torch.zeros(5, n, dtype=dtype) for n, dtype in zip((40, 20, 23), native.FLOATS, strict=True)]
    product.answer(plan, parts)
    for part, columns in zip(parts, whole.split((40, 20, 23), 1), strict=True):
        assert native.same_bits(part, columns.to(part.dtype))


@every_runnable
def test_gathered_and_scattered_rows(kernel: Kernel) -> None:
    """Rows are read by an index, with repetitions, and written by another: those of the plain product, none else."""
    torch.manual_seed(0)
    product, plan = Product(kernel, 3 * kernel["mr"] + 1, 40, 33), _plans.Plan(kernel["name"], 2)
    whole = product.answer(plan)
    m = kernel["mr"] + 2
    x_index, y_index = torch.randint(len(whole), (m,)), torch.randperm(len(whole))[:m]
    product.answer(plan, gathered := torch.zeros(m, 40, dtype=whole.dtype), x_index=x_index)
    assert native.same_bits(gathered, whole[x_index])
    both = torch.full_like(whole, 7)
    product.answer(plan, both, x_index=x_index, y_index=y_index)
    assert native.same_bits(both, torch.full_like(whole, 7).index_copy(0, y_index, whole[x_index]))


@pytest.mark.parametrize(("threads", "k_slices"), [(1, 1), (2, 1), (2, 3)])
@every_runnable
def test_lists(kernel: Kernel, threads: int, k_slices: int) -> None:
    """Products of any sizes, empty ones and of more than a block of rows, give the bits that each gives alone."""
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    plan = _plans.Plan(kernel["name"], threads, k_slices, (32 << 10, 16 << 10, 128 << 10))
    sizes = [
        (3, 50, 70),
        (0, 9, 5),
        (1, 1, 1),
        (2 * kernel["mr"] + 1, kernel["columns"] + 1, 33),
        (200, 65, 130),
        (4, 7, 0),
    ]
    products = [Product(kernel, *size) for size in sizes]
    expected = [product.answer(plan) for product in products]
    outs = [torch.zeros_like(y) for y in expected]
    _products.run_all(plan, [p.call(out) for p, out in zip(products, outs, strict=True)])
    torch.set_num_threads(1)
    assert all(native.same_bits(out, y) for out, y in zip(outs, expected, strict=True))
    _products.run_all(plan, [])


def test_experts() -> None:
    """Mixture of experts: each multiplies the rows sent to it, in one call, and writes them where they were."""
    torch.manual_seed(0)
    kernel = next(k for k in kernels() if k["own"] == "fp32")
    tokens, n, k, plan = 50, 48, 32, _plans.Plan(kernel["name"], 2)
    x, weights, chosen = torch.randn(tokens, k), torch.randn(4, n, k), torch.randint(4, (tokens,))
    y = torch.zeros(tokens, n)
    places = [(chosen == expert).nonzero().flatten() for expert in range(4)]
    _products.run_all(
        plan,
        [
            {"packed": native.pack(w, kernel["layout"]), "epilogue": _plans.Epilogue(), "x": x, "out": y}
            | {"x_index": rows, "y_index": rows}
            for w, rows in zip(weights, places, strict=True)
        ],
    )
    assert torch.allclose(y, torch.einsum("tk,tnk->tn", x, weights[chosen]), atol=1e-4)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"out": [torch.zeros(3, 4), torch.zeros(3, 4)]}, "have 8 columns together, not 9"),
        ({"out": [torch.zeros(3, 1)] * 9}, "1 to 8 tensors, not 9"),
        ({"out": []}, "1 to 8 tensors, not 0"),
        ({"out": [torch.zeros(3, 4), torch.zeros(2, 5)]}, r"out must be \[3, columns\]"),
        ({"out": [torch.zeros(3, 4), torch.zeros(3, 5, dtype=torch.uint8)]}, "out is torch.uint8, but"),
        ({"x_index": torch.tensor([0, 3, 1])}, "x_index must lie from 0 to 2, not from 0 to 3"),
        ({"x_index": torch.tensor([0, -1, 1])}, "x_index must lie from 0 to 2, not from -1 to 1"),
        ({"x_index": torch.zeros(3, dtype=torch.int32)}, "must be a contiguous int64 CPU tensor"),
        ({"y_index": torch.tensor([0, 1, 3])}, "y_index must lie from 0 to 2"),
        ({"y_index": torch.tensor([0, 1])}, "y_index has 2 rows, not 3"),
    ],
)
def test_bad_requests_are_refused(more: dict[str, object], message: str) -> None:
    """No row beyond x or out is read or written, no column is forgotten."""
    kernel = next(k for k in kernels() if k["own"] == "fp32")
    product = Product(kernel, 3, 9, 5)
    plan = _plans.Plan(kernel["name"])
    with pytest.raises(ValueError, match=message):
        _products.run_all(plan, [product.call(torch.zeros(3, 9)) | more])  # type: ignore[operator]


def test_integer_outputs_are_those_of_the_specification() -> None:
    """The scale and zero point of `out` hold in every segment."""
    kernel = next(k for k in kernels() if k["accumulate"] == "int32")
    product, plan = Product(kernel, 5, 40, 64, torch.int8), _plans.Plan(kernel["name"])
    assert product.epilogue.out == tuple(Requantize(torch.int8, 0.05, 128))
    assert product.answer(plan).unique().numel() > 5


def test_steps_and_sessions(tmp_path: Path) -> None:
    """A kernel with a row step, a K step and a session finds zeros where its operands end within a step, and is run
    within a session that is entered once a thread and call and restores what it found; under the address sanitizer."""
    options = ["-std=c++20", "-O0", "-fsanitize=address", f"-I{library.ROOT / 'include'}"]
    program = tmp_path / "steps"
    subprocess.run(["g++", *options, library.ROOT / "tests/kernel/steps.cpp", "-o", program, "-ldl"], check=True)
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "held\n"), done.stderr

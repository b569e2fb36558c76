"""Steps of two operands: what comes with a call meets the sums in every form, format and place of a program."""

import itertools
from collections.abc import Callable

import native
import pytest
import torch
from native import Kernel
from torch import Tensor

import fastlinear._kernels as _kernels
import fastlinear._plans as _plans
import fastlinear._products as _products
from fastlinear.spec import gates, programs
from fastlinear.spec.activations import Activation

M, N, K = 9, 83, 21
BINARY = programs.BINARY

# [M, N] with any row stride, a row, a column, a number; each made of fresh numbers.
FORMS: dict[str, Callable[[], Tensor]] = {
    "dense": lambda: torch.randn(M, N),
    "strided": lambda: torch.randn(M, 2 * N + 5)[:, 3 : N + 3],
    "every other row": lambda: torch.randn(M, 1, N).expand(M, 2, N)[:, 1],
    "row": lambda: torch.randn(N),
    "row of two dimensions": lambda: torch.randn(1, N),
    "column": lambda: torch.randn(M, 1),
    "strided column": lambda: torch.randn(M, 7)[:, 2:3],
    "number": lambda: torch.randn(()),
    "expanded number": lambda: torch.randn(1, 1).expand(M, N),
}


def test_every_function_of_two_operands_is_tested() -> None:
    """A new one has to say in the specification what it means; so has a gate."""
    assert {name for name, (_, operands, _) in _kernels.functions().items() if operands} == BINARY.keys()
    assert {
        name for name, (*_, gate) in _kernels.functions().items() if gate
    } == programs.GATES.keys() | programs.LIMITED


def kernels() -> list[Kernel]:
    """One kernel of fp32 weights an ISA with steps of its own."""
    found = {kernel["isa"]: kernel for kernel in native.RUNNABLE if kernel["layout"].startswith("fp32")}
    return list(found.values())


def computed(kernel: Kernel, steps: list[native.Any], operands: list[Tensor], out: Tensor, k_slices: int = 1) -> Tensor:
    """The sums of exact numbers, then the steps."""
    x, w, b = native.exact_case(kernel, M, N, K, kernel["dtypes"][0])
    plan = _plans.Plan(kernel["name"], 2, k_slices)
    _products.run(native.pack(w, kernel["layout"]), plan, _plans.Epilogue(steps), x, b, out, None, operands)
    return x @ w.T + b


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kernel", kernels(), ids=lambda kernel: kernel["isa"])
@pytest.mark.parametrize("name", BINARY)
def test_forms_and_formats(name: str, kernel: Kernel, form: str) -> None:
    """First, in the middle and last, of fp32, bf16 and fp16, with one and three K slices: the bits of torch."""
    torch.manual_seed(0)
    for dtype, k_slices in itertools.product(native.FLOATS, (1, 3)):
        operand = FORMS[form]().to(dtype)
        for before, after in itertools.product(([], [("relu", ())]), repeat=2):
            y = torch.full((M, N), torch.nan)
            sums = computed(kernel, [*before, (name, (), 0), *after], [operand], y, k_slices)
            expected = BINARY[name](sums.relu() if before else sums, operand.float().expand(M, N))
            assert torch.equal(y, expected.relu() if after else expected)


@pytest.mark.parametrize("kernel", kernels(), ids=lambda kernel: kernel["isa"])
@pytest.mark.parametrize("name", BINARY)
def test_numbers_and_nan(name: str, kernel: Kernel) -> None:
    """A number may stand for a tensor; NaN of either side comes through, also where the lesser or greater is asked."""
    torch.manual_seed(0)
    y = torch.empty(M, N)
    sums = computed(kernel, [(name, (0.3,))], [], y)
    assert torch.equal(y, BINARY[name](sums, torch.tensor(0.3)))
    operand = torch.where(torch.rand(M, N) < 0.3, torch.nan, torch.randn(M, N))
    sums = computed(kernel, [(name, (), 0), (name, (), 1)], [operand, torch.zeros(())], y)
    assert torch.equal(y.isnan(), BINARY[name](BINARY[name](sums, operand), torch.zeros(())).isnan())


@pytest.mark.parametrize("kernel", [native.parameter(k) for k in native.ALL if k["runnable"]])
def test_gates(kernel: Kernel) -> None:
    """Of every kernel: y has half the columns, act(gate) * through, for any N, with bias, operands and K slices, and
    sums that are kept beside it are in the order of the parameter."""
    torch.manual_seed(0)
    dtypes = kernel["dtypes"][0]
    integers = dtypes.weight is torch.int8
    gates_of_all = [(name, ()) for name in programs.GATES] + [("swiglu_oai", (1.5, 2.0)), ("swiglu_limited", (1.0,))]
    sizes = zip((1, 7, 16, 45, 83, 21, 40, 33), (1, 3, 1, 2, 1, 1, 2, 1), strict=True)
    for (name, params), (columns, k_slices) in zip(gates_of_all, sizes, strict=True):
        x = torch.randn(M, K).to(dtypes.x)
        w = torch.randint(-9, 9, (2 * columns, K), dtype=torch.int8) if integers else torch.randn(2 * columns, K)
        w = w if integers else w.to(dtypes.weight)
        scale = [torch.rand(2 * columns) / K] if integers else []
        b, operand = torch.randn(2 * columns), torch.randn(M, columns)
        layout = kernel["layout"]
        packed = native.pack(gates.interleave(w, layout), layout, *(gates.interleave(s, layout) for s in scale))
        assert torch.equal(gates.separate(packed.unpack(), layout), w)
        rows = _plans.RowQuantizer("symmetric") if kernel["accumulate"] == "int32" else None
        plan, both, y = _plans.Plan(kernel["name"], 2, k_slices), torch.empty(M, 2 * columns), torch.empty(M, columns)
        _products.run(native.pack(w, layout, *scale), plan, _plans.Epilogue(), x, b, both, rows)
        _products.run(packed, plan, _plans.Epilogue([(name, params), ("add", (), 0)]), x, b, y, rows, [operand])
        expected = programs.apply(Activation(name, params), both) + operand
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        again, sums = torch.empty_like(y), torch.empty_like(both)
        steps = _plans.Epilogue([(name, params), ("add", (), 0)])
        _products.run(packed, plan, steps, x, b, again, rows, [operand], sums=sums)
        assert torch.equal(again, y) and torch.equal(sums, both)


@pytest.mark.parametrize("kernel", [native.parameter(k) for k in native.ALL if k["runnable"]])
def test_sums_kept_beside(kernel: Kernel) -> None:
    """Of every kernel: what the epilogue is applied to, with the bias, as a product without steps gives it, and y is
    what it is without them, to the bit."""
    torch.manual_seed(0)
    dtypes = kernel["dtypes"][0]
    integers = dtypes.weight is torch.int8
    rows = _plans.RowQuantizer("symmetric") if kernel["accumulate"] == "int32" else None
    for m, n, k_slices, name, bias in ((3, 83, 1, "gelu", True), (41, 33, 2, "relu", False), (9, 64, 1, "tanh", True)):
        x = torch.randn(m, K).to(dtypes.x)
        w = torch.randint(-9, 9, (n, K), dtype=torch.int8) if integers else torch.randn(n, K).to(dtypes.weight)
        packed = native.pack(w, kernel["layout"], *([torch.rand(n) / K] if integers else []))
        b, plan = torch.randn(n) if bias else None, _plans.Plan(kernel["name"], 2, k_slices)
        bare, kept = torch.empty(m, n), torch.empty(m, n)
        _products.run(packed, plan, _plans.Epilogue(), x, b, bare, rows)
        for dtype in native.FLOATS:
            y, again = torch.empty(m, n, dtype=dtype), torch.empty(m, n, dtype=dtype)
            steps = _plans.Epilogue([(name, ())])
            _products.run(packed, plan, steps, x, b, y, rows)
            _products.run(packed, plan, steps, x, b, again, rows, sums=kept.fill_(torch.nan))
            assert torch.equal(again, y) and torch.equal(kept, bare)
    with pytest.raises(ValueError, match="sums must be a dense fp32"):
        _products.run(packed, plan, _plans.Epilogue(), x, b, bare, rows, sums=kept[1:])


@pytest.mark.parametrize("kernel", kernels(), ids=lambda kernel: kernel["isa"])
def test_outputs_of_every_format(kernel: Kernel) -> None:
    """16-bit outputs are rounded once, after the operand, which may be the output itself."""
    torch.manual_seed(0)
    for dtype in native.FLOATS:
        weight = next(k for k in native.RUNNABLE if k["own"] == "bf16" and k["isa"] == kernel["isa"])
        x, w, b = native.exact_case(weight, M, N, K, weight["dtypes"][0])
        y = torch.randn(M, N).to(dtype)
        expected = (x.float() @ w.float().T + b.float() + y.float()).to(dtype)
        plan, packed = _plans.Plan(weight["name"], 2), native.pack(w, weight["layout"])
        _products.run(packed, plan, _plans.Epilogue([("add", (), 0)]), x, b, y, None, [y])
        assert native.same_bits(y, expected)


@pytest.mark.parametrize("kernel", [native.parameter(k) for k in native.INTEGER if k["runnable"]])
def test_integer_products(kernel: Kernel) -> None:
    """Beside integer sums and integer outputs, and in the second block of rows, an operand is read where it lies."""
    torch.manual_seed(0)
    for m, k in ((M, K), (1200, 4160)):
        x, w = torch.randn(m, k), torch.randint(-128, 128, (N, k), dtype=torch.int8)
        packed, operand = native.pack(w, kernel["layout"], torch.rand(N) / k), torch.randn(m, N)
        rows, plan = _plans.RowQuantizer("symmetric"), _plans.Plan(kernel["name"], 2)
        plain, added = torch.empty(m, N), torch.empty(m, N)
        _products.run(packed, plan, _plans.Epilogue([("relu", ())]), x, None, plain, rows)
        _products.run(packed, plan, _plans.Epilogue([("relu", ()), ("add", (), 0)]), x, None, added, rows, [operand])
        assert torch.equal(added, plain + operand)
        integers = torch.empty(m, N, dtype=torch.uint8)
        out = (torch.uint8, 0.05, 128)
        _products.run(packed, plan, _plans.Epilogue([("add", (), 0)], out), x, None, integers, rows, [operand])
        _products.run(packed, plan, _plans.Epilogue([]), x, None, plain, rows)
        expected = torch.clamp((plain + operand) * torch.tensor(0.05).reciprocal(), -128, 127).round() + 128
        assert torch.equal(integers, expected.to(torch.uint8))


def test_many_operands_in_one_program() -> None:
    """A program of eight steps reads four operands, each in its place and as often as it is named."""
    kernel = kernels()[0]
    operands = [torch.randn(M, N), torch.randn(N), torch.randn(M, 1), torch.randn(())]
    steps = [("add", (), place) for place in (3, 2, 1, 0, 0, 1, 2, 3)]
    y = torch.empty(M, N)
    expected = computed(kernel, steps, operands, y)
    for _, _, place in steps:
        expected = expected + operands[place]
    assert torch.equal(y, expected)


@pytest.mark.parametrize(
    ("operands", "message"),
    [
        ([], "the epilogue names 1 operands, not 0"),
        ([torch.zeros(M, N), torch.zeros(M, N)], "names 1 operands, not 2"),
        ([torch.zeros(M + 1, N)], r"must be \[9, 83\] or broadcast to it, .* not a torch.float32 .*\(10, 83\)"),
        ([torch.zeros(M, 2 * N)[:, ::2]], "unit stride in a row"),
        ([torch.zeros(1, M, N)], "or broadcast to it"),
    ],
)
def test_bad_operands_are_refused(operands: list[Tensor], message: str) -> None:
    """The message says what is allowed and what was given."""
    with pytest.raises(ValueError, match=message):
        computed(kernels()[0], [("add", (), 0)], operands, torch.empty(M, N))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "kernel", [k for k in native.RUNNABLE if k["name"].startswith("int8")], ids=lambda kernel: kernel["name"]
)
def test_integers_meet_operands(kernel: Kernel, form: str) -> None:
    """A residual is added where the sums of integers become numbers: the bits are those of an addition afterwards."""
    torch.manual_seed(0)
    x, w, b = torch.randn(M, K), torch.randint(-127, 128, (N, K), dtype=torch.int8), torch.randn(N)
    packed, plan = native.pack(w, kernel["layout"], torch.rand(N) + 0.5), _plans.Plan(kernel["name"])
    rows = None if kernel["layout"].startswith("w8f") else _plans.RowQuantizer("asymmetric")
    bare, y = torch.full((2, M, N), torch.nan)
    _products.run(packed, plan, _plans.Epilogue(), x, b, bare, rows)
    for dtype in native.FLOATS:
        operand = FORMS[form]().to(dtype)
        for after in ([], [("relu", ())]):
            _products.run(packed, plan, _plans.Epilogue([("add", (), 0), *after]), x, b, y, rows, [operand])
            expected = bare + operand.float()
            assert torch.equal(y, expected.relu() if after else expected)

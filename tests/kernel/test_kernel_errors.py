"""Bad input at the door to C++ is a TypeError or ValueError that says what was given and what is allowed; no crash.

The cases run in forked children, since a tensor without memory that gets through is a SIGSEGV.
"""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import native
import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastlinear._plans import Epilogue, Plan
from fastlinear._products import run
from fastlinear._weights import Packed

KERNEL = next(kernel for kernel in native.RUNNABLE if kernel["own"] == "fp32")
NAME, LAYOUT = KERNEL["name"], KERNEL["layout"]
M, N, K = 5, 37, 10


class Wrapper(Tensor):
    """A subclass without memory of its own, as torchao and DTensor make them."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Wrapper":
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    @classmethod
    def __torch_dispatch__(cls, *_: Any) -> Any:
        raise AssertionError("nothing may be computed with it")


def emptied(shape: tuple[int, ...]) -> Tensor:
    """A tensor whose storage was given back, as FSDP does with the shards it does not need."""
    tensor = torch.ones(shape)
    tensor.untyped_storage().resize_(0)
    return tensor


# Makes something of the right shape that is no dense CPU tensor of one of the formats.
NOT_A_TENSOR: dict[str, Callable[[tuple[int, ...]], Any]] = {
    "None": lambda shape: None,
    "int": lambda shape: 5,
    "list": lambda shape: torch.ones(shape).tolist(),
    "ndarray": lambda shape: np.ones(shape, np.float32),
    "float64": lambda shape: torch.ones(shape, dtype=torch.float64),
    "float8": lambda shape: torch.ones(shape).to(torch.float8_e5m2),
    "int16": lambda shape: torch.ones(shape, dtype=torch.int16),
    "int32": lambda shape: torch.ones(shape, dtype=torch.int32),
    "complex64": lambda shape: torch.ones(shape, dtype=torch.complex64),
    "bool": lambda shape: torch.ones(shape, dtype=torch.bool),
    "meta": lambda shape: torch.ones(shape, device="meta"),
    "sparse_coo": lambda shape: torch.ones(shape).to_sparse(),
    "sparse_csr": lambda shape: torch.ones(shape if len(shape) == 2 else (1, *shape)).to_sparse_csr(),
    "mkldnn": lambda shape: torch.ones(shape).to_mkldnn(),
    "quantized": lambda shape: torch.quantize_per_tensor(torch.ones(shape), 1.0, 0, torch.qint8),
    "nested": lambda shape: torch.nested.nested_tensor([torch.ones(shape)]),
    "zeros without memory": lambda shape: torch._efficientzerotensor(shape),
    "storage given back": emptied,
    "fake": lambda shape: FakeTensorMode().from_tensor(torch.ones(shape)),
    "wrapper subclass": lambda shape: Wrapper(torch.ones(shape)),
}


Refusal = tuple[type[Exception], str, Callable[[], object]]


def refused(refusals: dict[str, Refusal]) -> None:
    """Each of these is, in one child for all."""

    def child(note: native.Note) -> None:
        for case, (kind, pattern, action) in refusals.items():
            note(case)
            with pytest.raises(kind, match=pattern):
                action()

    native.in_child(child)


def product(**changed: Any) -> None:
    """A valid `run`, but for what is changed."""
    ready: dict[str, Any] = {"packed": Packed(torch.ones(N, K), LAYOUT), "plan": Plan(NAME), "epilogue": Epilogue()}
    ready |= {"x": torch.ones(M, K), "bias": torch.ones(N), "out": torch.empty(M, N)}
    ready |= changed
    run(*(ready[name] for name in ("packed", "plan", "epilogue", "x", "bias", "out")))


def test_the_valid_product_is_valid() -> None:
    """Without changes the product of these tests goes through, so that each refusal has the named reason."""
    product()
    product(bias=None)
    product(x=torch.ones(M, K, requires_grad=True))


@pytest.mark.filterwarnings("ignore")  # torch's own, about sparse and nested tensors
@pytest.mark.parametrize("what", ["x", "bias", "out", "weight"])
def test_what_is_no_dense_cpu_tensor_of_a_format(what: str) -> None:
    """Other types, dtypes, devices and layouts, and tensors without memory, in every place."""
    shape = {"x": (M, K), "bias": (N,), "out": (M, N), "weight": (N, K)}[what]

    def give(value: Any) -> None:
        if what == "weight":
            Packed(value, LAYOUT)
        else:
            product(**{what: value})

    integers = "" if what == "bias" else " or int8 or uint8"
    message = f"{what} must be a dense fp32 or bf16 or fp16{integers} CPU tensor, not a"
    given = {name: make(shape) for name, make in NOT_A_TENSOR.items() if (name, what) != ("None", "bias")}
    refused({name: (TypeError, message, partial(give, value)) for name, value in given.items()})


SHAPES: dict[str, tuple[str, Callable[[], Any], str]] = {
    "x with another K": ("x", lambda: torch.ones(M, K + 1), rf"x must be \[M, {K}\].*\({M}, {K + 1}\)"),
    "x of 1 dimension": ("x", lambda: torch.ones(K), rf"x must be \[M, {K}\].*\({K},\)"),
    "x of 3 dimensions": ("x", lambda: torch.ones(1, M, K), rf"x must be \[M, {K}\]"),
    "x of 0 dimensions": ("x", lambda: torch.ones(()), rf"x must be \[M, {K}\]"),
    "x transposed": ("x", lambda: torch.ones(K, M).T, "x must be .* unit stride"),
    "x with steps": ("x", lambda: torch.ones(M, 2 * K)[:, ::2], "x must be .* unit stride"),
    "x expanded along K": ("x", lambda: torch.ones(M, 1).expand(M, K), "x must be .* unit stride"),
    "bias too short": ("bias", lambda: torch.ones(N - 1), rf"bias must be \[{N}\].*\({N - 1},\)"),
    "bias too long": ("bias", lambda: torch.ones(N + 1), rf"bias must be \[{N}\]"),
    "bias of one": ("bias", lambda: torch.ones(1), rf"bias must be \[{N}\]"),
    "bias of 2 dimensions": ("bias", lambda: torch.ones(1, N), rf"bias must be \[{N}\]"),
    "bias expanded": ("bias", lambda: torch.ones(1).expand(N), "bias must be .* unit stride"),
    "out with another M": ("out", lambda: torch.empty(M + 1, N), rf"out must be \[{M}, {N}\].*\({M + 1}, {N}\)"),
    "out with another N": ("out", lambda: torch.empty(M, N - 1), rf"out must be \[{M}, {N}\]"),
    "out of 1 dimension": ("out", lambda: torch.empty(M * N), rf"out must be \[{M}, {N}\]"),
    "out transposed": ("out", lambda: torch.empty(N, M).T, "out must be .* unit stride"),
}


def test_shapes_and_strides_that_do_not_fit() -> None:
    """The message has the shape that is needed and the one that was given."""

    def give(what: str, make: Callable[[], Any]) -> None:
        product(**{what: make()})

    refused({case: (ValueError, pattern, partial(give, what, make)) for case, (what, make, pattern) in SHAPES.items()})


def test_a_weight_has_two_dimensions() -> None:
    """Packed wants [N, K]."""
    refused(
        {
            f"{dims} dimensions": (
                ValueError,
                f"weight must have 2 dimensions, not {dims}",
                lambda dims=dims: Packed(torch.ones((2,) * dims), LAYOUT),
            )
            for dims in (0, 1, 3)
        }
    )


OWN = [kernel for kernel in native.ALL if kernel["id"] == kernel["name"]]


def test_a_kernel_reads_its_layouts_alone() -> None:
    """Every other layout is refused: the message names the kernel, what it reads and what was given."""
    packs = {layout: native.pack(torch.ones(N, K, dtype=dtype), layout) for layout, dtype, *_ in native.LAYOUTS}
    refusals: dict[str, Refusal] = {}
    for kernel in OWN:
        if kernel["runnable"]:
            x = torch.ones(M, K, dtype=kernel["of_x"][0])
            for layout in packs.keys() - kernel["reads"]:
                message = f"{kernel['name']}.*{kernel['layout']}.*{layout}"
                act = partial(product, packed=packs[layout], plan=Plan(kernel["name"]), x=x)
                refusals[f"{layout} for {kernel['name']}"] = (ValueError, message, act)
    refused(refusals)


def test_a_kernel_takes_its_formats_of_x_alone() -> None:
    """16-bit rows where the kernel reads others, or the weight is fp32: the message names kernel, layout and format."""
    refusals: dict[str, Refusal] = {}
    for kernel, dtype in itertools.product(native.RUNNABLE, (*native.FLOATS, torch.int8, torch.uint8)):
        weight = torch.ones(N, K, dtype=native.DTYPES[kernel["format"]])
        x = torch.ones(M, K, dtype=dtype)
        act = partial(product, packed=native.pack(weight, kernel["layout"]), plan=Plan(kernel["name"]), x=x)
        if dtype in kernel["of_x"]:
            act()
        else:
            message = f"{kernel['name']}.*{kernel['layout']}.*x of {dtype}"
            refusals[f"{dtype} for {kernel['id']}"] = (ValueError, message, act)
    refused(refusals)


def test_a_weight_is_of_its_layouts_format() -> None:
    """No layout holds another format: the message names the layout, its format and the weight's."""
    others = [
        (layout, of_layout, dtype)
        for layout, of_layout, *_ in native.LAYOUTS
        for dtype in (*native.FLOATS, torch.int8, torch.uint8)
        if dtype != of_layout
    ]
    refused(
        {
            f"{dtype} in {layout}": (
                TypeError,
                f"{layout}.*{of_layout}.*{dtype}",
                partial(Packed, torch.ones(N, K, dtype=dtype), layout),
            )
            for layout, of_layout, dtype in others
        }
    )


UNKNOWN: dict[str, Refusal] = {
    "layout": (ValueError, f"'fp32/9x9'.*{LAYOUT}", lambda: Packed(torch.ones(N, K), "fp32/9x9")),
    "empty layout": (ValueError, f"''.*{LAYOUT}", lambda: Packed(torch.ones(N, K), "")),
    "no layout": (TypeError, "str", lambda: Packed(torch.ones(N, K), 3)),
    "kernel": (ValueError, f"'fp32/avx9/1x1'.*{NAME}", lambda: Plan("fp32/avx9/1x1")),
    "no kernel": (TypeError, "str", lambda: Plan(3)),
    "None for a kernel": (TypeError, "None", lambda: Plan(None)),
    "no threads": (ValueError, "1 to 4096.*not 0 and 1", lambda: Plan(NAME, 0)),
    "negative threads": (ValueError, "1 to 4096.*not -1 and 1", lambda: Plan(NAME, -1)),
    "no slices": (ValueError, "1 to 4096.*not 1 and 0", lambda: Plan(NAME, 1, 0)),
    "a million slices": (ValueError, "1 to 4096", lambda: Plan(NAME, 1, 10**6)),
    "threads past 2^63": (OverflowError, "", lambda: Plan(NAME, 2**70)),
    "activation": (ValueError, "'swoosh'.*relu", lambda: Epilogue([("swoosh", ())])),
    "activation that is no name": (ValueError, "None.*relu", lambda: Epilogue([(None, ())])),
    "parameters for relu": (ValueError, "'relu' takes 0 parameters, not 1", lambda: Epilogue([("relu", (1.0,))])),
    "too few parameters": (
        ValueError,
        "'hardtanh' takes 2 parameters, not 1",
        lambda: Epilogue([("hardtanh", (1.0,))]),
    ),
    "too many parameters": (
        ValueError,
        "'elu' takes 1 parameters, not 3",
        lambda: Epilogue([("elu", (1.0, 2.0, 3.0))]),
    ),
    "parameter that is no number": (TypeError, "", lambda: Epilogue([("elu", ("steep",))])),
    "nine steps": (ValueError, "at most 8 steps, not 9", lambda: Epilogue([("relu", ())] * 9)),
    "add without an operand": (
        ValueError,
        r"'add' takes an operand, .* 0 to 7, not \(\)",
        lambda: Epilogue([("add", ())]),
    ),
    "a ninth operand": (ValueError, r"'add' takes an operand, .* not \(8,\)", lambda: Epilogue([("add", (), 8)])),
    "an operand for relu": (ValueError, r"'relu' takes no operand, not \(0,\)", lambda: Epilogue([("relu", (), 0)])),
    "steps that are no pairs": (ValueError, "", lambda: Epilogue(["relu"])),
    "None for steps": (TypeError, "None", lambda: Epilogue(None)),
    "None for a pack": (TypeError, "None", lambda: product(packed=None)),
    "None for a plan": (TypeError, "None", lambda: product(plan=None)),
    "None for an epilogue": (TypeError, "None", lambda: product(epilogue=None)),
    "a tensor for a pack": (TypeError, "Packed", lambda: product(packed=torch.ones(N, K))),
    "a name for a plan": (TypeError, "Plan", lambda: product(plan=NAME)),
    "a name for an epilogue": (TypeError, "Epilogue", lambda: product(epilogue="relu")),
}


def test_unknown_names_and_numbers() -> None:
    """Kernels, layouts, activations, counts: what was given, and what there is."""
    refused(UNKNOWN)


def test_a_kernel_of_another_cpu_is_refused() -> None:
    """A row of the table that may not run here cannot be planned."""
    names = [kernel["name"] for kernel in OWN if not kernel["runnable"]]
    refused({name: (ValueError, f"{name}.*runs here", partial(Plan, name)) for name in names})


def test_lazy_negation_is_honored_or_refused() -> None:
    """torch may keep a minus sign beside the memory (z.conj().imag): reading the memory alone would lose it."""
    z = torch.complex(torch.randn(N, K), torch.randn(N, K))
    weight = z.conj().imag
    assert weight.is_neg()
    try:
        assert torch.equal(Packed(weight, LAYOUT).unpack(), -z.imag)
    except TypeError as error:
        assert "weight" in str(error)
    try:
        negated, out = torch._neg_view(torch.ones(M, K)), torch.empty(M, N)
        product(x=negated, out=out, bias=None)
        assert (out == -K).all()
    except TypeError as error:
        assert "x must" in str(error)

"""Bad input at the door to C++ is a TypeError or ValueError that says what was given and what is allowed; no crash.

Every case runs in a forked child, since a tensor without memory that gets through is a SIGSEGV.
"""

from collections.abc import Callable
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


def refused(kind: type[Exception], pattern: str, action: Callable[[], object]) -> None:
    def child(note: native.Note) -> None:
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
@pytest.mark.parametrize("given", NOT_A_TENSOR)
def test_what_is_no_dense_cpu_tensor_of_a_format(given: str, what: str) -> None:
    """Other types, dtypes, devices and layouts, and tensors without memory, in every place."""
    if given == "None" and what == "bias":
        product(bias=None)
        return
    shape = {"x": (M, K), "bias": (N,), "out": (M, N), "weight": (N, K)}[what]
    value = NOT_A_TENSOR[given](shape)
    act = (lambda: Packed(value, LAYOUT)) if what == "weight" else (lambda: product(**{what: value}))
    integers = "" if what == "bias" else " or int8 or uint8"
    refused(TypeError, f"{what} must be a dense fp32 or bf16 or fp16{integers} CPU tensor, not a", act)


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


@pytest.mark.parametrize("case", SHAPES)
def test_shapes_and_strides_that_do_not_fit(case: str) -> None:
    """The message has the shape that is needed and the one that was given."""
    what, make, pattern = SHAPES[case]
    refused(ValueError, pattern, lambda: product(**{what: make()}))


@pytest.mark.parametrize("dims", [0, 1, 3])
def test_a_weight_has_two_dimensions(dims: int) -> None:
    """Packed wants [N, K]."""
    refused(ValueError, f"weight must have 2 dimensions, not {dims}", lambda: Packed(torch.ones((2,) * dims), LAYOUT))


OWN = [kernel for kernel in native.ALL if kernel["id"] == kernel["name"]]


@pytest.mark.parametrize("kernel", [k for k in OWN if k["runnable"]], ids=lambda kernel: kernel["name"])
def test_a_kernel_reads_its_layouts_alone(kernel: native.Kernel) -> None:
    """Every other layout is refused: the message names the kernel, what it reads and what was given."""

    def child(note: native.Note) -> None:
        x = torch.ones(M, K, dtype=kernel["of_x"][0])
        for layout, dtype, *_ in native.LAYOUTS:
            if layout not in kernel["reads"]:
                note(layout)
                packed = native.pack(torch.ones(N, K, dtype=dtype), layout)
                with pytest.raises(ValueError, match=f"{kernel['name']}.*{kernel['layout']}.*{layout}"):
                    product(packed=packed, plan=Plan(kernel["name"]), x=x)

    native.in_child(child)


@pytest.mark.parametrize("kernel", native.RUNNABLE, ids=lambda kernel: kernel["id"])
def test_a_kernel_takes_its_formats_of_x_alone(kernel: native.Kernel) -> None:
    """16-bit rows where the kernel reads others, or the weight is fp32: the message names kernel, layout and format."""
    weight = torch.ones(N, K, dtype=native.DTYPES[kernel["format"]])
    given: dict[str, Any] = {"packed": native.pack(weight, kernel["layout"]), "plan": Plan(kernel["name"])}
    for dtype in (*native.FLOATS, torch.int8, torch.uint8):
        x = torch.ones(M, K, dtype=dtype)
        if dtype in kernel["of_x"]:
            product(**given, x=x)
        else:
            message = f"{kernel['name']}.*{kernel['layout']}.*x of {dtype}"
            refused(ValueError, message, lambda x=x: product(**given, x=x))


def test_a_weight_is_of_its_layouts_format() -> None:
    """No layout holds another format: the message names the layout, its format and the weight's."""
    for layout, of_layout, *_ in native.LAYOUTS:
        for dtype in (*native.FLOATS, torch.int8, torch.uint8):
            if dtype != of_layout:
                weight = torch.ones(N, K, dtype=dtype)
                refused(TypeError, f"{layout}.*{of_layout}.*{dtype}", lambda w=weight, to=layout: Packed(w, to))


UNKNOWN: dict[str, tuple[type[Exception], str, Callable[[], object]]] = {
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


@pytest.mark.parametrize("case", UNKNOWN)
def test_unknown_names_and_numbers(case: str) -> None:
    """Kernels, layouts, activations, counts: what was given, and what there is."""
    refused(*UNKNOWN[case])


@pytest.mark.parametrize("kernel", [k for k in OWN if not k["runnable"]], ids=lambda kernel: kernel["name"])
def test_a_kernel_of_another_cpu_is_refused(kernel: native.Kernel) -> None:
    """A row of the table that may not run here cannot be planned."""
    refused(ValueError, f"{kernel['name']}.*runs here", lambda: Plan(kernel["name"]))


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

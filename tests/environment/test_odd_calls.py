"""Inputs, layers and tools that few use: a fast model answers what the stock one answers, or raises the same."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import OFF
from torch import Tensor, nn
from torch.nn.utils import prune
from transformers.pytorch_utils import Conv1D

import fastlinear
from fastlinear import Int4WeightOnly, Int8Dynamic, Int8Static, Int8WeightOnly
from fastlinear.spec.int8 import signal_to_noise

K, N = 24, 20
SCHEMES: dict[str, Callable[[nn.Module, Tensor], dict[str, Any]]] = {
    "fp32": lambda model, x: {},
    "bf16": lambda model, x: {"dtype": torch.bfloat16},
    "dynamic": lambda model, x: {"quantize": Int8Dynamic()},
    "asymmetric": lambda model, x: {"quantize": Int8Dynamic(asymmetric=True)},
    "weight-only": lambda model, x: {"quantize": Int8WeightOnly()},
    "4 bits": lambda model, x: {"quantize": Int4WeightOnly(16, offsets=True)},
    "static": lambda model, x: {"quantize": Int8Static(fastlinear.calibrate(model, [x]))},
}
every_scheme = pytest.mark.parametrize("scheme", SCHEMES)
frozen_or_not = pytest.mark.parametrize("freeze", [False, True], ids=["held", "frozen"])


def pair(scheme: str, freeze: bool, kind: Callable[[], nn.Module] = lambda: nn.Linear(K, N)) -> tuple[Any, Any]:
    """A stock layer in eval mode and the fast one that was made of a copy."""
    stock: Any = kind().eval()
    with torch.no_grad():
        stock.weight.normal_()
    fast = OFF(copy.deepcopy(stock), freeze=freeze, inplace=True, **SCHEMES[scheme](stock, torch.randn(64, K)))
    return stock, fast


def close(y: Tensor, expected: Tensor) -> bool:
    return y.shape == expected.shape and signal_to_noise(expected.double(), y.double()) > 28


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "coo": Tensor.to_sparse,
    "csr": Tensor.to_sparse_csr,
    "mkldnn": Tensor.to_mkldnn,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@every_scheme
@frozen_or_not
@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_rows_that_are_not_dense(scheme: str, freeze: bool, layout: str) -> None:
    """Sparse rows and those of oneDNN are multiplied in every scheme, quantized as their dense twins are."""
    _, fast = pair(scheme, freeze)
    x = torch.randn(5, K)
    with torch.no_grad():
        y = fast(LAYOUTS[layout](x))
        assert close(y if y.layout is torch.strided else y.to_dense(), fast(x))


@pytest.mark.parametrize(
    "x", [torch.tensor(1.0), torch.randn(3, K - 1), "rows", None], ids=["0-d", "K-1", "str", "None"]
)
@every_scheme
@frozen_or_not
def test_what_is_no_input_raises_as_stock(scheme: str, freeze: bool, x: Any) -> None:
    """What nn.Linear refuses is refused with an error of the same type, with and without gradients."""
    stock, fast = pair(scheme, freeze)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            with pytest.raises(Exception) as expected:
                stock(x)
            with pytest.raises(expected.type):
                fast(x)


def pruned(layer: Any) -> None:
    prune.l1_unstructured(layer, "weight", 0.5)


def pruned_for_good(layer: Any) -> None:
    pruned(layer)
    prune.remove(layer, "weight")


@pytest.mark.parametrize("change", [pruned, pruned_for_good], ids=lambda change: change.__name__)
@frozen_or_not
def test_a_weight_with_another_name(freeze: bool, change: Callable[[Any], object]) -> None:
    """Pruning registers the weight under another name, which thaws a frozen layer first."""
    stock, fast = pair("fp32", freeze)
    x = torch.randn(5, K)
    with torch.no_grad():
        fast(x)
    for layer in (stock, fast):
        change(layer)
    with torch.no_grad():
        assert close(fast(x), stock(x))
    assert dict(fast.named_parameters()).keys() == dict(stock.named_parameters()).keys()


@every_scheme
@frozen_or_not
def test_a_scripted_conv1d(scheme: str, freeze: bool) -> None:
    """GPT-2's Conv1D is scripted, saved and loaded as the stock one is, and takes its argument by the stock name."""
    _, fast = pair(scheme, freeze, lambda: Conv1D(N, K))
    x = torch.randn(5, K)
    with torch.no_grad():
        expected = fast(x)
        assert torch.equal(fast(x=x), expected)
        scripted = torch.jit.script(fast)
        saved = io.BytesIO()
        torch.jit.save(scripted, saved)
        saved.seek(0)
        for script in (scripted, torch.jit.load(saved)):
            assert close(script(x), expected)


@every_scheme
@frozen_or_not
def test_every_state_can_be_shown(scheme: str, freeze: bool) -> None:
    """`repr` and `report` tell of a layer whatever was done to it."""

    def shown(layer: nn.Module) -> None:
        assert "FastLinear(" in repr(layer)
        assert str(fastlinear.report(layer))

    _, fast = pair(scheme, freeze)
    shown(fast)
    with torch.no_grad():
        fast(torch.randn(3, K))
    shown(fast)
    fast.train()(torch.randn(3, K))
    shown(pickle.loads(pickle.dumps(fast)))
    shown(fast.half())
    shown(fast.to("meta"))
    del fast.bias
    shown(fast)

"""FastLinearGroup: several linear layers on one input as one product, and one by one wherever that would be wrong."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlinear
from fastlinear import FastLinearGroup

WIDTHS = (24, 8, 40)


def layers(k: int = 16, bias: bool = True) -> list[nn.Linear]:
    return [nn.Linear(k, n, bias) for n in WIDTHS]


def check(group: FastLinearGroup, stock: list[nn.Linear], x: Tensor, tolerance: float = 1e-5) -> None:
    with torch.no_grad():
        ys, want = group(x), [layer(x) for layer in stock]
    assert isinstance(ys, tuple) and all(y.is_contiguous() and y.dtype is x.dtype for y in ys)
    for y, expected in zip(ys, want, strict=True):
        torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", [(16,), (1, 16), (3, 16), (2, 5, 16), (0, 16), (40, 16)], ids=str)
@pytest.mark.parametrize("bias", [True, False, None])
def test_a_group_is_its_layers(shape: tuple[int, ...], bias: bool | None) -> None:
    """For any number of rows, and with biases on all, some or none, each output is that of its layer."""
    stock = layers(bias=bias is not False)
    if bias is None:
        stock[1].bias = None
    check(FastLinearGroup(stock).eval(), stock, torch.randn(shape))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits(dtype: torch.dtype) -> None:
    """Layers in 16 bits, and those packed in 16 bits under fp32 inputs."""
    stock = layers()
    check(FastLinearGroup(stock, dtype=dtype).eval(), stock, torch.randn(5, 16), 0.02)
    narrow = [layer.to(dtype) for layer in stock]
    check(FastLinearGroup(narrow).eval(), narrow, torch.randn(5, 16).to(dtype), 0.02)


@pytest.mark.parametrize("scheme", [fastlinear.Int8Dynamic(), fastlinear.Int8WeightOnly()], ids=str)
def test_int8_is_that_of_the_layers(scheme: Any) -> None:
    """Quantized together, each output is bit for bit that of the layer quantized alone."""
    stock, x = layers(64), torch.randn(5, 64)
    group = FastLinearGroup(stock, quantize=scheme).eval()
    alone = [fastlinear.FastLinear.from_linear(layer, quantize=scheme).eval() for layer in stock]
    check(group, alone, x, 1e-6)


def test_one_pack_for_all() -> None:
    """The layers are packed together, and not again each for itself."""
    group = FastLinearGroup(layers()).eval()
    check(group, list(group.layers), torch.randn(3, 16))  # type: ignore[arg-type]
    group = FastLinearGroup(layers()).eval()
    with torch.no_grad():
        group(torch.randn(3, 16))
    assert not any(layer.pack_nbytes for layer in group.layers)


def test_training_and_gradients() -> None:
    """Gradients reach the parameters and the input as nn.Linear's do, in training and in eval mode."""
    stock = layers()
    group = FastLinearGroup(copy.deepcopy(stock))
    for mode in (True, False):
        found = []
        for run in (lambda x: [layer(x) for layer in stock], group.train(mode)):
            x = torch.ones(3, 16, requires_grad=True)
            sum(y.square().sum() for y in run(x)).backward()
            found.append(x.grad)
        torch.testing.assert_close(*found)
    for ours, theirs in zip(group.layers, stock, strict=True):
        torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)


def test_changes_are_seen() -> None:
    """An optimizer's step, a state dict, a write through `.data` and a new bias are in the next answer."""
    stock = layers()
    group, x = FastLinearGroup(stock).eval(), torch.randn(3, 16)
    check(group, stock, x)
    with torch.enable_grad():
        sum(y.sum() for y in group(x)).backward()
    torch.optim.SGD(group.parameters(), lr=0.1, fused=True).step()
    check(group, stock, x)
    group.load_state_dict({key: torch.randn_like(t) for key, t in group.state_dict().items()})
    check(group, stock, x)
    stock[2].bias.data.mul_(2)
    check(group, stock, x)
    check(group.double(), stock, x.double())


def test_transforms_come_first() -> None:
    """A group that was never called may be transformed: each layer answers for itself then."""
    stock, x = layers(), torch.randn(3, 16)
    group = FastLinearGroup(stock).eval().requires_grad_(False)
    ys, tangents = torch.func.jvp(group, (x,), (x,))
    for y, tangent, layer in zip(ys, tangents, stock, strict=True):
        torch.testing.assert_close(y, layer(x))
        torch.testing.assert_close(tangent, x @ layer.weight.T)
    check(group, stock, x)


def test_hooks_are_called() -> None:
    """A hook on a layer sees that layer's calls."""
    group, seen = FastLinearGroup(layers()).eval(), []
    group.layers[1].register_forward_hook(lambda m, i, o: seen.append(o))
    with torch.no_grad():
        ys = group(torch.randn(3, 16))
    assert len(seen) == 1 and seen[0] is ys[1]


def test_other_layers_answer() -> None:
    """A layer that takes another's place in the group, is told something else or is released answers as it is now."""
    stock, x = layers(), torch.randn(3, 16)
    group = FastLinearGroup(stock).eval()
    check(group, stock, x)
    stock[0] = nn.Linear(16, 24)
    group.layers[0] = stock[0]
    check(group, stock, x)
    stock = layers()
    group = FastLinearGroup(stock).eval()
    check(group, stock, x)
    fastlinear.unconvert(group)
    check(group, stock, x)


def test_calls_that_somebody_watches() -> None:
    """Hooks on the group, global ones, a forward of one layer, training of one, FASTLINEAR_DISABLE: nothing is missed
    that a module's call does."""
    stock, x, seen = layers(), torch.randn(3, 16), []
    group = FastLinearGroup(stock).eval()
    check(group, stock, x)
    for registers in (group.register_forward_hook, group.layers[1].register_forward_hook):
        handle = registers(lambda m, i, o: seen.append(m))
        check(group, stock, x)
        handle.remove()
    handle = nn.modules.module.register_module_forward_hook(lambda m, i, o: seen.append(m) if m is group else None)
    check(group, stock, x)
    handle.remove()
    assert seen == [group, group.layers[1], group]
    check(group, stock, x)
    assert len(seen) == 3
    group.layers[1].forward = lambda x: x[..., :8] * 0
    with torch.no_grad():
        assert not group(x)[1].any()
    del group.layers[1].forward
    group.layers[1].train()
    check(group, stock, x)


@pytest.mark.parametrize("how", ["copy", "pickle", "freeze", "compile"])
def test_a_group_is_a_module(how: str) -> None:
    """Copied, pickled, frozen or compiled it answers what it did; its state dict is that of its layers."""
    stock, x = layers(), torch.randn(3, 16)
    group = FastLinearGroup(stock).eval()
    check(group, stock, x)
    assert list(group.state_dict()) == [f"layers.{i}.{key}" for i in range(3) for key in ("weight", "bias")]
    if how == "copy":
        group = copy.deepcopy(group)
    elif how == "pickle":
        group = pickle.loads(pickle.dumps(group))
    elif how == "freeze":
        fastlinear.freeze(group)
    else:
        torch._dynamo.reset()
        group = torch.compile(group, backend="eager", fullgraph=True)  # type: ignore[assignment]
    check(group, stock, x)


WRONG = {
    "one": (lambda: layers()[:1], ValueError, "fewer than two"),
    "widths": (lambda: [nn.Linear(8, 4), nn.Linear(16, 4)], ValueError, "they take 8 and 16 features"),
    "dtypes": (lambda: [nn.Linear(8, 4), nn.Linear(8, 4).bfloat16()], ValueError, "they differ in precision"),
    "activation": (lambda: [fastlinear.FastLinear(8, 4, activation="relu"), nn.Linear(8, 4)], ValueError, "relu"),
    "fallback": (
        lambda: [
            fastlinear.FastLinear.from_linear(each, quantize=fastlinear.Int8Dynamic(fallback=True)) for each in layers()
        ],
        ValueError,
        "may fall back",
    ),
    "no linear layer": (lambda: [nn.Linear(8, 4), nn.ReLU()], TypeError, "takes nn.Linear modules, but .* ReLU"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_group(name: str) -> None:
    """Layers that cannot be one product are refused, with the reason."""
    make, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        FastLinearGroup(make())

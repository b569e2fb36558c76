"""convert, unconvert and refresh: layers are swapped there and back, and nothing else about a model changes."""

import copy
import pickle
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import OFF, Model, fast_names, inputs, mlp, same_tensors
from torch import Tensor, nn

import fastlinear
from fastlinear import FastLinear
from fastlinear.layer import linear


@pytest.mark.parametrize("inplace", [False, True])
def test_same_outputs_same_state(inplace: bool) -> None:
    """Outputs agree, and the state dict has the same keys and values before and after convert and the first call."""
    model, x = Model().eval(), inputs()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        expected = model(x)
        fast = OFF(model, inplace=inplace)
        assert same_tensors(fast.state_dict(), state)
        torch.testing.assert_close(fast(x), expected)
    assert same_tensors(fast.state_dict(), state)
    assert len(fast_names(fast)) == 23
    assert (fast is model) == inplace


def test_the_original_is_untouched_and_shares_its_tensors() -> None:
    """convert returns another tree of modules over the very same parameters and buffers."""
    model = Model()
    before, attributes = str(model), [dict(vars(module)) for module in model.modules()]
    fast = OFF(model, exclude="head")
    assert str(model) == before and [dict(vars(module)) for module in model.modules()] == attributes
    assert not {id(module) for module in model.modules()} & {id(module) for module in fast.modules()}
    for mine, theirs in ((model.named_parameters, fast.named_parameters), (model.named_buffers, fast.named_buffers)):
        assert [(name, id(tensor)) for name, tensor in mine()] == [(name, id(tensor)) for name, tensor in theirs()]


def test_a_change_of_a_shared_parameter_is_seen() -> None:
    """An optimizer step on the original moves the converted copy too: its pack is renewed."""
    model, x = mlp(8, 8).eval(), inputs()
    fast = OFF(model)
    with torch.no_grad():
        fast(x)
        model[0].weight.mul_(3)
        torch.testing.assert_close(fast(x), model(x))


def test_state_dicts_load_both_ways() -> None:
    """Stock and converted models load each other's state dicts, strictly."""
    a, b = Model(), Model()
    fast = OFF(a)
    fast.load_state_dict(b.state_dict())
    assert same_tensors(fast.state_dict(), b.state_dict())
    b.load_state_dict(OFF(Model()).state_dict())


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_hold_no_packed_bytes(twin: Callable[[nn.Module], nn.Module]) -> None:
    """Deep copies and pickles of a model that ran work, and carry the weights once."""
    fast, x = OFF(mlp(64, 64, 64)).eval(), torch.randn(5, 64)
    with torch.no_grad():
        expected = fast(x)
        assert fast[0].pack_nbytes > 0
        other = twin(fast)
        assert other[0].pack_nbytes == 0
        torch.testing.assert_close(other(x), expected)
    weights = sum(parameter.nbytes for parameter in fast.parameters())
    assert len(pickle.dumps(fast)) < 1.5 * weights


def test_hooks_stay() -> None:
    """Hooks on a layer run after convert and after unconvert."""
    model, calls = mlp(8, 8).eval(), []
    model[0].register_forward_hook(lambda *_: calls.append("after"))
    model[0].register_forward_pre_hook(lambda *_: calls.append("before"))
    with torch.no_grad():
        fast = OFF(model)
        fast(inputs())
        fastlinear.unconvert(fast)(inputs())
    assert calls == ["before", "after"] * 2


def test_tied_weights_stay_tied() -> None:
    """A Parameter that two modules share stays one, in the state dict under both names."""
    model = nn.ModuleDict({"embed": nn.Embedding(10, 8), "head": nn.Linear(8, 10)})
    model["head"].weight = model["embed"].weight
    fast = OFF(model)
    assert fast["head"].weight is fast["embed"].weight is model["embed"].weight
    assert list(fast.state_dict()) == list(model.state_dict())


def test_shared_modules_are_converted_once() -> None:
    """A layer at two places of the tree stays one layer, with a weight of its own; one excluded name excludes it."""
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, nn.Linear(8, 8))})
    fast = OFF(model)
    assert isinstance(fast["a"], FastLinear) and fast["a"] is fast["b"][0]
    assert type(OFF(model, exclude="b.0")["a"]) is nn.Linear
    assert OFF(model, dtype=torch.bfloat16)["a"].packed_as == "bf16"


class Orthogonal(nn.Linear):
    """What many models have: another beginning, and more attributes."""

    def __init__(self, k: int, n: int, gain: float) -> None:
        super().__init__(k, n)
        self.gain = gain

    def reset_parameters(self) -> None:
        nn.init.orthogonal_(self.weight)
        nn.init.zeros_(self.bias)

    def size(self) -> Tensor:
        return self.gain * self.weight.norm()


@pytest.mark.parametrize("given", [{}, {"freeze": True}, {"quantize": fastlinear.Int8Dynamic()}], ids=str)
def test_a_subclass_that_leaves_forward_to_linear(given: dict[str, Any], tmp_path: Path) -> None:
    """It becomes fast, stays of its class with all that this has, in copies, pickles and files, too, and comes back."""
    model, x = nn.Sequential(Orthogonal(8, 16, 2.0), nn.ReLU(), Orthogonal(16, 3, 0.5)).eval(), inputs()
    fast = OFF(model, **given)
    with torch.inference_mode():
        expected = model(x)
        y = fast(x)
        torch.testing.assert_close(y, expected, rtol=0.05, atol=0.05 if "quantize" in given else 1e-5)
        torch.testing.assert_close(fast[0].size(), model[0].size(), rtol=0.01, atol=0.0)
        assert fast_names(fast) == {"0", "2"} and all(row.decision == "fast" for row in fastlinear.report(fast))
        for again in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), torch.jit.script(fast)):
            assert torch.equal(again(x), y)
            assert isinstance(again, torch.jit.ScriptModule) or (again[2].gain == 0.5 and linear.is_fast(again[2]))
    assert isinstance(fast[0], Orthogonal) and isinstance(fast[0], FastLinear)
    if "freeze" in given:
        fastlinear.save(fast, tmp_path / "file")
        assert fast_names(fastlinear.load(tmp_path / "file", copy.deepcopy(model))) == {"0", "2"}
    assert type(fastlinear.unconvert(fast)[0]) is Orthogonal and str(fast) == str(model)


def test_a_lone_linear_layer() -> None:
    """The model may itself be the layer."""
    layer = nn.Linear(8, 4)
    fast = OFF(layer)
    assert isinstance(fast, FastLinear) and isinstance(fast, nn.Linear) and fast.weight is layer.weight
    assert type(OFF(layer, inplace=True)) is FastLinear and linear.is_fast(layer)


def test_converting_twice_changes_nothing() -> None:
    """A converted model converts to itself, without a warning."""
    fast = OFF(Model())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fast_names(OFF(fast)) == fast_names(fast)


def test_a_model_that_cannot_be_copied() -> None:
    """The error says what to do, and in place it works."""
    model = mlp(8, 8)
    model.lock = sys.stderr  # type: ignore[assignment] # no open file can be copied
    with pytest.raises(TypeError, match=r"Sequential cannot be copied .*inplace=True"):
        OFF(model)
    assert fast_names(OFF(model, inplace=True)) == {"0"}


def test_unconvert_leaves_no_trace() -> None:
    """After unconvert every module has its class and exactly the attributes that it had."""
    model = nn.Sequential(Model(), mlp(8, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
    classes = [type(module) for module in model.modules()]
    attributes = [dict(vars(module)) for module in model.modules()]
    OFF(model, inplace=True, exclude="0.head")
    assert fastlinear.unconvert(model) is model
    assert [type(module) for module in model.modules()] == classes
    assert [dict(vars(module)) for module in model.modules()] == attributes


def test_unconvert_keeps_an_activation_it_cannot_give_back() -> None:
    """A FastLinear with an activation of its own stays, with a warning; one without becomes an nn.Linear."""
    model = nn.Sequential(FastLinear(8, 8, activation="gelu"), FastLinear(8, 8))
    with pytest.warns(UserWarning, match=r"unconvert left '0' fast: its activation 'gelu'"):
        fastlinear.unconvert(model)
    assert fast_names(model) == {"0"} and type(model[1]) is nn.Linear


def test_unconvert_of_a_part() -> None:
    """Unconverting the half of the tree that holds only the activation, or only the layer, keeps the model right."""
    x = inputs()
    with torch.no_grad():
        for part in (0, 1):
            model = nn.Sequential(nn.Sequential(nn.Linear(8, 8)), nn.Sequential(nn.GELU())).eval()
            fast = OFF(model)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                fastlinear.unconvert(fast[part])
            torch.testing.assert_close(fast(x), model(x))


def test_refresh_sees_uncounted_writes() -> None:
    """`.data.copy_` is invisible to torch's own counters; refresh makes the new values count."""
    fast, x = OFF(nn.Linear(8, 8)), inputs()
    with torch.no_grad():
        fast(x)
        fast.weight.data.copy_(torch.eye(8))
        fast.bias.data.zero_()
        assert fastlinear.refresh(fast) is fast
        torch.testing.assert_close(fast(x), x)


def test_adapters_see_a_linear_layer() -> None:
    """What LoRA libraries rely on: isinstance of nn.Linear, its sizes, a readable weight; wrapping first is exact."""

    class Adapter(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            assert isinstance(base, nn.Linear)
            self.base, self.down = base, nn.Linear(base.in_features, 2, dtype=base.weight.dtype)
            self.up = nn.Linear(2, base.out_features)

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + self.up(self.down(x))

    stock, x = mlp(8, 8).eval(), inputs()
    plain = OFF(stock, fuse=False)
    stock[0] = plain[0] = Adapter(stock[0])
    with torch.no_grad():
        torch.testing.assert_close(OFF(stock)(x), stock(x))
        plain[0] = Adapter(OFF(stock[0].base))
        plain[0].load_state_dict(stock[0].state_dict())
        torch.testing.assert_close(plain(x), stock(x))

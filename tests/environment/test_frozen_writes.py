"""What is written to a frozen layer's weight is never lost: the layer takes the memory over, and is frozen no more."""

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate.utils import set_module_tensor_to_device
from models import OFF
from torch import Tensor, nn
from torch.nn.utils import prune
from transformers.pytorch_utils import Conv1D

import fastlinear
from fastlinear.layer import frozen

K, N = 37, 70
DELTA = torch.linspace(-1, 1, N * K).view(N, K)


def twins(bias: bool = True, transposed: bool = False) -> tuple[Any, Any, Tensor]:
    """A stock layer, a frozen one of its own with the same numbers, and an input."""
    stock: Any = (Conv1D(N, K) if transposed else nn.Linear(K, N, bias)).eval().requires_grad_(False)
    return stock, OFF(copy.deepcopy(stock), inplace=True, freeze=True), torch.randn(5, K)


def like(layer: Any) -> Tensor:
    return DELTA.view_as(layer.weight)


def add(layer: Any) -> None:
    layer.weight.data += like(layer)


def multiply(layer: Any) -> None:
    weight = layer.weight
    weight *= 3


def assign(layer: Any) -> None:
    layer.weight.data = layer.weight.data.clone() + like(layer)


def assign_another(layer: Any) -> None:
    layer.weight.data = like(layer) * 2


def set_items(layer: Any) -> None:
    layer.weight[3] = 7.0
    layer.weight.data[:, 2] = -1.0


def through_a_view(layer: Any) -> None:
    layer.weight.view(-1)[5:200].mul_(4)


def through_a_transposed_view_of_data(layer: Any) -> None:
    layer.weight.data.t()[1].fill_(9)


def through_rows(layer: Any) -> None:
    for row in layer.weight:
        row.add_(1)


def unmerge(layer: Any) -> None:
    layer.weight.data += like(layer)
    layer.weight.data -= like(layer) / 2


def held_and_written_later(layer: Any) -> None:
    weight = layer.weight
    layer(torch.randn(5, K))
    weight.mul_(2)
    layer(torch.randn(5, K))
    weight.mul_(2)


def written_after_unfreeze(layer: Any) -> None:
    weight = layer.weight
    if frozen.is_frozen(layer):
        fastlinear.unfreeze(layer)
    weight.mul_(2)


def through_another_handle(layer: Any) -> None:
    first, second = layer.weight, layer.weight
    first.mul_(2)
    second.add_(1)


def data_of_a_written_handle(layer: Any) -> None:
    weight = layer.weight
    weight.mul_(2)
    weight.data = like(layer).clone()


def by_way_of_meta(layer: Any) -> None:
    value = layer.weight.clone() * 2
    set_module_tensor_to_device(layer, "weight", "meta")
    set_module_tensor_to_device(layer, "weight", "cpu", value=value)


INITS = [nn.init.zeros_, nn.init.normal_, nn.init.xavier_uniform_, nn.init.kaiming_uniform_, nn.init.orthogonal_]
WRITES: dict[str, Callable[[Any], object]] = {
    "data +=": add,
    "data = ": assign,
    "data = other": assign_another,
    "*=": multiply,
    "copy_": lambda m: m.weight.copy_(like(m)),
    "data.copy_": lambda m: m.weight.data.copy_(like(m)),
    "detach().copy_": lambda m: m.weight.detach().copy_(like(m)),
    "mul_": lambda m: m.weight.mul_(2),
    "[...] =": set_items,
    "a view": through_a_view,
    "a view of a view of data": through_a_transposed_view_of_data,
    "rows": through_rows,
    "chunks": lambda m: m.weight.chunk(2)[1].zero_(),
    "out=": lambda m: torch.add(m.weight, 1, out=m.weight),
    "foreach": lambda m: torch._foreach_mul_([m.weight], 2),
    "relu_": lambda m: F.relu(m.weight, inplace=True),
    "requires_grad = True": lambda m: (setattr(m.weight, "requires_grad", True), m.weight.data.mul_(2)),
    "set_": lambda m: m.weight.set_(like(m)),
    "a new Parameter": lambda m: setattr(m, "weight", nn.Parameter(like(m))),
    "merge and unmerge": unmerge,
    "later": held_and_written_later,
    "after unfreeze": written_after_unfreeze,
    "an average of the state dict": lambda m: [value.mul_(0.9).add_(0.1) for value in m.state_dict().values()],
    "another handle": through_another_handle,
    "data of a written handle": data_of_a_written_handle,
    "among the parameters": lambda m: m._parameters["weight"].data.mul_(2),
    "accelerate": lambda m: set_module_tensor_to_device(m, "weight", "cpu", value=like(m)),
    "accelerate, by way of meta": by_way_of_meta,
    **{init.__name__: lambda m, init=init: (torch.manual_seed(3), init(m.weight)) for init in INITS},
    **{f"{init.__name__} of data": lambda m, init=init: (torch.manual_seed(3), init(m.weight.data)) for init in INITS},
}


@pytest.mark.parametrize("write", WRITES.values(), ids=list(WRITES))
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
def test_writes_are_taken_over(write: Callable[[Any], object], mode: Any, transposed: bool) -> None:
    """However it is written to, the next call, the next read and the state dict have it, as with the stock layer."""
    stock, fast, x = twins(transposed=transposed)
    with mode():
        write(stock), write(fast)
        for _ in range(2):
            torch.testing.assert_close(fast(x), stock(x))
        torch.testing.assert_close(fast.weight, stock.weight, rtol=0, atol=0)
        torch.testing.assert_close(fast.state_dict()["weight"], stock.state_dict()["weight"], rtol=0, atol=0)
    assert not frozen.is_frozen(fast) and type(fast.weight) is nn.Parameter


@pytest.mark.parametrize("first", [True, False])
def test_swapped_tensors(first: bool) -> None:
    """torch.utils.swap_tensors(a, b) gives the layer the other one's contents, whichever of the two its weight is."""
    _, fast, x = twins()
    other = nn.Parameter(DELTA.clone())
    torch.utils.swap_tensors(*((fast.weight, other) if first else (other, fast.weight)))
    assert not frozen.is_frozen(fast) and type(fast.weight) is nn.Parameter
    torch.testing.assert_close(fast(x), F.linear(x, DELTA, fast.bias))


NORMS: dict[str, Callable[[Any], object]] = {
    "spectral_norm": nn.utils.spectral_norm,
    "spectral_norm, removed": lambda m: nn.utils.remove_spectral_norm(nn.utils.spectral_norm(m)),
    "weight_norm, removed": lambda m: nn.utils.remove_weight_norm(nn.utils.weight_norm(m)),
    "spectral_norm, parametrized": nn.utils.parametrizations.spectral_norm,
    "weight_norm, parametrized": nn.utils.parametrizations.weight_norm,
    "pruned": lambda m: prune.l1_unstructured(m, "weight", 0.5),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("norm", NORMS.values(), ids=list(NORMS))
def test_weights_that_are_computed(norm: Callable[[Any], object]) -> None:
    """What torch makes of a layer whose weight is computed by a hook or parametrization, it makes of a frozen one."""
    stock, fast, x = twins()
    for layer in (stock, fast):
        torch.manual_seed(5)
        norm(layer)
        layer.eval()
    torch.testing.assert_close(fast(x), stock(x))
    assert [name for name, _ in fast.named_parameters()] == [name for name, _ in stock.named_parameters()]


def test_functional_call_leaves_it_frozen() -> None:
    """Parameters that are lent for a call are no change of the layer's."""
    stock, fast, x = twins()
    lent = {"weight": DELTA.clone(), "bias": torch.ones(N)}
    torch.testing.assert_close(torch.func.functional_call(fast, lent, x), torch.func.functional_call(stock, lent, x))
    assert frozen.is_frozen(fast)
    torch.testing.assert_close(fast(x), stock(x))
    assert type(copy.deepcopy(fast)._parameters) is type(fast._parameters)


def test_tied_layers_are_thawed_together() -> None:
    """They hold one Parameter again."""
    stock = nn.Sequential(nn.Linear(K, K), nn.Linear(K, K)).eval()
    stock[1].weight = stock[0].weight
    fast, x = OFF(copy.deepcopy(stock), inplace=True, freeze=True), torch.randn(5, K)
    with torch.no_grad():
        stock[1].weight.mul_(2), fast[1].weight.mul_(2)
        torch.testing.assert_close(fast(x), stock(x))
    assert fast[0].weight is fast[1].weight


READS: dict[str, Callable[[Tensor], object]] = {
    "arithmetic": lambda w: (w + 1).mul_(2),
    "clone": lambda w: w.clone().zero_(),
    "to": lambda w: w.to(torch.float64).zero_(),
    "matmul": lambda w: torch.randn(3, K) @ w.t(),
    "copy from": lambda w: torch.empty(N, K).copy_(w),
    "requires_grad = False": lambda w: setattr(w, "requires_grad", False),
    "grad = None": lambda w: setattr(w, "grad", None),
    "data = data": lambda w: setattr(w, "data", w.data),
    "numpy": lambda w: w.numpy().sum(),
    "repr": repr,
    "set_ of an alias": lambda w: w.data.set_(torch.zeros(K, N)),
    "data of an alias": lambda w: setattr(w.detach(), "data", torch.zeros(K, N)),
    "deepcopy": copy.deepcopy,
    "pickle": lambda w: pickle.loads(pickle.dumps(w)),
    "DLPack": lambda w: torch.from_dlpack(w),
    "a Parameter of a clone": lambda w: nn.Parameter(w.clone()),
    "iteration": lambda w: [float(row.sum()) for row in w],
    "functional": lambda w: F.linear(torch.randn(3, K), w),
}


@pytest.mark.parametrize("read", READS.values(), ids=list(READS))
def test_reads_leave_it_frozen(read: Callable[[Tensor], object]) -> None:
    """Only writes thaw."""
    _, fast, x = twins()
    with torch.no_grad():
        y, weight = fast(x), fast.weight.clone()
        read(fast.weight)
        assert frozen.is_frozen(fast) and torch.equal(fast(x), y) and torch.equal(fast.weight, weight)


def test_numpy_is_read_only() -> None:
    """numpy writes without torch's knowledge, so it may not."""
    _, fast, _ = twins()
    for array in (fast.weight.numpy(), fast.weight.data.detach().numpy()):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


def test_copies_are_plain_tensors() -> None:
    """Clones, deep copies, pickles and what torch.save writes know nothing of frozen layers."""
    _, fast, _ = twins()
    buffer = io.BytesIO()
    torch.save({"w": fast.weight}, buffer)
    buffer.seek(0)
    copies = [fast.weight.clone(), copy.deepcopy(fast.weight), pickle.loads(pickle.dumps(fast.weight))]
    copies += [torch.load(buffer, weights_only=True)["w"], copy.deepcopy(fast.state_dict())["weight"]]
    for each in copies:
        assert type(each) is Tensor and torch.equal(each, fast.weight)
        each.zero_()
    assert frozen.is_frozen(fast) and isinstance(fast.weight, Tensor)


def test_one_memory_at_a_time() -> None:
    """Reads share the memory of one unpacked weight while somebody has it, and it goes with the last of them."""
    _, fast, _ = twins()
    first, second = fast.weight, fast.weight.data[1:]
    assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    del first, second
    assert fast._frozen.lent is None


def test_unfreeze_makes_a_parameter_of_the_memory_that_is_lent() -> None:
    """So that a handle from before writes to the weight, as a stock layer's would."""
    _, fast, _ = twins()
    weight = fast.weight
    fastlinear.unfreeze(fast)
    assert fast.weight.data_ptr() == weight.data_ptr()


def test_peft_merges_and_unmerges() -> None:
    """LoRA's merge into a frozen base layer, safe or not, and the way back."""
    peft = pytest.importorskip("peft")
    for safe in (False, True):
        model = nn.Sequential(nn.Linear(K, N), nn.ReLU(), nn.Linear(N, K)).eval()
        fast, x = OFF(model, fuse=False, freeze=True), torch.randn(5, K)
        config = peft.LoraConfig(target_modules=["0", "2"], init_lora_weights=False)
        lora = peft.get_peft_model(fast, config).eval()
        with torch.no_grad():
            before = lora(x)
            lora.merge_adapter(safe_merge=safe)
            torch.testing.assert_close(lora(x), before)
            lora.unmerge_adapter()
            torch.testing.assert_close(lora(x), before)
            torch.testing.assert_close(lora.merge_and_unload(safe_merge=safe)(x), before)


# ---- frozen models have parameters -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_without_biases_has_a_parameter(dtype: torch.dtype) -> None:
    """next(model.parameters()) tells dtype and device; it has no elements, no gradient, no place in any state dict."""
    model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.SiLU(), nn.Linear(16, 8, bias=False)).eval().to(dtype)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    fast = OFF(model, freeze=True)
    for module in (fast, fast[0], fast[2]):
        parameter = next(module.parameters())
        assert (parameter.device.type, parameter.dtype, parameter.numel()) == ("cpu", dtype, 0)
        assert not parameter.requires_grad
    assert sum(p.numel() for p in fast.parameters()) == 0
    assert list(fast.state_dict()) == list(state)
    assert all(torch.equal(fast.state_dict()[key], value) for key, value in state.items())
    torch.optim.AdamW(fast.parameters(), lr=1.0).step()
    assert not fast.load_state_dict({}, strict=False).unexpected_keys
    assert fast.load_state_dict({}, strict=False).missing_keys == list(state)
    for again in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), fast.to("cpu").requires_grad_(False)):
        assert frozen.is_frozen(again[0]) and list(again.state_dict()) == list(state)
    fast.load_state_dict(state)
    assert [name for name, _ in fast.named_parameters()] == list(state)
    assert [name for name, _ in fastlinear.freeze(fast).double().named_parameters()] == list(state)


def test_files_have_no_placeholders(tmp_path: Path) -> None:
    """A frozen model without biases is saved and loaded, into a stock model and into a frozen one."""
    model, x = nn.Sequential(nn.Linear(8, 16, bias=False), nn.Linear(16, 8, bias=False)).eval(), torch.randn(5, 8)
    fast = OFF(model, freeze=True)
    fastlinear.save(fast, tmp_path / "model.safetensors")
    for empty in (copy.deepcopy(model), copy.deepcopy(fast)):
        loaded = fastlinear.load(tmp_path / "model.safetensors", empty)
        with torch.no_grad():
            assert frozen.is_frozen(loaded[0]) and torch.equal(loaded(x), fast(x))


def test_a_layer_with_a_bias_has_that() -> None:
    """Nothing is added where there is something to ask."""
    _, fast, _ = twins()
    assert [name for name, _ in fast.named_parameters()] == ["bias"]

"""FastLinear is nn.Linear followed by its activation: for every input, mode and change of state torch allows."""

import contextlib
import copy
import functools
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations, parametrize, prune, weight_norm
from transformers.pytorch_utils import Conv1D

import fastlinear
from fastlinear import FastLinear
from fastlinear.layer import fitness, linear
from fastlinear.spec import activations

K, N = 16, 32
KINDS: dict[str, Callable[[int, int], nn.Module]] = {
    "linear": nn.Linear,
    "nobias": functools.partial(nn.Linear, bias=False),
    "conv1d": lambda k, n: Conv1D(n, k),
}
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)
FROZEN = ("frozen linear", "frozen conv1d")
EVERY_STATE = pytest.mark.parametrize("kind", [*KINDS, *FROZEN])


class Stock(nn.Module):
    """What a fast layer stands for: torch's own layer, then torch's own activation."""

    def __init__(self, layer: nn.Module, activation: str) -> None:
        super().__init__()
        self.layer, self.activation = layer, activation

    def forward(self, x: Any) -> Tensor:
        layer = self.layer
        y = F.linear(x, layer.weight.t(), layer.bias) if isinstance(layer, Conv1D) else layer(x)
        return activations.apply(activations.resolve(self.activation), y)


def twins(kind: str = "linear", k: int = K, n: int = N, activation: str = "gelu") -> tuple[nn.Module, Stock]:
    """A fast layer that does not tune, and its stock twin with parameters of its own and equal values."""
    layer = KINDS[kind.split()[-1]](k, n).eval()
    nn.init.normal_(layer.weight.requires_grad_(kind not in FROZEN))
    fast = copy.deepcopy(layer)
    linear.adopt(fast, activations.resolve(activation), "off", "blocks.3.fc1")
    if kind in FROZEN:
        fastlinear.freeze(fast)
    return fast, Stock(layer, activation)


def outcome(call: Callable[[], Tensor]) -> tuple[Tensor | None, type[Exception] | None]:
    try:
        return call(), None
    except (RuntimeError, TypeError, NotImplementedError, IndexError, AttributeError) as error:
        return None, type(error)


def same(fast: nn.Module, stock: nn.Module, x: Any) -> bool:
    """Both return the same tensor of the same kind (True), or raise the same kind of error (False)."""
    expected, error = outcome(lambda: stock(x))
    got, own_error = outcome(lambda: fast(x))
    assert own_error == error
    if expected is None:
        return False
    assert (got.dtype, got.device, got.layout, type(got)) == (
        expected.dtype,
        expected.device,
        expected.layout,
        type(expected),
    )
    assert got.requires_grad == expected.requires_grad and got.is_inference() == expected.is_inference()
    if got.device.type == "meta":
        assert got.shape == expected.shape
    else:
        plain = [list(t.unbind()) if t.is_nested else t.to_dense() for t in (got, expected)]
        # torch rounds 16-bit sums before the activation, too; tests/layer/test_sixteen.py has the bound.
        loose = 4 * torch.finfo(got.dtype).eps if got.dtype.is_floating_point and got.element_size() == 2 else None
        torch.testing.assert_close(*plain, equal_nan=True, rtol=loose, atol=loose)
    return True


# ---- inputs ----------------------------------------------------------------------------------------------------------

NATIVE_INPUTS: dict[str, Callable[[], Tensor]] = {
    "1-D": lambda: torch.randn(K),
    "2-D": lambda: torch.randn(5, K),
    "3-D": lambda: torch.randn(2, 3, K),
    "4-D": lambda: torch.randn(2, 3, 1, K),
    "5-D": lambda: torch.randn(2, 1, 3, 2, K),
    "9-D": lambda: torch.randn(*[1] * 8, K),
    "M=0": lambda: torch.randn(0, K),
    "M=0 in the middle": lambda: torch.randn(3, 0, 2, K),
    "every second row": lambda: torch.randn(10, K)[::2],
    "columns of a wider tensor": lambda: torch.randn(5, 3 * K)[:, K : 2 * K],
    "every second element": lambda: torch.randn(5, 2 * K)[:, ::2],
    "expanded rows": lambda: torch.randn(1, K).expand(5, K),
    "expanded elements": lambda: torch.randn(5, 1).expand(5, K),
    "transposed": lambda: torch.randn(K, 5).t(),
    "permuted batch": lambda: torch.randn(3, 2, K).permute(1, 0, 2),
    "misaligned": lambda: torch.randn(5 * K + 1)[1:].view(5, K),
    "misaligned by a byte": lambda: torch.randn(5 * K + 1).view(torch.uint8)[4:].view(torch.float32).view(5, K),
    "negative view": lambda: torch.randn(5, K, dtype=torch.complex64).conj().imag,
    "real part": lambda: torch.randn(5, K, dtype=torch.complex64).real,
    "zeros without memory": lambda: torch._efficientzerotensor((5, K)),
    "inf and nan": lambda: (
        torch.randn(5, K).index_fill(0, torch.tensor([1]), torch.inf).index_fill(0, torch.tensor([3]), torch.nan)
    ),
    "Parameter": lambda: nn.Parameter(torch.randn(5, K), requires_grad=False),
    "requires grad": lambda: torch.randn(5, K, requires_grad=True),
    "inference tensor": lambda: torch.inference_mode()(torch.randn)(5, K),
}


class Tagged(Tensor):
    """A subclass without behavior of its own, which results inherit."""


OTHER_INPUTS: dict[str, Callable[[], Any]] = {
    "0-D": lambda: torch.randn(()),
    "no elements in a row": lambda: torch.randn(5, 0),
    "too wide": lambda: torch.randn(5, K + 1),
    "flat": lambda: torch.randn(5 * K),
    "fp64": lambda: torch.randn(5, K).double(),
    "bf16": lambda: torch.randn(5, K).bfloat16(),
    "fp16": lambda: torch.randn(5, K).half(),
    "complex": lambda: torch.randn(5, K, dtype=torch.complex64),
    "integers": lambda: torch.ones(5, K, dtype=torch.long),
    "bool": lambda: torch.ones(5, K, dtype=torch.bool),
    "meta": lambda: torch.randn(5, K, device="meta"),
    "sparse": lambda: torch.randn(5, K).to_sparse(),
    "sparse rows": lambda: torch.randn(5, K).to_sparse_csr(),
    "mkldnn": lambda: torch.randn(5, K).to_mkldnn(),
    "quantized": lambda: torch.quantize_per_tensor(torch.randn(5, K), 0.1, 0, torch.qint8),
    "nested, strided": lambda: torch.nested.nested_tensor([torch.randn(2, K), torch.randn(3, K)]),
    "nested": lambda: torch.nested.nested_tensor([torch.randn(2, K), torch.randn(3, K)], layout=torch.jagged),
    "subclass": lambda: torch.randn(5, K).as_subclass(Tagged),
    "list": lambda: [1.0] * K,
    "None": lambda: None,
}


@EVERY_STATE
@pytest.mark.parametrize("name", NATIVE_INPUTS)
def test_inputs(kind: str, name: str) -> None:
    """Any fp32 CPU tensor of the right width gives what nn.Linear gives."""
    fast, stock = twins(kind)
    x = NATIVE_INPUTS[name]()
    with torch.no_grad():
        assert same(fast, stock, x) or name in ("9-D", "zeros without memory")
    same(fast, stock, x)


@EVERY_STATE
@pytest.mark.parametrize("name", OTHER_INPUTS)
@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's own, about sparse, nested and quantized tensors
def test_other_inputs(kind: str, name: str) -> None:
    """What the kernels do not take goes to torch: same result or same kind of error as nn.Linear's."""
    fast, stock = twins(kind)
    with torch.no_grad():
        same(fast, stock, OTHER_INPUTS[name]())


def test_other_dtypes_of_the_layer() -> None:
    """A layer of a dtype that no kernel has is torch's business, all the way."""
    fast, stock = twins()
    with torch.no_grad():
        assert same(fast.double(), stock.double(), torch.randn(5, K, dtype=torch.float64))
        assert not same(fast, stock, torch.randn(5, K))
    assert fast.pack_nbytes == 0


@pytest.mark.parametrize(("k", "n"), [(0, N), (K, 0), (0, 0), (1, 1), (K, 1), (1, N)])
def test_empty_and_thin_layers(k: int, n: int) -> None:
    """in_features or out_features of 0 and 1 work as in nn.Linear."""
    fast, stock = twins(k=max(k, 1), n=max(n, 1))
    for layer in (fast, stock.layer):
        layer.weight = nn.Parameter(layer.weight[:n, :k].detach().clone())
        layer.bias = nn.Parameter(layer.bias[:n].detach().clone())
        layer.in_features, layer.out_features = k, n
    with torch.no_grad():
        assert same(fast, stock, torch.randn(5, k)) and same(fast, stock, torch.randn(0, k))


@EVERY_STATE
@pytest.mark.parametrize("shape", [(5, K + 1), (K - 1,), (2, 3, 1), ()])
@pytest.mark.parametrize("grad", [False, True])
def test_a_wrong_width_is_told_with_the_name(kind: str, shape: tuple[int, ...], grad: bool) -> None:
    """The one error names the layer, its in_features and the shape that was given."""
    fast, _ = twins(kind)
    with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match=r"'blocks\.3\.fc1'.*in_features=16") as told:
        fast(torch.randn(shape))
    assert str(shape) in str(told.value)


def test_conv1d() -> None:
    """The stand-in of these tests for GPT-2's Conv1D is Conv1D."""
    fast, stock = twins("conv1d", activation="relu")
    with torch.no_grad():
        torch.testing.assert_close(fast(torch.ones(2, 3, K)), stock.layer(torch.ones(2, 3, K)).relu())


def test_the_kernels_really_run() -> None:
    """The comparisons of this file are not torch against itself."""
    fast, _ = twins()
    with torch.no_grad():
        fast(torch.randn(5, K))
    (chosen,) = fast.plans
    assert fast.pack_nbytes >= K * N * 4 and (chosen.x, chosen.bucket) == ("fp32", 5)
    assert chosen.name in {row["name"] for row in fastlinear.kernels()}


# ---- modes -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


MODES: dict[str, Callable[[], Any]] = {
    "grad": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast bf16": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast fp16": lambda: torch.autocast("cpu", torch.float16),
    "default dtype fp64": lambda: default_dtype(torch.float64),
    "default device meta": lambda: torch.device("meta"),
    "anomaly detection": lambda: torch.autograd.set_detect_anomaly(True, check_nan=False),
    "forward-mode AD": forward_ad.dual_level,
    "profiler": torch.autograd.profiler.profile,
}


@EVERY_STATE
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_modes(kind: str, mode: str, grad: bool) -> None:
    """Under each mode of torch the layer does what nn.Linear does, packed or not."""
    fast, stock = twins(kind)
    x = torch.randn(2, 3, K)
    for _ in range(2):
        with torch.set_grad_enabled(grad), MODES[mode]():
            assert same(fast, stock, x)


@EVERY_KIND
@pytest.mark.parametrize("training", [False, True])
def test_gradients(kind: str, training: bool) -> None:
    """Gradients of input, weight and bias are nn.Linear's."""
    fast, stock = twins(kind)
    grads = []
    for module, layer in ((fast, fast), (stock, stock.layer)):
        module.train(training)
        x = torch.linspace(-1, 1, 5 * K).view(5, K).requires_grad_()
        module(x).square().sum().backward()
        grads.append([x.grad, *(p.grad for p in layer.parameters())])
    torch.testing.assert_close(*grads)


# ---- changes of state ------------------------------------------------------------------------------------------------


def fresh_state(layer: nn.Module) -> dict[str, Tensor]:
    return {key: torch.linspace(-1, 1, t.numel()).view_as(t) for key, t in layer.state_dict().items()}


def step(layer: nn.Module) -> None:
    with torch.enable_grad():
        sum(p.square().sum() for p in layer.parameters()).backward()
    torch.optim.SGD(layer.parameters(), 0.1).step()


def swap_data(layer: nn.Module) -> None:
    layer.weight.data = fresh_state(layer)["weight"]


def swap_data_and_back(layer: nn.Module) -> None:
    before = layer.weight.data
    swap_data(layer)
    layer(torch.ones(5, K))
    layer.weight.data = before


def made_in_inference_mode(layer: nn.Module) -> None:
    with torch.inference_mode():
        layer.weight = nn.Parameter(fresh_state(layer)["weight"], requires_grad=False)
        layer(torch.ones(5, K))


def to_empty(layer: nn.Module) -> None:
    layer.to_empty(device="cpu").load_state_dict({key: t + 1 for key, t in fresh_state(layer).items()})


def shrink(layer: nn.Module) -> None:
    layer.load_state_dict({key: t[..., : N // 2] for key, t in fresh_state(layer).items()}, assign=True)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def remove_bias(layer: nn.Module) -> None:
    layer.bias = None


def replace_bias(layer: nn.Module) -> None:
    layer.bias = nn.Parameter(torch.linspace(-1, 1, N))


def computed_bias(layer: nn.Module) -> None:
    del layer.bias
    layer.bias = torch.linspace(-1, 1, N)


def computed_weight(layer: nn.Module) -> None:
    weight = layer.weight.detach() * 3
    del layer.weight
    layer.weight = weight


def no_thaw(layer: nn.Module) -> None:
    layer.to("cpu", torch.float32).share_memory().requires_grad_(False).requires_grad_(True)


def pruned(layer: nn.Module) -> None:
    prune.l1_unstructured(layer, "weight", 0.5)


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "to(float64) and back": lambda m: m.double().float(),
    "to(bfloat16) and back": lambda m: m.bfloat16().float(),
    "to(meta) and to_empty": lambda m: to_empty(m.to("meta")),
    "to_empty": to_empty,
    "share_memory": lambda m: m.share_memory(),
    "load_state_dict": lambda m: m.load_state_dict(fresh_state(m)),
    "load_state_dict(assign=True)": lambda m: m.load_state_dict(fresh_state(m), assign=True),
    "optimizer step": step,
    "copy_": lambda m: m.weight.copy_(fresh_state(m)["weight"]),
    "in-place on a view": lambda m: m.weight[0].zero_(),
    "in-place through detach": lambda m: m.weight.detach().mul_(-1),
    ".data = t": swap_data,
    ".data = t and back": swap_data_and_back,
    "set_": lambda m: m.weight.set_(fresh_state(m)["weight"]),
    "a new Parameter": lambda m: setattr(m, "weight", nn.Parameter(fresh_state(m)["weight"])),
    "a transposed Parameter": lambda m: setattr(m, "weight", nn.Parameter(fresh_state(m)["weight"].t().clone().t())),
    "made in inference mode": made_in_inference_mode,
    "requires_grad off": lambda m: m.requires_grad_(False),
    "requires_grad off and on": lambda m: m.requires_grad_(False).requires_grad_(True),
    "to what it is": no_thaw,
    "train": lambda m: m.train(),
    "train and eval": lambda m: m.train().eval(),
    "bias = None": remove_bias,
    "bias replaced": replace_bias,
    "bias changed in place": lambda m: m.bias is None or m.bias.mul_(-1),
    "bias no Parameter": computed_bias,
    "weight no Parameter": computed_weight,
    "parametrized": lambda m: parametrize.register_parametrization(m, "weight", Doubled()),
    "weight_norm": lambda m: parametrizations.weight_norm(m),
    "weight_norm of old": weight_norm,
    "pruned": pruned,
    "module.compile()": lambda m: m.compile(backend="eager"),
}


# These write to the Parameter, which a frozen layer lacks.
WRITES = {"optimizer step", "copy_", "in-place on a view", "in-place through detach", ".data = t", ".data = t and back"}
WRITES |= {"set_", "pruned"}
CASES = [(kind, change) for kind in (*KINDS, *FROZEN) for change in CHANGES if kind in KINDS or change not in WRITES]


@pytest.mark.parametrize(("kind", "change"), CASES)
@pytest.mark.filterwarnings("ignore:.*weight_norm", "ignore:.*lazily|.*__setstate__")
def test_changes_of_state(kind: str, change: str) -> None:
    """A packed layer whose parameters, buffers or settings change is right at the very next call."""
    fast, stock = twins(kind)
    x = torch.randn(5, K)
    with torch.no_grad():
        assert same(fast, stock, x)
        CHANGES[change](fast)
        CHANGES[change](stock.layer)
        assert same(fast, stock, x) and same(fast, stock, x)
    assert same(fast, stock, x)


def write_data(layer: nn.Module) -> None:
    layer.weight.data.copy_(fresh_state(layer)["weight"])


def write_inference_tensor(layer: nn.Module) -> None:
    made_in_inference_mode(layer)
    with torch.inference_mode():
        layer.weight.mul_(-1)


@pytest.mark.parametrize("write", [write_data, write_inference_tensor])
def test_the_blind_spot(write: Callable[[nn.Module], None]) -> None:
    """Torch does not count writes through `.data`, nor those in inference mode; refresh() is the cure."""
    fast, stock = twins()
    x = torch.randn(5, K)
    with torch.no_grad():
        fast(x)
        write(fast), write(stock.layer)
        fastlinear.refresh(fast)
        assert same(fast, stock, x)


def saved_and_loaded(layer: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "torch.save": saved_and_loaded,
}


@EVERY_KIND
@pytest.mark.parametrize("way", COPIES)
def test_copies(kind: str, way: str) -> None:
    """Copies and pickles carry no packed bytes, compute the same, and go their own way afterwards."""
    fast, stock = twins(kind)
    x = torch.randn(5, K)
    size = len(pickle.dumps(fast))
    with torch.no_grad():
        assert same(fast, stock, x)
        assert len(pickle.dumps(fast)) == size
        other = COPIES[way](fast)
        assert type(other) is type(fast) and other.pack_nbytes == 0 and same(other, stock, x)
        other.weight = nn.Parameter(other.weight.detach() * 2)
        stock.layer.weight.mul_(2)
        assert same(other, stock, x)
        assert list(other.state_dict()) == list(stock.layer.state_dict())


def test_tied_weights_share_one_pack() -> None:
    """Layers with one Parameter keep one packed copy between them."""
    fast, _ = twins()
    other, _ = twins(activation="relu")
    other.weight = fast.weight
    with torch.no_grad():
        fast(torch.randn(5, K)), other(torch.randn(5, K))
    assert fast._engine.packed is other._engine.packed


# ---- hooks, subclasses, ways to call ---------------------------------------------------------------------------------

HOOKS: dict[str, Callable[[nn.Module, Callable[..., None]], Any]] = {
    "forward": lambda m, hook: m.register_forward_hook(hook),
    "forward with kwargs": lambda m, hook: m.register_forward_hook(hook, with_kwargs=True),
    "forward, always": lambda m, hook: m.register_forward_hook(hook, always_call=True),
    "pre-forward": lambda m, hook: m.register_forward_pre_hook(hook),
    "backward": lambda m, hook: m.register_full_backward_hook(hook),
    "pre-backward": lambda m, hook: m.register_full_backward_pre_hook(hook),
    "global forward": lambda m, hook: nn.modules.module.register_module_forward_hook(hook),
    "global pre-forward": lambda m, hook: nn.modules.module.register_module_forward_pre_hook(hook),
    "global backward": lambda m, hook: nn.modules.module.register_module_full_backward_hook(hook),
}


@pytest.mark.parametrize("kind_of_hook", HOOKS)
def test_hooks_run(kind_of_hook: str) -> None:
    """Every kind of hook sees a packed layer's calls, as often as it would see nn.Linear's, until it is removed."""
    fast, _ = twins()
    x = torch.randn(5, K, requires_grad=True)
    with torch.no_grad():
        fast(x)
    seen: list[nn.Module] = []
    handle = HOOKS[kind_of_hook](fast, lambda module, *_: seen.append(module))
    if "backward" in kind_of_hook:
        fast(x).sum().backward()
    else:
        with torch.no_grad():
            fast(x)
    handle.remove()
    with torch.no_grad():
        fast(x)
    assert seen == [fast]


def test_hooks_may_change_input_and_output() -> None:
    """What hooks return replaces input and output."""
    fast, stock = twins()
    x = torch.randn(5, K)
    fast.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    fast.register_forward_hook(lambda module, args, y: y + 1)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), stock(2 * x) + 1)


def test_ways_to_call() -> None:
    """A keyword argument, forward() and an unbound forward() are the same call; wrong ones raise TypeError."""
    fast, stock = twins()
    x = torch.randn(5, K)
    with torch.no_grad():
        for y in (fast(input=x), fast.forward(x), type(fast).forward(fast, x), nn.Module.__call__(fast, x)):
            torch.testing.assert_close(y, stock(x))
        for args, kwargs in ((), {}), ((x, x), {}), ((x,), {"input": x}), ((), {"x": x}):
            with pytest.raises(TypeError):
                fast(*args, **kwargs)


def test_a_patched_forward_is_honored() -> None:
    """Libraries that wrap `module.forward` on the instance (accelerate, for one) are called."""
    fast, stock = twins()
    x = torch.randn(5, K)
    with torch.no_grad():
        fast(x)
        inner = fast.forward
        fast.forward = lambda x: inner(x) + 1
        torch.testing.assert_close(fast(x), stock(x) + 1)
        del fast.forward
        assert same(fast, stock, x)


class Shifted(FastLinear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


class Renamed(Shifted):
    pass


@pytest.mark.parametrize("cls", [Shifted, Renamed])
def test_subclasses_keep_their_forward(cls: type[FastLinear]) -> None:
    """A subclass with a forward of its own is called through it, its super().forward() is the fast one."""
    layer = cls(K, N, activation="relu").eval()
    layer._tune = "off"
    x = torch.randn(5, K)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias).relu() + 1)
    assert layer.pack_nbytes > 0


# ---- construction ----------------------------------------------------------------------------------------------------


def test_constructor_is_that_of_linear() -> None:
    """Positions and keywords of nn.Linear, the same initial values from the same seed, and an activation."""
    torch.manual_seed(1)
    stock = nn.Linear(K, N, False, "cpu", torch.float64)
    torch.manual_seed(1)
    fast = FastLinear(K, N, False, "cpu", torch.float64, activation=("leaky_relu", 0.2))
    assert torch.equal(fast.weight, stock.weight) and fast.bias is None
    assert isinstance(fast, nn.Linear) and fast.activation == ("leaky_relu", (0.2,))
    with pytest.raises(ValueError, match="'swoosh' is unknown; allowed are relu, "):
        FastLinear(K, N, activation="swoosh")


def test_from_linear_shares_the_parameters() -> None:
    """The layer that was given stays as it was, down to its hooks."""
    stock = nn.Linear(K, N).eval()
    fast = FastLinear.from_linear(stock, activation="relu")
    assert fast.weight is stock.weight and fast.bias is stock.bias and type(stock) is nn.Linear
    fast.register_forward_hook(lambda *_: None)
    assert not stock._forward_hooks and not fast.training
    with pytest.raises(ValueError, match="neither"):
        FastLinear.from_linear(nn.Bilinear(2, 2, 2))


def test_adopt_and_release() -> None:
    """There and back: same object, class, attributes and outputs."""
    layer = nn.Linear(K, N).eval()
    before, x = dict(vars(layer)), torch.randn(5, K)
    linear.adopt(layer, tune="off")
    assert type(layer) is FastLinear and linear.is_fast(layer)
    with torch.no_grad():
        y = layer(x)
        linear.release(layer)
        torch.testing.assert_close(layer(x), y)
    assert type(layer) is nn.Linear and vars(layer) == before
    with pytest.raises(ValueError, match="tune='later' is unknown; allowed are lazy, off"):
        linear.adopt(layer, tune="later")
    assert type(layer) is nn.Linear


def with_bias_of(dtype: torch.dtype, layer: nn.Module) -> nn.Module:
    layer.bias = nn.Parameter(layer.bias.detach().to(dtype))
    return layer


def sparse(layer: nn.Module) -> nn.Module:
    layer.weight = nn.Parameter(layer.weight.detach().to_sparse())
    return layer


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "another class": (lambda: nn.Bilinear(2, 2, 2), "neither nn.Linear nor transformers' Conv1D"),
    "a subclass": (
        lambda: type("Mine", (nn.Linear,), {"forward": lambda self, x: x})(2, 2),
        "an nn.Linear with a forward of its own",
    ),
    "a subclass of that name": (
        lambda: type("Linear", (nn.Linear,), {"__module__": "theirs", "forward": lambda self, x: x})(2, 2),
        "theirs.Linear is an nn.Linear with a forward of its own",
    ),
    "a subclass that is called otherwise": (
        lambda: type("Mine", (nn.Linear,), {"__call__": lambda self, x: x})(2, 2),
        "with a forward of its own",
    ),
    "a subclass that answers for its attributes": (
        lambda: type(
            "Mine", (nn.Linear,), {"__getattribute__": lambda self, name: object.__getattribute__(self, name)}
        )(2, 2),
        "with a forward of its own",
    ),
    "lazy": (lambda: nn.LazyLinear(2), "its first call makes its parameters"),
    "fp64": (lambda: nn.Linear(2, 2).double(), "torch.float64, not torch.float32"),
    "fp16 bias": (lambda: with_bias_of(torch.float16, nn.Linear(2, 2)), "bias is torch.float16, not torch.float32"),
    "fp64 bias": (lambda: with_bias_of(torch.float64, nn.Linear(2, 2).half()), "as its weight"),
    "sparse": (lambda: sparse(nn.Linear(2, 2)), "torch.sparse_coo, not dense"),
    "meta": (lambda: nn.Linear(2, 2, device="meta"), "on device meta"),
    "weight_norm of old": (lambda: weight_norm(nn.Linear(2, 2)), "computed by a hook"),
    "parametrized": (lambda: parametrizations.weight_norm(nn.Linear(2, 2)), "weight is computed by a hook or parametr"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore:.*weight_norm")
def test_reasons_not_to_convert(name: str) -> None:
    """why_not says in words why a module stays, and adopt refuses it with them."""
    make, words = REFUSED[name]
    module = make()
    assert words in (fitness.why_not(module) or "")
    with pytest.raises(ValueError, match=words):
        linear.adopt(module)


def test_a_weight_of_three_dimensions_is_refused() -> None:
    """Such layers exist (vLLM met one); the reason names the number."""
    layer = nn.Linear(2, 2)
    layer.weight = nn.Parameter(torch.ones(2, 2, 2))
    assert fitness.why_not(layer) == "its weight has 3 dimensions, not 2"


def test_repr_tells_what_runs() -> None:
    """repr shows sizes, activation, and kernel and packed size once there are any."""
    fast, _ = twins()
    assert "activation='gelu', kernel=untuned" in repr(fast)
    with torch.no_grad():
        fast(torch.randn(5, K))
    assert f"kernel={fast.plans[0].name}" in repr(fast) and "MiB" in repr(fast) and "dtype" not in repr(fast)


INTO: dict[str, Callable[[], Tensor]] = {
    "as the answer": lambda: torch.empty(3, 5, N),
    "a part of more": lambda: torch.empty(8, 5, N)[2:5],
    "of wider rows": lambda: torch.empty(3, 5, 2 * N)[..., :N],
    "turned": lambda: torch.empty(5, 3, N).transpose(0, 1),
    "rounded": lambda: torch.empty(3, 5, N, dtype=torch.bfloat16),
}


@EVERY_STATE
@pytest.mark.parametrize("place", INTO)
def test_an_answer_goes_where_it_is_told(kind: str, place: str) -> None:
    """In eval mode, in training, and where torch answers: with the numbers that it has otherwise, and nothing else is
    written."""
    fast, _ = twins(kind)
    x, into = torch.randn(3, 5, K), INTO[place]()
    for training in (False, True):
        fast.train(training)
        with torch.no_grad():
            whole = into if into._base is None else into._base
            whole.fill_(7.0)
            want = fast(x)
            assert fast._engine.forward(fast, x, (), into) is into
            torch.testing.assert_close(into, want.to(into.dtype), rtol=0, atol=0)
            into.fill_(7.0)
            assert bool((whole == 7.0).all())

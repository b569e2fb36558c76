"""Whatever is done to a converted model, in whatever order, it stays what the stock model is after the same."""

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from models import OFF
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import fastlinear

WIDTH = 24
MODELS: dict[str, Callable[[], nn.Module]] = {
    "layers": lambda: nn.Sequential(
        nn.Linear(WIDTH, 40), nn.GELU(), nn.Linear(40, 40, bias=False), nn.Tanh(), nn.Linear(40, WIDTH)
    ),
    "encoder": lambda: nn.Sequential(
        nn.TransformerEncoderLayer(WIDTH, 4, 48, 0.0, "gelu", batch_first=True), nn.SiLU(), nn.Linear(WIDTH, WIDTH)
    ),
}


class Pair:
    """A stock model and a converted one, to both of which the same is done."""

    def __init__(self, model: str) -> None:
        self.stock: Any = MODELS[model]().eval()
        self.fast: Any = OFF(copy.deepcopy(self.stock))
        self.frozen = False
        self.hooked = False

    @property
    def dtype(self) -> torch.dtype:
        return next(self.stock.parameters()).dtype  # type: ignore[no-any-return]

    @property
    def is_plain(self) -> bool:
        return not any(prune.is_pruned(m) or parametrize.is_parametrized(m) for m in self.stock.modules())

    def linears(self, place: int) -> list[Any]:
        """The same layer of both, one whose module is called."""
        names = [name for name, m in self.stock.named_modules() if isinstance(m, nn.Linear) and "out_proj" not in name]
        return [model.get_submodule(names[place % len(names)]) for model in (self.stock, self.fast)]

    def x(self) -> Tensor:
        return torch.randn(2, 5, WIDTH, dtype=self.dtype)

    def compare(self, call: Callable[[Any, Tensor], Tensor] = lambda model, x: model(x)) -> None:
        x = self.x()
        torch.testing.assert_close(call(self.fast, x), call(self.stock, x), rtol=1e-4, atol=1e-4)


def torch_can(function: Callable[..., Any], *args: Any) -> bool:
    """What torch refuses to do to the stock model, by whatever it raises, is not asked of the converted one."""
    try:
        function(*args)
    except Exception:
        return False
    return True


# ---- what is done: each takes a pair and a number, by which it chooses ----


def gradients(pair: Pair, _: int) -> None:
    if pair.frozen:
        return
    x, found = pair.x(), []
    for model in (pair.stock, pair.fast):
        own = x.clone().requires_grad_()
        model(own).square().sum().backward()
        found.append([own.grad, *(parameter.grad for parameter in model.parameters())])
        model.zero_grad()
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-3)


def step(pair: Pair, choice: int) -> None:
    if pair.frozen or not all(parameter.requires_grad for parameter in pair.stock.parameters()):
        return
    x = pair.x()
    kinds: list[dict[str, Any]] = [{"fused": True}, {"foreach": True}, {"momentum": 0.9}]
    kind = kinds[choice % len(kinds)]
    for model in (pair.stock, pair.fast):
        cls: Any = torch.optim.SGD if "momentum" in kind else torch.optim.AdamW
        optimizer = cls(model.parameters(), lr=1e-3, **kind)
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    pair.fast.load_state_dict(pair.stock.state_dict())  # gradients that are nearly 0 take AdamW either way


def load(pair: Pair, choice: int) -> None:
    state = {name: torch.randn_like(t) * 0.2 for name, t in pair.stock.state_dict().items()}
    for model in (pair.stock, pair.fast):
        own = {name: t.clone() for name, t in state.items()}
        model.load_state_dict(own, assign=choice % 2 == 1 and not pair.frozen)
    pair.frozen = False


def deep_copy(pair: Pair, _: int) -> None:
    if torch_can(copy.deepcopy, pair.stock):
        pair.stock, pair.fast = copy.deepcopy(pair.stock), copy.deepcopy(pair.fast)


def pickled(pair: Pair, choice: int) -> None:
    if pair.hooked or not torch_can(pickle.dumps, pair.stock):
        return
    if choice % 2:
        pair.fast = pickle.loads(pickle.dumps(pair.fast))
    else:
        file = io.BytesIO()
        torch.save(pair.fast, file)
        file.seek(0)
        pair.fast = torch.load(file, weights_only=False)


def cast(pair: Pair, choice: int) -> None:
    if not pair.frozen:
        for model in (pair.stock, pair.fast):
            model.to([torch.float64, torch.bfloat16][choice % 2]).to([torch.float32, torch.float64][choice // 2 % 2])


def train(pair: Pair, choice: int) -> None:
    for model in (pair.stock, pair.fast):
        model.train(choice % 2 == 1)


def require(pair: Pair, choice: int) -> None:
    if not pair.frozen:
        for model in (pair.stock, pair.fast):
            model.requires_grad_(choice % 2 == 1)


def replace_weight(pair: Pair, choice: int) -> None:
    layers = pair.linears(choice)
    if pair.frozen or "weight" not in layers[0]._parameters:
        return
    new = torch.randn_like(layers[0].weight.detach()) * 0.2
    for layer in layers:
        with torch.no_grad():
            match choice // 8 % 5:
                case 0:
                    layer.weight = nn.Parameter(new.clone(), layer.weight.requires_grad)
                case 1:
                    layer.weight.data = new.clone()
                case 2:
                    layer.weight.copy_(new)
                case 3:
                    layer.weight.set_(new.clone())
                case 4:
                    layer.weight.mul_(1.25)


def pruned(pair: Pair, choice: int) -> None:
    layers = pair.linears(choice)
    if pair.frozen or not (prune.is_pruned(layers[0]) or "weight" in layers[0]._parameters):
        return
    for layer in layers:
        if prune.is_pruned(layer):
            prune.remove(layer, "weight")
        else:
            prune.l1_unstructured(layer, "weight", 0.3)


def parametrized(pair: Pair, choice: int) -> None:
    layers = pair.linears(choice)
    if pair.frozen or prune.is_pruned(layers[0]):
        return
    for layer in layers:
        if parametrize.is_parametrized(layer):
            parametrize.remove_parametrizations(layer, "weight")
        else:
            parametrizations.weight_norm(layer, "weight")


def hook(pair: Pair, choice: int) -> None:
    pair.hooked = True
    for layer in pair.linears(choice):
        if choice % 2:
            layer.register_forward_hook(lambda _, args, y: y + 0.5)
        else:
            layer.register_forward_pre_hook(lambda _, args: (args[0] * 1.25,))


def freeze(pair: Pair, _: int) -> None:
    if pair.is_plain and pair.dtype is not torch.float64 and not pair.stock.training:
        fastlinear.freeze(pair.fast)
        pair.frozen = True


def unfreeze(pair: Pair, _: int) -> None:
    fastlinear.unfreeze(pair.fast)
    pair.frozen = False


def unconvert(pair: Pair, _: int) -> None:
    fastlinear.unconvert(pair.fast)
    pair.frozen = False
    kinds = [[type(m).__name__ for m in model.modules()] for model in (pair.stock, pair.fast)]
    assert kinds[1] == kinds[0]


def convert(pair: Pair, choice: int) -> None:
    if not pair.frozen and torch_can(copy.deepcopy, pair.stock):
        pair.fast = OFF(pair.fast, inplace=choice % 2 == 1)


def lend(pair: Pair, _: int) -> None:
    """By torch's names."""
    others = {name: 0.5 * p.detach() for name, p in pair.stock.named_parameters()}
    if torch_can(torch.func.functional_call, pair.stock, others, (pair.x(),)):
        pair.compare(lambda model, x: torch.func.functional_call(model, others, (x,)))


def trace(pair: Pair, _: int) -> None:
    if not pair.hooked and not pair.stock.training:
        traced = torch.jit.trace(pair.fast, pair.x(), check_trace=False)
        pair.compare(lambda model, x: traced(x) if model is pair.fast else model(x))


STEPS = {
    function.__name__: function
    for function in (
        gradients, step, load, deep_copy, pickled, cast, train, require, replace_weight, pruned, parametrized, hook,
        freeze, unfreeze, unconvert, convert, lend, trace,
    )
}  # fmt: skip


@pytest.mark.parametrize(
    "sequences", [25, pytest.param(2000, marks=pytest.mark.exhaustive)], ids=["some sequences", "many sequences"]
)
def test_it_stays_what_the_stock_model_is(sequences: int) -> None:
    """Outputs after each step, gradients, and, unconverted, the very classes."""
    few = settings(
        max_examples=sequences,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=[*HealthCheck],
    )
    todo = st.lists(st.tuples(st.sampled_from(sorted(STEPS)), st.integers(0, 63)), min_size=8, max_size=24)

    @few
    @given(st.sampled_from(sorted(MODELS)), todo)
    def run(model: str, steps: list[tuple[str, int]]) -> None:
        torch.manual_seed(0)
        pair = Pair(model)
        for name, choice in steps:
            STEPS[name](pair, choice)
            with torch.no_grad():
                pair.compare()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of nothing to convert, of tracing
        run()

"""The candidates: what a list of equal nn.Linear becomes in each of them, as calls from x to relu(linear(x))."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from timing import Call
from torch import Tensor, nn

import fastlinear
from fastlinear import _engine, planner
from fastlinear.fast_module import pack

OURS = "fastlinear"


def copies(k: int, n: int, count: int) -> list[nn.Linear]:
    """Layers of equal content, each with memory of its own."""
    first = nn.Linear(k, n).eval()
    layers = [first] + [nn.Linear(k, n, device="meta").to_empty(device="cpu").eval() for _ in range(count - 1)]
    for layer in layers[1:]:
        layer.load_state_dict(first.state_dict())
    return layers


def eager(layers: Sequence[nn.Linear], m: int) -> list[Call]:
    """The two modules of a model as it is written."""
    relu = nn.ReLU()

    def call(layer: nn.Linear) -> Call:
        return lambda x: relu(layer(x))

    return [call(layer) for layer in layers]


def mkl(layers: Sequence[nn.Linear], m: int) -> list[Call]:
    """MKL's sgemm on weights packed for this M, as Inductor calls it; relu in place, as the output is its own."""
    reorder, run = torch.ops.mkl._mkl_reorder_linear_weight, torch.ops.mkl._mkl_linear.default

    def call(layer: nn.Linear) -> Call:
        weight, bias, packed = layer.weight.detach(), layer.bias, reorder(layer.weight.detach(), m)
        return lambda x: torch.relu_(run(x, packed, weight, bias, m))

    return [call(layer) for layer in layers]


def onednn(layers: Sequence[nn.Linear], m: int) -> list[Call]:
    """oneDNN's inner product on weights packed for this M, relu fused, as Inductor calls it."""
    reorder, run = torch.ops.mkldnn._reorder_linear_weight, torch.ops.mkldnn._linear_pointwise.default

    def call(layer: nn.Linear) -> Call:
        bias, packed = layer.bias, reorder(layer.weight.detach(), m)
        return lambda x: run(x, packed, bias, "relu", [], "")

    return [call(layer) for layer in layers]


def inductor(layers: Sequence[nn.Linear], m: int) -> list[Call]:
    """torch.compile at its best. Every copy would be compiled for seconds, so only the first is: hot states only."""
    import torch._inductor.config as config

    torch._dynamo.reset()
    config.freezing = True
    return [torch.compile(nn.Sequential(layers[0], nn.ReLU()).eval(), mode="max-autotune", dynamic=False)]


PEERS: dict[str, Callable[[Sequence[nn.Linear], int], list[Call]]] = {
    "nn.Linear": eager,
    **({"mkl": mkl} if torch.backends.mkl.is_available() else {}),
    **({"onednn": onednn} if torch.backends.mkldnn.is_available() else {}),
}


class Fast:
    """The FastLinear of each layer; packed once, tuned once for each M, all copies on the same plan."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self.modules = [fastlinear.FastLinear.from_linear(layer, activation="relu") for layer in layers]

    def tune(self, x: Tensor) -> tuple[planner.Chosen, float]:
        """Lets the first layer choose its plan for x and gives it to the others; the choice, and its milliseconds."""
        first, *others = self.modules
        start = time.perf_counter()
        first(x)
        milliseconds = 1e3 * (time.perf_counter() - start)
        m = _engine.bucket(len(x))
        chosen = first.plans[m]
        problem = planner.Problem(
            m, first.out_features, first.in_features, True, first.activation, False, chosen.threads
        )
        for module in others:
            if not module.pack_nbytes:
                module._engine.take(module.weight, module.weight._version, pack(module.weight))
            module._engine.plan_for(m, chosen.threads, planner.executable(chosen, problem, module.weight.detach()))
        return chosen, milliseconds


def check(calls: dict[str, list[Call]], x: Tensor) -> None:
    """All candidates compute the same; AssertionError naming the one that does not."""
    want = calls["nn.Linear"][0](x)
    for name, of_name in calls.items():
        if not torch.allclose(of_name[-1](x), want, rtol=1e-3, atol=1e-3):  # type: ignore[arg-type]
            raise AssertionError(f"{name} does not compute relu(linear(x)) for x of shape {tuple(x.shape)}")

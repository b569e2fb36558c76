"""The candidates: what a list of equal nn.Linear becomes in each of them, as calls from x to relu(linear(x))."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timing import Call
from torch import Tensor, nn

import fastlinear
from fastlinear import _engine, _kernels, planner
from fastlinear.packs import pack

Makers = dict[str, Callable[[Sequence[nn.Linear], int], list[Call]]]


class Candidate(NamedTuple):
    calls: Sequence[Call]  # one for each copy of the layer
    x: Tensor  # what they are called with


def copies(layer: nn.Linear, count: int, dtype: torch.dtype) -> list[nn.Linear]:
    """Layers of equal content, each with memory of its own."""
    return [copy.deepcopy(layer).to(dtype).eval() for _ in range(count)]


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


PEERS: Makers = {
    "nn.Linear": eager,
    **({"mkl": mkl} if torch.backends.mkl.is_available() else {}),
    **({"onednn": onednn} if torch.backends.mkldnn.is_available() else {}),
}


def willing(dtype: torch.dtype) -> tuple[Makers, dict[str, str]]:
    """The peers that run in this dtype on this CPU, and what the others say to it."""
    makers, refused = {}, {}
    layer, x = nn.Linear(64, 64, dtype=dtype), torch.randn(16, 64).to(dtype)
    for name, make in PEERS.items():
        try:
            with torch.inference_mode():
                make([layer], len(x))[0](x)
        except RuntimeError as error:
            refused[name] = str(error).splitlines()[0]
        else:
            makers[name] = make
    return makers, refused


class Fast:
    """The FastLinear of each layer, for x of its dtype; packed once, tuned once for each M, all on the same plan."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self.modules = [fastlinear.FastLinear.from_linear(layer, activation="relu") for layer in layers]

    def tune(self, x: Tensor) -> tuple[Candidate, planner.Chosen, float]:
        """Lets the first layer choose its plan for x, in the layers' dtype, and gives it to the others; the modules to
        call, the choice, and its milliseconds."""
        first, *others = self.modules
        x = x.to(first.weight.dtype)
        start = time.perf_counter()
        first(x)
        milliseconds = 1e3 * (time.perf_counter() - start)
        m, form = _engine.bucket(len(x)), _kernels.FORMATS[x.dtype]
        (chosen,) = (plan for plan in first.plans if plan.bucket == m)
        problem = planner.Problem(
            m=m,
            n=first.out_features,
            k=first.in_features,
            x=form,
            packed=form,
            held=form,
            accumulate="fp32",
            bias=True,
            activation=first.activation,
            transposed=False,
            threads=chosen.threads,
        )
        for module in others:
            if not module.pack_nbytes:
                module._engine.take(module.weight, module.weight._version, pack(module.weight, x.dtype))
            plan = planner.executable(chosen, problem, module.weight.detach())
            module._engine.plan_for(m, chosen.threads, x.dtype, plan)
        return Candidate(self.modules, x), chosen, milliseconds


def check(candidates: dict[str, Candidate], layer: nn.Linear, x: Tensor) -> None:
    """All candidates compute relu(layer(x)), as it is in fp32; AssertionError naming the one that does not."""
    want = torch.relu(F.linear(x.float(), layer.weight.float(), layer.bias.float()))
    tolerance = 1e-3 + 4 * torch.finfo(x.dtype).eps
    for name, candidate in candidates.items():
        y: Tensor = candidate.calls[-1](candidate.x)  # type: ignore[assignment]
        if not torch.allclose(y.float(), want, rtol=tolerance, atol=tolerance):
            raise AssertionError(f"{name} does not compute relu(linear(x)) for {x.dtype} x of shape {tuple(x.shape)}")

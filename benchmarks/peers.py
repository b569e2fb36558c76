"""The candidates: what a list of equal nn.Linear becomes in each of them, as calls from x to relu(linear(x))."""

from __future__ import annotations

import copy
import functools
import pickle
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol
from unittest import mock

import torch
import torch.nn.functional as F
from timing import Call, Rotation, Sampled
from torch import Tensor, nn

import fastlinear
import fastlinear._plans as _plans
import fastlinear._tensors as _tensors
from fastlinear.plan import decide, measuring
from fastlinear.plan.candidates import Chosen
from fastlinear.spec import grouping, int4
from fastlinear.spec.int8 import quantize_weight
from fastlinear.spec.schemes import Int4Dynamic, Int4WeightOnly, Int8Dynamic, Int8WeightOnly, Scheme

Make = Callable[[Sequence[nn.Linear], int], list[Call]]
Makers = dict[str, Make]


class Contestant(Protocol):
    """What is checked and timed: a Candidate, or a rival in another process (remote.py)."""

    def answer(self) -> Tensor: ...
    def rotation(self, hot: bool) -> Sampled: ...


class Candidate(NamedTuple):
    calls: Sequence[Call]  # one for each copy of the layer
    x: Tensor  # what they are called with

    def answer(self) -> Tensor:
        """Of the last of the calls."""
        y: Tensor = self.calls[-1](self.x)  # type: ignore[assignment]
        return y

    def rotation(self, hot: bool) -> Sampled:
        return Rotation(self.calls[:1] if hot else self.calls, self.x)


def copies(layer: nn.Linear, count: int) -> list[nn.Linear]:
    """Layers of equal content, each with memory of its own."""
    return [copy.deepcopy(layer).eval() for _ in range(count)]


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


def quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 values [N, K], symmetric in each row, and the rows' scales fp32 [N]; FastLinear's own."""
    own = quantize_weight(weight)
    return own.values, own.scale


def coding_of(form: str) -> int4.Coding | None:
    """How weights in groups become codes; None for all others."""
    return SCHEMES[form].coding() if form in SCHEMES else None


@functools.lru_cache(maxsize=2)  # the search for scales takes a second
def coded(layer: nn.Linear, form: str) -> int4.Coded:
    """Its weight in groups, in the codes that FastLinear has, which stand for -8 to 7."""
    coding = coding_of(form)
    assert coding is not None
    return grouping.quantize_weight(layer.weight, coding)


def as_stored(layer: nn.Linear, form: str) -> tuple[Tensor, Tensor]:
    """Its weight as rivals in other processes get it: `quantized`; or, in groups, uint8 codes [N, K] of 8 more than
    what is to be multiplied by the scales fp16 [N, groups]."""
    if coding_of(form) is None:
        return quantized(layer.weight)
    own = coded(layer, form)
    return own.codes, own.scale


def rounded(layer: nn.Linear, form: str) -> nn.Linear:
    """With weights that the format holds exactly, where it has 4 bits: what all make of them is then the same."""
    if (coding := coding_of(form)) is not None:
        layer.weight.data = int4.dequantize(grouping.quantize_weight(layer.weight, coding)).to(layer.weight.dtype)
    return layer


def weight_bytes(form: str) -> float:
    """Of one weight in the packs of a format, with the scale that it shares."""
    coding = coding_of(form)
    return _tensors.PACKED[form].itemsize if coding is None else 0.5 + coding.scales.itemsize / coding.group


def quantize_dynamic(layers: Sequence[nn.Linear], m: int, engine: str) -> list[Call]:
    """The operator in the modules that torch.ao.quantization.quantize_dynamic makes, relu fused, a scale a row."""
    torch.backends.quantized.engine = engine  # is asked when a weight is packed, by nobody else here
    run = torch.ops.quantized.linear_relu_dynamic.default

    def call(layer: nn.Linear) -> Call:
        _, scale = quantized(layer.weight)
        zeros = torch.zeros(len(scale), dtype=torch.int64)
        weight = torch.quantize_per_channel(layer.weight.detach(), scale, zeros, 0, torch.qint8)
        packed = torch.ops.quantized.linear_prepack(weight, layer.bias.detach())
        return lambda x: run(x, packed, engine == "x86")  # x in 7 bits: FBGEMM's sums of two would saturate on AVX2

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that it will part with all this
        return [call(layer) for layer in layers]


def int8pack(layers: Sequence[nn.Linear], m: int) -> list[Call]:
    """ATen's weight-only operator, then bias and relu in place."""
    run = torch.ops.aten._weight_int8pack_mm.default

    def call(layer: nn.Linear) -> Call:
        (weight, scale), bias = quantized(layer.weight), layer.bias
        scale = scale.to(bias.dtype)
        return lambda x: torch.relu_(run(x, weight, scale).add_(bias))

    return [call(layer) for layer in layers]


def int4pack(layers: Sequence[nn.Linear], m: int, form: str) -> list[Call]:
    """ATen's weight-only operator on groups, then bias and relu in place."""
    run, pack = torch.ops.aten._weight_int4pack_mm_for_cpu.default, torch.ops.aten._convert_weight_to_int4pack_for_cpu

    own = coded(layers[0], form)

    def call(layer: nn.Linear) -> Call:
        weight, group, bias = pack(own.codes.int(), 1), own.group, layer.bias.bfloat16()
        scale = own.scale.T.bfloat16()
        scale_and_zero = torch.stack([scale, torch.zeros_like(scale)], -1).contiguous()
        return lambda x: torch.relu_(run(x.bfloat16(), weight, group, scale_and_zero).add_(bias))

    return [call(layer) for layer in layers]


PEERS: Makers = {
    "nn.Linear": eager,
    **({"mkl": mkl} if torch.backends.mkl.is_available() else {}),
    **({"onednn": onednn} if torch.backends.mkldnn.is_available() else {}),
}
QUANTIZED: dict[str, Makers] = {  # by format; others have PEERS
    "int8": {
        "nn.Linear": eager,
        **{
            f"torch_{engine}": functools.partial(quantize_dynamic, engine=engine)
            for engine in ("x86", "onednn")
            if engine in torch.backends.quantized.supported_engines
        },
    },
    "w8f": {"nn.Linear": eager, "int8pack": int8pack},
    **{
        form: {"nn.Linear": eager, "int4pack": functools.partial(int4pack, form=form)}
        for form in ("int4", "int4g128", "int4wo")
    },
}
SCHEMES: dict[str, Scheme] = {  # by format, with the size of its groups where that is another than 32
    "int8": Int8Dynamic(),
    "w8f": Int8WeightOnly(),
    "int4": Int4Dynamic(group=32),
    "int4g128": Int4Dynamic(group=128),
    "int4wo": Int4WeightOnly(group=32),
}


def willing(form: str, dtype: torch.dtype) -> tuple[Makers, dict[str, str]]:
    """The peers that run in this format, x of this dtype, on this CPU; and what is to be said of the others: the words
    of those that refuse, and who computes something else (oneDNN's sums of int8 saturate on AVX2)."""
    layer, x = sample(form, dtype)

    def candidate(make: Make) -> Candidate:
        return Candidate(make([layer], len(x)), x)

    makers, refused = QUANTIZED.get(form, PEERS), {}
    for name, make in makers.items():
        if (why := why_refused(name, functools.partial(candidate, make), form, layer, x)) is not None:
            refused[name] = why
    return {name: make for name, make in makers.items() if name not in refused}, refused


def sample(form: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Linear, Tensor]:
    """A layer of a format and some rows, by which to see who computes it."""
    return rounded(nn.Linear(512, 64, dtype=dtype), form), torch.randn(16, 512).to(dtype)


def why_refused(name: str, make: Callable[[], Contestant], form: str, layer: nn.Linear, x: Tensor) -> str | None:
    """What is to be said of a candidate that refuses a layer or computes something else; None of any other."""
    try:
        with torch.inference_mode():
            check({name: make()}, form, layer, x)
    except (RuntimeError, AssertionError) as error:
        return str(error).splitlines()[0]
    return None


def options(form: str) -> dict[str, Any]:
    """What fastlinear.convert is told, for packed weights of a format; nothing where that is their own."""
    return {"quantize": SCHEMES[form]} if form in SCHEMES else {}


class Fast:
    """The FastLinear of each layer, for x of its dtype; packed once, tuned once for each M, all on the same plan."""

    def __init__(self, layers: Sequence[nn.Linear], form: str) -> None:
        make = fastlinear.FastLinear.from_linear
        self.modules: list[Any]
        if coding_of(form) is not None:  # one search for scales, and packs of their own
            frozen = pickle.dumps(fastlinear.freeze(make(layers[0].eval(), activation="relu", **options(form))))
            self.modules = [pickle.loads(frozen) for _ in layers]
        else:
            self.modules = [make(layer.eval(), activation="relu", **options(form)) for layer in layers]

    def tune(self, x: Tensor) -> tuple[Candidate, Chosen, float]:
        """Lets the first layer choose its plan for x, in the layers' dtype, and gives it to the others; the modules to
        call, the choice, and its milliseconds."""
        first, *others = self.modules
        x = x.to(first.weight.dtype)
        start = time.perf_counter()
        with measuring.process.thorough():
            first(x)
        milliseconds = 1e3 * (time.perf_counter() - start)
        (chosen,) = (plan for plan in first.plans if plan.bucket == _plans.bucket(len(x)))
        with mock.patch.object(decide, "decide", return_value=chosen):
            for module in others:
                module(x)
        return Candidate(self.modules, x), chosen, milliseconds


def check(candidates: Mapping[str, Contestant], form: str, layer: nn.Linear, x: Tensor) -> None:
    """All candidates compute relu(layer(x)), as it is in fp32; AssertionError naming the one that does not.

    In a float format every element has to be right within rounding. Quantizing moves each by a share of the largest:
    there the norm of the error is what may be at most 3 % of that of y."""
    want = torch.relu(F.linear(x.float(), layer.weight.float(), layer.bias.float()))
    tolerance = 1e-3 + 4 * torch.finfo(x.dtype).eps
    for name, candidate in candidates.items():
        y = candidate.answer().float()
        if form in SCHEMES and y.shape == want.shape:
            close = bool((y - want).norm() <= 0.03 * want.norm())
        else:
            close = y.shape == want.shape and torch.allclose(y, want, rtol=tolerance, atol=tolerance)
        if not close:
            raise AssertionError(f"{name} does not compute relu(linear(x)) for {x.dtype} x of shape {tuple(x.shape)}")

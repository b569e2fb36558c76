"""How much of a model runs fast: of its weights, and of the multiply-adds of a call."""

from __future__ import annotations

import functools
import math
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parameter import is_lazy
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import fastlinear._torch as _torch
from fastlinear.layer import experts, experts_frozen, takeover
from fastlinear.layer.fitness import features_of
from fastlinear.layer.frozen import record_of
from fastlinear.model.arguments import call, check_example
from fastlinear.model.convert import stock_copy
from fastlinear.model.selection import linear_layers
from fastlinear.model.tables import Readers

_LARGEST = 3  # of the weights that do not run fast are named


class Share(NamedTuple):
    """weights: elements of all parameters that products may read, which have more than one element in two dimensions or
    more, those of embeddings and of tables that are added and never multiplied by not among them;
    multiply_adds: of one call, None where nobody counted. `slow` are the largest of the weights that do not run fast,
    by name; `uncalled` the layers by whose weights that call multiplied without calling them, which are not fast."""

    weights: int
    fast_weights: int
    slow: tuple[tuple[str, int], ...]
    multiply_adds: int | None = None
    fast_multiply_adds: int | None = None
    uncalled: tuple[str, ...] = ()

    def text(self) -> str:
        parts = [f"fast: {_percent(self.fast_weights, self.weights)} of {_amount(self.weights)} weights"]
        if self.multiply_adds is not None and self.fast_multiply_adds is not None:
            share = _percent(self.fast_multiply_adds, self.multiply_adds)
            parts.append(f"{share} of {_amount(self.multiply_adds)} multiply-adds of the example")
        text = " and ".join(parts)
        rest = ", ".join(f"{name} ({_amount(size)})" for name, size in self.slow)
        return f"{text}; not fast: {rest}" if rest else text

    def to_dict(self) -> dict[str, Any]:
        return {**self._asdict(), "slow": [*map(list, self.slow)], "uncalled": [*self.uncalled]}


class Fast(NamedTuple):
    """What is known of a model before its share is told: names of the layers that run fast, of those among them that
    nobody has called yet, and of parameters that are never multiplied by; the part of attention that runs fast."""

    layers: set[str]
    idle: set[str]
    tables: set[str]
    attended: float = 0.0


def share_of(model: nn.Module, known: Fast, example: Any) -> Share:
    """example: what to count the multiply-adds of."""
    if example is None:
        return _weights(model, known.layers, known.tables)
    total, quick, uncalled, tables = _counted(model, known, example)
    return _weights(model, known.layers - uncalled, known.tables | tables)._replace(
        multiply_adds=total, fast_multiply_adds=quick, uncalled=tuple(sorted(uncalled))
    )


def _weights(model: nn.Module, fast: set[str], tables: set[str]) -> Share:
    looked_up = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))}
    sizes, slow, seen = [0, 0], [], set()
    for layer, names in linear_layers(model).items():
        if takeover.is_foreign(layer):
            seen |= {id(each) for each in layer.parameters()}
            size = math.prod(features_of(layer))
            sizes[False] += size
            slow.append((names[0], size))
            continue
        frozen = record_of(layer)
        held: Any = layer._parameters.get("weight") if frozen is None else frozen
        if held is None or is_lazy(held) or id(held) in seen:
            continue
        seen.add(id(held))
        size = held.numel() if isinstance(held, Tensor) else held.packed.n * held.packed.k
        sizes[names[0] in fast] += size
        slow += [] if names[0] in fast else [(names[0], size)]
    for name, module in model.named_modules():
        for own, count in _of_frozen_experts(module):
            full = f"{name}.{own}" if name else own
            sizes[full in fast] += count
            slow += [] if full in fast else [(full, count)]
        if experts.are_experts(module):
            looked_up |= {id(each) for own, each in module._parameters.items() if own.endswith("_bias")}
    for name, parameter in model.named_parameters():
        if name in tables - fast:
            continue
        if id(parameter) not in seen | looked_up and not is_lazy(parameter) and sum(n > 1 for n in parameter.shape) > 1:
            sizes[name in fast] += parameter.numel()
            slow += [] if name in fast else [(name, parameter.numel())]
    largest = sorted(slow, key=lambda each: -each[1])[:_LARGEST]
    return Share(sum(sizes), sizes[True], tuple(largest))


def _of_frozen_experts(module: Any) -> Iterator[tuple[str, int]]:
    """Names and elements of the weights of frozen experts, which are no parameters any more."""
    if experts_frozen.are_frozen(module):
        for name, (n, k) in zip(module.names, module.shapes, strict=True):
            yield name, module.count * n * k


def _counted(model: nn.Module, known: Fast, example: Any) -> tuple[int, int, set[str], set[str]]:
    """The multiply-adds of a call of a stock copy, in which attention is spelled out, since torch has no count of its
    fused ones on CPUs; those of them that are fast; which of the idle layers are read and not called; and parameters
    that are read and never multiplied by."""
    check_example(example)
    fast, idle = known.layers, known.idle
    stock, counted, called = stock_copy(model), [0], set[str]()
    attention = {name: m for name, m in stock.named_modules() if isinstance(m, nn.MultiheadAttention)}
    for name, module in attention.items():
        ahead = f"{name}." if name else ""  # in a graph the first is no layer
        wanted = [part for part in _PROJECTIONS if {ahead + part, f"{ahead}{part}_weight"} & fast]
        module.register_forward_pre_hook(functools.partial(_count_projections, counted, wanted), with_kwargs=True)
    layers = {
        name: stock.get_submodule(name)
        for name in _of(stock, fast)
        if name.removesuffix("out_proj").rstrip(".") not in attention  # which never calls it
    }
    for name, layer in layers.items():
        layer.forward = functools.partial(_count_rows, counted, called, name, layer, layer.forward)
    for name, module in stock.named_modules():
        if experts.are_experts(module):
            if hasattr(getattr(module, "config", None), "_experts_implementation"):
                module.config._experts_implementation = "eager"  # torch does not count those of a grouped product
            for own, (_, n, k) in zip(experts.names_of(module), experts.sizes_of(module), strict=True):
                if (f"{name}.{own}" if name else own) in fast:
                    module.register_forward_pre_hook(functools.partial(_count_pairs, counted, n * k), with_kwargs=True)
    counter, rest, readers = FlopCounterMode(display=False), _Multiplied(stock, fast, layers), Readers(stock)
    counter.mod_tracker = _Everywhere()  # type: ignore[assignment]
    quick, onednn = torch.backends.mha.get_fastpath_enabled(), _torch.get_mkldnn_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    _torch.set_mkldnn_enabled(False)  # torch does not count its LSTM
    try:
        with torch.no_grad(), warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH), counter, rest, readers:
            warnings.simplefilter("ignore")
            call(stock, example)
    finally:
        torch.backends.mha.set_fastpath_enabled(quick)
        _torch.set_mkldnn_enabled(onednn)
    uncalled = set[str]()
    for names, count in rest.counts.items():
        if called.isdisjoint(names):
            uncalled |= idle & names
            counted[0] += 0 if idle & names else count
    counted[0] += round(known.attended * rest.between)
    total = max(counter.get_total_flops() // 2, counted[0])
    return total, counted[0], uncalled, readers.tables()


class _Everywhere(nullcontext[None]):
    """Instead of torch's tracker of modules, whose hooks no model survives that takes gradients in its forward."""

    parents = ("Global",)


class _Multiplied(_torch.TorchDispatchMode):  # type: ignore[misc]
    """Counts the multiply-adds by weights of fast layers, which may not be called for that, and of no layer, attention
    or mixture, which a graph multiplies by. counts: by the names that a weight has; between: of activations with one
    another, as attention's are."""

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module, fast: set[str], layers: Mapping[str, Any]) -> None:
        super().__init__()
        self.counts = Counter[frozenset[str]]()
        held: dict[int, set[str]] = defaultdict(set)
        for name, layer in layers.items():
            if isinstance(layer, nn.Linear) and type(layer.weight) is nn.Parameter:
                held[layer.weight.untyped_storage().data_ptr()].add(name)
        for own, module in model.named_modules():
            if isinstance(module, nn.MultiheadAttention) or experts.are_experts(module):
                continue
            for name, parameter in module._parameters.items():
                full = f"{own}.{name}" if own else name
                if parameter is not None and full in fast:
                    held[parameter.untyped_storage().data_ptr()].add(full)
        self._storages = {address: frozenset(names) for address, names in held.items()}
        self._weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self.between = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        y = func(*args, **(kwargs or {}))
        formula = flop_registry.get(getattr(func, "overloadpacket", None))
        if formula is not None:
            read = [each.untyped_storage().data_ptr() for each in args if isinstance(each, Tensor)]
            count = formula(*args, **(kwargs or {}), out_val=y) // 2
            for names in filter(None, map(self._storages.get, read)):
                self.counts[names] += count
            if func.overloadpacket in _BETWEEN and self._weights.isdisjoint(read):
                self.between += count
        return y


def _count_rows(
    counted: list[int], called: set[str], name: str, layer: Any, forward: Any, *arguments: Any, **named: Any
) -> Any:
    """A layer's forward, of whose call it takes note."""
    called.add(name)
    x = arguments[0] if arguments else next(iter(named.values()), None)
    if isinstance(x, Tensor):
        counted[0] += x.numel() // max(1, x.shape[-1]) * layer.weight.numel()
    return forward(*arguments, **named)


_BETWEEN = {torch.ops.aten.bmm, torch.ops.aten.baddbmm}  # what products of activations are, in the end

# Of torch's attention, by the rows that they multiply: the last three where keys and values have widths of their own.
_PROJECTIONS = {
    "in_proj": ("query", "key", "value"),
    "out_proj": ("query",),
    "q_proj": ("query",),
    "k_proj": ("key",),
    "v_proj": ("value",),
}


def _count_projections(
    counted: list[int], wanted: list[str], module: Any, arguments: tuple[Any, ...], named: Mapping[str, Any]
) -> None:
    """Adds those of query, key, value and output of torch's attention, which multiplies without calling a layer."""
    given = {**dict(zip(("query", "key", "value"), arguments, strict=False)), **named}
    rows = {name: given[name].numel() // given[name].shape[-1] for name in ("query", "key", "value")}
    widths = {"query": module.embed_dim, "key": module.kdim, "value": module.vdim}
    read = [name for part in wanted for name in _PROJECTIONS[part]]
    counted[0] += sum(rows[name] * widths[name] for name in read) * module.embed_dim


def _count_pairs(
    counted: list[int], work: int, module: Any, arguments: tuple[Any, ...], named: Mapping[str, Any]
) -> None:
    """Adds what an expert does with a row, for each pair of a token and one of its experts."""
    ids = [each for each in (*arguments, *named.values()) if isinstance(each, Tensor) and each.dtype is torch.int64]
    rows = arguments[0] if arguments else next(iter(named.values()))
    counted[0] += work * (ids[0].numel() if ids else rows.numel() // rows.shape[-1])  # where each is handed its own


def _of(model: nn.Module, names: set[str]) -> Iterator[str]:
    known = {name for name, _ in model.named_modules(remove_duplicate=False)}
    return (name for name in sorted(names) if name in known)


def _amount(count: int) -> str:
    """To three digits: "22.7 million"."""
    for size, word in ((10**9, "billion"), (10**6, "million")):
        if count >= size:
            return f"{count / size:.3g} {word}"
    return str(count)


def _percent(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if whole else "0%"

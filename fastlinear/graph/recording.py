"""A graph without Dynamo: what a model calls of torch's, written down while it runs on tensors without numbers.

It is spelled as Dynamo would spell it, in a fraction of the time, since torch's functions are seen, and not each
instruction of Python's. What Dynamo guards is left to the caller: modules, attributes and numbers are those of the
recorded call, but for one size that may be another one in each call, as far as `Size.holds` allows it.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

import fastlinear._torch as _torch
from fastlinear.layer.traced import recorded

_PACKED = {"_frozen", "_pack", "_frozen_experts"}  # attributes of modules that hold packed weights


_DTYPES: dict[type, Any] = {int: torch.int64, float: torch.float64, bool: torch.bool}  # which fx cannot spell


# Held while a recording is made, since torch then says of all threads that they compile.
alone = threading.RLock()


class Unrecorded(Exception):
    """A call that no graph can stand for; the message says why, in a few words."""


class Kept(Unrecorded):
    """The call of a model that keeps a tensor which it has made, as some do in their first call."""


class Fakes:
    """The tensors without numbers of one recording. size: the one that may be another one in each call, or None."""

    def __init__(self, size: int | None) -> None:
        symbolic, fake = (_torch.find(name) for name in ("fx.experimental.symbolic_shapes", "_subclasses"))
        shapes = symbolic.ShapeEnv()
        self.mode = fake.FakeTensorMode(shape_env=shapes, allow_non_fake_inputs=True)
        self.size = None if size is None else Size(shapes, symbolic.DimDynamic.DYNAMIC, size)

    def like(self, tensor: Tensor, dims: Sequence[int] = ()) -> Tensor:
        """A contiguous one of the same shape, with the size in `dims`."""
        shape: list[Any] = list(tensor.shape)
        if self.size is not None:
            for dim in dims:
                shape[dim] = self.size.symint
        with self.mode:
            return torch.empty(shape, dtype=tensor.dtype, device=tensor.device)


class Size:
    """The size that may be another one in each call, and what the recorded call took for granted of it."""

    def __init__(self, shapes: Any, dynamic: Any, value: int) -> None:
        source = _torch.find("_dynamo.source.ConstantSource")("size")
        self.symbol = shapes.create_symbol(value, source, dynamic, None)
        self.symint = shapes.create_symintnode(self.symbol, hint=value, source=source)
        self._guards, self._known = shapes.guards, dict[int, bool]()

    def holds(self, value: int) -> bool:
        """Whether the graph is that of this size, too."""
        known = self._known.get(value)
        if known is None:
            guards = [guard.expr.xreplace({self.symbol: value}) for guard in self._guards]
            known = self._known[value] = value > 1 and all(map(bool, guards))
        return known


class Recording(NamedTuple):
    """module: the graph, which returns a tuple of tensors; inputs: what it was made with, which are those given, the
    size where there is one, and `weights`, in this order."""

    module: fx.GraphModule
    inputs: list[Any]
    weights: list[Tensor]


def record(
    function: Callable[[], Sequence[Tensor]], given: Mapping[str, Tensor], fakes: Fakes, sources: Mapping[int, str]
) -> Recording:
    """The graph of function(), which makes its tensors of `given`, fakes by name.

    sources: what Dynamo would call each other tensor that may be read, by its id. Raises Unrecorded, and whatever the
    function raises because numbers are missing.
    """
    graph = fx.Graph()
    recorder = _Recorder(graph, given, fakes.size, sources)
    # Without it some ops take no unknown size.
    plainly = _torch.find("_dispatch.python.enable_python_dispatcher") or nullcontext
    with alone, plainly(), fakes.mode, recorded(), _torch.compile_session(), recorder:
        outputs = function()
    graph.output(tuple(map(recorder.node_of, outputs)))
    graph.erase_node(recorder.begin)
    inputs = [node.meta["example_value"] for node in graph.nodes if node.op == "placeholder"]
    return Recording(fx.GraphModule(nn.Module(), graph), inputs, recorder.weights)


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Takes tensors without numbers from the modules of a model again, and raises Kept where there are any."""
    tables = [(name, table) for name, module in model.named_modules() for table in (vars(module), module._buffers)]
    before = [dict(table) for _, table in tables]
    kept: list[str] = []
    try:
        yield
    finally:
        for (name, table), known in zip(tables, before, strict=True):
            for key in [key for key, value in table.items() if isinstance(value, _torch.FakeTensor)]:
                kept.append(f"{name}.{key}")
                del table[key]
                table.update({key: known[key]} if key in known else {})
    if kept:
        raise Kept(f"it keeps a tensor of the call as {kept[0]}")


def sources_of(model: nn.Module) -> dict[int, str]:
    """What Dynamo calls the tensors that the modules of a model hold, packed ones included, by their ids."""
    found: dict[int, str] = {}
    for name, module in model.named_modules():
        place = "L['self']" + "".join(f"._modules['{part}']" for part in name.split(".") if part)
        for table in ("_parameters", "_buffers"):
            held = vars(module)[table].items()
            found |= {id(tensor): f"{place}.{table}['{key}']" for key, tensor in held if tensor is not None}
        found |= {id(each): f"{place}.{key}" for key, each in vars(module).items() if type(each) is Tensor}
        for key in _PACKED & vars(module).keys():
            value = vars(module)[key]
            for pack in value if isinstance(value, tuple) else (value,):
                for what in ("panels", "smooth"):
                    found[id(getattr(pack, what, None))] = f"{place}.{key}.{what}"
    found.pop(id(None), None)
    return found


class _Recorder(TorchFunctionMode):
    def __init__(self, graph: fx.Graph, given: Mapping[str, Tensor], size: Size | None, sources: Mapping[int, str]):
        super().__init__()
        self.graph, self.size, self.sources = graph, size, sources
        self.nodes: dict[int, fx.Node] = {}
        self.seen: list[Tensor] = []  # whose ids are taken for as long as they live
        self.weights: list[Tensor] = []
        for name, tensor in given.items():
            self._know(tensor, self._input(f"L[{name!r}]", tensor))
        self.length = None if size is None else self._input("", size.symint)
        self.begin = graph.call_function(_nothing)  # before which weights are put as they come

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = str(getattr(function, "__name__", ""))
        if name == "to" and _is_given(args[0], (*args[1:], *kwargs.values())):
            return args[0]  # as torch does, but not on tensors without numbers in inference mode
        value = function(*args, **kwargs)
        writes = (name.endswith("_") and not name.endswith("__")) or name.startswith("__i") or name == "__setitem__"
        idle = any(value is each for each in args)  # x.contiguous(), which returned x
        if writes or (_has_tensor(value) and not idle):
            kind, target, more = _spelling(function, name)
            node = self.graph.create_node(kind, target, (*self._of(args), *more), self._of(kwargs))
            self._made(node, value)
        return value

    def node_of(self, tensor: Tensor) -> fx.Node:
        node = self.nodes.get(id(tensor))
        if node is None:
            source = self.sources.get(id(tensor))
            if source is None:
                raise Unrecorded(f"it reads a tensor {list(tensor.shape)} that is no input, parameter or buffer")
            with self.graph.inserting_before(self.begin):
                node = self._input(source, tensor)
            self._know(tensor, node)
            self.weights.append(tensor)
        return node

    def _made(self, node: fx.Node, value: Any) -> None:
        node.meta["example_value"] = value
        if isinstance(value, Tensor):
            if id(value) not in self.nodes:  # what is written to is known as what it was
                self._know(value, node)
        elif isinstance(value, (tuple, list)):
            for i, each in enumerate(value):
                if _has_tensor(each):
                    self._made(self.graph.call_function(operator.getitem, (node, i)), each)

    def _know(self, tensor: Tensor, node: fx.Node) -> None:
        self.nodes[id(tensor)] = node
        self.seen.append(tensor)

    def _input(self, source: str, value: Any) -> fx.Node:
        node = self.graph.placeholder(f"given_{len(self.graph.nodes)}")
        node.meta.update(example_value=value, grapharg=SimpleNamespace(source=SimpleNamespace(name=source)))
        return node

    def _of(self, value: Any) -> Any:
        """An argument, with the nodes of the tensors and sizes in it."""
        if isinstance(value, Tensor):
            return self.node_of(value)
        if isinstance(value, torch.SymInt):
            return self._sized(value)
        if isinstance(value, (tuple, list)):
            return (list if isinstance(value, list) else tuple)(map(self._of, value))
        if isinstance(value, dict):
            return {name: self._of(each) for name, each in value.items()}
        if isinstance(value, slice):
            return slice(*map(self._of, (value.start, value.stop, value.step)))
        if isinstance(value, (torch.SymFloat, torch.SymBool)):
            raise Unrecorded("its numbers decide what it does")
        return _DTYPES.get(value, value) if isinstance(value, type) else value

    def _sized(self, value: torch.SymInt) -> Any:
        expr = value.node.expr
        if expr.is_number:
            return int(expr)
        if self.size is None or self.length is None or expr.free_symbols != {self.size.symbol}:
            raise Unrecorded(f"numbers decide a size in it, {expr}")
        if expr == self.size.symbol:
            return self.length
        node = self.graph.call_function(_computed(expr, self.size.symbol), (self.length,))
        node.meta["example_value"] = value
        return node


def _computed(expr: Any, symbol: Any) -> Callable[[int], int]:
    def computed(size: int) -> int:
        return int(expr.xreplace({symbol: size}))

    return computed


def _nothing() -> None:
    """Stands in a graph that is being made."""


def _has_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, (tuple, list)) and any(map(_has_tensor, value)))


def _is_given(x: Tensor, wanted: Sequence[Any]) -> bool:
    """Whether a tensor is of these devices and dtypes."""
    return all(each in (x.device, str(x.device), x.dtype) for each in wanted)


def _spelling(function: Any, name: str) -> tuple[str, Any, tuple[Any, ...]]:
    """Kind and target of the node that calls a function, and the arguments that it has beside those of the function."""
    if name == "__get__":  # x.mT
        return "call_function", getattr, (function.__self__.__name__,)
    if not str(getattr(function, "__qualname__", "")).startswith(("Tensor.", "TensorBase.", "_TensorBase.")):
        return "call_function", function, ()
    spelled = getattr(operator, name, None) if name.startswith("__") else None  # x[0], x & y
    return ("call_method", name, ()) if spelled is None else ("call_function", spelled, ())

"""What a converted linear layer may absorb: the activation that is applied to its output and to nothing else.

Two things prove that an activation follows a linear layer: nn.Sequential, and the source of a module's own methods,
which says `self.act(self.fc(x))`, or `x = self.fc(x)` followed by `x = self.act(x)`. Reading the source finds the MLPs
of transformers' models, and of the user's, without a list of class names that ages with each release.

What convert finds is where it is worth while. Models change: layers are replaced, wrapped, sliced, called alone. So the
proof is made anew in each call (_calls.pyx), and where it fails the layer leaves its activation to the marker.
"""

from __future__ import annotations

import ast
import dis
import functools
import inspect
import itertools
import weakref
from collections import Counter, defaultdict
from collections.abc import Container, Iterator
from types import CodeType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastlinear._calls as _calls
from fastlinear.layer import linear
from fastlinear.layer.takeover import is_foreign
from fastlinear.spec import activations
from fastlinear.spec.activations import Activation, has_hooks, recognize

# Reading these of a layer says nothing about its output: nn.TransformerEncoderLayer reads linear1.weight, T5 wo.weight.
_HARMLESS = {"weight", "bias", "in_features", "out_features"}


class Pair(NamedTuple):
    """A linear layer, where it stands, and the slot (attribute name) of `holder` with the activation of its output."""

    linear: nn.Module
    holder: nn.Module
    slot: str
    activation: Activation


_GLOBAL_HOOKS = [getattr(nn.modules.module, "_global" + hooks) for hooks in activations.HOOKS]


@_calls.redeeming
class Absorbed(nn.Module):
    """Stands where an activation stood that a linear layer may apply for it, and is that activation to all others.

    `original` is that activation (a module or a function), and `linear` the layer, None if there is none any more. The
    layer applies the activation where its call proves that the output goes here and nowhere else, and hands that output
    over; what was not handed over gets the original. Neither is registered as a submodule, so they change no state dict
    and are not visited twice. The layer holds its marker, not the marker its layer: no cycle keeps a model alive.
    Attributes of the original are had, and set, here too.
    """

    original: Any
    __jit_unused_properties__ = ["linear"]

    def __init__(self, original: Any) -> None:
        super().__init__()
        known = {"_settings": _settings(original), "_code": getattr(type(original), "forward", None)}
        vars(self).update(original=original, **known, _tickets=_calls.Tickets(), _linear=None)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        is_function = not isinstance(self.original, nn.Module)
        # A function knows of more arguments; global hooks are to see the original once, and no marker.
        direct = (is_function or any(_GLOBAL_HOOKS)) and not has_hooks(self)
        if direct or (is_function and (kwargs or len(args) != 1)):
            return self.original(*args, **kwargs)
        return super().__call__(*args, **kwargs)

    def forward(self, input: Tensor) -> Tensor:
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            y: Tensor = torch.ops.fastlinear.activation(input, self._name, self._params)
        else:
            y = self._apply_original(input)
        return y

    def _apply_original(self, input: Tensor) -> Tensor:
        activation = None if isinstance(input, Tensor) else recognize(self.original)
        if activation is not None:  # FX refuses modules that are no submodules
            return activations.apply(activation, input)
        # Whoever has patched nn.Module.__call__ has had this call.
        whole = not isinstance(self.original, nn.Module) or has_hooks(self.original)
        y: Tensor = self.original(input) if whole else self.original.forward(input)
        return y

    def __prepare_scriptable__(self) -> Absorbed:
        """Gives torch.jit.script what `forward` asks for in a script."""
        activation = recognize(self.original)
        if activation is None:
            raise RuntimeError(f"torch.jit.script cannot have {self.extra_repr()}, which has a hook or another forward")
        vars(self).update(_name=activation.name, _params=torch.jit.Attribute(list(activation.params), list[float]))
        return self

    @property
    def linear(self) -> nn.Module | None:
        layer: nn.Module | None = self._linear and self._linear()
        return layer if layer is not None and vars(layer).get("_absorbed") is self else None

    def tickets_of(self, layer: nn.Module) -> _calls.Tickets:
        """Makes `layer` the one whose activation this is; what it hands over it adds to the result."""
        if self.linear is None:  # a shallow copy of the layer has its marker too
            vars(self)["_linear"] = weakref.ref(layer)
        tickets: _calls.Tickets = self._tickets
        return tickets

    def __getattr__(self, name: str) -> Any:
        original = vars(self).get("original")
        if name in _settings(original):
            return getattr(original, name)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        original = vars(self).get("original")
        if name in _settings(original):
            setattr(original, name, value)  # which the layer notices
        else:
            super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        return {
            **vars(self),
            "_tickets": _calls.Tickets(),
            "_linear": None,
            "_params": None,
            "_code": None,
        }  # the layer brings itself

    def __setstate__(self, state: dict[str, Any]) -> None:
        layer = state.pop("linear", None)  # up to version 0.1 the marker held its layer, and that not its marker
        fresh: dict[str, Any] = {
            "_settings": _settings(state["original"]),
            "_tickets": _calls.Tickets(),
            "_linear": None,
        }
        code = getattr(type(state["original"]), "forward", None)
        super().__setstate__({**fresh, **state, "_tickets": _calls.Tickets(), "_code": code})  # type: ignore[no-untyped-call]
        if layer is not None:
            vars(layer)["_absorbed"] = self

    def extra_repr(self) -> str:
        return repr(self.original) if isinstance(self.original, nn.Module) else str(self.original.__name__)


Absorbed.__annotations__ = {"training": bool}  # the others are strings, which TorchScript does not understand
Absorbed.forward.__annotations__ = {}


def _settings(original: Any) -> dict[str, Any]:
    """The parameters of an activation that is a module: nn.LeakyReLU's negative_slope, say."""
    if not isinstance(original, nn.Module):
        return {}
    return {key: value for key, value in vars(original).items() if not key.startswith("_") and key != "training"}


def find_pairs(model: nn.Module, linears: Container[nn.Module]) -> list[Pair]:
    """The activations in `model` that the layers among `linears` may absorb.

    A layer that stands at two places of the model, or that has hooks (they must see its output as it was), absorbs
    nothing.
    """
    single = single_places(model)
    absorbing = {child for child in single if child in linears and not _is_watched(child)}
    found: dict[tuple[nn.Module, str], Pair] = {}
    for module in model.modules():
        for layer, holder, slot in (*_in_sequence(module, single), *_in_source(module, absorbing)):
            activation = recognize(_held(holder, slot))
            if layer in absorbing and activation is not None:
                found[holder, slot] = Pair(layer, holder, slot, activation)
    return list(found.values())


def _is_watched(layer: nn.Module) -> bool:
    """Whether somebody else is to see what a layer answers. A forward that another package gave it goes with what that
    quantized."""
    hooked = any(getattr(layer, hooks, None) for hooks in activations.HOOKS)
    return hooked if is_foreign(layer) else has_hooks(layer)


def single_places(model: nn.Module) -> dict[nn.Module, tuple[nn.Module, str]]:
    """The modules within `model` that stand at one place only, and where: the parent, and what that calls them."""
    places: dict[nn.Module, list[tuple[nn.Module, str]]] = defaultdict(list)
    for module in model.modules():
        for name, child in module._modules.items():
            if child is not None:
                places[child].append((module, name))
    return {child: where[0] for child, where in places.items() if len(where) == 1}


def absorb(pair: Pair) -> None:
    """Put an Absorbed marker in the place of the activation, which the caller has given to the linear layer."""
    marker = Absorbed(_held(pair.holder, pair.slot))
    function = vars(pair.holder).pop(pair.slot, None)  # it would hide the marker
    pair.holder._modules[pair.slot] = marker.train(pair.holder.training)
    if function is not None and type(pair.holder).__setstate__ is not nn.Module.__setstate__:
        vars(pair.holder)[pair.slot] = marker  # where nn.TransformerDecoderLayer misses a function, it puts F.relu
    linear.set_absorbed(pair.linear, marker)


def restore(holder: nn.Module, slot: str) -> None:
    """Undo `absorb`: what is held at `slot` is the original again."""
    marker = holder._modules[slot]
    assert isinstance(marker, Absorbed)
    vars(holder).pop(slot, None)
    if isinstance(marker.original, nn.Module):
        holder._modules[slot] = marker.original.train(marker.training)
    else:
        del holder._modules[slot]
        vars(holder)[slot] = marker.original


def _held(holder: nn.Module, slot: str) -> object:
    """What the instance itself holds at `slot`; a class attribute belongs to other instances too."""
    return vars(holder).get(slot) or holder._modules.get(slot)


_Candidate = tuple[nn.Module, nn.Module, str]  # a linear layer, and the holder and slot of what runs on its output


def _in_sequence(module: nn.Module, single: Container[nn.Module]) -> Iterator[_Candidate]:
    if isinstance(module, nn.Sequential):
        for (_, _, layer), (holder, slot, _) in itertools.pairwise(leaves(module, single)):
            yield layer, holder, slot


def leaves(sequential: nn.Sequential, single: Container[nn.Module]) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Holder, slot and module of what runs one after the other; nested sequences used once are opened."""
    own = any(getattr(type(sequential), name) is not getattr(nn.Sequential, name) for name in ("forward", "__iter__"))
    if own or "forward" in vars(sequential):
        return
    for slot, child in sequential._modules.items():
        if isinstance(child, nn.Sequential) and child in single and not has_hooks(child):
            yield from leaves(child, single)
        elif child is not None:
            yield sequential, slot, child


def _in_source(module: nn.Module, absorbing: Container[nn.Module]) -> Iterator[_Candidate]:
    """Where all that ever happens to self.linear(...) is self.slot, by the methods of the class but for __init__.

    Inherited ones are read, too: neither attribute may be used at a second place. Nothing is found where the source is
    not at hand or is not understood.
    """
    children = {name: child for name, child in module._modules.items() if child is not None and child in absorbing}
    if not children or "forward" in vars(module):
        return
    held = (*module._modules.items(), *vars(module).items())
    slots = {name for name, value in held if callable(value) and recognize(value)}
    names = children.keys() | slots
    codes = [code for code in _methods(type(module)) if slots and _mentions(code, names)]  # reading takes long
    read = [_read(code) for code in codes]
    uses = sum((each.uses for each in read if each), Counter[str]())
    if None not in read:
        for name, slot in (flow for each in read if each for flow in each.flows.values()):
            if name in children and slot in slots and uses[name] == uses[slot] == 1:
                yield children[name], module, slot


def _methods(cls: type[Any]) -> Iterator[CodeType]:
    """The methods of `cls` and its bases below nn.Module, without __init__ and as they were before decoration."""
    for base in cls.__mro__[: cls.__mro__.index(nn.Module)]:
        for name, member in vars(base).items():
            function = inspect.unwrap(getattr(member, "fget", None) or getattr(member, "__func__", member))
            if isinstance(function, FunctionType) and name != "__init__":
                yield function.__code__


def _mentions(code: CodeType, names: set[str]) -> bool:
    nested = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return not names.isdisjoint(code.co_names) or any(_mentions(inner, names) for inner in nested)


class _Reading(NamedTuple):
    """What the source of a method says."""

    uses: Counter[str]  # how often each `self.X` is read
    flows: dict[int, tuple[str, str]]  # byte offset of a call of self.X -> X, and the Y of self.Y(...) that it goes to


@functools.lru_cache(maxsize=1024)
def _read(code: CodeType) -> _Reading | None:
    """The source of a function, held against its instructions; None where it is not at hand or is not understood."""
    try:
        lines, first = inspect.getsourcelines(code)
        indented = lines[0][:1].isspace()  # kept, so that columns are those of the instructions
        tree = ast.parse("if True:\n" * indented + "".join(lines))
    except (OSError, TypeError, SyntaxError):
        return None
    ast.increment_lineno(tree, max(first, 1) - 1 - indented)
    calls = [*_nested_calls(tree), *_consecutive_calls(tree)]
    return _Reading(_uses(tree), _found_in(code, calls))


def _sites(code: CodeType) -> dict[int, str]:
    """The calls in a method whose result goes to self.slot(...) and nowhere else: byte offset -> slot."""
    reading = _read(code)
    return {} if reading is None else {offset: slot for offset, (_, slot) in reading.flows.items()}


_calls.read_with(_sites)

_Place = tuple[int | None, ...]  # first and last line, first column and the one behind the last


def _found_in(code: CodeType, calls: list[tuple[ast.Call, ast.Call]]) -> dict[int, tuple[str, str]]:
    """Which instructions the calls (of the linear layer, of the activation) are; from Python 3.11 on these know where
    in the source they come from, which need not be the source that is there now."""
    if not code.co_argcount or code.co_varnames[0] != "self" or not hasattr(code, "co_positions"):
        return {}
    offsets: dict[_Place, list[int]] = defaultdict(list)
    loads: set[tuple[str, _Place]] = set()
    for instruction in dis.get_instructions(code):
        place = tuple(getattr(instruction, "positions", None) or ())
        if instruction.opname.startswith("CALL"):
            offsets[place].append(instruction.offset)
        elif instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            loads.add((instruction.argval, place))
    found = {}
    for inner, outer in calls:
        names = _called(inner), _called(outer)
        there = all((name, _place(call.func)) in loads for name, call in zip(names, (inner, outer), strict=True))
        for offset in offsets[_place(inner)] if there else ():
            found[offset] = names
    return found


def _place(node: ast.expr) -> _Place:
    return node.lineno, node.end_lineno, node.col_offset, node.end_col_offset


def _attribute(node: ast.AST) -> str | None:
    """X of the expression `self.X`."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
        return node.attr
    return None


def _called(node: ast.AST) -> str:
    """X of the expression `self.X(...)`, or nothing."""
    return (_attribute(node.func) if isinstance(node, ast.Call) else None) or ""


def _uses(tree: ast.AST) -> Counter[str]:
    """How often each `self.X` is read, harmless reads of `self.X.weight` and the like apart."""
    uses: Counter[str] = Counter()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            if name := _attribute(node):
                uses[name] += 1
            if node.attr in _HARMLESS and (name := _attribute(node.value)):
                uses[name] -= 1
    return uses


_Calls = Iterator[tuple[ast.Call, ast.Call]]  # of a layer, and of what gets its output


def _nested_calls(tree: ast.AST) -> _Calls:
    """Each `self.activation(self.linear(...))`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and _called(node) and len(node.args) == 1 and not node.keywords:
            (inner,) = node.args
            if isinstance(inner, ast.Call) and _called(inner):
                yield inner, node


def _consecutive_calls(tree: ast.AST) -> _Calls:
    """Each `x = self.linear(...)` with `x = self.activation(x)` as the next statement."""
    for node in ast.walk(tree):
        for block in (getattr(node, "body", None), getattr(node, "orelse", None)):
            if isinstance(block, list):
                for (target, inner), (other, outer) in itertools.pairwise(map(_assigned_call, block)):
                    if inner is not None and outer is not None and target == other == _argument(outer):
                        yield inner, outer


def _assigned_call(statement: ast.stmt) -> tuple[str, ast.Call | None]:
    """x and the call of `x = self.called(...)`."""
    if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Call) and _called(statement.value):
        (target, *more) = statement.targets
        if isinstance(target, ast.Name) and not more:
            return target.id, statement.value
    return "", None


def _argument(call: ast.Call) -> str | None:
    """x of `called(x)`; None where that is not one variable."""
    argument = call.args[0] if len(call.args) == 1 and not call.keywords else None
    return argument.id if isinstance(argument, ast.Name) else None

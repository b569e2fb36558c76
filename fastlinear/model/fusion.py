"""What a converted linear layer may absorb: the activation that is applied to its output and to nothing else.

Two things prove that an activation follows a linear layer: nn.Sequential, and the source of a module's own methods,
which says `self.act(self.fc(x))`, or `x = self.fc(x)` followed by `x = self.act(x)`. Reading the source finds the MLPs
of transformers' models, and of the user's, without a list of class names that ages with each release.
"""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import textwrap
from collections import Counter, defaultdict
from collections.abc import Container, Hashable, Iterator
from types import CodeType, FunctionType
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from fastlinear.spec.activations import Activation, has_hooks, recognise

# Reading these of a layer says nothing about its output: nn.TransformerEncoderLayer reads linear1.weight, T5 wo.weight.
_HARMLESS = {"weight", "bias", "in_features", "out_features"}


class Pair(NamedTuple):
    """A linear layer, where it stands, and the slot (attribute name) of `holder` with the activation of its output."""

    linear: nn.Module
    home: nn.Module
    name: str  # home.name is the linear layer
    holder: nn.Module
    slot: str
    activation: Activation


class Absorbed(nn.Module):
    """Stands where an activation stood that the linear layer before it now applies, and returns its input.

    `original` is that activation (a module or a function) and `linear` that layer, which is `home.name`. None of them
    is registered as a submodule, so they change no state dict and are not visited twice. Raises RuntimeError once the
    layer was replaced or wrapped (by a LoRA adapter, say), which would lose the activation or misplace it.
    """

    original: Any
    linear: nn.Module
    home: nn.Module
    name: str

    def __init__(self, original: Any, linear: nn.Module, home: nn.Module, name: str) -> None:
        super().__init__()
        vars(self).update(original=original, linear=linear, home=home, name=name)

    def forward(self, input: Tensor) -> Tensor:
        if self.home._modules.get(self.name) is not self.linear:
            raise RuntimeError(
                f"the layer {self.name!r} of {type(self.home).__name__} was replaced after it had absorbed "
                f"{self.extra_repr()}: call fastlinear.unconvert(model), and convert it again as it is now"
            )
        return input

    def extra_repr(self) -> str:
        return repr(self.original) if isinstance(self.original, nn.Module) else str(self.original.__name__)


def find_pairs(model: nn.Module, linears: Container[nn.Module]) -> list[Pair]:
    """The activations in `model` that the layers among `linears` may absorb.

    A layer that stands at two places of the model, or that has hooks (they must see its output as it was), absorbs
    nothing.
    """
    single = single_places(model)
    absorbing = {child for child in single if child in linears and not has_hooks(child)}
    found: dict[tuple[nn.Module, str], Pair] = {}
    for module in model.modules():
        for linear, holder, slot in (*_in_sequence(module, single), *_in_source(module, absorbing)):
            activation = recognise(_held(holder, slot))
            if linear in absorbing and activation is not None:
                found[holder, slot] = Pair(linear, *single[linear], holder, slot, activation)
    return list(found.values())


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
    marker = Absorbed(_held(pair.holder, pair.slot), pair.linear, pair.home, pair.name)
    vars(pair.holder).pop(pair.slot, None)  # a plain function lives there, and would hide the marker
    pair.holder._modules[pair.slot] = marker.train(pair.holder.training)


def restore(holder: nn.Module, slot: str) -> None:
    """Undo `absorb`: what is held at `slot` is the original again."""
    marker = holder._modules[slot]
    assert isinstance(marker, Absorbed)
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
        for (_, _, linear), (holder, slot, _) in itertools.pairwise(leaves(module, single)):
            yield linear, holder, slot


def leaves(sequential: nn.Sequential, single: Container[nn.Module]) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Holder, slot and module of what runs one after the other; nested sequences used once are opened."""
    if type(sequential).forward is not nn.Sequential.forward or "forward" in vars(sequential):
        return
    for slot, child in sequential._modules.items():
        if isinstance(child, nn.Sequential) and child in single and not has_hooks(child):
            yield from leaves(child, single)
        elif child is not None:
            yield sequential, slot, child


def _in_source(module: nn.Module, absorbing: Container[nn.Module]) -> Iterator[_Candidate]:
    children = {name: child for name, child in module._modules.items() if child is not None and child in absorbing}
    if children and "forward" not in vars(module):
        held = (*module._modules.items(), *vars(module).items())
        slots = frozenset(name for name, value in held if callable(value) and recognise(value))
        cls = cast(Hashable, type(module))  # which mypy does not see
        for name, slot in _calls_in_a_row(cls, frozenset(children), slots) if slots else ():
            yield children[name], module, slot


@functools.lru_cache(maxsize=256)
def _calls_in_a_row(cls: Any, linears: frozenset[str], slots: frozenset[str]) -> tuple[tuple[str, str], ...]:
    """The attribute names (linear, slot) of `cls` where all that ever happens to self.linear(...) is self.slot.

    All methods are read, inherited ones too, but for __init__: neither attribute may be used at a second place.
    Nothing is found where the source is not at hand or is not understood.
    """
    pairs: list[tuple[str, str]] = []
    uses: Counter[str] = Counter()
    try:
        for function in _methods(cls):
            if _mentions(function.__code__, linears | slots):  # reading source takes long, and most methods do not
                tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
                uses.update(_uses(tree))
                pairs.extend(_nested_calls(tree))
                pairs.extend(_consecutive_calls(tree))
    except (OSError, TypeError, SyntaxError):
        return ()
    return tuple((a, b) for a, b in pairs if a in linears and b in slots and uses[a] == uses[b] == 1)


def _methods(cls: type[Any]) -> Iterator[FunctionType]:
    """The methods of `cls` and its bases below nn.Module, without __init__ and as they were before decoration."""
    for base in cls.__mro__[: cls.__mro__.index(nn.Module)]:
        for name, member in vars(base).items():
            function = inspect.unwrap(getattr(member, "fget", None) or getattr(member, "__func__", member))
            if isinstance(function, FunctionType) and name != "__init__":
                yield function


def _mentions(code: CodeType, names: frozenset[str]) -> bool:
    nested = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return not names.isdisjoint(code.co_names) or any(_mentions(inner, names) for inner in nested)


def _attribute(node: ast.AST) -> str | None:
    """X of the expression `self.X`."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
        return node.attr
    return None


def _called(node: ast.AST) -> str | None:
    """X of the expression `self.X(...)`."""
    return _attribute(node.func) if isinstance(node, ast.Call) else None


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


def _nested_calls(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """(linear, activation) of each `self.activation(self.linear(...))`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and len(node.args) == 1 and not node.keywords:
            linear, slot = _called(node.args[0]), _called(node)
            if linear and slot:
                yield linear, slot


def _consecutive_calls(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """(linear, activation) of each `x = self.linear(...)` with `x = self.activation(x)` as the next statement."""
    for node in ast.walk(tree):
        for block in (getattr(node, "body", None), getattr(node, "orelse", None)):
            if isinstance(block, list):
                for first, second in itertools.pairwise(block):
                    linear, slot = _assigned_call(first), _assigned_call(second)
                    if linear and slot and linear.target == slot.target == slot.argument:
                        yield linear.called, slot.called


class _AssignedCall(NamedTuple):
    """`target = self.called(argument)`; argument is None where it is not one variable."""

    target: str
    called: str
    argument: str | None


def _assigned_call(statement: ast.stmt) -> _AssignedCall | None:
    if not isinstance(statement, ast.Assign) or not isinstance(statement.value, ast.Call):
        return None
    (target, *more), call = statement.targets, statement.value
    name = _called(call)
    if more or name is None or not isinstance(target, ast.Name):
        return None
    argument = call.args[0] if len(call.args) == 1 and not call.keywords else None
    return _AssignedCall(target.id, name, argument.id if isinstance(argument, ast.Name) else None)

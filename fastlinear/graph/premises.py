"""What a compiled graph takes for granted of the modules that it was traced from, and how it gets at their parameters.

Dynamo guards all of it one by one in each call, by hundreds of guards of a model's modules and parameters, and hands
every parameter over by its path through the modules: on a small model half a millisecond. Where it lets us, one guard
stands for those of them that say what modules and Parameters are, and asks them only when something is not what it was
when they last held (see _trees); and the graph is given the module itself, of which it takes the parameters.

Whatever a guard reads beside that, such as globals, a config, inputs or buffers, stays Dynamo's.
"""

from __future__ import annotations

import copy
import operator
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from torch import fx, nn

import fastlinear._torch as _torch
from fastlinear._trees import Tree, found, is_atom, is_function, is_steady
from fastlinear.graph.capture import name_of_source, source_of

_FEWEST = 2  # parameters; with one, nobody could tell the two forms of a graph apart by the number of their inputs
# L['self']._modules['encoder']._parameters['weight']: root, place, attribute, key
_NAME = re.compile(r"L\['(\w+)'\]((?:\._modules\['[^']*'\])*)(?:\.(\w+)(?:\['([^']*)'\])?)?")
_TABLES = ("_modules", "_parameters")
_OF_MODULES = ("TYPE_MATCH", "ID_MATCH", "NOT_PRESENT_IN_GENERIC_DICT")
_OF_FUNCTIONS = ("TYPE_MATCH", "ID_MATCH", "BUILTIN_MATCH", "FUNCTION_MATCH")


class Name(NamedTuple):
    """What an expression of Dynamo's says: the local variable that holds a module, the place of one below it, an
    attribute of that, and a key there."""

    root: str
    place: tuple[str, ...]
    attribute: str | None
    key: str | None


def named(text: str) -> Name | None:
    """The name that an expression is, if it is one of a module's."""
    match = _NAME.fullmatch(text)
    if match is None:
        return None
    root, path, attribute, key = match.groups()
    return Name(root, tuple(re.findall(r"\['([^']*)'\]", path)), attribute, key)


def hold(module: fx.GraphModule, parameters: Sequence[fx.Node]) -> bool:
    """Has one guard stand for those of the module that most of these inputs are parameters of, and the graph take that
    module in their place. False, and nothing is changed, where this torch, or the way it is used, does not allow it."""
    names = {node: named(name_of_source(node)) for node in parameters}
    roots = Counter(name.root for name in names.values() if name is not None)
    root = max(roots, key=roots.__getitem__, default=None)
    taken = {node: name for node, name in names.items() if name is not None and name.root == root and _is_own(name)}
    context = _torch.TracingContext.try_get() if hasattr(_torch.TracingContext, "try_get") else None
    if root is None or len(taken) < _FEWEST or context is None or not _may_be_held(context):
        return False
    source = _root_of(source_of(next(iter(taken))))
    guards = [guard for guard in context.guards_context.dynamo_guards if (n := named(guard.name)) and n.root == root]
    if source is None or not guards:
        return False
    tree = Tree([(name.place, name.key) for name in taken.values()])
    _guard(context.guards_context.dynamo_guards, Premises(root, source, tree, guards))
    _take(module, tree, source, list(taken))
    return True


def _is_own(name: Name) -> bool:
    return name.attribute == "_parameters" and name.key is not None


def _may_be_held(context: Any) -> bool:
    """Whether guards are a set that can be changed, Dynamo does not compare parameters with one another, and does not
    compile the graph once more."""
    alone = _torch.find("_dynamo.config.skip_no_tensor_aliasing_guards_on_parameters")
    shapes = getattr(context.fake_mode, "shape_env", None)
    known = hasattr(context.guards_context.dynamo_guards, "inner") and _torch.find("_guards.Guard") is not None
    return known and alone is True and not getattr(shapes, "specializations", ())


def _root_of(source: Any) -> Any:
    while hasattr(source, "base"):
        source = source.base
    return source


def _take(module: fx.GraphModule, tree: Tree, source: Any, nodes: Sequence[fx.Node]) -> None:
    """Puts the module that `source` is, and what is read of it, in the place of these inputs."""
    graph = module.graph
    argument = copy.copy(nodes[0].meta["grapharg"])
    argument.source, argument.fake_tensor, argument.is_tensor = source, None, False
    argument.erase()

    def parameters(model: nn.Module) -> Any:
        return tree.values(model)

    with graph.inserting_before(next(iter(graph.nodes))):
        model = graph.placeholder("model")
        model.meta["grapharg"] = argument
        values = graph.call_function(parameters, (model,))
        for i, node in enumerate(nodes):
            value = graph.call_function(operator.getitem, (values, i))
            value.meta = {key: each for key, each in node.meta.items() if key != "grapharg"}
            node.replace_all_uses_with(value)
    for node in nodes:
        graph.erase_node(node)
        node.meta["grapharg"].erase()
        node.meta.clear()  # as Dynamo does for those that are left; it refers to parameters, weakly


def _guard(guards: Any, premises: Premises) -> None:
    """Puts one guard in the place of many."""
    one, many = _torch.Guard(premises.source, premises.MODULES_MATCH), set(premises.guards)
    guards.inner = type(guards.inner)([guard for guard in guards.inner if guard not in many] + [one])


class Premises:
    """Guards of one module, which are to be as one."""

    def __init__(self, root: str, source: Any, tree: Tree, guards: list[Any]) -> None:
        self.root, self.source, self.tree, self.guards = root, source, tree, guards

    def MODULES_MATCH(self, builder: Any, guard: Any) -> None:  # the name is what Dynamo's filters know it by
        """Makes all of them in Dynamo's `builder`: behind one guard those that a look at the modules answers."""
        if not hasattr(builder, "_cached_guard_managers"):
            for each in self.guards:
                each.create(builder)
            return
        root, module = self.root, builder.scope["L"][self.root]
        kept = set(self.tree.parameters[:1])  # on which it sees what this thread does to all
        behind = {each for each in self.guards if self._is_answered(module, each, kept)}
        for each in self.guards:
            if each not in behind:
                each.create(builder)
        outer, known = builder.guard_manager, builder._cached_guard_managers
        inner = type(outer)()
        builder.guard_manager, builder._cached_guard_managers = inner, {}
        try:
            for each in self.guards:
                if each in behind:
                    each.create(builder)
        finally:
            builder.guard_manager, builder._cached_guard_managers = outer, known
        why = [f"the modules of L[{root!r}] are what they were"]

        def holds(model: nn.Module) -> bool:
            scope = {root: model}
            if inner.root.check(scope):
                return True
            why[:] = inner.root.check_verbose(scope).verbose_code_parts
            return False

        read: list[tuple[Any, str | None]] = [(place, "_parameters") for place, _ in self.tree.parameters]
        read += [_read_by(name, each) for each in behind if (name := named(each.name)) is not None]
        self.tree.watch(_places(read), holds)
        manager = builder.get_guard_manager_from_source(self.source)
        try:
            manager.add_lambda_guard(self.tree.holds, why, None)
        except TypeError:  # before it was told of the user's stack
            manager.add_lambda_guard(self.tree.holds, why)

    def _is_answered(self, root: nn.Module, guard: Any, kept: set[Any]) -> bool:
        """Whether the guard holds for as long as the modules are what Tree.watch wants."""
        name, kind = named(guard.name), guard.create_fn_name()
        if name is None or kind == "DUPLICATE_INPUT":
            return False
        try:
            module = found(root, name.place)
        except (AttributeError, KeyError):
            return False
        if not isinstance(module, nn.Module):
            return False
        place, attribute, key = name.place, name.attribute, name.key
        if attribute is None:
            return kind in _OF_MODULES or (kind == "HASATTR" and _is_looked_up_plainly(type(module)))
        if attribute == "_parameters" and key is not None:
            value = module._parameters.get(key)
            return kind == "TENSOR_MATCH" and is_steady(value) and (place, key) not in kept
        if key is None and (attribute in _TABLES or (attribute == "_buffers" and kind == "TYPE_MATCH")):
            return type(vars(module)[attribute]) is dict
        if key is not None or attribute not in vars(module) or _is_descriptor(getattr(type(module), attribute, None)):
            return False
        value = vars(module)[attribute]
        return is_atom(value) or (is_function(value) and kind in _OF_FUNCTIONS)


def _is_descriptor(of_class: Any) -> bool:
    """Whether what a class has by a name is asked before the module's own attribute."""
    return hasattr(type(of_class), "__set__")


def _read_by(name: Name, guard: Any) -> tuple[tuple[str, ...], str | None]:
    """The place of the module that a guard is of, and the table that it looks into."""
    return name.place, None if guard.create_fn_name() == "TYPE_MATCH" else name.attribute


def _places(read: Iterable[tuple[tuple[str, ...], str | None]]) -> list[tuple[tuple[str, ...], list[str]]]:
    """The places of modules of which something is read, and of those above them, with the tables that count there."""
    tables: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for place, what in read:
        tables[place] |= {what} if what in _TABLES else set()
        for i in range(len(place)):
            tables[place[:i]].add("_modules")
    return sorted(((place, sorted(names)) for place, names in tables.items()), key=lambda each: len(each[0]))


def _is_looked_up_plainly(kind: type) -> bool:
    pairs = ((object, "__getattribute__"), (nn.Module, "__getattr__"))
    return all(getattr(kind, name, None) is getattr(base, name) for base, name in pairs)

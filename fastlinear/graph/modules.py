"""Whether the modules of a model are what they were when a graph was recorded, without a guard for each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from fastlinear._trees import Tree
from fastlinear.layer.experts import is_fast_experts

_TABLES = ("_modules", "_parameters", "_buffers")
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")


class Modules:
    """The children of a model, and all below them: their classes and attributes, and which children, Parameters and
    buffers they have. What these hold may change.

    is_idle: whether a hook does nothing that a graph would not. why_not: why no graph stands for the modules' calls, in
    a few words; None where one may.
    """

    def __init__(self, model: nn.Module, is_idle: Callable[[Any], bool]) -> None:
        self._model, self._children = model, dict(model._modules)
        below = [child for child in self._children.values() if child is not None]
        self._hooks = [vars(each)[table] for child in below for each in child.modules() for table in _HOOKS]
        self._hooked = sum(map(len, self._hooks))
        self._experts = [(each, _of_experts(each)) for each in model.modules() if is_fast_experts(each)]
        self._trees = [(child, _tree(child)) for child in below]
        self.why_not: str | None = None
        if not all(is_idle(hook) for hooks in self._hooks for hook in hooks.values()):
            self.why_not = "its modules have hooks, which may do what no graph does"
        elif not self.hold():
            self.why_not, self._trees, self._experts = "its modules cannot be watched", [], []

    def hold(self) -> bool:
        """Whether they are."""
        if self._model._modules != self._children or sum(map(len, self._hooks)) != self._hooked:
            return False
        if any(_of_experts(each) != known for each, known in self._experts):
            return False
        return all(tree.holds(child) for child, tree in self._trees)


def _of_experts(module: Any) -> tuple[Any, ...]:
    """What of fast experts, which a graph calls, stays as it is while they answer."""
    held = (id(each) for each in (module._frozen_experts, *module._parameters.values()))
    return (type(module), module._form, module._handle, module.training, *held)


def _tree(root: nn.Module) -> Tree:
    """What says of a module, once it has said True, whether all below it but fast experts is what it was then."""
    named = ((name, module) for name, module in root.named_modules() if not is_fast_experts(module))
    places = [(tuple(name.split(".")) if name else (), module) for name, module in named]
    tables = [(place, [table for table in _TABLES if type(vars(m)[table]) is dict]) for place, m in places]
    tree, once = Tree([]), [True]
    tree.watch(tables, lambda _: bool(once and once.pop()))
    tree.holds(root)
    return tree

"""Fast modules that torch.nn.utils.parametrize has put a class of its own before.

Such a class has a property for each tensor that is computed. It refuses to tell a state, and where the class behind it
has no `__deepcopy__` it brings one that copies all attributes one by one, engines included.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn
from torch.nn.utils import parametrize


def deepcopied(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """What copy.deepcopy makes of a module by its state, as the class behind such a one tells it; for classes to have
    as their `__deepcopy__`."""
    kind: Any = type(module)
    own = kind.__mro__[1] if parametrize.is_parametrized(module) else kind
    # Before Python 3.11 not all objects have a __getstate__.
    state = own.__getstate__(module) if hasattr(own, "__getstate__") else vars(module)
    memo[id(module)] = replica = kind.__new__(kind)
    own.__setstate__(replica, copy.deepcopy(state, memo))
    return replica  # type: ignore[no-any-return]


_OF_ANY = {"__dict__", "__doc__", "__module__", "__weakref__"}


def before(module: nn.Module, cls: type[nn.Module]) -> type[nn.Module]:
    """The class of a module that becomes one of `cls`: that, or the like of what stands before its own."""
    if not parametrize.is_parametrized(module):
        return cls
    members = {name: member for name, member in vars(type(module)).items() if name not in _OF_ANY}
    if not hasattr(cls, "__deepcopy__"):
        members["__deepcopy__"] = deepcopied
    return type(f"Parametrized{cls.__name__}", (cls,), members)

"""The options of the backend: those of `convert` that mean something in a graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import nn

from fastlinear.model.selection import as_patterns
from fastlinear.spec.precision import Wanted, wanted
from fastlinear.spec.schemes import Scheme

_TUNE = ("lazy", "off")


class Options(NamedTuple):
    """torch.compile(model, backend="fastlinear", options={...}); as in `convert`, but for filter_fn's first argument,
    which is a fast layer over the same parameters, since a graph has no modules."""

    dtype: torch.dtype | None = None
    accumulate: str = "fp32"
    quantize: Scheme | None = None
    products: torch.dtype | None = None
    include: Any = None
    exclude: Any = None
    filter_fn: Callable[[nn.Module, str], bool] | None = None
    fuse: bool = True
    freeze: bool = False
    tune: str = "lazy"

    @property
    def asked(self) -> Wanted:
        return wanted(self.dtype, self.accumulate, self.quantize, self.products)

    def is_included(self, name: str, classes: Iterable[type]) -> bool:
        """Whether `include` names the layer, whose parents are of these classes."""
        return _hits(self.include, name, classes)

    def why_left(self, name: str, classes: Iterable[type]) -> str | None:
        """Why the layer called `name` is left alone, in a few words; None where it is not."""
        classes = list(classes)
        if _hits(self.exclude, name, classes):
            return "it is excluded"
        if self.include is not None and not _hits(self.include, name, classes):
            return "it is not among the included layers"
        return None


def options(given: Mapping[str, Any] | None, mode: str | None) -> Options:
    """What torch.compile passes on, checked. Raises TypeError or ValueError for what the backend does not know."""
    if mode is not None:
        raise ValueError(f'mode={mode!r} means nothing to the backend "fastlinear", which takes {_names()} as options')
    given = dict(given or {})
    unknown = sorted(set(given) - set(Options._fields))
    if unknown:
        raise ValueError(f'the backend "fastlinear" has no option {", ".join(map(repr, unknown))}; it has {_names()}')
    found = Options(**given)
    for name in ("fuse", "freeze"):
        if not isinstance(given.get(name, True), bool):
            raise TypeError(f"{name} must be True or False, but is {given[name]!r}")
    if found.freeze:
        raise ValueError(
            "freeze=True is nothing a graph can do, as its weights are the model's: compile a frozen model, "
            'torch.compile(fastlinear.convert(model, freeze=True), backend="fastlinear")'
        )
    if found.tune not in _TUNE:
        raise ValueError(f"tune must be one of {', '.join(map(repr, _TUNE))} in a graph, but is {found.tune!r}")
    if found.filter_fn is not None and not callable(found.filter_fn):
        raise TypeError(f"filter_fn must be a function of (module, name) or None, but is {found.filter_fn!r}")
    wanted(found.dtype, found.accumulate, found.quantize, found.products)
    return found._replace(include=as_patterns("include", found.include), exclude=as_patterns("exclude", found.exclude))


def _names() -> str:
    return ", ".join(Options._fields)


def _hits(patterns: Iterable[Any] | None, name: str, classes: Iterable[type]) -> bool:
    """Whether a pattern means the layer: a glob of its name or of the front of that up to a dot, or a class."""
    parts = name.split(".")
    fronts = [".".join(parts[: i + 1]) for i in range(len(parts))]
    classes = list(classes)
    for pattern in patterns or ():
        if isinstance(pattern, str) and any(fnmatchcase(front, pattern) for front in fronts):
            return True
        if isinstance(pattern, type) and any(issubclass(cls, pattern) for cls in classes):
            return True
    return False

"""The activations a FastLinear can fuse: their names, parameters and meaning, told in torch's own functions.

`apply` is the specification: the native epilogues are tested against it, and every fallback runs it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Activation(NamedTuple):
    """A fused activation: a name from `names()` and its parameters in torch's order."""

    name: str
    params: tuple[float, ...] = ()


class _Definition(NamedTuple):
    function: Callable[..., Tensor]  # function(y, *params): the meaning of the name
    aliases: tuple[Callable[..., Tensor], ...] = ()  # other functions that mean the same
    modules: tuple[str, ...] = ()  # classes by qualified name, so that transformers need not be imported
    params: Mapping[str, float] = MappingProxyType({})  # attribute of those modules -> torch's default


def _nn(*classes: str) -> tuple[str, ...]:
    return tuple(f"torch.nn.modules.activation.{name}" for name in classes)


def _hf(*classes: str) -> tuple[str, ...]:
    return tuple(f"transformers.activations.{name}" for name in classes)


def quick_gelu(y: Tensor) -> Tensor:
    """CLIP's gelu (Hendrycks and Gimpel 2016, arXiv:1606.08415), which torch has no function for."""
    return y * torch.sigmoid(1.702 * y)


def relu2(y: Tensor) -> Tensor:
    """The square of relu (So et al. 2021, arXiv:2109.08668), Nemotron's and BitNet's; torch has no function for it."""
    return torch.relu(y).square()


_DEFINITIONS: dict[str, _Definition] = {
    "relu": _Definition(torch.relu, (F.relu, torch.relu_, F.relu_), _nn("ReLU")),
    "relu6": _Definition(F.relu6, (), _nn("ReLU6")),
    "gelu": _Definition(F.gelu, (), _nn("GELU") + _hf("GELUActivation")),
    # transformers spells the same tanh formula in four ways that differ by rounding only.
    "gelu_tanh": _Definition(
        functools.partial(F.gelu, approximate="tanh"),
        (),
        _hf("GELUTanh", "NewGELUActivation", "FastGELUActivation", "AccurateGELUActivation"),
    ),
    "quick_gelu": _Definition(quick_gelu, (), _hf("QuickGELUActivation")),
    "silu": _Definition(F.silu, (), _nn("SiLU") + _hf("SiLUActivation")),
    "sigmoid": _Definition(torch.sigmoid, (F.sigmoid, torch.sigmoid_), _nn("Sigmoid")),
    "tanh": _Definition(torch.tanh, (F.tanh, torch.tanh_), _nn("Tanh")),
    "hardswish": _Definition(F.hardswish, (), _nn("Hardswish")),
    "hardsigmoid": _Definition(F.hardsigmoid, (), _nn("Hardsigmoid")),
    "hardtanh": _Definition(F.hardtanh, (F.hardtanh_,), _nn("Hardtanh"), {"min_val": -1.0, "max_val": 1.0}),
    "leaky_relu": _Definition(F.leaky_relu, (F.leaky_relu_,), _nn("LeakyReLU"), {"negative_slope": 0.01}),
    "elu": _Definition(F.elu, (F.elu_,), _nn("ELU"), {"alpha": 1.0}),
    "softplus": _Definition(F.softplus, (), _nn("Softplus"), {"beta": 1.0, "threshold": 20.0}),
    "mish": _Definition(F.mish, (), _nn("Mish") + _hf("MishActivation")),
    "relu2": _Definition(relu2, (), _hf("ReLUSquaredActivation")),
}
_aten = torch.ops.aten


def _quick_gelu_slope(g: Tensor, y: Tensor, s: Tensor) -> Tensor:
    slope: Tensor = g * s + _aten.sigmoid_backward(g * y, s) * 1.702
    return slope


# slope(g, y, *params): what torch's own backward makes of g, the gradient of function(y).
_SLOPES: dict[str, Callable[..., Tensor]] = {
    "relu": lambda g, y: _aten.threshold_backward(g, y, 0.0),
    "relu6": lambda g, y: _aten.hardtanh_backward(g, y, 0.0, 6.0),
    "gelu": _aten.gelu_backward,
    "gelu_tanh": functools.partial(_aten.gelu_backward, approximate="tanh"),
    "quick_gelu": lambda g, y: _quick_gelu_slope(g, y, torch.sigmoid(1.702 * y)),
    "silu": _aten.silu_backward,
    "sigmoid": lambda g, y: _aten.sigmoid_backward(g, torch.sigmoid(y)),
    "tanh": lambda g, y: _aten.tanh_backward(g, torch.tanh(y)),
    "hardswish": _aten.hardswish_backward,
    "hardsigmoid": _aten.hardsigmoid_backward,
    "hardtanh": _aten.hardtanh_backward,
    "leaky_relu": lambda g, y, negative_slope: _aten.leaky_relu_backward(g, y, negative_slope, False),
    "elu": lambda g, y, alpha: _aten.elu_backward(g, alpha, 1.0, 1.0, False, y),
    "softplus": _aten.softplus_backward,
    "mish": _aten.mish_backward,
    "relu2": lambda g, y: _aten.threshold_backward(g * (2 * torch.relu(y)), y, 0.0),
}
_NAME_OF_CLASS = {cls: name for name, definition in _DEFINITIONS.items() for cls in definition.modules}
_NAME_OF_FUNCTION = {
    function: name
    for name, definition in _DEFINITIONS.items()
    for function in (definition.function, *definition.aliases)
}
_METHODS = {getattr(Tensor, name + mark): name for name in ("relu", "sigmoid", "tanh") for mark in ("", "_")}
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def names() -> tuple[str, ...]:
    """The activations that can be fused, by name."""
    return tuple(_DEFINITIONS)


def parameters_of(name: str) -> int:
    """How many parameters the activation of this name takes; ValueError where there is none."""
    return len(_checked(name, ()).params)


def apply(activation: Activation | None, y: Tensor) -> Tensor:
    """The activation of `y` (any shape, any floating dtype) through torch's own function; `y` itself for None."""
    if activation is None:
        return y
    return _DEFINITIONS[activation.name].function(y, *activation.params)


def slope(activation: Activation, g: Tensor, y: Tensor) -> Tensor | None:
    """The gradient of y where that of activation(y) is g, bit for bit as torch has it, but with no derivative of its
    own; None for programs and the like, which torch has no backward of."""
    known = _SLOPES.get(activation.name)
    return None if known is None else known(g, y, *activation.params)


def resolve(spec: object) -> Activation | None:
    """The Activation that `spec` means, or None for None.

    `spec` is a name ("gelu"), a name with torch's parameters (("leaky_relu", 0.1)), an Activation, an nn module
    instance (nn.GELU(approximate="tanh")) or a torch function (F.gelu). Raises ValueError for anything else.
    """
    if spec is None:
        return None
    if isinstance(spec, Activation):
        return _checked(spec.name, spec.params)
    if isinstance(spec, str):
        return _checked(spec, ())
    if isinstance(spec, tuple) and spec and isinstance(spec[0], str):
        return _checked(spec[0], spec[1:])
    found = recognize(spec)
    if found is None:
        raise ValueError(f"activation={spec!r} is none that can be fused; allowed are {_allowed()}")
    return found


def recognize(candidate: object) -> Activation | None:
    """The Activation that a module instance or function computes, or None where that is not certain. Never raises.

    Subclasses, modules with hooks and modules whose `forward` was replaced are not certain.
    """
    if isinstance(candidate, nn.Module):
        return _of_module(candidate)
    if isinstance(candidate, functools.partial):
        tanh_gelu = candidate.func is F.gelu and not candidate.args and candidate.keywords == {"approximate": "tanh"}
        return Activation("gelu_tanh") if tanh_gelu else None
    try:
        name = _NAME_OF_FUNCTION.get(candidate)  # type: ignore[call-overload]
    except TypeError:  # unhashable: no function of torch's
        return None
    return None if name is None else Activation(name, tuple(_DEFINITIONS[name].params.values()))


def called(function: object, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Activation | None:
    """The Activation that `function(y, *args, **kwargs)`, torch's or a method of Tensor's, is of y, in place or not.

    None where it is none, or its parameters are not known numbers.
    """
    name = (_METHODS | _NAME_OF_FUNCTION).get(function)
    if name is None:
        return None
    if kwargs.get("approximate", "none") == "tanh":
        name = "gelu_tanh"
    definition = _DEFINITIONS[name]
    given = {**definition.params, **dict(zip(definition.params, args, strict=False)), **kwargs}
    try:
        return _checked(name, tuple(given[param] for param in definition.params))
    except ValueError:  # known when the graph runs, if at all
        return None


def has_hooks(module: nn.Module) -> bool:
    """True where something else than `type(module).forward` may run, or watch, a call of the module."""
    return "forward" in vars(module) or any(getattr(module, hooks, None) for hooks in HOOKS)


def _of_module(module: nn.Module) -> Activation | None:
    cls = type(module)
    name = _NAME_OF_CLASS.get(f"{cls.__module__}.{cls.__qualname__}")
    if name is None or has_hooks(module) or getattr(cls.forward, "__module__", None) != cls.__module__:
        return None
    if getattr(module, "approximate", "none") == "tanh":  # nn.GELU holds two functions
        name = "gelu_tanh"
    try:
        return _checked(name, tuple(getattr(module, attribute) for attribute in _DEFINITIONS[name].params))
    except (AttributeError, ValueError):  # somebody set a parameter to what torch itself would refuse
        return None


def _checked(name: str, params: tuple[Any, ...]) -> Activation:
    definition = _DEFINITIONS.get(name)
    if definition is None:
        raise ValueError(f"activation {name!r} is unknown; allowed are {_allowed()}")
    wanted = tuple(definition.params)
    values = tuple(params) or tuple(definition.params.values())
    real = all(isinstance(v, (int, float)) and not isinstance(v, bool) and not math.isnan(v) for v in values)
    if len(values) != len(wanted) or not real:
        takes = f"takes the numbers ({', '.join(wanted)})" if wanted else "takes no parameters"
        raise ValueError(f"activation {name!r} {takes}, but was given {params!r}")
    if name == "hardtanh" and values[0] > values[1]:
        raise ValueError(f"activation 'hardtanh' needs min_val <= max_val, but was given {params!r}")
    return Activation(name, tuple(float(v) for v in values))


def _allowed() -> str:
    return f"{', '.join(_DEFINITIONS)}, an nn module or torch function of these, or (name, *parameters)"

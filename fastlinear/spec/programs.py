"""Epilogue programs: what a layer does with its sums and bias, step by step, told in torch's own functions.

A step is an activation; add, sub, mul, div, min or max with a number, or with a tensor that comes with the call, its
operand; clamp; or, the first one only, a gate of two halves of the columns. A program of one activation is that
`Activation`. One of several steps is spelled as an `Activation` of a long name, which stands for it in the key of a
plan, the schema of the op and a file: ("relu+add@0+mul", (0.5,)) is (relu(y) + operands[0]) * 0.5.

`apply` is the specification: native epilogues are tested against it, and every fallback runs it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlinear.spec import activations
from fastlinear.spec.activations import Activation

MAX_STEPS = 8
BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "min": torch.minimum,
    "max": torch.maximum,
}
# Of y [..., 2 N], whose first half goes through the activation and is what the second half is multiplied by.
GATES = {
    "glu": Activation("sigmoid"),
    "reglu": Activation("relu"),
    "reglu2": Activation("relu2"),
    "geglu": Activation("gelu"),
    "geglu_tanh": Activation("gelu_tanh"),
    "swiglu": Activation("silu"),
}


def _swiglu_oai(gate: Tensor, through: Tensor, alpha: float, limit: float) -> Tensor:
    gate = gate.clamp(max=limit)
    return gate * torch.sigmoid(gate * alpha) * (through.clamp(-limit, limit) + 1)


def _swiglu_limited(gate: Tensor, through: Tensor, limit: float) -> Tensor:
    return F.silu(gate.clamp(max=limit)) * through.clamp(-limit, limit)


class Limited(NamedTuple):
    """A gate of more than an activation: apply(gate, through, *params)."""

    params: int
    apply: Callable[..., Tensor]


# Those of experts: of gpt-oss (alpha 1.702, limit 7), and of DeepSeek V4.
LIMITED = {"swiglu_oai": Limited(2, _swiglu_oai), "swiglu_limited": Limited(1, _swiglu_limited)}
_COUNTS = dict.fromkeys(GATES, 0) | {name: gate.params for name, gate in LIMITED.items()}  # of a gate's parameters
_NAMES = frozenset(activations.names())
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Step(NamedTuple):
    """One step. operand: the place of its tensor among those of the call; None for none, or a number in `params`."""

    name: str
    params: tuple[float, ...] = ()
    operand: int | None = None


def apply(program: Activation | None, y: Tensor, operands: Sequence[Tensor] = ()) -> Tensor:
    """The program of y (any floating dtype) and of operands that broadcast to it, which are cast to its dtype."""
    if program is None or program.name in _NAMES:
        return activations.apply(program, y)
    for name, params, operand in steps_of(program):
        if name in _COUNTS:
            y = _gated(name, params, *y.chunk(2, -1))
        elif name in BINARY:
            other = y.new_tensor(params[0]) if operand is None else operands[operand]
            y = BINARY[name](y, other if other.dtype is y.dtype else other.to(y.dtype))
        else:
            y = activations.apply(Activation(name, params), y)
    return y


def _gated(name: str, params: tuple[float, ...], gate: Tensor, through: Tensor) -> Tensor:
    if name in GATES:
        return activations.apply(GATES[name], gate) * through
    return LIMITED[name].apply(gate, through, *params)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, program: Activation | None, operands: Sequence[Tensor] = ()
) -> Tensor:
    """program(x W^T + b) by torch, in the dtype of x [..., K], to which weight [N, K], bias and operands are cast."""
    return apply(program, F.linear(x, _cast(weight, x), None if bias is None else _cast(bias, x)), operands)


def _cast(operand: Tensor, x: Tensor) -> Tensor:
    return operand if operand.dtype is x.dtype else operand.to(x.dtype)  # even a to() that does nothing costs a call


def steps_of(program: Activation) -> tuple[Step, ...]:
    """The steps that a program is spelled of; ValueError where it is none."""
    # Dynamo looks through the cache, and warns of that.
    return _steps_of(program) if torch.compiler.is_dynamo_compiling() else _cached_steps_of(program)


def _steps_of(program: Activation) -> tuple[Step, ...]:
    steps, params = [], list(program.params)
    for spelled in program.name.split("+"):
        name, mark, place = spelled.partition("@")
        if mark and not (name in BINARY and place.isdecimal()):
            raise ValueError(f"{program.name!r} is no epilogue program")
        if name in _COUNTS:
            count = _COUNTS[name]
        else:
            count = int(not mark) if name in BINARY else activations.parameters_of(name)
        if len(params) < count:
            raise ValueError(f"the epilogue program {program.name!r} takes more than {len(program.params)} parameters")
        steps.append(Step(name, tuple(params[:count]), int(place) if mark else None))
        del params[:count]
    if params:
        raise ValueError(f"the epilogue program {program.name!r} takes {len(program.params) - len(params)} parameters")
    return tuple(steps)


_cached_steps_of = functools.lru_cache(maxsize=256)(_steps_of)


def spelled(steps: Iterable[Step]) -> Activation | None:
    """The program of these steps; None of none."""
    steps = tuple(steps)
    names = (step.name if step.operand is None else f"{step.name}@{step.operand}" for step in steps)
    return Activation("+".join(names), tuple(p for step in steps for p in step.params)) if steps else None


def count_operands(program: Activation | None) -> int:
    """How many tensors a call has to bring."""
    places = () if program is None else (step.operand for step in steps_of(program) if step.operand is not None)
    return max(places, default=-1) + 1


def is_gated(program: Activation | None) -> bool:
    """Whether the program begins with a gate."""
    return program is not None and program.name.partition("+")[0] in _COUNTS


def parsed(name: str, params: Sequence[float]) -> Activation:
    """A program as `spelled` makes it, from a file; ValueError for what it does not make."""
    odd = sorted({type(p).__name__ for p in params if not isinstance(p, float)})
    if odd:
        raise ValueError(f"the epilogue program {name!r} has no such parameters: {', '.join(odd)} for a float")
    program = Activation(name, tuple(params))
    steps = steps_of(program)
    gates = [step for step in steps[1:] if step.name in _COUNTS]
    places = sorted({step.operand for step in steps if step.operand is not None})
    if gates or len(steps) > MAX_STEPS or places != list(range(len(places))):
        raise ValueError(f"{name!r} is no epilogue program")
    checked = spelled(
        step if step.name in BINARY.keys() | _COUNTS.keys() else _activation(step.name, step.params) for step in steps
    )
    if checked != program:
        raise ValueError(f"the epilogue program {name!r} has no such parameters: {params!r}")
    return program


def resolve(epilogue: object) -> Activation | None:
    """The program that a sequence of steps means, or None for none. Each is

    - what `activations.resolve` takes: a name ("relu"), a name with torch's parameters, an nn module, a function;
    - "add", "sub", "mul", "div", "min" or "max", whose operand is the next tensor of the call, or ("mul", 0.5), which
      has a number in its place;
    - ("clamp", low, high), either of which may be None.

    Raises TypeError or ValueError for anything else.
    """
    if not isinstance(epilogue, (tuple, list)):
        raise TypeError(f"epilogue is a tuple of steps, such as ('relu', 'add'), but is {epilogue!r}")
    if len(epilogue) > MAX_STEPS:
        raise ValueError(f"epilogue has {len(epilogue)} steps, but at most {MAX_STEPS} are allowed")
    steps: list[Step] = []
    for step in epilogue:
        place = sum(each.operand is not None for each in steps)
        steps.append(_step(step, place))
    return spelled(steps)


def _step(given: object, place: int) -> Step:
    name, *params = given if isinstance(given, tuple) and given else (given,)
    if isinstance(name, str) and name in BINARY:
        if not params:
            return Step(name, (), place)
        if len(params) > 1 or not _is_number(params[0]):
            raise ValueError(f"epilogue step {given!r} takes one number, or none for a tensor of the call")
        return Step(name, (float(params[0]),))
    if name == "clamp":
        bounds = [
            bound if given is None else given for given, bound in zip(params, (-math.inf, math.inf), strict=False)
        ]
        fit = len(params) == 2 and all(map(_is_number, bounds)) and bounds[0] <= bounds[1]
        if not fit:
            raise ValueError(
                f"epilogue step {given!r} must be ('clamp', low, high) with low <= high, or None for either"
            )
        return Step("hardtanh", tuple(map(float, bounds)))
    try:
        activation = activations.resolve(given)
    except ValueError as error:
        allowed = f"{', '.join(BINARY)}, clamp, {', '.join(activations.names())}"
        raise ValueError(
            f"epilogue step {given!r} is unknown or has other parameters; allowed are {allowed}"
        ) from error
    if activation is None:
        raise ValueError(f"epilogue step {given!r} does nothing: leave it out")
    return Step(*activation)


def _activation(name: str, params: tuple[float, ...]) -> Step:
    resolved = activations.resolve((name, *params))
    assert resolved is not None
    return Step(*resolved)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)


def why_not_operands(
    program: Activation, count: int, operands: Sequence[Any], y: Sequence[int], x: Tensor
) -> str | None:
    """Why a call with an input x and an output of shape y cannot have these operands of a program, of which there are
    to be `count`, in a few words; None if it can."""
    if len(operands) != count:
        names = ", ".join(repr(step.name) for step in steps_of(program) if step.operand is not None)
        wanted = f"{count} operand{'s'[: count != 1]} ({names})"
        return f"takes {wanted} beside its input, but was given {len(operands)}"
    for i, operand in enumerate(operands):
        if not isinstance(operand, Tensor):
            return f"takes tensors or numbers as operands, but operand {i} is a {type(operand).__name__}"
        if operand.dtype not in (*_FLOATS, x.dtype):
            allowed = ", ".join(str(dtype) for dtype in _FLOATS)
            return f"takes operands of {allowed}, but operand {i} is {operand.dtype}"
        if operand.device != x.device:
            return f"takes operands on the device of its input, {x.device}, but operand {i} is on {operand.device}"
        sizes = list(operand.shape), list(y)[len(y) - operand.dim() :]
        if operand.dim() > len(y) or any(a not in (1, b) for a, b in zip(*sizes, strict=True)):
            return (
                f"takes operands that broadcast to its output of shape {tuple(y)}, but operand {i} is of shape "
                f"{tuple(operand.shape)}"
            )
    return None

"""A module of transformers' that holds experts: what it computes, or why kernels cannot."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastlinear.layer.fitness import odd_dtype, odd_memory, runs_its_own
from fastlinear.layer.quality import coded_snr
from fastlinear.spec import activations, programs
from fastlinear.spec.activations import Activation
from fastlinear.spec.experts import Form
from fastlinear.spec.precision import Wanted

FIRST, SECOND = ("gate_up_proj", "up_proj"), "down_proj"  # parameters: of the first product, one of them; of the second
_BLOCKS = {"transformers.models.llama4.modeling_llama4.Llama4TextExperts"}
_FLAGS = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "is_concatenated")


def names_of(module: nn.Module) -> tuple[str, str]:
    """Of the parameters of both products."""
    return next(name for name in FIRST if name in module._parameters), SECOND


def takes_blocks(kind: type) -> bool:
    """Whether experts of a class take rows alone, [experts * T, K], the first T those of the first expert, most of them
    zeros: all tokens times what the router makes of them. Their weights are [in, out], and their gates in halves."""
    return f"{kind.__module__}.{kind.__qualname__}" in _BLOCKS


def why_unread(weight: Any, name: str, bias: Tensor | None) -> str | None:
    """Why the kernels cannot read the parameter of this name, or its bias, in a few words; None if they can."""
    for what, tensor in ((name, weight), (f"{name}_bias", bias)):
        if tensor is not None and (reason := odd_memory(what, tensor)) is not None:
            return reason
    if weight.dim() != 3 or 0 in weight.shape:
        return f"its {name} is {list(weight.shape)}, which holds no experts"
    return odd_dtype(weight.dtype, bias)


def why_unquantized(module: Any, asked: Wanted, transposed: bool, name: str) -> str | None:
    """Why the weights cannot be quantized as it was asked for, in a few words; None if they can, or need not."""
    if asked.scheme is None:
        return None
    if asked.scheme.calibration is not None:
        return "experts are not calibrated"
    for own in names_of(module):
        weight = module._parameters.get(own)
        if weight is None:
            return None  # frozen, of which the caller knows
        reason = asked.why_not(name, weight.shape[1 if transposed else 2])
        if reason is None and not bool(torch.stack(weight.detach().aminmax()).isfinite().all()):
            reason = f"its {own} has infinities or NaN, which no integers stand for"
        coding, least = asked.scheme.coding(), asked.scheme.least
        if reason is None and coding is not None and least is not None:
            rows = weight.mT if transposed else weight
            kept = coded_snr(rows.flatten(0, 1), coding)
            if kept < least:
                reason = f"4 bits keep {kept:.1f} dB of its {own}, less than the {least:g} that were asked for"
        if reason is not None:
            return reason
    return None


def form_of(module: Any) -> Form | str:
    """How a module of transformers' holds its experts and what they compute; or why it cannot have a fast twin, in a
    few words."""
    kind = type(module).__name__
    blocks = takes_blocks(type(module))
    if not blocks and not _is_handed(module):
        return f"{kind} is no class of experts that transformers hands to an implementation"
    if not runs_its_own(module, "forward"):
        return "its forward was replaced by one that knows nothing of kernels: convert first, then replace it"
    if vars(module).get("has_post_expert_norm"):
        return "each of its experts is followed by a norm"
    if vars(module).get("_is_expert_parallel"):
        return "its experts are spread over processes"
    program = _program_of(module)
    if program is None:
        return "its experts have an activation that is none of fastlinear's"
    if blocks:
        return Form(program, transposed=True)
    interleaved = module.has_gate and not module.is_concatenated
    return Form(program, transposed=bool(module.is_transposed), interleaved=interleaved)


def _is_handed(module: Any) -> bool:
    return all(flag in vars(module) for flag in _FLAGS) and hasattr(type(module).forward, "__wrapped__")


def _program_of(module: Any) -> Activation | None:
    """What its experts compute between their products; None where that is nothing that kernels do."""
    if takes_blocks(type(module)):
        return tried(lambda y: module.act_fn(y.chunk(2, -1)[0]) * y.chunk(2, -1)[1], False, ())
    if not module.has_gate:
        return tried(module.act_fn, False, ())
    numbers = (getattr(module, f"{front}{name}", None) for name in ("limit", "alpha") for front in ("", "swiglu_"))
    return tried(module._apply_gate, not module.is_concatenated, numbers)  # models differ in what they call these


def tried(compute: Callable[[Tensor], Any], interleaved: bool, numbers: Iterable[Any]) -> Activation | None:
    """What makes y [M, 2 N] or [M, N] of the first product's [M, 2 N], found by trying; None where that is nothing that
    kernels do. interleaved: whether gates and what goes through them take turns; numbers: what limits may be."""
    grid = torch.linspace(-12.0, 12.0, 97, dtype=torch.float32, device="cpu")
    gate, through = (t.flatten()[None] for t in torch.meshgrid(grid, grid, indexing="ij"))
    halves = torch.cat([gate, through], -1)
    try:
        with torch.no_grad():
            y = compute(torch.stack([gate, through], -1).flatten(-2) if interleaved else halves)
    except Exception:  # whatever the code of others raises
        return None
    for program in _candidates(numbers):
        want = programs.apply(program, halves)
        if y.shape == want.shape and torch.allclose(y.float(), want, rtol=1e-5, atol=1e-5):
            return program
    return None


def _candidates(numbers: Iterable[Any]) -> Iterator[Activation]:
    yield from map(Activation, programs.GATES)
    yield from (Activation(name) for name in activations.names() if activations.parameters_of(name) == 0)
    floats = {float(each) for each in numbers if isinstance(each, (int, float)) and not isinstance(each, bool)}
    for limit in sorted(floats):
        yield Activation("swiglu_limited", (limit,))
        yield from (Activation("swiglu_oai", (alpha, limit)) for alpha in sorted(floats))

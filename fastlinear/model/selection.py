"""Which linear layers of a model convert takes, and the reason for each one that it leaves."""

from __future__ import annotations

import functools
import logging
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

import fastlinear._extras as _extras
from fastlinear.layer import attention, experts, experts_frozen, linear, takeover
from fastlinear.layer.fitness import conv1d, dtype_of, features_of, why_not
from fastlinear.layer.frozen import is_frozen
from fastlinear.spec.formats import DTYPES, name_of
from fastlinear.spec.precision import ANYHOW, AS_HELD, Wanted

_log = logging.getLogger("fastlinear")

Pattern = str | type[nn.Module]
Patterns = Pattern | Iterable[Pattern]
Filter = Callable[[nn.Module, str], bool]

# On a layer that the caller chose to leave alone: why, for the report.
REASON = "_fastlinear_reason"
_ON_META = " is on device meta"  # how a reason ends that is none any more once the parameters are filled


def linear_layers(model: nn.Module) -> dict[nn.Module, list[str]]:
    """The layers of `model` that multiply by a weight, of any linear class, fast or not, with all their names; among
    them those of other packages, which quantized them."""
    classes = (nn.Linear, conv1d() or nn.Linear)
    return _named(model, lambda m: isinstance(m, classes) or linear.is_fast(m) or takeover.is_foreign(m))


def expert_layers(model: nn.Module) -> dict[nn.Module, list[str]]:
    """The modules of `model` that hold the experts of a mixture as parameters, fast or not, with all their names."""
    return _named(model, experts.are_experts)


def lookup_layers(model: nn.Module) -> dict[nn.Module, list[str]]:
    """The embeddings of `model`, with all their names."""
    return _named(model, lambda module: isinstance(module, nn.Embedding))


def _named(model: nn.Module, wanted: Callable[[nn.Module], bool]) -> dict[nn.Module, list[str]]:
    layers: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if wanted(module):
            layers.setdefault(module, []).append(name)
    return layers


def excluded_lookups(model: nn.Module, exclude: Patterns | None) -> set[nn.Module]:
    """The embeddings that a pattern of `exclude` matches."""
    lookups, patterns = lookup_layers(model), as_patterns("exclude", exclude) or []
    return {layer for pattern in patterns for layer in _matched(model, lookups, pattern)}


def is_fast(layer: nn.Module) -> bool:
    """True for fast linear layers and fast experts."""
    return linear.is_fast(layer) or experts.is_fast_experts(layer)


def attentions(model: nn.Module) -> dict[nn.Module, nn.MultiheadAttention]:
    """By its `out_proj`, each attention that holds its other projection itself: both are converted, or neither."""
    return {module.out_proj: module for module in model.modules() if type(module) is nn.MultiheadAttention}


_LOW_RANK = 64  # up to which an adapter's call gained 1 to 3 us, and its tuning took 150 ms: the worth of 100,000 calls


def adapters(model: nn.Module) -> set[nn.Module]:
    """The layers that peft put beside others, lora_A and lora_B, say."""
    kind = getattr(sys.modules.get("peft.tuners.tuners_utils"), "BaseTunerLayer", None)
    holders = [module for module in model.modules() if kind is not None and isinstance(module, kind)]
    if holders and (reason := _extras.why_not("peft")) is not None:
        _tell_once(f"adapters are not told from other layers: that needs {reason}")
        return set()
    own = (getattr(module, name, None) for module in holders for name in module.adapter_layer_names)
    return {layer for each in own if isinstance(each, nn.Module) for layer in each.modules()}


@functools.cache
def _tell_once(text: str) -> None:
    _log.warning(text)


def why_skipped(layer: nn.Module) -> str | None:
    """Why `layer` is not fast; None where nothing stands against it."""
    reason: str | None = vars(layer).get(REASON)
    if reason is not None and reason.endswith(_ON_META):
        on_meta = any(t.is_meta for t in (*layer.parameters(), *layer.buffers()))
        return reason if on_meta else "its parameters were on device meta when convert was called: call it again"
    return reason or (experts.why_not(layer) if experts.are_experts(layer) else why_not(layer))


def choose(
    model: nn.Module,
    include: Patterns | None,
    exclude: Patterns | None,
    filter_fn: Filter | None,
    asked: Wanted = ANYHOW,
    lookups: bool = False,
) -> dict[nn.Module, str | None]:
    """For every linear layer, and the experts of every mixture, the reason to leave it alone, or None to convert it
    (arguments as in `convert`).

    Warns of a pattern that matches no layer, nor with `lookups` an embedding that is excluded, and when there is
    nothing to convert.
    """
    included_by, excluded_by = as_patterns("include", include), as_patterns("exclude", exclude)
    layers = linear_layers(model) | expert_layers(model)
    included = _hits(model, layers, "include", included_by or [])
    known = layers | lookup_layers(model) if lookups else layers
    excluded = _hits(model, known, "exclude", excluded_by or [])
    heads, mixtures, small = attentions(model), expert_layers(model), adapters(model)
    uses: dict[Any, list[str]] = {}
    for name, parameter in _each_once(model):
        uses.setdefault(parameter, []).append(name)

    def reason(layer: nn.Module, name: str) -> str | None:
        if is_fast(layer) and _is_already(layer, name, asked):
            return "already fast"
        of_experts = layer in mixtures
        if experts_frozen.are_frozen(layer) if of_experts else is_frozen(layer):
            return "frozen in another precision, which unfreeze makes room for"
        if layer in excluded:
            return f"excluded by {excluded[layer]}"
        if included_by is not None and layer not in included:
            return "not among the included layers"
        if of_experts:
            refused = experts.why_not(layer, asked, name)
            return refused or (None if filter_fn is None or filter_fn(layer, name) else "refused by filter_fn")
        whole = heads.get(layer)
        obstacle = (
            why_not(layer, asked, name) if whole is None else attention.why_not(whole, asked, name.rpartition(".")[0])
        )
        if obstacle is not None:
            return obstacle
        if takeover.is_foreign(layer):
            return None if filter_fn is None or filter_fn(layer, name) else "refused by filter_fn"
        if layer in small and layer not in included and (rank := min(features_of(layer))) <= _LOW_RANK:
            return f"an adapter of rank {rank} gains less than its tuning costs: name it in include to have it"
        rounds = asked.packed not in (None, name_of(dtype_of(layer)))
        if rounds and layer not in included:
            form = DTYPES.get(asked.packed or "", asked.packed)
            if name.split(".")[-1] == "lm_head":
                return f"packing an lm_head as {form} is lossy: name it in include to have it"
            if len(uses[layer.weight]) > 1:
                names = " and ".join(uses[layer.weight])
                return f"packing a shared weight ({names}) as {form} is lossy: name the layer in include to have it"
        return None if filter_fn is None or filter_fn(layer, name) else "refused by filter_fn"

    reasons = {layer: reason(layer, names[0]) for layer, names in layers.items()}
    if all(reasons.values()) and "already fast" not in reasons.values():
        why = "; ".join(sorted({r for r in reasons.values() if r})) or "it has no linear layer"
        warnings.warn(f"nothing to convert in {type(model).__name__}: {why}", stacklevel=3)
    return reasons


def _each_once(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of each module by its first name: a module at two places shares them with none."""
    for prefix, module in model.named_modules():
        yield from module.named_parameters(prefix, recurse=False, remove_duplicate=False)


def _is_already(layer: Any, name: str, asked: Wanted) -> bool:
    if asked.packed is None and asked.everywhere.is_as(AS_HELD):
        return True
    if asked.why_not(name, layer.in_features) is not None:
        return False
    if experts.is_fast_experts(layer):
        return linear.precision_of(layer).is_as(experts.own(asked.of(name, layer.held)))
    return linear.precision_of(layer).is_as(asked.of(name, dtype_of(layer)))


def as_patterns(argument: str, patterns: Any) -> list[Pattern] | None:
    """`patterns` as a list; raises TypeError for anything but names, globs, module types and iterables of them."""
    if patterns is None:
        return None
    is_single = isinstance(patterns, (str, type)) or not isinstance(patterns, Iterable)
    several: list[Any] = [patterns] if is_single else list(patterns)
    for pattern in several:
        if not isinstance(pattern, str) and not (isinstance(pattern, type) and issubclass(pattern, nn.Module)):
            raise TypeError(f"{argument} takes names, globs and nn.Module types, but was given {pattern!r}")
    return several


def _hits(
    model: nn.Module, layers: dict[nn.Module, list[str]], argument: str, patterns: list[Pattern]
) -> dict[nn.Module, str]:
    """The layers that a pattern matches, each with the text of that pattern."""
    hits: dict[nn.Module, str] = {}
    for pattern in patterns:
        text = repr(pattern) if isinstance(pattern, str) else pattern.__name__
        found = _matched(model, layers, pattern)
        hits.update(dict.fromkeys(found, text))
        if not found:
            example = repr(next(iter(layers.values()))[0]) if layers else "(it has none)"
            warnings.warn(
                f"{argument}={text} matches no linear layer of {type(model).__name__}; a pattern must match a whole "
                f"dotted name or the front of one up to a dot, and the names look like {example}",
                stacklevel=4,
            )
    return hits


def _matched(model: nn.Module, layers: dict[nn.Module, list[str]], pattern: Pattern) -> list[nn.Module]:
    return [layer for layer, names in layers.items() if any(_matches(model, pattern, name) for name in names)]


def _matches(model: nn.Module, pattern: Pattern, name: str) -> bool:
    """Whether `pattern` means the module called `name`, or a container that it lies in."""
    parts = name.split(".")
    prefixes = [".".join(parts[: i + 1]) for i in range(len(parts))]
    if isinstance(pattern, str):
        return any(fnmatchcase(prefix, pattern) for prefix in prefixes)
    return any(isinstance(model.get_submodule(prefix), pattern) for prefix in ("", *prefixes))

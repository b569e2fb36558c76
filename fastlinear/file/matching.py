"""Whether a model is the one that a file says it holds, found out before anything of the model is touched."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastlinear.file.manifest import Fused, Layer, Manifest, member, plain_names
from fastlinear.file.safetensors import Contents, Entry, shown
from fastlinear.layer import experts, experts_frozen, linear, mixture
from fastlinear.layer.embedding import is_packed, why_no_rows
from fastlinear.layer.fitness import dtype_of, is_transposed, why_no_twin
from fastlinear.layer.frozen import PLACEHOLDER, is_frozen, shared_as
from fastlinear.layer.shard import local
from fastlinear.model import fusion
from fastlinear.spec.activations import recognize

_SHOWN = 10  # names in a message


class Held(NamedTuple):
    """A parameter or buffer and its place in a model."""

    module: nn.Module
    attribute: str
    name: str  # dotted
    tensor: Tensor
    kind: str  # "parameter", "buffer", or "transient" for a buffer that no state dict has


def tensors_of(model: nn.Module) -> Iterator[Held]:
    """All that torch knows of, and frozen weights as tensors on meta; where processes share one, this one's part. A
    module at two places goes by its first name."""
    for prefix, module in model.named_modules():
        for attribute, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None and attribute == "weight" and is_frozen(module):
                tensor = torch.empty(_weight_shape(module), dtype=dtype_of(module), device="meta")
            if tensor is None and attribute == "weight" and is_packed(module):
                tensor = module.weight  # on meta
            if tensor is None and experts_frozen.are_frozen(module) and attribute in module.names:
                tensor = experts_frozen.on_meta(module, attribute)
            if tensor is not None and attribute != PLACEHOLDER:
                kind = "transient" if attribute in module._non_persistent_buffers_set else "buffer"
                kind = "parameter" if attribute in module._parameters else kind
                yield Held(module, attribute, member(prefix, attribute), local(tensor), kind)


class Match(NamedTuple):
    """A model that a file fits."""

    modules: dict[str, nn.Module]  # by first names
    stored: Mapping[str, Entry]  # what the file has plain, by all its names
    plain: list[Held]  # what is to be replaced by that
    pairs: list[fusion.Pair]  # activations to be absorbed


def match(model: nn.Module, said: Manifest, contents: Contents) -> Match:
    """How the file fits the model; ValueError, telling names, where it does not."""
    stored = plain_names(said, contents)
    held = {each.name: each for each in tensors_of(model)}
    needed = [name for name, each in held.items() if each.kind != "transient" or each.tensor.is_meta]
    given = {**stored, **{layer.weight: None for layer in said.layers}}
    missing = [name for name in needed if name not in given]
    unexpected = [name for name in given if name not in held and name not in said.transient]
    need_the_same(model, missing, unexpected)
    modules, slots = dict(model.named_modules()), {fused.layer: fused for fused in said.fused}
    pairs = [_pair(modules, layer, slots.get(layer.name)) for layer in said.linear]
    plain = [held[name] for name in needed if name in stored]
    if other := [each for each in plain if tuple(each.tensor.shape) != stored[each.name].shape]:
        first = other[0]
        raise ValueError(
            f"it has {listed([each.name for each in other])} in other shapes than this {type(model).__name__}, the "
            f"first {list(stored[first.name].shape)}, not {list(first.tensor.shape)}"
        )
    for layer in said.lookups:
        _check_lookup(modules[layer.name], layer)
    for name, products in said.mixtures.items():
        _check_mixture(modules[name], name, products)
    return Match(modules, stored, plain, [pair for pair in pairs if pair is not None])


def need_the_same(model: nn.Module, missing: list[str], unexpected: list[str]) -> None:
    """ValueError where a file lacks tensors of a model, or has others."""
    if missing or unexpected:
        kind = type(model).__name__
        parts = [f"lacks {listed(missing)} of this {kind}"] if missing else []
        parts += [f"has {listed(unexpected)} that this {kind} has not"] if unexpected else []
        raise ValueError(f"it {' and '.join(parts)}")


def listed(names: list[str]) -> str:
    """How many there are, and the first of them, for a message."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{len(names)} tensor{'s'[: len(names) > 1]} ({', '.join(map(_plainly, names[:_SHOWN]))}{more})"


def _plainly(name: str) -> str:
    return name if name.isprintable() and len(name) < 200 else shown(name)


def _check_lookup(module: Any, layer: Layer) -> None:
    """ValueError where the model's module cannot be the embedding of the file."""
    reason, own = why_no_rows(module), f"its embedding {layer.name!r}"
    if reason is not None:
        raise ValueError(f"{own} is packed, but in this model {reason}")
    if (shape := tuple(module.weight.shape)) != (layer.n, layer.k):
        raise ValueError(f"{own} is {layer.n} x {layer.k}, but {' x '.join(map(str, shape))} in this model")


def _check_mixture(module: Any, name: str, products: tuple[Layer, ...]) -> None:
    """ValueError where the model's module is not the experts of the file."""
    form = module._form if experts.is_fast_experts(module) else mixture.form_of(module)
    if isinstance(form, str):
        raise ValueError(f"its experts {name!r} are fast, but in this model {form}")
    first = products[0]
    sizes = tuple((each.experts, each.n, each.k) for each in products)
    own = experts.names_of(module), experts.sizes_of(module)
    if own != (tuple(each.name.rpartition(".")[2] for each in products), sizes):
        raise ValueError(f"its experts {name!r} are {sizes}, but {own[1]} in this model")
    if (form.program, form.transposed, form.interleaved) != (first.activation, first.transposed, first.interleaved):
        raise ValueError(f"its experts {name!r} compute something else than in this model, or are held otherwise")


def _pair(modules: Mapping[str, nn.Module], layer: Layer, fused: Fused | None) -> fusion.Pair | None:
    """What the model's layer is still to absorb; ValueError where it cannot become the one of the file."""
    module: Any = modules[layer.name]
    fast = linear.is_fast(module)
    reason = why_no_twin(module)
    if reason is not None:
        raise ValueError(f"its layer {layer.name!r} is fast, but in this model {reason}")
    shape = (layer.k, layer.n) if layer.transposed else (layer.n, layer.k)
    held = _weight_shape(module)
    if held != shape or is_transposed(module) != layer.transposed:
        k, n = held if is_transposed(module) else held[::-1]
        part = "" if shared_as(module) is None else f", of which this process has {k} x {n},"
        raise ValueError(f"its layer {layer.name!r} is {layer.k} x {layer.n}, but {module!r}{part} in this model")
    holder = modules.get(fused.holder) if fused else None
    there = _at(holder, fused.slot) if fused and holder is not None else None
    if fast:
        absorbed = isinstance(there, fusion.Absorbed) and there.linear is module
        if module.activation != layer.activation or absorbed != (fused is not None):
            raise ValueError(f"its layer {layer.name!r} was fused with other activations than in this model")
        return None
    if layer.activation is None:
        return None
    if fused is None or holder is None or recognize(there) != layer.activation:
        raise ValueError(
            f"its layer {layer.name!r} computes {layer.activation.name}, which this model has not got "
            + (f"as {shown(member(fused.holder, fused.slot))}" if fused else "there: it was built as a FastLinear")
        )
    return fusion.Pair(module, holder, fused.slot, layer.activation)


def _at(holder: nn.Module, slot: str) -> object:
    return holder._modules.get(slot) or vars(holder).get(slot)


def _weight_shape(module: Any) -> tuple[int, ...]:
    """Unread, where it is frozen."""
    return module.weight_shape if linear.is_fast(module) else tuple(local(module.weight).shape)

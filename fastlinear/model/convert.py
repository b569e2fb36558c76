"""The swap of a model's linear layers for fast ones, and back.

What can be refused is refused before the first layer changes, and what fails later is undone: no model is ever left
half-converted.
"""

from __future__ import annotations

import copy
import logging
import warnings
from contextlib import ExitStack
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastlinear.layer import attention, experts, experts_takeover, linear, takeover
from fastlinear.layer.fitness import dtype_of, taken_over
from fastlinear.layer.frozen import Frozen
from fastlinear.layer.shard import shard_of
from fastlinear.model import chains, fusion, vocabulary
from fastlinear.model.agreement import agreed
from fastlinear.model.arguments import check_example, check_module
from fastlinear.model.encoders import allow_bypass, forbid_bypasses
from fastlinear.model.freezing import freeze as freeze_model
from fastlinear.model.freezing import unfreeze
from fastlinear.model.selection import REASON, Filter, Patterns, attentions, choose, excluded_lookups, is_fast
from fastlinear.model.tuning import fast_layers, run_to_tune
from fastlinear.spec.precision import Precision, Wanted, wanted
from fastlinear.spec.schemes import Int8WeightOnly, Scheme

Model = TypeVar("Model", bound=nn.Module)

_TUNE = ("lazy", "now", "off")
_log = logging.getLogger("fastlinear")


def convert(
    model: Model,
    *,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    filter_fn: Filter | None = None,
    dtype: torch.dtype | None = None,
    accumulate: str = "fp32",
    quantize: Scheme | None = None,
    products: torch.dtype | None = None,
    embeddings: Int8WeightOnly | None = None,
    fuse: bool = True,
    inplace: bool = False,
    freeze: bool = False,
    tune: str = "lazy",
    example_inputs: Any = None,
) -> Model:
    """A copy of `model` whose linear layers run on prepacked weights, with the activations that follow them fused.

    The copy shares parameters and buffers with `model`, which stays as it is; `inplace=True` changes `model` itself.
    State dict, hooks, training and gradients work as before. In training mode a layer computes on its plain parameter,
    in eval mode on the weight as it is packed, with gradients through that. Converted are nn.Linear (`model` itself may
    be one), transformers' Conv1D and the experts of its mixtures (MoE), and both projections of nn.MultiheadAttention,
    which then is a FastMultiheadAttention with layers called `in_proj` and `out_proj`; `report` names the layers that
    were left alone, and why.

    include, exclude: dotted names, globs or module types, one or several; `exclude` wins. A name or type of a
        container means all layers in it; a glob must match a whole dotted name ("encoder.*.fc1"), or the front of one
        up to a dot, so "layers.1" never means "layers.10".
    filter_fn: filter_fn(module, name) is asked about every layer that is left, and converts it by returning True.
    dtype: torch.bfloat16 or torch.float16 packs the weights in 16 bits; parameters and activations keep their dtypes.
        As this is lossy for a parameter of another dtype, an `lm_head`, and a layer whose weight has a second use (an
        embedding's, say), are then left alone unless `include` matches them.
    accumulate: "fp16" admits kernels that sum up to 64 products in fp16 before they go on in fp32.
    quantize: `Int8Dynamic()`, `Int8WeightOnly()` or `Int8Static(calibration)` packs the weights in 8 bits,
        `Int4Dynamic()` or `Int4WeightOnly()` in 4 bits in groups; as lossy as `dtype`, and with the same exceptions.
        Weights that are int8 tensors of torchao's are taken over as they are.
        Of layers that others quantized, see below, those of 8 bits may have `Int8Dynamic()`, and those of 4 bits
        `Int4Dynamic()`: it then says how their inputs are quantized.
    products: torch.bfloat16 or torch.float16 multiplies in 16 bits what may be fp32 before and after: weights are
        packed so, rows of x are rounded once, to nearest, and sums, biases and activations are fp32. As lossy as
        `dtype`, and with the same exceptions; with `Int8WeightOnly` it rounds x alone. None does what torch was told
        when this is called: bf16 in layers of fp32 after torch.set_float32_matmul_precision("medium") or
        torch.backends.mkldnn.matmul.fp32_precision = "bf16", unless another of these wishes is given; torch.float32
        does not round.
    embeddings: Int8WeightOnly() packs embeddings in 8 bits, and unpacks the rows that are looked up; so it packs the
        head of a language model (linear layers of an embedding's weight, or called `lm_head`), whatever `quantize`
        says. What was tied stays so, over one pack, which is frozen at once; `exclude` of one of them leaves all alone.
    fuse: absorb an activation where it is all that happens to the output of a converted layer, in nn.Sequential or in
        a module whose source says so. Each call proves that anew: where the layer is called by something else, has
        hooks or was wrapped (by LoRA, say), or its activation was replaced or taken away, it computes what nn.Linear
        does and the activation, if there is one, runs as it did, at the cost of a pass over the output. So it is in
        `torch.compile`, too.
    freeze: drop the weights of the converted layers, as `freeze(model)` does. With `inplace` each goes as soon as it
        is packed, so that memory peaks at the model and one layer; what `dtype` or `quantize` rounds is then lost, and
        an error in tuning leaves the model converted.
    tune: "lazy" chooses kernels at the first call with a new batch size, "now" by running the model on
        `example_inputs` (see `tune`), "off" by a fixed rule, without measuring.

    Layers that other packages quantized are taken over as they are, whatever `dtype` says, and frozen: those of
    GPTQ, AWQ (gemm), compressed-tensors (pack-quantized, int8, fp8), bitsandbytes (nf4, fp4, int8), HQQ (4 bits,
    axis 1), torchao (4 bits, and 8 in groups) and fp8 in blocks, transformers' experts in fp8 too; before their
    first call, in which some repack themselves. What is taken over wants no package any more, and `unconvert` makes
    nn.Linear of it. `report` has the reason of others.

    Layers that are fast already stay as they are, unless `dtype`, `accumulate`, `quantize` or `products` is given: then
    they take all four.

    Of a model whose parameters are DTensors, each process packs its own part; all have to call this alike.

    nn.TransformerEncoder leaves torch's fused fast path, which would bypass the converted layers; as always without
    that path, outputs at padded positions are arbitrary instead of zero.

    Raises TypeError or ValueError for arguments of a wrong kind; warns (UserWarning) of a pattern that matches no
    layer and of a model with nothing to convert. Where processes share the model, ValueError in all of them if they
    disagree about a layer, and RuntimeError if it failed in one, or one does not call it within a minute.
    """
    _check_arguments(model, filter_fn, {"fuse": fuse, "inplace": inplace, "freeze": freeze}, tune, example_inputs)
    asked = wanted(dtype, accumulate, quantize, products)
    names = {module: name for name, module in model.named_modules()}
    with agreed(model, "convert") as story:
        reasons = choose(model, include, exclude, filter_fn, asked, lookups=embeddings is not None)
        tables = vocabulary.tables_of(model, embeddings, reasons, excluded_lookups(model, exclude))
        story.update((names[layer], f"{asked.text()}, {_placed(layer, reason)}") for layer, reason in reasons.items())
    wished = [layer for layer, reason in reasons.items() if reason is None]
    mixtures = [layer for layer in wished if experts.are_experts(layer)]
    chosen = [layer for layer in wished if not experts.are_experts(layer) and not linear.is_fast(layer)]
    fast = [layer for layer in wished if linear.is_fast(layer)]
    pairs = fusion.find_pairs(model, set(chosen)) if fuse else []
    activations = {pair.linear: pair.activation for pair in pairs}

    result = model if inplace else _copy_sharing_tensors(model)
    twin = dict(zip(model.modules(), result.modules(), strict=True))
    heads, mode, around = attentions(model), "off" if tune == "off" else "lazy", takeover.dtype_around(model)
    with ExitStack() as undo:
        for whole in (heads[layer] for layer in chosen if layer in heads):
            _open_up(undo, twin[whole], names[whole], mode, asked)
        for layer in chosen:
            over, precision = _taken(undo, layer, twin[layer], names[layer], asked, around)
            linear.adopt(twin[layer], activations.get(layer), mode, names[layer], precision, over)
            undo.callback(linear.release, twin[layer])
        for module in result.modules():
            undo.callback(takeover.without_unpacking(module))
        for layer in fast:
            _set_precision(undo, twin[layer], _next(layer, asked, names[layer]))
        for layer in mixtures:
            _adopt_experts(undo, twin[layer], names[layer], mode, asked, around)
        for table in tables:
            vocabulary.pack(undo, table, twin, names, mode)
        _absorb(undo, pairs, twin)
        if asked.scheme is not None and asked.scheme.chain:
            for first, out in chains.find(result, {twin[layer] for layer in (*chosen, *fast)}):
                _set_precision(undo, first, linear.precision_of(first)._replace(out=out))
        for module in forbid_bypasses(result):
            undo.callback(allow_bypass, module)
        if freeze and any(map(is_fast, result.modules())):
            undo.pop_all()  # a weight that is gone cannot be brought back
            freeze_model(result)
        if tune == "now":
            run_to_tune(result, example_inputs, None)
        undo.pop_all()
    for layer, reason in reasons.items():
        if reason is not None and not is_fast(layer):
            vars(twin[layer])[REASON] = reason
    told = len(chosen), len(mixtures), len(reasons), len(pairs)
    _log.info("converted %d linear layers and experts of %d mixtures of %d, fused %d activations", *told)
    return result


def _placed(layer: Any, reason: str | None) -> str:
    """What another process must say of a layer, too: where its weight lies, and why it is left alone."""
    shard = shard_of(layer._parameters.get("weight"))
    where = "" if shard is None else f" of {tuple(shard.shape)} as {', '.join(map(str, shard.placements))}"
    return f"a weight{where}, {reason or 'fast'}"


def _taken(
    undo: ExitStack, layer: Any, twin: Any, name: str, asked: Wanted, around: torch.dtype | None
) -> tuple[Frozen | None, Precision]:
    """What stands for a layer's weight where somebody else has quantized that, and what it computes in."""
    told = takeover.found(layer)
    if isinstance(told, takeover.Found):
        taken = takeover.take(layer, told, asked, name, around, False)
        undo.callback(takeover.put_back, twin, takeover.put_in_place(twin, taken.linear))
        return taken.frozen, taken.precision
    over = taken_over(layer, asked)
    if over is not None:  # which `release` would bring back as numbers
        undo.callback(_set_weight, twin, layer._parameters["weight"])
    return over, asked.of(name, dtype_of(layer))


def _absorb(undo: ExitStack, pairs: list[fusion.Pair], twin: dict[Any, Any]) -> None:
    for pair in pairs:
        there = pair._replace(linear=twin[pair.linear], holder=twin[pair.holder])
        fusion.absorb(there)
        undo.callback(fusion.restore, there.holder, there.slot)


def _set_weight(layer: Any, weight: Any) -> None:
    layer._parameters["weight"] = weight


def _open_up(undo: ExitStack, whole: Any, name: str, mode: str, asked: Wanted) -> None:
    """Makes an attention's projections layers, of which the first, which no model has, becomes fast here."""
    attention.open_up(whole)
    undo.callback(attention.close, whole)
    ahead = f"{name}.in_proj" if name else "in_proj"
    linear.adopt(whole.in_proj, None, mode, ahead, asked.of(ahead, dtype_of(whole.in_proj)))
    undo.callback(linear.release, whole.in_proj)


def _adopt_experts(
    undo: ExitStack, module: Any, name: str, mode: str, asked: Wanted, around: torch.dtype | None
) -> None:
    if experts.is_fast_experts(module):
        undo.callback(experts.set_precision, module, module._precision)
        experts.set_precision(module, _next(module, asked, name))
    elif experts_takeover.are_foreign(module):
        undo.callback(experts.take_over(module, mode, name, around or torch.float32))
    else:
        experts.adopt(module, mode, name, asked.of(name, experts.dtype_of(module)))
        undo.callback(experts.release, module)


def _next(layer: nn.Module, asked: Wanted, name: str) -> Precision:
    """What a layer that is fast already is told to compute in."""
    if asked.packed is None:
        return linear.precision_of(layer)._replace(accumulate=asked.everywhere.accumulate)
    return asked.of(name, layer.held if experts.is_fast_experts(layer) else dtype_of(layer))  # type: ignore[arg-type]


def _set_precision(undo: ExitStack, layer: nn.Module, precision: Precision) -> None:
    undo.callback(linear.set_precision, layer, linear.precision_of(layer))
    linear.set_precision(layer, precision)


def unconvert(model: Model) -> Model:
    """Undo `convert` and `freeze` in place, with activations and torch's encoder fast path, and return the model.

    A FastLinear whose activation was not absorbed from within `model` stays, with a warning: nn.Linear has none.
    """
    check_module("unconvert", model)
    unfreeze(model)
    for module in list(model.modules()):
        for slot, child in list(module._modules.items()):
            if isinstance(child, fusion.Absorbed):
                layer = child.linear
                fusion.restore(module, slot)
                if layer is not None and linear.is_fast(layer):
                    linear.release(layer)
    for name, module in model.named_modules():
        vars(module).pop(REASON, None)
        allow_bypass(module)
        if experts.is_fast_experts(module):
            experts.release(module)
        if linear.is_fast(module) and not linear.has_own_activation(module):
            linear.release(module)
        elif linear.is_fast(module):
            warnings.warn(
                f"unconvert left {name!r} fast: its activation {module.activation.name!r} was not absorbed from a "
                f"module within this {type(model).__name__}",
                stacklevel=2,
            )
    for module in list(model.modules()):
        if isinstance(module, attention.FastMultiheadAttention):
            attention.close(module)
    return model


def stock_copy(model: Model) -> Model:
    """A copy without fast layers that shares all tensors, but for the weights of frozen layers, which it unpacks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of layers with an activation of their own, which stay
        return unconvert(_copy_sharing_tensors(model))


def refresh(model: Model) -> Model:
    """Drop all packed weights, so that the next call packs them anew, and return the model.

    Changes of weights are seen by themselves: torch counts them, and where it does not (fused optimizers, collectives,
    writes through `.data`, an alias or another process) a sample of the contents tells. Needed only after a change that
    goes unseen: a few elements written through `.data`. Frozen layers keep their packs.
    """
    check_module("refresh", model)
    for layer in fast_layers(model):
        linear.refresh(layer)
    for module in model.modules():
        if experts.is_fast_experts(module):
            module._reset()  # type: ignore[operator]
    return model


def _copy_sharing_tensors(model: Model) -> Model:
    held = [t for module in model.modules() for t in vars(module).values() if isinstance(t, Tensor)]
    shared = (*model.parameters(), *model.buffers(), *held)
    try:
        return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})
    except Exception as error:  # whatever the model's own attributes raise when they are copied
        raise TypeError(f"{type(model).__name__} cannot be copied ({error}): convert it with inplace=True") from error


def _check_arguments(model: object, filter_fn: object, flags: dict[str, Any], tune: object, example: object) -> None:
    check_module("convert", model)
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"filter_fn must be a function of (module, name) or None, but is {filter_fn!r}")
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise TypeError(f"{name} must be True or False, but is {flag!r}")
    if tune not in _TUNE:
        raise ValueError(f"tune must be one of {', '.join(map(repr, _TUNE))}, but is {tune!r}")
    if tune == "now" and example is None:
        raise ValueError("tune='now' runs the model, so it needs example_inputs")
    if tune != "now" and example is not None:
        raise ValueError(f"example_inputs are used by tune='now' alone, but tune is {tune!r}")
    if example is not None:
        check_example(example)

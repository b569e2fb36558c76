"""`model.generate` on a preallocated cache, each of whose calls runs a recorded graph.

Dynamo takes seconds for a graph of a language model, most of what one waits for before the first token, and guards it
by a millisecond a token. `graph/recording.py` takes a fraction of that, and what Dynamo guards is known here: the
modules are looked at by `Modules`, the shapes and numbers of a call are what its recording is found by, and a cache is
one of transformers' own, of which `hf/caches.py` says what decides a call beside its tensors.

The model gets two attributes: a forward, and in the place of transformers' method by which `generate` has a cache made
one that asks for a preallocated cache where a graph may run on it. So what a user asks for, saves or copies of the
model's `generation_config` is what it was.
"""

from __future__ import annotations

import inspect
import itertools
import logging
from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import StaticCache
from transformers.generation.configuration_utils import GenerationMode
from transformers.utils.generic import ModelOutput

import fastlinear.hf.caches as caches
from fastlinear._modes import undisturbed
from fastlinear.graph import options as backend_options
from fastlinear.graph.backend import Graph, function_of, rewritten
from fastlinear.graph.modules import Modules
from fastlinear.graph.recording import Fakes, Kept, Recording, Size, Unrecorded, alone, record, sources_of, unchanged

_log = logging.getLogger("fastlinear")

_MOST = 64  # recordings of a model, the oldest of which go
_TRIAL = 4  # times that the modules have changed between any two calls, from which on none is recorded
_MAKE = "_prepare_cache_for_generation"  # transformers' method that `generate` has a cache of
_MODES = {getattr(GenerationMode, name) for name in ("GREEDY_SEARCH", "SAMPLE", "BEAM_SEARCH", "BEAM_SAMPLE")}
_OF_NUMBERS = {"GuardOnDataDependentSymNode", "DataDependentOutputException", "DynamicOutputShapeException"}


def prepare_generation(model: Any, length: int = 1024, **options: Any) -> Any:
    """Has `model.generate` run on a preallocated cache and on recorded graphs, and returns the model.

    model: one of transformers' that generates text, in eval mode; its linear layers, fast or not, run as through
        `torch.compile(backend="fastlinear")`.
    length: tokens, of prompt and answer, that a cache has room for. Calls up to it share their graphs; the first that
        wants more doubles it for those that follow. Room that is not used costs address space and little time.
    options: those of the backend.

    A graph is recorded when a prompt, of whatever length, or a token first comes, and again where the batch is another
    one, the cache longer or a module was changed. A call that no graph can stand for (of models whose cache cannot be
    preallocated, with hooks, numbers that decide what is done) runs as before, and a warning says why; so does any in
    training, with gradients or autocast, and all of a `generate` on another cache, with an assistant or hidden states.
    Copies of the model are prepared, too, and record anew. `del model.forward` ends it.

    Raises TypeError for a model that does not generate, or whose forward was replaced, and ValueError for a length that
    is not positive, and for unknown options.
    """
    if not hasattr(model, "generate") or not hasattr(model, "generation_config"):
        raise TypeError(
            f"prepare_generation takes a model of transformers that generates, but got {type(model).__name__}"
        )
    if not isinstance(vars(model).get("forward"), (Generation, type(None))):
        raise TypeError(f"the forward of this {type(model).__name__} was replaced, by which it would be passed over")
    if not isinstance(length, int) or length < 1:
        raise ValueError(f"length must be a positive number of tokens, but is {length!r}")
    generation = Generation(model, length, options)
    if generation.why_not is not None:
        generation.tell(generation.why_not)
    model.forward = generation
    setattr(model, _MAKE, generation.make_cache)
    return model


class Recorded(NamedTuple):
    """A call's graph. run: takes the tensors of a call, its size if that may differ, and `weights`; kind, fields: the
    model's output, the index of a tensor of the graph's for each that is none of the cache."""

    run: Any
    graph: Graph
    size: Size | None
    weights: list[Tensor]
    kind: type[ModelOutput]
    fields: dict[str, int | None]


class Call(NamedTuple):
    """What a call is given. key: equal for calls of one graph, as far as `Size.holds`; tensors: by name; dims: for each
    those that are its number of rows."""

    key: Hashable
    rows: int
    tensors: dict[str, Tensor]
    dims: list[tuple[int, ...]]


_FORGOTTEN = {"_known", "_modules", "_changes", "_told", "_sizes"}  # of what a copy knows nothing


class Generation:
    """What stands for the forward of a model. why_not: why no call of it has a graph, in a few words, or None."""

    def __init__(self, model: Any, length: int, options: dict[str, Any]) -> None:
        self.model, self.length, self.options = model, length, backend_options.options(options, None)
        self.why_not = _why_not(model)
        self.__signature__ = inspect.signature(type(model).forward.__get__(model))
        self._forget()

    def _forget(self) -> None:
        self._known: dict[Hashable, list[Recorded | str]] = {}
        self._modules: Modules | None = None
        self._changes = 0  # of the modules, since a graph was run
        self._told: str | None = None
        self._sizes: list[caches.Sizes] | None = None  # of the layers of a cache

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in _FORGOTTEN}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()

    def tell(self, reason: str) -> None:
        """Warns of a reason, if it is another one than before."""
        if reason != self._told:
            self._told = reason
            _log.warning("%s generates without a graph: %s", type(self.model).__name__, reason)

    def make_cache(self, config: Any, kwargs: dict[str, Any], mode: Any, *rest: Any) -> Any:
        """transformers' method, which makes the cache that `config` of a `generate` asks for."""
        if vars(self.model).get("forward") is self and self._may_run() and _is_free(config, kwargs, mode):
            if config.max_length > self.length:
                self.length = 2 * config.max_length
            config.cache_implementation, config.max_cache_len = "static", self.length
        return getattr(type(self.model), _MAKE)(self.model, config, kwargs, mode, *rest)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        cache: Any = kwargs.get("past_key_values")
        if args or type(cache) is not StaticCache or not self._may_run():
            return type(self.model).forward(self.model, *args, **kwargs)
        answer = self._answer(cache, kwargs)
        if answer is None:
            answer = type(self.model).forward(self.model, **kwargs)
            self._sizes = caches.sizes_of(cache) or self._sizes
        return answer

    def _may_run(self) -> bool:
        if self.why_not is not None or torch.is_grad_enabled() or self.model.training:
            return False
        if torch.compiler.is_compiling():
            if torch.compiler.is_dynamo_compiling():
                return False
            with alone:  # another thread records, while torch says of all of them that they compile
                pass
        return undisturbed() and not (self._modules is not None and self._modules.why_not and self._modules.hold())

    def _answer(self, cache: Any, kwargs: dict[str, Any]) -> Any:
        made = self._allocate(cache, kwargs)
        call = _call_of(self.model, cache, kwargs)
        found = None if call is None else self._recorded(call, cache, kwargs)
        if call is None or found is None or isinstance(found, str):
            if made:
                caches.release(cache)
            return None
        size = () if found.size is None else (call.rows,)
        outputs = found.run(*call.tensors.values(), *size, *found.weights)
        caches.count(cache, call.rows)
        fields = {name: cache if at is None else outputs[at] for name, at in found.fields.items()}
        return found.kind(**fields)

    def _allocate(self, cache: Any, kwargs: dict[str, Any]) -> bool:
        """Gives a new cache its memory, which would else be a part of the first call; False where that is not possible,
        or was done."""
        ids = kwargs.get("input_ids")
        if ids is None or not caches.is_new(cache):
            return False
        sizes = caches.told_sizes(self.model, len(cache.layers)) if self._sizes is None else self._sizes
        caches.allocate(cache, len(ids), sizes, self.model.dtype, self.model.device)
        return bool(sizes)

    def _recorded(self, call: Call, cache: Any, kwargs: dict[str, Any]) -> Recorded | str:
        if self._modules is not None and self._modules.hold() and (found := self._find(call)) is not None:
            self._changes = 0
            return found
        with alone:
            if self._modules is None or not self._modules.hold():
                changes, told, sizes = self._changes + (self._modules is not None), self._told, self._sizes
                self._forget()
                self._changes, self._told, self._sizes = changes, told, sizes
                self._modules = Modules(self.model, _is_idle)
                if changes == _TRIAL:
                    self.why_not = "its modules change from call to call"
                    self.tell(self.why_not)
            if self.why_not is not None:
                return self.why_not
            found = self._find(call)
            return self._new(call, cache, kwargs) if found is None else found

    def _find(self, call: Call) -> Recorded | str | None:
        for found in self._known.get(call.key, ()):
            if isinstance(found, str) or found.size is None or found.size.holds(call.rows):
                return found
        return None

    def _new(self, call: Call, cache: Any, kwargs: dict[str, Any]) -> Recorded | str:
        found: Recorded | str
        try:
            found = self._record(call, cache, kwargs)
        except Exception as error:  # of tensors without numbers; what is wrong with the call itself, it says without us
            found = _reason(error)
            if isinstance(error, Kept) and self._changes == 0:  # and, once it has it, keeps no other
                return found
            self.tell(found)
        self._known.setdefault(call.key, []).append(found)
        if sum(map(len, self._known.values())) > _MOST:
            self._known.pop(next(iter(self._known)))
        return found

    def _record(self, call: Call, cache: Any, kwargs: dict[str, Any]) -> Recorded:
        if self._modules is not None and self._modules.why_not is not None:
            raise Unrecorded(self._modules.why_not)
        fakes = Fakes(call.rows if call.rows > 1 else None)
        given = {name: fakes.like(t, dims) for (name, t), dims in zip(call.tensors.items(), call.dims, strict=True)}
        fake = caches.with_tensors(cache, given, call.rows)
        made: dict[str, Any] = {}

        def run() -> list[Tensor]:
            arguments = {name: fake if each is cache else _with(given, name, each) for name, each in kwargs.items()}
            output = type(self.model).forward(self.model, **arguments)
            if not isinstance(output, ModelOutput):
                raise Unrecorded(f"it returns a {type(output).__name__}")
            tensors = [each for each in output.values() if each is not fake]
            if not all(isinstance(each, Tensor) for each in tensors):
                raise Unrecorded("it returns more than tensors and its cache")
            made.update(kind=type(output), fields=dict(output))
            return tensors

        with unchanged(self.model):
            recording = record(run, given, fakes, sources_of(self.model))
        caches.check(fake, cache, given, call.rows if fakes.size is None else fakes.size.symint)
        graph = self._rewrite(recording)
        number = itertools.count()
        fields = {name: None if each is fake else next(number) for name, each in made["fields"].items()}
        return Recorded(function_of(recording.module), graph, fakes.size, recording.weights, made["kind"], fields)

    def _rewrite(self, recording: Recording) -> Graph:
        graph, _ = rewritten(recording.module, recording.inputs, self.options)
        for node in recording.module.graph.nodes:
            node.meta.clear()
        return graph


def _reason(error: Exception) -> str:
    if isinstance(error, Unrecorded):
        return str(error)
    kind = type(error).__name__
    return "its numbers decide what it does" if kind in _OF_NUMBERS else f"{kind}: {error}".splitlines()[0]


def _is_idle(hook: Any) -> bool:
    """Whether a hook is transformers' own, that collects hidden states for calls that want them."""
    return str(getattr(hook, "__module__", "")) == "transformers.utils.output_capturing"


def _why_not(model: Any) -> str | None:
    """Why no call of a model can have a graph, in a few words; None where one may."""
    if model.config.is_encoder_decoder:
        return "it is an encoder and a decoder, and only decoders are recorded"
    if not getattr(model, "_can_compile_fullgraph", True):
        return "transformers does not let its cache be preallocated"
    if model.config.model_type == "falcon" and model.config.alibi:
        return "its ALiBi is as long as the prompt, and not as a preallocated cache"
    return caches.why_not(model.config.get_text_config(decoder=True))


def _is_free(config: Any, kwargs: dict[str, Any], mode: Any) -> bool:
    """Whether a `generate` may be given a preallocated cache: it asks for no other one, nor for what depends on its
    length, and takes no token back."""
    given = any(kwargs.get(name) is not None for name in ("past_key_values", "cache_params"))
    wide = config.output_attentions or config.output_hidden_states
    own = config.cache_implementation not in (None, "static") or config.max_cache_len is not None
    other = given or wide or own or config.use_cache is False or config.is_assistant
    return not other and mode in _MODES


def _call_of(model: Any, cache: Any, kwargs: dict[str, Any]) -> Call | None:
    """A call by what it is given; None for one that has no graph."""
    ids = kwargs.get("input_ids")
    if ids is None or ids.dim() != 2 or cache.offloading:
        return None
    rows = ids.shape[1]
    tensors: dict[str, Tensor] = {}
    others: list[Any] = [rows > 1, model.config._attn_implementation]
    for name, value in kwargs.items():
        for key, each in value.items() if isinstance(value, dict) else ((None, value),):
            if isinstance(each, Tensor):
                tensors[_name(name, key)] = each.contiguous()
            elif each is not cache:
                others.append((name, key, each))
    dims = [_dims_of(tensor, rows) if rows > 1 else () for tensor in tensors.values()]
    shapes = [(name, _form(t, own)) for (name, t), own in zip(tensors.items(), dims, strict=True)]
    state = caches.state(cache, rows)
    if state is None:
        return None
    others.append(state)
    tensors |= caches.tensors(cache)
    dims += [()] * (len(tensors) - len(dims))
    key = (*shapes, *others)
    return Call(key, rows, tensors, dims) if _is_hashable(key) else None


def _name(name: str, key: str | None) -> str:
    return name if key is None else f"{name}.{key}"


def _with(given: dict[str, Tensor], name: str, value: Any) -> Any:
    """An argument with the tensors of a recording in the place of its own."""
    if isinstance(value, dict):
        return {key: given.get(_name(name, key), each) for key, each in value.items()}
    return given.get(name, value)


def _dims_of(tensor: Tensor, rows: int) -> tuple[int, ...]:
    """Which dimensions of an argument are the number of rows: of ids and positions [B, L], embeddings [B, L, D], and
    masks [B, 1, L, S], where S is L, too, if the prompt is longer than a window."""
    places = {2: (1,), 3: (1,), 4: (2, 3)}.get(tensor.dim(), ())
    return tuple(dim for dim in places if tensor.shape[dim] == rows)


def _form(tensor: Tensor, dims: tuple[int, ...]) -> Hashable:
    return (tensor.dtype, tensor.device, *(None if i in dims else size for i, size in enumerate(tensor.shape)))


def _is_hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True

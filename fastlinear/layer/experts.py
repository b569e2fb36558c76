"""FastExperts: the experts of a mixture (MoE) on packed weights, each call two grouped products and a weighted sum.

transformers keeps the experts of a layer as two parameters of three dimensions, `gate_up_proj` (or `up_proj`) and
`down_proj`, and calls them as module(hidden_states, top_k_index, top_k_weights). `adopt` gives such a module a class of
its own, as `linear.adopt` does with a linear layer: the object, its parameters and its hooks stay. What that class
computes stands in spec/experts.py.
"""

from __future__ import annotations

import functools
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastlinear._engine as _engine
import fastlinear._environment as environment
import fastlinear._experts as _experts
import fastlinear._fingerprints as _fingerprints
import fastlinear._modes as _modes
import fastlinear._plans as _plans
import fastlinear._products as _products
import fastlinear._reasons as _reasons
import fastlinear._tensors as _tensors
from fastlinear.layer import blend, mixture, pages
from fastlinear.layer.elsewhere import why_watched
from fastlinear.layer.fallback import label
from fastlinear.layer.lent import Lent
from fastlinear.layer.lock import lock
from fastlinear.layer.packs import pack_apart
from fastlinear.layer.shelf import Shelf, shelve
from fastlinear.layer.stack import fit
from fastlinear.plan import decide, measuring
from fastlinear.plan.candidates import Chosen
from fastlinear.plan.problem import FROZEN, Problem
from fastlinear.spec import activations, programs
from fastlinear.spec.activations import Activation
from fastlinear.spec.experts import Form, computed
from fastlinear.spec.formats import FP32, long_name, name_of
from fastlinear.spec.precision import ANYHOW, AS_HELD, Precision, Wanted, epilogue, wanted
from fastlinear.spec.schemes import Scheme

# What lies between the products takes at most this at a time; tokens beyond that wait, and find the weights read again.
_BETWEEN = 64 << 20
# From so many multiply-adds on all threads share a grouped product.
_PARALLEL_WORK = 1 << 20

_UNSAVED = ("_spelled", "_ready", "_known", "_decided", "_answered", "_waits", "_handle", "_elsewhere", "_lent")
_OWN = (*_UNSAVED, "_form", "_tune", "_name", "_frozen_experts")


class Frozen(NamedTuple):
    """What frozen experts have instead of weights. dtype, requires_grad: of the Parameters, as they will be again."""

    first: Shelf
    second: Shelf
    dtype: torch.dtype
    requires_grad: tuple[bool, bool]
    origin: str = ""


class _Ready(NamedTuple):
    """What a call needs of the weights."""

    shelves: tuple[Shelf, Shelf]
    products: tuple[_experts.Projection, _experts.Projection]


class ExpertsModule(nn.Module):
    """What fast experts of all classes have in common; mixed in before the stock class."""

    _form: Form
    _tune: str
    _name: str
    _frozen_experts: Frozen | None = None
    _ready: _Ready | None
    _known: tuple[_fingerprints.Fingerprint | None, ...]
    _decided: dict[tuple[int, int, str, int], tuple[Chosen, float]]
    _elsewhere: dict[str, int]  # calls that the kernels did not answer, by reason
    _answered: int
    _waits: int
    _handle: int  # by which the op finds it
    _spelled: str  # its form, as the op has it
    _lent: dict[str, Lent]
    _stock: Any = None

    # ---- what it is ----

    @property
    def first_name(self) -> str:
        """Of the parameter of the first product."""
        return mixture.FIRST[0] if mixture.FIRST[0] in self._parameters else mixture.FIRST[1]

    @property
    def names(self) -> tuple[str, str]:
        return self.first_name, mixture.SECOND

    @property
    def shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """N and K of both products."""
        frozen = self._frozen_experts
        if frozen is not None:
            return frozen.first.form[1:], frozen.second.form[1:]
        a, b = (tuple(self._parameters[name].shape[1:]) for name in self.names)  # type: ignore[union-attr]
        return (a[::-1], b[::-1]) if self._form.transposed else (a, b)

    @property
    def count(self) -> int:
        """Of experts."""
        frozen = self._frozen_experts
        return len(self._parameters[mixture.SECOND]) if frozen is None else len(frozen.second.packs)  # type: ignore[arg-type]

    @property
    def in_features(self) -> int:
        return self.shapes[0][1]

    @property
    def held(self) -> torch.dtype:
        """The dtype of the weights, or what it was before they were frozen."""
        frozen = self._frozen_experts
        return self._parameters[mixture.SECOND].dtype if frozen is None else frozen.dtype  # type: ignore[union-attr]

    @property
    def packed_as(self) -> str:
        return self._precision.packed or name_of(self.held)

    @property
    def _precision(self) -> Precision:
        return self._form.precision

    @property
    def precision(self) -> Precision:
        """As it was asked for, with the format that the weights are packed in."""
        return self._precision._replace(packed=self.packed_as)

    @property
    def dtypes(self) -> str:
        """As of a linear layer."""
        held = " as ".join(dict.fromkeys((long_name(name_of(self.held)), long_name(self.packed_as))))
        products = self._precision.products
        return held if products == FP32 else f"{held}, {long_name(products)} products"

    @property
    def plans(self) -> tuple[tuple[Chosen, ...], tuple[Chosen, ...]]:
        """What runs of each product, under torch's present number of threads."""
        threads = _products.num_threads()
        found = [(which, plan) for (which, t, *_), (plan, _due) in list(self._decided.items()) if t == threads]
        return tuple(  # type: ignore[return-value]
            tuple(sorted((plan for w, plan in found if w == which), key=lambda c: (c.x, c.bucket))) for which in (0, 1)
        )

    @property
    def pack_nbytes(self) -> tuple[int, int]:
        """Bytes of the packed weights of both products; 0 before the first call."""
        frozen, ready = self._frozen_experts, self._ready
        if frozen is not None:
            return frozen.first.nbytes, frozen.second.nbytes
        return (0, 0) if ready is None else (ready.shelves[0].nbytes, ready.shelves[1].nbytes)

    def ask_again(self, anew: bool = False) -> None:
        """Forgets the plans that were to be measured but are not (anew: all)."""
        with lock:
            for key, (plan, _) in list(self._decided.items()) if self._tune == "lazy" else ():
                if anew or plan.source in ("heuristic", "neighbor"):
                    del self._decided[key]
            vars(self).update(_answered=_engine.trial, _waits=0)

    # ---- call ----

    def forward(
        self,
        hidden_states: Tensor,
        top_k_index: Any = None,
        top_k_weights: Any = None,
        *,
        router_indices: Any = None,
        routing_weights: Any = None,
    ) -> Tensor:
        ids = router_indices if top_k_index is None else top_k_index
        weights = routing_weights if top_k_weights is None else top_k_weights
        if torch.compiler.is_dynamo_compiling():
            if torch.compiler.is_exporting():
                return self.in_torch(hidden_states, ids, weights, dense=True)
            if self.training:
                return self.in_training(hidden_states, ids, weights)
            return blend.call(self, hidden_states, ids, weights)
        why = self._why_elsewhere(hidden_states, ids, weights)
        if why is None:
            if torch.is_grad_enabled() and self._wants_grad(hidden_states, weights):
                return blend.call(self, hidden_states, ids, weights)
            y = self.native(hidden_states, ids, weights)
            if y is not None:
                return y
            why = _reasons.CHANGING
        count = self._elsewhere[why] = self._elsewhere.get(why, 0) + 1
        if count == 1:
            decide.tell(f"{label(self)} goes round the kernels: {why}")
        if why in (_reasons.TRAINING, "FASTLINEAR_DISABLE"):
            return self.in_training(hidden_states, ids, weights)
        return self.in_torch(hidden_states, ids, weights, dense=_modes.watched())

    def _why_elsewhere(self, x: Any, ids: Any, weights: Any) -> str | None:
        """Why the kernels do not answer a call, in a few words; None where they may."""
        if self.training:
            return _reasons.TRAINING
        if environment.disabled():
            return "FASTLINEAR_DISABLE"
        if _modes.watched():
            return why_watched() or "a mode of torch"
        return self.why_not_these(x, ids, weights) or self.why_unread()

    def why_not_these(self, x: Any, ids: Any, weights: Any) -> str | None:
        """Why the kernels do not take these inputs, in a few words; None where they do."""
        for tensor in (x, ids, weights):
            if type(tensor) not in (Tensor, nn.Parameter):
                return f"an input of type {type(tensor).__name__}"
            if tensor.device.type != "cpu" or tensor.layout is not torch.strided or tensor.dim() != 2:
                return "an input that is no dense CPU tensor of two dimensions"
        if x.dtype not in _tensors.FORMATS or not self._takes(x.dtype):
            return f"an input of {x.dtype}"
        if ids.dtype is not torch.int64 or not weights.is_floating_point():
            return "expert numbers or weights of another dtype"
        fits = x.shape[1] == self.in_features and ids.shape == weights.shape and len(ids) == len(x)
        return None if fits else "inputs whose shapes do not go together"

    def _takes(self, x: torch.dtype) -> bool:
        return self.precision.takes(x) or torch.is_autocast_enabled("cpu")

    def why_unread(self) -> str | None:
        """Why the kernels cannot read its parameters, in a few words; None if they can."""
        for name in self.names if self._frozen_experts is None else ():
            weight = self._parameters.get(name)
            if weight is None:
                return f"its {name} is computed by a hook or parametrization"
            if (reason := mixture.why_unread(weight, name, self._parameters.get(f"{name}_bias"))) is not None:
                return reason
        return None

    def _wants_grad(self, *tensors: Tensor) -> bool:
        return any(t is not None and t.requires_grad for t in (*tensors, *self._parameters.values()))

    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """What stands for both weights in the op, and both biases."""
        first, second = self.names
        biases = self._parameters.get(f"{first}_bias"), self._parameters.get(f"{second}_bias")
        frozen = self._frozen_experts
        if frozen is not None:
            return frozen.first.panels, frozen.second.panels, *biases
        return self._parameters[first], self._parameters[second], *biases  # type: ignore[return-value]

    def form(self) -> Form:
        """As the op has it: with the panels of frozen weights, and the format that others are packed in."""
        frozen = self._frozen_experts
        if frozen is None:
            return self._form
        return self._form._replace(panels=(frozen.first.form, frozen.second.form))

    def native(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor | None:
        """The answer of the kernels, without gradients; None while the weights keep changing."""
        ready = self._fresh()
        if ready is None:
            return None
        given = x.detach()
        if not self.precision.takes(given.dtype):  # under autocast, which leaves rows of 16 bits before fp32 weights
            given = given.float()
        if given.dim() == 2 and given.stride(1) != 1:
            given = given.contiguous()
        ids, weights = ids.contiguous(), weights.detach().to(torch.float32).contiguous()
        (columns, _), (n, _) = self.shapes
        per_token = max(1, ids.shape[1]) * (columns * given.element_size() + 4 * n)
        most = max(1, _BETWEEN // max(1, per_token))
        if len(given) <= most:
            y = self._run(ready, given, ids, weights)
        else:
            parts = zip(given.split(most), ids.split(most), weights.split(most), strict=True)
            y = torch.cat([self._run(ready, *part) for part in parts])
        self._answered += 1
        return y if y.dtype is x.dtype else y.to(x.dtype)

    def _run(self, ready: _Ready, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        # Not how many experts were chosen: bits depend on shapes alone.
        rows = -(-ids.numel() // max(1, min(self.count, ids.numel())))
        plans = [self._plan(which, max(1, rows), ids.numel(), x.dtype, ready) for which in (0, 1)]
        return _experts.run(*ready.products, plans[0], plans[1], x, ids, weights, self._quantizer)

    @functools.cached_property
    def _quantizer(self) -> _plans.RowQuantizer | None:
        return self._precision.quantizer()

    # ---- what a cold call prepares ----

    def _fresh(self) -> _Ready | None:
        """The packed weights, packed now if need be; None where they kept changing, until they have stood still."""
        parameters = self._watched()
        ready = self._ready
        if ready is not None and not self._waits and fit(self._known, parameters):
            return ready
        with lock:
            known = tuple(None if p is None else _fingerprints.Fingerprint(p) for p in parameters)
            if self._waits and fit(self._known, parameters):
                self._waits -= 1
            elif self._ready is not None:
                self._waits = _engine.trial if self._answered < _engine.trial else 0
            self._answered, self._known, self._ready = 0, known if self._waits else (None,), None
            if self._waits:
                return None
            frozen = self._frozen_experts
            shelves = (self.packed(0), self.packed(1)) if frozen is None else (frozen.first, frozen.second)
            self._hold(shelves, known)
        return self._ready

    def _watched(self) -> tuple[Tensor | None, ...]:
        first, second = self.names
        names = (first, second, f"{first}_bias", f"{second}_bias")
        return tuple(self._parameters.get(name) for name in names)

    def _hold(self, shelves: tuple[Shelf, Shelf], known: tuple[_fingerprints.Fingerprint | None, ...]) -> None:
        biases = [None if b is None else b.detach() for b in self.tensors()[2:]]
        biases[0] = self._form.bias(biases[0])
        steps = (self._form.program, None)
        products = [
            _experts.Projection(shelf.packs, epilogue(program, None), None if bias is None else bias.contiguous())
            for shelf, program, bias in zip(shelves, steps, biases, strict=True)
        ]
        vars(self).pop("_quantizer", None)
        self._ready, self._known = _Ready(shelves, (products[0], products[1])), known
        self._answered = _engine.trial if not self._decided else 0  # the first has credit, as a layer's has

    def packed(self, which: int) -> Shelf:
        """The weights of the one product or the other, packed anew."""
        weights: Any = self._parameters[self.names[which]]
        form, precision = self._form, self.precision
        gated = which == 0 and programs.is_gated(form.program)
        turned = form.weight if which == 0 else lambda weight: weight.mT if form.transposed else weight
        return shelve((pack_apart(turned(weight), precision, gated) for weight in weights.detach()), len(weights))

    def _plan(self, which: int, rows: int, pairs: int, x: torch.dtype, ready: _Ready) -> _plans.Plan:
        """What runs the one product or the other, of so many rows an expert."""
        threads = _products.num_threads()
        key = (which, threads, name_of(x), _plans.bucket(rows))
        found, due = self._decided.get(key, (None, 0.0))
        if found is None or (due and time.monotonic() >= due):
            shelf = ready.shelves[which]
            bias = self.tensors()[2 + which]
            problem = self._problem(which, shelf, threads, name_of(x), _plans.bucket(rows))
            own = None if bias is None else bias.detach()[0].contiguous()
            operands = decide.Operands(None, own, shelf.packs[0], self._quantizer)
            found = decide.decide(problem, operands, measure=self._tune == "lazy")
            due = measuring.process.due(problem.key(), found.provisional) if found.provisional else 0.0
            self._decided[key] = found, due
        shelf = ready.shelves[which]
        if pairs * shelf.n * shelf.k >= _PARALLEL_WORK and threads > 1:  # the experts are what threads share
            return _plan_of(found.name, threads, 1)
        return _plan_of(found.name, found.plan_threads, found.k_slices)

    def _problem(self, which: int, shelf: Shelf, threads: int, x: str, bucket: int) -> Problem:
        """What a plan is made for: the product of one expert with its rows."""
        precision = self.precision
        return Problem(
            m=bucket,
            n=shelf.n,
            k=shelf.k,
            x=x,
            packed=shelf.format,
            held=FROZEN,
            accumulate=precision.accumulate,
            bias=self.tensors()[2 + which] is not None,
            activation=None if which else self._form.program,
            transposed=False,
            threads=threads,
            scheme=precision.scheme,
            layout=shelf.layout,
            products=precision.products,
        )

    @property
    def decided(self) -> list[Chosen]:
        """The plans in the order of `problem_keys`."""
        return [] if self._ready is None else [plan for plan, _due in self._decided.values()]

    def problem_keys(self) -> list[str]:
        """What the tuning cache knows the plans by."""
        ready = self._ready
        asked = [] if ready is None else list(self._decided)
        return [self._problem(key[0], ready.shelves[key[0]], *key[1:]).key() for key in asked if ready is not None]

    # ---- what torch computes ----

    def in_torch(self, x: Tensor, ids: Tensor, weights: Tensor, dense: bool = False) -> Tensor:
        """The numbers of the kernels, by torch's ops."""
        with torch.autocast(x.device.type, enabled=False):
            return computed(self.form(), x, ids, weights, *self.tensors(), dense=dense)

    def in_training(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """What the module computed before it was fast, of its plain parameters."""
        if self._frozen_experts is not None:
            return self.in_torch(x, ids, weights)
        return self._stock.forward(self, x, ids, weights)  # type: ignore[no-any-return]

    # ---- what is saved of it, and what changes it ----

    def _reset(self) -> None:
        """Forgets packs and plans, but for those of frozen experts."""
        vars(self).update(_ready=None, _known=(None,), _decided={}, _answered=_engine.trial, _waits=0, _lent={})
        vars(self).setdefault("_elsewhere", {})
        vars(self).pop("_quantizer", None)
        vars(self).update(_handle=blend.register(self), _spelled=self.form().spelled())

    def __getattr__(self, name: str) -> Any:
        frozen = vars(self).get("_frozen_experts")
        if frozen is not None and name in (*mixture.FIRST, mixture.SECOND) and self._parameters.get(name, self) is None:
            return self._handed_out(name)
        return super().__getattr__(name)

    def _unpacked(self, name: str) -> Tensor:
        frozen = self._frozen_experts
        assert frozen is not None
        if name == mixture.SECOND:
            weight = frozen.second.unpack().to(frozen.dtype)
            return weight.mT.contiguous() if self._form.transposed else weight
        return self._form.held(frozen.first.unpack().to(frozen.dtype)).contiguous()

    def _handed_out(self, name: str) -> Tensor:
        """A frozen weight for others than the module; whoever writes to it makes it a Parameter again."""
        weight = self._unpacked(name)
        if torch.compiler.is_dynamo_compiling() or _modes.watched():
            return weight
        lent = Lent(weight, functools.partial(_take_over, self, name))
        return lent.hand_out(lent.whole)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        own: dict[str, Tensor | None] = dict.fromkeys(self._parameters)
        if self._frozen_experts is not None:
            own |= {name: self._unpacked(name) for name in self.names}
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, weight in own.items():  # in the order of the stock module's
            if weight is not None:
                destination[prefix + name] = weight
            elif prefix + name in destination:
                destination[prefix + name] = destination.pop(prefix + name)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing_keys: list[str], *lists: Any
    ) -> None:
        if any(prefix + name in state_dict for name in self.names):
            thaw(self)
        elif strict and self._frozen_experts is not None:
            missing_keys.extend(prefix + name for name in self.names)
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing_keys, *lists)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        frozen = self._frozen_experts
        if frozen is not None:
            before = torch.empty(0, dtype=frozen.dtype, device="cpu")
            after = fn(before)
            if after.dtype is not before.dtype or after.device != before.device:
                thaw(self)
        self._reset()
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key not in (*_UNSAVED, "_quantizer")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._reset()

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _again, (self._stock, self.__getstate__())

    def extra_repr(self) -> str:
        (n, k), (m, _) = self.shapes
        parts = [f"{self.count} experts, {k} -> {n} -> {m}"]
        if self.dtypes != "float32":
            parts.append(f"dtype={self.dtypes}")
        parts += [f"quantized={self._precision.scheme}"] if self._precision.scheme else []
        parts += ["frozen=True"] if self._frozen_experts is not None else []
        parts += [f"program={self._form.program.name}"] if self._form.program is not None else []
        return ", ".join(parts)


@functools.lru_cache(maxsize=1024)
def _plan_of(name: str, threads: int, k_slices: int) -> _plans.Plan:
    return _plans.Plan(name, threads, k_slices)


class Experts(nn.Module):
    """Experts without a kernel, as a class of transformers' holds them: what FastExperts is a drop-in for."""

    def __init__(self, experts: int, features: int, hidden: int, bias: bool, device: Any, dtype: Any) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * hidden, features, device=device, dtype=dtype))
        self.down_proj = nn.Parameter(torch.empty(experts, features, hidden, device=device, dtype=dtype))
        if bias:
            self.gate_up_proj_bias = nn.Parameter(torch.zeros(experts, 2 * hidden, device=device, dtype=dtype))
            self.down_proj_bias = nn.Parameter(torch.zeros(experts, features, device=device, dtype=dtype))
        with torch.no_grad():
            for weight in (self.gate_up_proj, self.down_proj):
                weight.uniform_(-(weight.shape[-1] ** -0.5), weight.shape[-1] ** -0.5)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        module: Any = self
        plain = module._form._replace(precision=AS_HELD)
        return computed(plain, hidden_states, top_k_index, top_k_weights, *module.tensors())


class FastExperts(ExpertsModule, Experts):
    """The experts of a mixture: y[t] = sum_j w[t, j] * (gate(x[t] U_e^T + b_e) D_e^T + c_e), e = ids[t, j].

    experts: how many there are; features: in and out; hidden: what the gate makes.
    activation: that of the gate, "silu" (SwiGLU), "gelu", "gelu_tanh", "relu", "sigmoid", or ("swiglu_oai", alpha,
        limit), gpt-oss's, or ("swiglu_limited", limit), DeepSeek V4's.
    packed, accumulate, quantize, products: as `dtype`, `accumulate` ... of `convert`.

    Called as experts(x, ids, weights): x [tokens, features], ids int64 [tokens, top_k], weights [tokens, top_k], of
    which an id past the last expert means none. Parameters: gate_up_proj [experts, 2 * hidden, features], the gates'
    channels first, down_proj [experts, features, hidden], and with `bias` gate_up_proj_bias and down_proj_bias. Rows
    are sorted by expert, and no expert without rows is read; the sum is made in the order of j, whatever ran first.
    Raises ValueError for an activation that is no gate.
    """

    def __init__(
        self,
        experts: int,
        features: int,
        hidden: int,
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        activation: Any = "silu",
        packed: torch.dtype | None = None,
        accumulate: str = "fp32",
        quantize: Scheme | None = None,
        products: torch.dtype | None = None,
    ) -> None:
        program, asked = _gate(activation), wanted(packed, accumulate, quantize, products)
        if (reason := asked.why_not("", max(features, hidden))) is not None:
            raise ValueError(f"FastExperts of {features} and {hidden} features cannot be quantized so: {reason}")
        super().__init__(experts, features, hidden, bias, device, dtype)
        vars(self).update(_form=Form(program, own(asked.of("", self.down_proj.dtype))), _tune="lazy", _name="")
        self._reset()


FastExperts._stock = Experts


def _gate(activation: Any) -> Activation:
    of_activation = {each: gate for gate, each in programs.GATES.items()}
    name, *params = activation if isinstance(activation, tuple) else (activation,)
    if name in programs.LIMITED and len(params) == programs.LIMITED[name].params:
        return Activation(name, tuple(map(float, params)))
    gate = of_activation.get(activations.resolve(activation))  # type: ignore[arg-type]
    if gate is None:
        allowed = ", ".join([*(each.name for each in of_activation), *programs.LIMITED])
        raise ValueError(f"FastExperts takes one of {allowed} as its activation, but was given {activation!r}")
    return Activation(gate)


# ---- from a class of transformers', and back ----


def is_fast_experts(module: nn.Module) -> bool:
    return isinstance(module, ExpertsModule)


def are_frozen(module: Any) -> bool:
    return is_fast_experts(module) and module._frozen_experts is not None


def dtype_of(module: Any) -> torch.dtype:
    """The dtype of the weights of experts, also of frozen ones."""
    dtype: torch.dtype = module.held if is_fast_experts(module) else module._parameters[mixture.SECOND].dtype
    return dtype


def is_transposed(module: Any) -> bool:
    """Whether experts are held as [in, out]."""
    return bool(module._form.transposed if is_fast_experts(module) else getattr(module, "is_transposed", False))


def on_meta(module: Any, name: str) -> Tensor:
    """A frozen weight as the Parameter was, on the meta device."""
    n, k = module.shapes[module.names.index(name)]
    shape = (module.count, k, n) if module._form.transposed else (module.count, n, k)
    return torch.empty(shape, dtype=module.held, device="meta")


def are_experts(module: nn.Module) -> bool:
    """Whether a module has the parameters of experts, fast or not, of whatever class it is."""
    if is_fast_experts(module):
        return True
    held = [module._parameters.get(name) for name in (*mixture.FIRST, mixture.SECOND)]
    three = [p is not None and p.dim() == 3 for p in held]
    return three[2] and (three[0] or three[1])


def names_of(module: Any) -> tuple[str, str]:
    """Of the parameters of both products."""
    return module.names if is_fast_experts(module) else mixture.names_of(module)


def sizes_of(module: Any) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Experts, N and K of both products; of a class that nobody knows, as if its weights were [experts, N, K]."""
    if is_fast_experts(module):
        first, second = module.shapes
        return (module.count, *first), (module.count, *second)
    shapes = [tuple(module._parameters[name].shape) for name in mixture.names_of(module)]
    if is_transposed(module):
        shapes = [(e, n, k) for e, k, n in shapes]
    return shapes[0], shapes[1]


def why_not(module: Any, asked: Wanted = ANYHOW, name: str = "") -> str | None:
    """Why experts cannot run on the kernels as it was asked for, in a few words; None if they can, or do."""
    if isinstance(module, ExpertsModule):
        return module.why_unread() or mixture.why_unquantized(module, asked, is_transposed(module), name)
    if (reason := why_no_twin(module)) is not None:
        return reason
    for own in mixture.names_of(module):
        reason = mixture.why_unread(module._parameters[own], own, module._parameters.get(f"{own}_bias"))
        if reason is not None:
            return reason
    return mixture.why_unquantized(module, asked, is_transposed(module), name)


def why_no_twin(module: Any) -> str | None:
    """Why a module of this class cannot become fast experts, whatever its weights are."""
    form = None if is_fast_experts(module) else mixture.form_of(module)
    return form if isinstance(form, str) else None


def adopt(module: Any, tune: str = "lazy", name: str = "", precision: Precision = AS_HELD) -> None:
    """Turns experts into their fast twin in place; ValueError where `mixture.form_of` has a reason."""
    form = mixture.form_of(module)
    if isinstance(form, str):
        raise ValueError(f"{name or type(module).__name__} cannot be converted: {form}")
    vars(module).update(_form=form._replace(precision=own(precision)), _tune=tune, _name=name)
    stock: Any = type(module)
    module.__class__ = _twin(stock)
    module._reset()


def release(module: Any) -> None:
    """Turns fast experts back into what they were, thawed."""
    thaw(module)
    if type(module) is FastExperts:
        return  # there is nothing that it was
    for key in (*_OWN, "_quantizer"):
        vars(module).pop(key, None)
    module.__class__ = module._stock


def set_precision(module: Any, precision: Precision) -> None:
    """Tells fast experts what to compute in."""
    vars(module)["_form"] = module._form._replace(precision=own(precision))
    module._reset()


def own(precision: Precision) -> Precision:
    """Without what experts do not have: another format to run in where that is faster, and inputs of a calibration."""
    return precision._replace(fallback=False, sample=None)


def freeze(module: Any) -> None:
    """Packs the weights of fast experts and drops them; ValueError where the kernels cannot read them."""
    with lock:
        if module._frozen_experts is not None:
            return
        if (reason := module.why_unread()) is not None:
            raise ValueError(f"{label(module)} cannot be frozen: {reason}")
        parameters = [module._parameters[name] for name in module.names]
        dtype, wants = parameters[0].dtype, (parameters[0].requires_grad, parameters[1].requires_grad)
        # Anew, as they may have changed in a way that torch does not count.
        first, second = module.packed(0), module.packed(1)
        hold(module, Frozen(first, second, dtype, wants))
        pages.let_go(*(parameter.detach() for parameter in parameters))


def hold(module: Any, frozen: Frozen) -> None:
    """Makes fast experts frozen ones; what they had as their weights is let go, unread."""
    plans = module._decided
    vars(module)["_frozen_experts"] = frozen
    for name in module.names:
        module._parameters[name] = None
    module._reset()
    vars(module)["_decided"] = plans


def thaw(module: Any) -> None:
    """Makes the weights of frozen experts Parameters again; does nothing to others."""
    with lock, torch.inference_mode(False):
        frozen = module._frozen_experts
        if frozen is not None:
            weights = {name: module._unpacked(name) for name in module.names}
            _thaw(module, frozen, weights)


def _thaw(module: Any, frozen: Frozen, weights: dict[str, Tensor]) -> None:
    for name, wants in zip(module.names, frozen.requires_grad, strict=True):
        weight = weights[name]
        module._parameters[name] = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, wants)
    vars(module).pop("_frozen_experts")
    module._reset()


def _take_over(module: Any, name: str, written: Tensor) -> nn.Parameter | None:
    """Thaws experts one of whose weights somebody has written to."""
    with lock, torch.inference_mode(False):
        frozen = module._frozen_experts
        if frozen is None:
            return None
        weights = {own: written if own == name else module._unpacked(own) for own in module.names}
        _thaw(module, frozen, weights)
        return module._parameters[name]  # type: ignore[no-any-return]


@functools.cache
def _twin(stock: type[nn.Module]) -> type[nn.Module]:
    if stock is Experts:
        return FastExperts
    members = {"_stock": stock, "__module__": __name__, "__doc__": f"{stock.__name__} on packed weights."}
    return type(f"Fast{stock.__name__}", (ExpertsModule, stock), members)


def _again(stock: type, state: dict[str, Any]) -> nn.Module:
    cls = _twin(stock)
    module = cls.__new__(cls)
    module.__setstate__(state)
    return module

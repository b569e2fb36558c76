"""How fast experts answer: the kernels where they can, torch where they cannot, and what is saved of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import fastlinear._engine as _engine
import fastlinear._experts as _experts
import fastlinear._modes as _modes
import fastlinear._reasons as _reasons
import fastlinear._tensors as _tensors
from fastlinear.layer import blend, mixture
from fastlinear.layer.elsewhere import why_switched_off, why_watched
from fastlinear.layer.experts_frozen import Freezable
from fastlinear.layer.experts_planning import Plannable, Ready
from fastlinear.layer.fallback import label
from fastlinear.layer.lent import Lent
from fastlinear.layer.parametrized import deepcopied
from fastlinear.layer.traced import is_recorded
from fastlinear.plan import decide
from fastlinear.spec.experts import Form, computed
from fastlinear.spec.formats import name_of, told
from fastlinear.spec.precision import Precision

# What lies between the products takes at most this at a time; tokens beyond that wait, and find the weights read again.
_BETWEEN = 64 << 20
_UNSAVED = ("_spelled", "_ready", "_known", "_decided", "_answered", "_waits", "_handle", "_elsewhere", "_lent")
OWN = (*_UNSAVED, "_quantizer", "_form", "_tune", "_name", "_frozen_experts")


class ExpertsModule(Plannable, Freezable):
    """What fast experts of all classes have in common; mixed in before the stock class."""

    _name: str
    _elsewhere: dict[str, int]  # calls that the kernels did not answer, by reason
    _handle: int  # by which the op finds it
    _spelled: str  # its form, as the op has it
    _lent: dict[str, Lent]
    _stock: Any = None
    _blocks = False  # True: `mixture.takes_blocks` of the stock class

    # ---- what it is ----

    @property
    def first_name(self) -> str:
        """Of the parameter of the first product."""
        name, other = mixture.FIRST
        held = name in self._parameters or name in vars(self)  # torch's pruning leaves what it computes there
        return name if held or parametrize.is_parametrized(self, name) else other

    @property
    def names(self) -> tuple[str, str]:
        return self.first_name, mixture.SECOND

    def _weights(self, name: str) -> Tensor:
        """Those of all experts of one product, also where a parametrization computes them."""
        held: Tensor | None = self._parameters.get(name)
        return getattr(self, name) if held is None else held

    @property
    def shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """N and K of both products."""
        frozen = self._frozen_experts
        if frozen is not None:
            return frozen.first.form[1:], frozen.second.form[1:]
        a, b = ((each.shape[1], each.shape[2]) for each in map(self._weights, self.names))
        return (a[::-1], b[::-1]) if self._form.transposed else (a, b)

    @property
    def count(self) -> int:
        """Of experts."""
        frozen = self._frozen_experts
        return len(self._weights(mixture.SECOND)) if frozen is None else len(frozen.second.packs)

    @property
    def in_features(self) -> int:
        return self.shapes[0][1]

    @property
    def held(self) -> torch.dtype:
        """The dtype of the weights, or what it was before they were frozen."""
        frozen = self._frozen_experts
        return self._weights(mixture.SECOND).dtype if frozen is None else frozen.dtype

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
        """What they are computed in, as the report has it."""
        return told(self.held, self.packed_as, self._precision.products)

    @property
    def pack_nbytes(self) -> tuple[int, int]:
        """Bytes of the packed weights of both products; 0 before the first call."""
        frozen, ready = self._frozen_experts, self._ready
        if frozen is not None:
            return frozen.first.nbytes, frozen.second.nbytes
        return (0, 0) if ready is None else (ready.shelves[0].nbytes, ready.shelves[1].nbytes)

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
        if self._blocks:
            ids, weights = self._in_blocks(hidden_states)
        if torch.compiler.is_dynamo_compiling():
            if torch.compiler.is_exporting():
                return self.in_torch(hidden_states, ids, weights, dense=True)
            if self.training:
                return self.in_training(hidden_states, ids, weights)
            return blend.call(self, hidden_states, ids, weights)
        if is_recorded():
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
        if why in (_reasons.TRAINING, _reasons.SWITCHED_OFF):
            return self.in_training(hidden_states, ids, weights)
        return self.in_torch(hidden_states, ids, weights, dense=_modes.watched())

    def _in_blocks(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Whose rows are whose, where each expert is handed its own. Zeros are nobody's, and stay zeros."""
        own = torch.arange(len(x), device=x.device) // max(1, len(x) // self.count)
        ids = torch.where(x.any(-1), own, self.count)
        return ids[:, None], x.new_ones(len(x), 1)

    def _why_elsewhere(self, x: Any, ids: Any, weights: Any) -> str | None:
        """Why the kernels do not answer a call, in a few words; None where they may."""
        watched = (why_watched() or "a mode of torch") if _modes.watched() else None
        return why_switched_off(self) or watched or self.why_unread() or self.why_not_these(x, ids, weights)

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
        return self._weights(first), self._weights(second), *biases

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

    def _run(self, ready: Ready, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        # Not how many experts were chosen: bits depend on shapes alone.
        rows = -(-ids.numel() // max(1, min(self.count, ids.numel())))
        plans = [self._plan(which, max(1, rows), ids.numel(), x.dtype, ready) for which in (0, 1)]
        return _experts.run(*ready.products, plans[0], plans[1], x, ids, weights, self._quantizer)

    # ---- what torch computes ----

    def in_torch(self, x: Tensor, ids: Tensor, weights: Tensor, dense: bool = False) -> Tensor:
        """The numbers of the kernels, by torch's ops."""
        with torch.autocast(x.device.type, enabled=False):
            return computed(self.form(), x, ids, weights, *self.tensors(), dense=dense)

    def in_training(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """What the module computed before it was fast, of its plain parameters."""
        if self._frozen_experts is not None:
            return self.in_torch(x, ids, weights)
        given = (x,) if self._blocks else (x, ids, weights)
        return self._stock.forward(self, *given)  # type: ignore[no-any-return]

    # ---- what is saved of it, and what changes it ----

    def _reset(self) -> None:
        """Forgets packs and plans, but for those of frozen experts."""
        vars(self).update(_ready=None, _known=(None,), _decided={}, _answered=_engine.trial, _waits=0, _lent={})
        vars(self).setdefault("_elsewhere", {})
        vars(self).pop("_quantizer", None)
        vars(self).update(_handle=blend.register(self), _spelled=self.form().spelled())

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key not in (*_UNSAVED, "_quantizer")}

    __deepcopy__ = deepcopied

    def __setstate__(self, state: dict[str, Any]) -> None:
        form = state["_form"]
        state = {**state, "_form": form._replace(precision=form.precision.present())}
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._reset()

    def extra_repr(self) -> str:
        (n, k), (m, _) = self.shapes
        parts = [f"{self.count} experts, {k} -> {n} -> {m}"]
        if self.dtypes != "float32":
            parts.append(f"dtype={self.dtypes}")
        parts += [f"quantized={self._precision.scheme}"] if self._precision.scheme else []
        parts += ["frozen=True"] if self._frozen_experts is not None else []
        parts += [f"program={self._form.program.name}"] if self._form.program is not None else []
        return ", ".join(parts)

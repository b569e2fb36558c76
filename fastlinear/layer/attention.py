"""FastMultiheadAttention: nn.MultiheadAttention whose projections are linear layers of their own, which it calls.

torch's class holds the projection of its inputs as a bare parameter, `in_proj_weight`, and reads the weight of
`out_proj` without ever calling it. `open_up` makes of it a module with two children, `in_proj` and `out_proj`, which
can be fast, frozen and saved like any linear layer; `close` undoes that. State dicts keep torch's names.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

import fastlinear._torch as _torch
from fastlinear.layer import fitness, linear
from fastlinear.layer.form import address_of
from fastlinear.layer.frozen import LENDING, record_of
from fastlinear.layer.lent import LentTensor
from fastlinear.spec import attention
from fastlinear.spec.activations import has_hooks
from fastlinear.spec.precision import Wanted

_PARTS = ("weight", "bias")
_CROSS = "_cross"  # where a module keeps its _Apart


class _Apart(NamedTuple):
    """Query, key and value as layers apart, for inputs that are not one tensor, and what they were made of: objects of
    the whole projection, and where the memory is that its parameters had, which `.data =` changes behind them."""

    known: tuple[Any, ...]
    places: list[Any]
    layers: list[nn.Module] | None


class FastMultiheadAttention(nn.MultiheadAttention):
    """Drop-in for nn.MultiheadAttention, which `convert` makes of it.

    Takes and returns what torch's class does, but does not take torch's fused path of encoders. Where query, key and
    value are one tensor their projections are one product; where they are not, three, whose weights are packed apart.
    """

    in_proj: nn.Linear

    # By torch's names, for those who read the parameters instead of calling the module.
    in_proj_weight: Any = property(lambda self: self.in_proj.weight)
    in_proj_bias: Any = property(lambda self: self.in_proj.bias)

    def __setattr__(self, name: str, value: Any) -> None:
        """What replaces a parameter by torch's name for it replaces that of the layer, be it with a tensor that
        functional_call lends."""
        if name not in _OLD_NAMES:
            super().__setattr__(name, value)
            return
        own = name.removeprefix("in_proj_")
        if sys._getframe(1).f_code is LENDING:
            given = None if isinstance(value, LentTensor) else value  # what a frozen layer gave before
            _torch.swap_tensor(self.in_proj, own, given)
        else:
            setattr(self.in_proj, own, value)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if not self._is_regular(query, key, value, key_padding_mask, attn_mask, is_causal):
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        alone = query.dim() == 2
        q, k, v = self._projected(query, key, value)
        # [B, L, H, D] from here on; without a batch, and with its dimension second, as views.
        q, k, v = (self._heads(y, alone) for y in (q, k, v))
        k, v, further = self._longer(k, v)
        causal = is_causal and key_padding_mask is None and not need_weights
        mask = None if causal else self._mask(attn_mask, q.dtype)
        if key_padding_mask is not None:
            padding = _added(key_padding_mask, q.dtype).reshape(len(q), 1, 1, -1)
            mask = padding if mask is None else mask + padding
        mask = F.pad(mask, (0, further)) if mask is not None and further else mask
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))  # [B, H, L, D]
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            y, weights = attention.with_weights(q, k, v, mask, self.head_dim, average_attn_weights, dropout)
            weights = weights.squeeze(0) if alone else weights
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal)
        y = y.transpose(1, 2).flatten(-2)
        y = y.squeeze(0) if alone else y if self.batch_first else y.transpose(0, 1)
        return self.out_proj(y), weights

    def _is_regular(self, query: Any, key: Any, value: Any, padding: Any, mask: Any, is_causal: bool) -> bool:
        """Whether all is as documented; torch's own code complains of the rest, and takes nested tensors."""
        if any((type(x) is not Tensor and not isinstance(x, Tensor)) or x.is_nested for x in (query, key, value)):
            return False
        dims = query.dim()
        if dims not in (2, 3) or key.dim() != dims or key.shape != value.shape:
            return False
        batch = None if dims == 2 else 0 if self.batch_first else 1
        length = 1 - (batch or 0) if dims == 3 else 0
        sizes = [1 if batch is None else query.shape[batch], query.shape[length], key.shape[length]]
        if query.shape[-1] != self.embed_dim or key.shape[-1] != self.embed_dim or 0 in sizes:
            return False
        if batch is not None and key.shape[batch] != sizes[0]:
            return False
        if is_causal and mask is None:
            return False
        if padding is not None and padding.shape != ((sizes[2],) if batch is None else (sizes[0], sizes[2])):
            return False
        if mask is not None and mask.shape not in (tuple(sizes[1:]), (sizes[0] * self.num_heads, *sizes[1:])):
            return False
        return all(m is None or m.dtype is torch.bool or m.is_floating_point() for m in (padding, mask))

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> Any:
        if query is key and query is value:
            return self.in_proj(query).chunk(3, -1)
        gradients = self.training or torch.is_grad_enabled()
        layers = None if gradients or torch.compiler.is_compiling() else self._layers_apart()
        if layers is None:
            return tuple(self.in_proj(x).chunk(3, -1)[i] for i, x in enumerate((query, key, value)))
        return tuple(layer(x) for layer, x in zip(layers, (query, key, value), strict=True))

    def apart(self) -> list[Any]:
        """The projections as layers of their own, if a call to another sequence has made them so far."""
        apart: _Apart | None = vars(self).get(_CROSS)
        return [] if apart is None else [layer for layer in apart.layers or () if linear.is_fast(layer)]

    def _layers_apart(self) -> list[nn.Module] | None:
        """The projections as layers of their own, without gradients; None where they would not have the numbers of the
        whole. They share its memory; those of a frozen one have packs of their own."""
        whole, apart = self.in_proj, vars(self).get(_CROSS)
        weight, bias = whole._parameters.get("weight"), whole._parameters.get("bias")
        if has_hooks(whole) or (weight is None and record_of(whole) is None):
            return None  # who computes the weight, prunes it or watches the layer wants it called
        known = (weight, record_of(whole), bias, type(whole), vars(whole).get("_precision"))
        places = [None if t is None else (address_of(t), t.shape, t.stride(), t.dtype) for t in (weight, bias)]
        if apart is None or any(a is not b for a, b in zip(apart.known, known, strict=True)) or apart.places != places:
            apart = vars(self)[_CROSS] = _Apart(known, places, _apart(whole))
        return apart.layers

    def _heads(self, y: Tensor, alone: bool) -> Tensor:
        heads: Tensor = y.unflatten(-1, (self.num_heads, self.head_dim))
        return heads.unsqueeze(0) if alone else heads if self.batch_first else heads.transpose(0, 1)

    def _longer(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, int]:
        """Keys and values with those that the module adds to them, and how many these are."""
        further = 0
        if self.bias_k is not None and self.bias_v is not None:
            own = (b.unflatten(-1, (self.num_heads, self.head_dim)) for b in (self.bias_k, self.bias_v))
            k, v = (torch.cat([y, b.expand(len(y), -1, -1, -1)], 1) for y, b in zip((k, v), own, strict=True))
            further += 1
        if self.add_zero_attn:
            k, v = (torch.cat([y, torch.zeros_like(y[:, :1])], 1) for y in (k, v))
            further += 1
        return k, v, further

    def _mask(self, mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        if mask is None:
            return None
        mask = _added(mask, dtype)
        return mask.unflatten(0, (-1, self.num_heads)) if mask.dim() == 3 else mask

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As torch names the parameters, and in torch's order."""
        state = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", "")
        first = {f"{prefix}in_proj_{part}": state.pop(f"{prefix}in_proj.{part}", None) for part in _PARTS}
        rest = {key: state.pop(key) for key in list(state) if key.startswith(prefix)}
        state.update({key: value for key, value in first.items() if value is not None} | rest)
        return state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """To the names of the children, before they look for theirs."""
        for part in _PARTS:
            if f"{prefix}in_proj_{part}" in state_dict:
                state_dict[f"{prefix}in_proj.{part}"] = state_dict.pop(f"{prefix}in_proj_{part}")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != _CROSS}

    def __prepare_scriptable__(self) -> nn.MultiheadAttention:
        """torch.jit.script gets torch's own class over the same parameters."""
        stock: Any = nn.MultiheadAttention.__new__(nn.MultiheadAttention)
        state = {key: dict(value) if isinstance(value, dict) else value for key, value in self.__getstate__().items()}
        vars(stock).update(state)
        del stock._modules["in_proj"]
        _put_first(stock._parameters, {"in_proj_weight": self.in_proj_weight, "in_proj_bias": self.in_proj_bias})
        out = nn.Linear(self.embed_dim, self.embed_dim, device="meta")
        out._parameters.update(weight=nn.Parameter(self.out_proj.weight.detach()), bias=self.out_proj.bias)
        stock._modules["out_proj"] = out
        out.__class__ = NonDynamicallyQuantizableLinear
        return stock  # type: ignore[no-any-return]


_OLD_NAMES = ("in_proj_weight", "in_proj_bias")


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return attention.additive(mask, mask.dtype is torch.bool, dtype)


def _apart(whole: Any) -> list[nn.Module] | None:
    """Query, key and value of the projection `whole`: layers over a third of its channels each; None where a frozen
    weight does not pack to the same numbers again."""
    frozen, layers = record_of(whole), []
    weight = whole._parameters["weight"].detach() if frozen is None else frozen.unpack(transposed=False)
    bias = whole._parameters.get("bias")
    for rows in torch.arange(len(weight), device="cpu").chunk(3):
        part: Any = nn.Linear(weight.shape[1], len(rows), bias is not None, device="meta").eval()
        of_weight = weight[rows[0] : rows[-1] + 1]
        part.weight = nn.Parameter(of_weight, requires_grad=False)
        if bias is not None:
            part.bias = nn.Parameter(bias.detach()[rows[0] : rows[-1] + 1], requires_grad=False)
        if linear.is_fast(whole):
            linear.adopt(part, None, whole._tune, whole._name, linear.precision_of(whole))
        if frozen is not None:
            linear.freeze_layer(part)
            again = record_of(part)
            if again is None or not torch.equal(again.unpack(transposed=False), of_weight):
                return None
        layers.append(part)
    return layers


# ---- from torch's class, and back ----


def why_not_open(module: nn.Module) -> str | None:
    """Why a module is no nn.MultiheadAttention whose projections can be layers; None if they can."""
    if type(module) is not nn.MultiheadAttention:
        return f"{type(module).__name__} is not exactly nn.MultiheadAttention"
    if type(module.out_proj) is not NonDynamicallyQuantizableLinear:
        return f"its out_proj is a {type(module.out_proj).__name__}"
    if not module._qkv_same_embed_dim:
        return "its keys and values have widths of their own"
    if module._parameters.get("in_proj_weight") is None:
        return "its in_proj_weight is computed by a hook or parametrization"
    if "forward" in vars(module):
        return "its forward was replaced by one that knows nothing of kernels: convert first, then replace it"
    return None


def projections(module: nn.MultiheadAttention) -> tuple[nn.Linear, nn.Linear]:
    """The two layers that `open_up` would make children, over the module's parameters."""
    width, bias = module.embed_dim, module._parameters.get("in_proj_bias") is not None
    ahead: Any = nn.Linear(width, 3 * width, bias, device="meta")
    ahead._parameters.update(weight=module._parameters["in_proj_weight"], bias=module._parameters.get("in_proj_bias"))
    behind: Any = nn.Linear(width, width, module.out_proj.bias is not None, device="meta")
    vars(behind).update(vars(module.out_proj))
    for layer in (ahead, behind):
        layer.train(module.training)
    return ahead, behind


def why_not(module: nn.MultiheadAttention, asked: Wanted, name: str) -> str | None:
    """Why the kernels cannot run the projections of a module as it was asked for, in a few words; None if they can."""
    reason = why_not_open(module)
    for layer, child in zip(projections(module), ("in_proj", "out_proj"), strict=True) if reason is None else ():
        reason = reason or fitness.why_not(layer, asked, f"{name}.{child}" if name else child)
    return reason


def open_up(module: Any) -> None:
    """Turns an nn.MultiheadAttention into a FastMultiheadAttention in place; ValueError where `why_not_open` tells a
    reason."""
    if (reason := why_not_open(module)) is not None:
        raise ValueError(f"{type(module).__name__} cannot be opened: {reason}")
    ahead, _ = projections(module)
    for name in _OLD_NAMES:
        del module._parameters[name]
    module.__class__ = FastMultiheadAttention
    _put_first(module._modules, {"in_proj": ahead})
    module.out_proj.__class__ = nn.Linear


def close(module: Any) -> None:
    """Undoes `open_up`, once both layers are plain ones again."""
    vars(module).pop(_CROSS, None)
    ahead = module._modules.pop("in_proj")
    module.__class__ = nn.MultiheadAttention
    own = {"in_proj_weight": ahead._parameters["weight"], "in_proj_bias": ahead._parameters["bias"]}
    _put_first(module._parameters, own)
    module.out_proj.__class__ = NonDynamicallyQuantizableLinear


def _put_first(members: dict[str, Any], first: dict[str, Any]) -> None:
    """In place, since others may hold a module's dicts."""
    all_of_them = first | members
    members.clear()
    members.update(all_of_them)

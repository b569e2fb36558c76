"""What the inputs of a model's linear layers look like: the ranges and smoothing that int8 is set up with."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from fastlinear.model.arguments import call, check_example, check_module
from fastlinear.model.selection import linear_layers
from fastlinear.spec.int8 import TINY, asymmetric
from fastlinear.spec.schemes import Calibration, Observed

_METHODS = ("minmax", "percentile")
_ROWS, _VALUES = 32, 1 << 18  # kept of each layer's inputs; of so many values 262 lie beyond the 99.9th percentile
_SMOOTHEST = 2.0**60  # of a channel that is next to never used, smoothing would make an infinity


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    method: str = "minmax",
    percentile: float = 99.9,
    symmetric: bool = False,
    smooth: float | None = None,
) -> Calibration:
    """Run `model` on `batches`, without gradients and in eval mode, and note what each linear layer is given.

    The result is for `Int8Static` and, if smoothed, `Int8Dynamic`, to convert this model or a copy of it: layers go by
    their names. What it holds does not grow with the number of batches, which may come from a generator; the same
    batches give the same result.

    batches: tensors, tuples of arguments or mappings of keyword arguments, as for `tune`; a few hundred rows that are
        like those to come will do.
    method: the range of a layer is "minmax", all that it was given, or "percentile", without what is rarer than that:
        from the (100 - percentile)th percentile to the percentile-th (symmetric: to that of |x|), beyond which x
        saturates. Of more than 262144 values these are of a random sample of so many.
    symmetric: the range is made symmetric about 0, as for s8 activations, instead of u8 with a zero point.
    smooth: from 0 to 1, 0.5 being usual. x[..., k] is divided by s[k] = max |x[k]| ^ smooth / max |w[k]| ^ (1 - smooth)
        and the weight's column k multiplied by it, before either is quantized, so that the outliers of a few input
        channels cost the others less (SmoothQuant, Xiao et al. 2022, equation 4). Layers whose weight is frozen or
        quantized already are not smoothed.

    Raises TypeError or ValueError for arguments of a wrong kind and where there is no batch, and ValueError for a layer
    that is given an infinity or a NaN. A layer that no batch reached is listed in the result's `skipped`.
    """
    check_module("calibrate", model)
    _check_arguments(batches, method, percentile, symmetric, smooth)
    share = percentile / 100 if method == "percentile" else None
    names = {layer: names[0] for layer, names in linear_layers(model).items()}
    observers = {layer: _Observer(layer, name, share) for layer, name in names.items()}
    count = 0
    with ExitStack() as stack:
        for module in model.modules():
            stack.callback(setattr, module, "training", module.training)
        model.eval()
        for layer, observer in observers.items():
            stack.callback(layer.register_forward_pre_hook(observer.hook, with_kwargs=True).remove)
        stack.enter_context(torch.no_grad())
        for count, batch in enumerate(batches, 1):  # noqa: B007
            check_example(batch)
            call(model, batch)
    if not count:
        raise ValueError("calibrate was given no batches")
    layers: dict[str, Observed] = {}
    skipped: dict[str, str] = {}
    for layer, observer in observers.items():
        found = observer.result(symmetric, smooth)
        if isinstance(found, str):
            skipped[names[layer]] = found
        else:
            layers[names[layer]] = found
    return Calibration(layers, skipped)


class _Sample:
    """At most `size` of the items offered so far, all equally likely to be among them; the same in every run."""

    def __init__(self, size: int) -> None:
        self._size, self._random = size, torch.Generator("cpu").manual_seed(0)
        # Every item draws a number from 0 to 1, and those stay whose numbers are the lowest.
        self._drawn, self._limit = (
            torch.empty(0, dtype=torch.float64, device="cpu"),
            torch.ones((), dtype=torch.float64, device="cpu"),
        )
        self.items = torch.empty(0, dtype=torch.float32, device="cpu")

    def offer(self, count: int, items_at: Callable[[Tensor], Tensor]) -> None:
        """`count` more items; items_at(indices) is asked for those that come in."""
        drawn = torch.rand(count, generator=self._random, dtype=torch.float64, device="cpu")
        come = (drawn < self._limit).nonzero()[:, 0]
        both = torch.cat([self._drawn, drawn[come]])
        if len(both) > self._size:
            self._limit = both.kthvalue(self._size + 1).values
            come = come[drawn[come] < self._limit]
        stay, new = self._drawn < self._limit, items_at(come)
        self.items = torch.cat([self.items[stay].reshape(-1, *new.shape[1:]), new])
        self._drawn = torch.cat([self._drawn[stay], drawn[come]])


class _Observer:
    """Watches the inputs of one layer."""

    def __init__(self, layer: nn.Module, name: str, share: float | None) -> None:
        self._layer, self._name, self._share = layer, name, share
        # fp32 [K], each of them with 0 within its range
        self._low = self._high = torch.empty(0, dtype=torch.float32, device="cpu")
        self._rows, self._values = _Sample(_ROWS), _Sample(_VALUES)

    def hook(self, layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()), None)
        if not isinstance(x, Tensor) or not x.is_floating_point():  # chained int8 layers hand on integers
            return
        if x.dim() and x.numel():  # whatever else is wrong with it, the layer itself will say
            parts = x.detach().unbind() if x.is_nested else (x.detach(),)  # nn.TransformerEncoder nests padded batches
            self._see(torch.cat([part.reshape(-1, part.shape[-1]) for part in parts]).to("cpu", torch.float32))

    def _see(self, x: Tensor) -> None:
        low, high = x.amin(0).clamp(max=0.0), x.amax(0).clamp(min=0.0)
        if not bool((low.isfinite() & high.isfinite()).all()):
            raise ValueError(f"calibrate met an infinity or a NaN in the input of layer {self._name!r}")
        seen = len(self._low) > 0
        self._low, self._high = (self._low.minimum(low), self._high.maximum(high)) if seen else (low, high)
        self._rows.offer(len(x), lambda at: x[at])
        if self._share is not None:
            flat, k = x.flatten(), x.shape[1]
            self._values.offer(len(flat), lambda at: torch.stack((flat[at], (at % k).float()), 1))

    def result(self, symmetric: bool, smooth: float | None) -> Observed | str:
        """What was seen, or why that is nothing."""
        if not len(self._low):
            return "no batch of the calibration reached it"
        factors = None if smooth is None else self._smoothing(smooth)
        low, high = self._range(symmetric, factors)
        if symmetric:
            scale, zero = torch.maximum(-low, high) / 127, torch.tensor(128, dtype=torch.int64, device="cpu")
        else:
            scale, zero = asymmetric(low, high)
        if not TINY <= float(scale) < math.inf:
            span = f"{float(low) + 0.0:g} to {float(high) + 0.0:g}"  # -0 becomes 0
            return f"its inputs were from {span} while calibrating, which has no scale"
        return Observed(float(scale), int(zero), factors, self._rows.items)

    def _range(self, symmetric: bool, factors: Tensor | None) -> tuple[Tensor, Tensor]:
        """The lowest value of x that does not saturate, or 0, and the highest."""
        if self._share is None:
            low, high = (self._low, self._high) if factors is None else (self._low * factors, self._high * factors)
            return low.min(), high.max()
        values, channels = self._values.items.unbind(1)
        values = values if factors is None else values * factors[channels.long()]
        if symmetric:
            high = torch.quantile(values.abs().double(), self._share).float()
            return -high, high
        low, high = (torch.quantile(values.double(), share).float() for share in (1 - self._share, self._share))
        return low.clamp(max=0.0), high.clamp(min=0.0)

    def _smoothing(self, alpha: float) -> Tensor | None:
        """What x is to be multiplied by; a channel that is always 0, in x or in the weight, is left as it is."""
        weight = self._layer._parameters.get("weight")
        if weight is None or type(weight) not in (nn.Parameter, Tensor) or not weight.is_floating_point():
            return None
        of_w = weight.detach().to("cpu").double().abs().amax(0 if isinstance(self._layer, nn.Linear) else 1)
        of_x = torch.maximum(-self._low, self._high).double()
        factors = torch.where((of_x > 0) & (of_w > 0), of_w ** (1 - alpha) / of_x**alpha, 1.0)
        return factors.clamp(1 / _SMOOTHEST, _SMOOTHEST).float()


def _check_arguments(batches: Any, method: Any, percentile: Any, symmetric: Any, smooth: Any) -> None:
    if isinstance(batches, (Tensor, Mapping, str)) or not isinstance(batches, Iterable):
        raise TypeError(f"batches must be several examples, in a list, say, but is of type {type(batches).__name__}")
    if method not in _METHODS:
        raise ValueError(f"method must be {' or '.join(map(repr, _METHODS))}, but is {method!r}")
    if not _is_number(percentile) or not 50 < percentile <= 100:
        raise ValueError(f"percentile must be a number above 50, up to 100, but is {percentile!r}")
    if not isinstance(symmetric, bool):
        raise TypeError(f"symmetric must be True or False, but is {symmetric!r}")
    if smooth is not None and not (_is_number(smooth) and 0 <= smooth <= 1):
        raise ValueError(f"smooth must be None or a number from 0 to 1, but is {smooth!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)

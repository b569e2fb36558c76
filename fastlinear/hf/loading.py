"""`from_pretrained(..., quantization_config=FastLinearConfig(...))`, and the experts of transformers.

What transformers calls quantized is here a model that is frozen: adapters can be trained on it, but not its weights,
and `half()` and `float()` are refused. A model that keeps its parameters is an ordinary one.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from fastlinear.file import manifest, safetensors
from fastlinear.file.saving import load
from fastlinear.layer import experts, pages
from fastlinear.layer.fallback import label
from fastlinear.layer.frozen import Frozen, hold, record_of
from fastlinear.model.convert import convert, unconvert
from fastlinear.spec.precision import wanted
from fastlinear.spec.schemes import KINDS, Int8WeightOnly, Scheme

_METHOD = "fastlinear"  # what `quant_method` is in a config.json
_log = logging.getLogger("fastlinear")


@register_quantization_config(_METHOD)
class FastLinearConfig(QuantizationConfigMixin):
    """What `from_pretrained` of transformers is to make of the linear layers of a model, as its `quantization_config`.

    dtype, quantize, include, exclude, embeddings: as `convert` takes them, but for types of modules in `include` and
        `exclude`, which no config.json can tell.
    freeze: each layer's weight goes as soon as it is packed, with the pages of the file that it was read from, so that
        memory peaks at the larger of file and model, and one layer. Such a model counts as quantized: Trainer trains
        adapters on it alone, `half()` and `float()` are refused, and `model.dequantize()` gives a stock model with what
        `dtype` or `quantize` left of its weights.

    `save_pretrained` writes stock weights and this config, so the folder loads with fast layers wherever this module
    was imported, and with stock ones elsewhere. A folder's own config comes before one that is passed. Where its
    model.safetensors is a file of `fastlinear.save`, that is loaded as by `fastlinear.load`, and tells all that dtype,
    quantize and the others could; FormatError where it is damaged, or of another model.

    Raises TypeError or ValueError for arguments of a wrong kind.
    """

    def __init__(
        self,
        dtype: torch.dtype | str | None = None,
        quantize: Scheme | dict[str, Any] | None = None,
        include: str | Iterable[str] | None = None,
        exclude: str | Iterable[str] | None = None,
        freeze: bool = True,
        embeddings: Int8WeightOnly | dict[str, Any] | None = None,
        quant_method: str = _METHOD,
    ) -> None:
        if quant_method != _METHOD:
            raise ValueError(f"quant_method of a FastLinearConfig is {_METHOD!r}, but was given as {quant_method!r}")
        if not isinstance(freeze, bool):
            raise TypeError(f"freeze must be True or False, but is {freeze!r}")
        self.quant_method: Any = _METHOD
        self.dtype = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
        self.quantize = _scheme(quantize) if isinstance(quantize, dict) else quantize
        self.include, self.exclude = _names("include", include), _names("exclude", exclude)
        self.freeze = freeze
        self.embeddings: Any = _scheme(embeddings) if isinstance(embeddings, dict) else embeddings
        if not isinstance(self.embeddings, Int8WeightOnly | None):
            raise TypeError(f"embeddings must be Int8WeightOnly() or None, but is {embeddings!r}")
        wanted(self.dtype, quantize=self.quantize)

    def to_dict(self) -> dict[str, Any]:
        """What config.json has of it; a calibration is told by its size alone."""
        scheme, dtype = self.quantize, self.dtype
        assert dtype is None or isinstance(dtype, torch.dtype)
        return {
            "quant_method": _METHOD,
            "dtype": None if dtype is None else _named(dtype),
            "quantize": None if scheme is None else {"scheme": type(scheme).__name__, **_fields(scheme)},
            "embeddings": None if self.embeddings is None else {"scheme": type(self.embeddings).__name__},
            "include": self.include,
            "exclude": self.exclude,
            "freeze": self.freeze,
        }


def _fields(scheme: Any) -> dict[str, Any]:
    told = asdict(scheme)
    if scheme.calibration is not None:
        told["calibration"] = repr(scheme.calibration)
    return {name: _named(value) if isinstance(value, torch.dtype) else value for name, value in told.items()}


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _scheme(told: dict[str, Any]) -> Scheme:
    fields = dict(told)
    kind = KINDS.get(fields.pop("scheme", ""))
    if kind is None:
        raise ValueError(f"quantize of a FastLinearConfig has a scheme of {', '.join(KINDS)}, but is {told!r}")
    if isinstance(scales := fields.get("scales"), str):
        fields["scales"] = getattr(torch, scales, scales)
    return kind(**fields)


def _names(argument: str, patterns: Any) -> list[str] | None:
    if patterns is None:
        return None
    names: list[Any] = [patterns] if isinstance(patterns, str) or not isinstance(patterns, Iterable) else [*patterns]
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"{argument} of a FastLinearConfig takes names and globs, but was given {name!r}")
    return names


_EVERYTHING = ".*"  # a pattern of names that transformers may leave unread
_SHARE = 32  # of the files: what may be in memory until it is let go


class _Reading(ConversionOps):
    """Leaves all tensors as they come, and lets go of the files' pages that they were read from, in some 30 steps."""

    def __init__(self, files: list[str]) -> None:
        self.files, self.read, self.begun = files, 0, False
        self.step = sum(map(os.path.getsize, files)) // _SHARE

    def convert(self, input_dict: dict[str, Any], *_: Any, **__: Any) -> dict[str, Any]:
        self.begun = True
        for value in input_dict.values():
            self.read += sum(tensor.nbytes for tensor in (value if isinstance(value, list) else [value]))
        if self.read > self.step:
            self.read = 0
            pages.let_go_of_files(self.files)
        return input_dict


@register_quantizer(_METHOD)
class FastLinearQuantizer(HfQuantizer):
    """What transformers calls around the loading of a model's weights."""

    is_trainable = True  # adapters on frozen layers
    is_compileable = True
    _packed: str | None = None  # a file of fastlinear.save
    _reading: _Reading | None = None
    _dtype: torch.dtype | None = None
    _narrow: tuple[nn.Module, ...] = ()

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.pre_quantized = False  # what `save_pretrained` writes are stock weights, read one after the other here

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """False for a model that a calibration made, which no config.json can hold."""
        asked: Any = self.quantization_config
        scheme = asked.quantize
        if scheme is None or scheme.calibration is None:
            return True
        _log.warning("a config.json cannot hold the calibration of %r: fastlinear.save can", scheme)
        return False

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Notes what dtype the weights get."""
        self._dtype = dtype
        return dtype

    def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
        """Whether `_Reading` is told of a tensor. Those of a dtype of their own keep it only where this says no.

        Asked again later, of a tensor whose shape differs, this says that it may not.
        """
        if self._reading is None or self._reading.begun:
            return False
        return bool(model.get_parameter_or_buffer(param_name).dtype == self._dtype)

    def get_quantize_ops(self) -> Any:
        """What sees each tensor as it was read."""
        return self._reading

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **_: Any
    ) -> Any:
        files = [file for file in checkpoint_files or () if file.endswith(".safetensors")]
        if len(files) == 1 and manifest.KEY in safetensors.read(files[0]).metadata:
            self._packed = files[0]
            model.state_dict = dict  # transformers has nothing to fill, to miss or to initialize
            model._keys_to_ignore_on_load_unexpected.add(_EVERYTHING)
        elif files:
            self._reading = _Reading(files)
            self._narrow = tuple(self._as_stored(model, files))
        return model

    def _as_stored(self, model: Any, files: list[str]) -> Iterator[nn.Module]:
        """The linear layers that are packed in fewer bytes anyway, of weights that are cast up while they are read: on
        meta they get the dtype of the file, so that the wide weights of all layers are never there at once."""
        asked: Any = self.quantization_config
        if not asked.freeze or (asked.quantize is None and asked.dtype is None) or self._dtype is not torch.float32:
            return
        stored = {name: entry.dtype for file in files for name, entry in safetensors.read(file).entries.items()}
        uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
        for name, module in model.named_modules():
            weight = module._parameters.get("weight")
            dtype = next((stored[each] for each in _ends(f"{name}.weight") if each in stored), None)
            lossy_head = asked.quantize is None and name.rpartition(".")[2] == "lm_head"  # which convert leaves alone
            alone = type(module) is nn.Linear and weight.is_meta and uses[id(weight)] == 1 and not lossy_head
            if alone and dtype in (torch.bfloat16, torch.float16):
                module._parameters["weight"] = nn.Parameter(weight.to(dtype), requires_grad=weight.requires_grad)
                yield module

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        asked: Any = self.quantization_config
        if self._packed is not None:
            del model.state_dict
            model._keys_to_ignore_on_load_unexpected.discard(_EVERYTHING)
            load(self._packed, model)
        else:
            convert(
                model,
                dtype=asked.dtype,
                quantize=asked.quantize,
                include=asked.include,
                exclude=asked.exclude,
                embeddings=asked.embeddings,
                freeze=asked.freeze,
                inplace=True,
            )
            for layer in self._narrow:
                _widen(layer, self._dtype)
        model.is_quantized = asked.freeze
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        return unconvert(model).to(dtype)


def _ends(name: str) -> Iterator[str]:
    """A dotted name, and that without one, two ... words at its front, as a model within this one has it."""
    words = name.split(".")
    return (".".join(words[i:]) for i in range(len(words)))


def _widen(layer: Any, dtype: Any) -> None:
    """Has a layer know its weight as of another dtype, or, where it was not packed, cast it."""
    frozen = record_of(layer)
    if frozen is not None and frozen.dtype is not dtype:
        hold(layer, Frozen(frozen.packed, dtype, frozen.requires_grad, frozen.origin, frozen.smooth, frozen.shard))
    elif frozen is None:
        layer.weight = nn.Parameter(layer.weight.detach().to(dtype), requires_grad=layer.weight.requires_grad)


_AS_STOCK = "grouped_mm"  # what computes where fast experts do not


def _experts(module: Any, *arguments: Any, **named: Any) -> Any:
    """What `experts_implementation="fastlinear"` calls: experts become fast at their first call, as by `convert`."""
    if experts.is_fast_experts(module):  # which come here in training alone
        return ALL_EXPERTS_FUNCTIONS[_AS_STOCK](module, *arguments, **named)
    if (reason := experts.why_not(module)) is not None:
        _log.debug("%s is left to %s: %s", label(module), _AS_STOCK, reason)
        return ALL_EXPERTS_FUNCTIONS[_AS_STOCK](module, *arguments, **named)
    experts.adopt(module)
    return module(*arguments, **named)


ALL_EXPERTS_FUNCTIONS.register("fastlinear", _experts)

"""Fast linear layers for PyTorch on CPUs: prepacked weights, fused activations, autotuned kernels.

What is below is imported when it is first asked for: of an import, most went into what a process never calls. The
operators are there from the beginning, since programs that were exported or scripted look for them.
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING, Any

import fastlinear._moved  # pickles look for old names
import fastlinear.layer.blend
import fastlinear.layer.operator  # noqa: F401  fastlinear::linear, ::unpack; above, ::experts

if TYPE_CHECKING:  # the same names for those who read and do not run
    from fastlinear._kernels import cpu_info as cpu_info
    from fastlinear._kernels import kernels as kernels
    from fastlinear.file.checkpoints import load_quantized as load_quantized
    from fastlinear.file.plans import load_plans as load_plans
    from fastlinear.file.plans import save_plans as save_plans
    from fastlinear.file.safetensors import FormatError as FormatError
    from fastlinear.file.saving import load as load
    from fastlinear.file.saving import save as save
    from fastlinear.layer.experts import FastExperts as FastExperts
    from fastlinear.layer.gated import FastGatedLinear as FastGatedLinear
    from fastlinear.layer.group import FastLinearGroup as FastLinearGroup
    from fastlinear.layer.linear import FastLinear as FastLinear
    from fastlinear.model.calibration import calibrate as calibrate
    from fastlinear.model.convert import convert as convert
    from fastlinear.model.convert import refresh as refresh
    from fastlinear.model.convert import unconvert as unconvert
    from fastlinear.model.explaining import explain as explain
    from fastlinear.model.freezing import freeze as freeze
    from fastlinear.model.freezing import unfreeze as unfreeze
    from fastlinear.model.profiling import profile as profile
    from fastlinear.model.reporting import report as report
    from fastlinear.model.sensing import sensitivity as sensitivity
    from fastlinear.model.tuning import clear_cache as clear_cache
    from fastlinear.model.tuning import force as force
    from fastlinear.model.tuning import tune as tune
    from fastlinear.spec.schemes import Calibration as Calibration
    from fastlinear.spec.schemes import Int4Dynamic as Int4Dynamic
    from fastlinear.spec.schemes import Int4WeightOnly as Int4WeightOnly
    from fastlinear.spec.schemes import Int8Dynamic as Int8Dynamic
    from fastlinear.spec.schemes import Int8Static as Int8Static
    from fastlinear.spec.schemes import Int8WeightOnly as Int8WeightOnly

_MODULES = {  # a module -> the names that it gives
    "_kernels": ("cpu_info", "kernels"),
    "file.checkpoints": ("load_quantized",),
    "file.plans": ("load_plans", "save_plans"),
    "file.safetensors": ("FormatError",),
    "file.saving": ("load", "save"),
    "layer.experts": ("FastExperts",),
    "layer.gated": ("FastGatedLinear",),
    "layer.group": ("FastLinearGroup",),
    "layer.linear": ("FastLinear",),
    "model.calibration": ("calibrate",),
    "model.convert": ("convert", "refresh", "unconvert"),
    "model.explaining": ("explain",),
    "model.freezing": ("freeze", "unfreeze"),
    "model.profiling": ("profile",),
    "model.reporting": ("report",),
    "model.sensing": ("sensitivity",),
    "model.tuning": ("clear_cache", "force", "tune"),
    "spec.schemes": ("Calibration", "Int4Dynamic", "Int4WeightOnly", "Int8Dynamic", "Int8Static", "Int8WeightOnly"),
}
_PLACES = {name: f"fastlinear.{module}" for module, names in _MODULES.items() for name in names}

__all__ = sorted(_PLACES)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("fastlinear")
    elif name in _PLACES:
        value = getattr(_import_module(_PLACES[name]), name)
    else:
        raise AttributeError(f"module 'fastlinear' has no attribute {name!r}")
    globals()[name] = value  # asked for once
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]

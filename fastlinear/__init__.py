"""Fast linear layers for PyTorch on CPUs: prepacked weights, fused activations, autotuned kernels."""

from importlib.metadata import version as _version

from fastlinear._kernels import cpu_info, kernels
from fastlinear._moved import keep_old_names
from fastlinear.file.checkpoints import load_quantized
from fastlinear.file.plans import load_plans, save_plans
from fastlinear.file.safetensors import FormatError
from fastlinear.file.saving import load, save
from fastlinear.layer.experts import FastExperts
from fastlinear.layer.gated import FastGatedLinear
from fastlinear.layer.group import FastLinearGroup
from fastlinear.layer.linear import FastLinear
from fastlinear.model.calibration import calibrate
from fastlinear.model.convert import convert, refresh, unconvert
from fastlinear.model.explaining import explain
from fastlinear.model.freezing import freeze, unfreeze
from fastlinear.model.profiling import profile
from fastlinear.model.reporting import report
from fastlinear.model.sensing import sensitivity
from fastlinear.model.tuning import clear_cache, force, tune
from fastlinear.spec.schemes import Calibration, Int4Dynamic, Int4WeightOnly, Int8Dynamic, Int8Static, Int8WeightOnly

__all__ = [
    "Calibration",
    "FastExperts",
    "FastGatedLinear",
    "FastLinear",
    "FastLinearGroup",
    "FormatError",
    "Int4Dynamic",
    "Int4WeightOnly",
    "Int8Dynamic",
    "Int8Static",
    "Int8WeightOnly",
    "calibrate",
    "clear_cache",
    "convert",
    "cpu_info",
    "explain",
    "force",
    "freeze",
    "kernels",
    "load",
    "load_plans",
    "load_quantized",
    "profile",
    "refresh",
    "report",
    "save",
    "save_plans",
    "sensitivity",
    "tune",
    "unconvert",
    "unfreeze",
]

__version__ = _version("fastlinear")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


keep_old_names()

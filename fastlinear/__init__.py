"""Fast linear layers for PyTorch on CPUs: prepacked weights, fused activations, autotuned kernels."""

from fastlinear._kernels import cpu_info, kernels
from fastlinear.calibration import calibrate
from fastlinear.convert import convert, refresh, unconvert
from fastlinear.freeze import freeze, unfreeze
from fastlinear.header import FormatError
from fastlinear.linear import FastLinear
from fastlinear.report import report
from fastlinear.schemes import Calibration, Int8Dynamic, Int8Static, Int8WeightOnly
from fastlinear.serialize import load, save
from fastlinear.tuning import tune

__all__ = [
    "Calibration",
    "FastLinear",
    "FormatError",
    "Int8Dynamic",
    "Int8Static",
    "Int8WeightOnly",
    "calibrate",
    "convert",
    "cpu_info",
    "freeze",
    "kernels",
    "load",
    "refresh",
    "report",
    "save",
    "tune",
    "unconvert",
    "unfreeze",
]

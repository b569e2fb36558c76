"""Fast linear layers for PyTorch on CPUs: prepacked weights, fused activations, autotuned kernels."""

from fastlinear._kernels import cpu_info, kernels
from fastlinear.convert import convert, refresh, tune, unconvert
from fastlinear.freeze import freeze, unfreeze
from fastlinear.header import FormatError
from fastlinear.linear import FastLinear
from fastlinear.report import report
from fastlinear.serialize import load, save

__all__ = [
    "FastLinear",
    "FormatError",
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

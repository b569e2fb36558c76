"""Fast linear layers for PyTorch on CPUs: prepacked weights, fused activations, autotuned kernels."""

from fastlinear._kernels import cpu_info, kernels
from fastlinear.convert import convert, refresh, tune, unconvert
from fastlinear.linear import FastLinear
from fastlinear.report import report

__all__ = ["FastLinear", "convert", "cpu_info", "kernels", "refresh", "report", "tune", "unconvert"]

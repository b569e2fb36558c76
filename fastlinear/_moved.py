"""Where modules and classes have gone that pickles, and imports of versions before 0.2, know by other names."""

import importlib
import sys

_MOVED = {
    "activations": "spec.activations",
    "autotune": "plan.race",
    "calibration": "model.calibration",
    "candidates": "plan.candidates",
    "frozen": "layer.frozen",
    "fusion": "model.fusion",
    "header": "file.safetensors",
    "linear": "layer.linear",
    "precision": "spec.precision",
    "quantize": "spec.int8",
    "schemes": "spec.schemes",
    "serialize": "file.saving",
    "tuning": "model.tuning",
}


def keep_old_names() -> None:
    """Makes `import fastlinear.linear` and the like find the module that has the place now."""
    for old, new in _MOVED.items():
        sys.modules[f"fastlinear.{old}"] = importlib.import_module(f"fastlinear.{new}")

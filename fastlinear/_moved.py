"""Where modules and classes have gone that pickles, and imports of versions before 0.2, know by other names."""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

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


class _Finder(MetaPathFinder, Loader):
    """Makes `import fastlinear.linear` and the like find the module that has the place now."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        package, _, old = name.rpartition(".")
        return ModuleSpec(name, self) if package == "fastlinear" and old in _MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        """Puts the other module into the place of this one, which importlib allows for."""
        sys.modules[module.__name__] = import_module(f"fastlinear.{_MOVED[module.__name__.rpartition('.')[2]]}")


sys.meta_path.append(_Finder())

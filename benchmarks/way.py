"""One way of torch to run a whole model, in a process of its own: python way.py NAME MODEL THREADS

whole.py is the other end.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import whole_models
from apart import serve
from timing import WHOLE, Turns
from torch import nn

import fastlinear
from fastlinear.graph import backend

Way = Callable[[nn.Module], Callable[..., Any]]
INT8: dict[str, Any] = {"quantize": fastlinear.Int8Dynamic(asymmetric=True)}
BF16: dict[str, Any] = {"products": torch.bfloat16}


def convert(**options: Any) -> Way:
    return lambda model: fastlinear.convert(model, **options)


def compiled(**options: Any) -> Way:
    return lambda model: torch.compile(model, backend=backend, fullgraph=True, options=options)


def inductor(model: nn.Module) -> Callable[..., Any]:
    """torch.compile at its best; it needs a C++ compiler."""
    return torch.compile(model, dynamic=False, options={"max_autotune": True, "freezing": True})


def quantize_dynamic(model: nn.Module) -> Callable[..., Any]:
    """torch's own int8, with FBGEMM."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that it will part with it
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)


def torchao(model: nn.Module) -> Callable[..., Any]:
    """Its int8 weights and rows, which need Inductor to be fast; from the environment of the rivals."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return inductor(model)


WAYS: dict[str, Way] = {
    "eager": lambda model: model,
    "eager bf16": lambda model: model.bfloat16(),
    "inductor": inductor,
    "quantize_dynamic": quantize_dynamic,
    "torchao": torchao,
    "convert": convert(),
    "backend": compiled(),
    "convert int8": convert(**INT8),
    "backend int8": compiled(**INT8),
    "convert bf16": convert(**BF16),
    "backend bf16": compiled(**BF16),
}


class Runner(Turns):
    """What whole.py may ask for."""

    def __init__(self, name: str, model: str) -> None:
        self._model = whole_models.build(model)
        self._dtype = torch.bfloat16 if name == "eager bf16" else None
        call = WAYS[name](self._model)
        self._call = torch.inference_mode()(lambda *inputs: call(*inputs))

    def prepare(self, folder: str, answer: str) -> float:
        """Calls it with the inputs of `folder` and writes what comes out; seconds of that first call."""
        self._inputs = [torch.from_numpy(array) for array in np.load(Path(folder, "inputs.npz")).values()]
        self._inputs = [x.to(self._dtype) if x.is_floating_point() and self._dtype else x for x in self._inputs]
        start = time.perf_counter()
        y = self._call(*self._inputs)
        seconds = time.perf_counter() - start
        np.save(answer, y.float().numpy())
        return seconds

    def rotate(self) -> float:
        """Prepares samples; seconds that one takes."""
        for _ in range(3):
            self._call(*self._inputs)
        return self.rotate_over([lambda _: self._call(*self._inputs)], WHOLE)


def export(name: str, folder: str) -> None:
    """The model as ONNX, of the shapes of the inputs in `folder`."""
    inputs = tuple(torch.from_numpy(array) for array in np.load(Path(folder, "inputs.npz")).values())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(whole_models.build(name), inputs, Path(folder, "model.onnx"), dynamo=True, verbose=False)


def main(name: str, model: str, threads: str, rivals: str) -> None:
    torch.set_num_threads(int(threads))
    if name in ("export", "torchao"):
        sys.path.append(rivals)  # where what only they need is installed
    if name == "export":
        export(model, sys.argv[5])
    else:
        serve(lambda: Runner(name, model))


if __name__ == "__main__":
    main(*sys.argv[1:5])

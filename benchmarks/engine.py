"""Another engine that runs a whole model from ONNX, in a process of its own: python engine.py NAME THREADS

whole.py is the other end; it runs this with the interpreter of an environment that has neither torch nor fastlinear.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from apart import serve
from timing import WHOLE, Turns

Run = Callable[[], Any]  # the first output
Build = Callable[[Path, dict[str, Any], int], Run]


def onnxruntime(path: Path, inputs: dict[str, Any], threads: int) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    feed = dict(zip(names, inputs.values(), strict=False))
    return lambda: session.run(None, feed)[0]


def onnxruntime_int8(path: Path, inputs: dict[str, Any], threads: int) -> Run:
    """Its quantize_dynamic, a scale a channel."""
    from onnxruntime.quantization import quantize_dynamic

    smaller = path.with_suffix(".int8.onnx")
    quantize_dynamic(path, smaller, per_channel=True)
    return onnxruntime(smaller, inputs, threads)


def openvino(path: Path, inputs: dict[str, Any], threads: int) -> Run:
    """One stream, for the least latency, in fp32 also where the CPU has more to offer in 16 bits."""
    import openvino

    config = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": threads}
    compiled = openvino.Core().compile_model(path, "CPU", {**config, "INFERENCE_PRECISION_HINT": "f32"})
    request = compiled.create_infer_request()
    for i, array in zip(range(len(compiled.inputs)), inputs.values(), strict=False):
        request.set_input_tensor(i, openvino.Tensor(array, shared_memory=True))

    def run() -> Any:
        request.infer(share_outputs=True)
        return request.get_output_tensor(0).data

    return run


ENGINES: dict[str, Build] = {
    "onnxruntime": onnxruntime,
    "onnxruntime int8": onnxruntime_int8,
    "openvino": openvino,
}


class Runner(Turns):
    """What whole.py may ask for; as that of way.py."""

    def __init__(self, name: str, threads: int) -> None:
        self._build, self._threads = ENGINES[name], threads

    def prepare(self, folder: str, answer: str) -> float:
        """Seconds of building it from the model in `folder` and of the first call, whose answer it writes."""
        inputs = dict(np.load(Path(folder, "inputs.npz")))
        start = time.perf_counter()
        self._run = self._build(Path(folder, "model.onnx"), inputs, self._threads)
        y = self._run()
        seconds = time.perf_counter() - start
        np.save(answer, y)
        return seconds

    def rotate(self) -> float:
        return self.rotate_over([lambda _: self._run()], WHOLE)


def main(name: str, threads: str) -> None:
    serve(lambda: Runner(name, int(threads)))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""A rival in a process of its own, so that its pool of threads and torch's never meet: python rival.py NAME THREADS

remote.py is the other end; it runs this with the interpreter of an environment that has neither torch nor fastlinear.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from apart import serve
from timing import Call, Turns

Bind = Callable[[Any, Any], Call]  # from x [M, K] and y [M, N], both fp32, to a call that writes y
Build = Callable[[Any, Any, Any], Bind]  # from weight int8 [N, K], its scales fp32 [N] and bias fp32 [N]


def onnxruntime(threads: int) -> Build:
    """relu(DynamicQuantizeMatMul), which its quantize_dynamic and the fusions of a session make of a linear layer; x
    and y are bound, not copied. Its sessions share threads and memory, as the layers of one model do."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    onnxruntime.set_global_thread_pool_sizes(threads, 1)
    device = ("Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT)
    onnxruntime.create_and_register_allocator(onnxruntime.OrtMemoryInfo(*device), None)
    options = onnxruntime.SessionOptions()
    options.use_per_session_threads = False
    options.add_session_config_entry("session.use_env_allocators", "1")

    def build(weight: Any, scale: Any, bias: Any) -> Bind:
        n, k = weight.shape
        constants = {"w": np.ascontiguousarray(weight.T), "s": scale, "z": np.zeros(n, np.int8), "b": bias}
        graph = helper.make_graph(
            [
                helper.make_node("DynamicQuantizeMatMul", ["x", *constants], ["sum"], domain="com.microsoft"),
                helper.make_node("Relu", ["sum"], ["y"]),
            ],
            "linear",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, k])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, n])],
            [numpy_helper.from_array(value, name) for name, value in constants.items()],
        )
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

        def bind(x: Any, y: Any) -> Call:
            binding = session.io_binding()
            binding.bind_input("x", "cpu", 0, np.float32, x.shape, x.ctypes.data)
            binding.bind_output("y", "cpu", 0, np.float32, y.shape, y.ctypes.data)
            return lambda _: session.run_with_iobinding(binding)

        return bind

    return build


def openvino(threads: int, dynamic: bool) -> Build:
    """relu(x W^T + b) with W kept as int8 and a scale a row, sums in fp32 unless dynamic; then x is quantized, in one
    group a row. One stream; all tensors bound."""
    import openvino
    from openvino import opset13

    core = openvino.Core()
    config = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": threads}

    def build(weight: Any, scale: Any, bias: Any) -> Bind:
        x = opset13.parameter([-1, weight.shape[1]], np.float32)
        widened = opset13.multiply(opset13.convert(opset13.constant(weight), np.float32), scale[:, None])
        model = openvino.Model([opset13.relu(opset13.add(opset13.matmul(x, widened, False, True), bias))], [x])
        group = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": weight.shape[1] if dynamic else 0}
        compiled = core.compile_model(model, "CPU", {**config, **group, "INFERENCE_PRECISION_HINT": "f32"})

        def bind(x: Any, y: Any) -> Call:
            request = compiled.create_infer_request()
            request.set_input_tensor(openvino.Tensor(x, shared_memory=True))
            request.set_output_tensor(openvino.Tensor(y, shared_memory=True))
            return lambda _: request.infer(share_outputs=True)

        return bind

    return build


RIVALS: dict[str, Callable[[int], Build]] = {
    "onnxruntime": onnxruntime,
    "openvino": functools.partial(openvino, dynamic=True),
    "openvino_fp32": functools.partial(openvino, dynamic=False),
}


class Rival(Turns):
    """What remote.py may ask for."""

    def __init__(self, name: str, threads: int) -> None:
        self._build = RIVALS[name](threads)
        self._layers: list[Bind] = []
        self._calls: list[Call] = []

    def layers(self, folder: str, copies: int) -> None:
        """Builds so many equal layers, each with memory of its own, from the files of `folder`."""
        self._layers, self._calls = [], []  # those of the last shape go first
        tensors = [np.load(Path(folder, f"{name}.npy")) for name in ("weight", "scale", "bias")]
        self._layers = [self._build(*tensors) for _ in range(copies)]

    def answer(self, folder: str) -> None:
        """Writes y of the last layer for the x of `folder`; x is what is rotated over from now on."""
        self._tensors = x, y = [np.load(Path(folder, f"{name}.npy")) for name in "xy"]  # the calls know addresses only
        self._calls = [bind(x, y) for bind in self._layers]
        for call in self._calls:  # the first call with a new M compiles and allocates
            call(None)
        np.save(Path(folder, "y.npy"), y)

    def rotate(self, copies: int) -> float:
        """Prepares samples over so many of the layers; seconds that one takes."""
        return self.rotate_over(self._calls[:copies])


def main(name: str, threads: str) -> None:
    serve(lambda: Rival(name, int(threads)))


if __name__ == "__main__":
    main(*sys.argv[1:])

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
# From weight int8 [N, K], its scales fp32 [N] and bias fp32 [N]; or, with 4 bits, from codes uint8 [N, K], 8 more than
# what is to be multiplied by scales fp16 [N, groups].
Build = Callable[[Any, Any, Any], Bind]


def onnxruntime(threads: int, bits: int) -> Build:
    """relu(DynamicQuantizeMatMul), which its quantize_dynamic and the fusions of a session make of a linear layer; of 4
    bits relu(MatMulNBits) on inputs in 8 (accuracy level 4). x and y are bound, not copied. Its sessions share threads
    and memory, as the layers of one model do."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    onnxruntime.set_global_thread_pool_sizes(threads, 1)
    device = ("Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT)
    onnxruntime.create_and_register_allocator(onnxruntime.OrtMemoryInfo(*device), None)
    options = onnxruntime.SessionOptions()
    options.use_per_session_threads = False
    options.add_session_config_entry("session.use_env_allocators", "1")

    def product(weight: Any, scale: Any, bias: Any) -> tuple[Any, dict[str, Any]]:
        """The node from x to sum, and its constants."""
        n, k = weight.shape
        if bits == 8:
            constants = {"w": np.ascontiguousarray(weight.T), "s": scale, "z": np.zeros(n, np.int8), "b": bias}
            name, how = "DynamicQuantizeMatMul", {}
        else:
            group = k // scale.shape[1]
            codes = pairs(weight).reshape(n, -1, group // 2)
            constants = {"w": codes, "s": scale.astype(np.float32), "b": bias}
            name, how = "MatMulNBits", {"K": k, "N": n, "bits": 4, "block_size": group, "accuracy_level": 4}
        inputs = ["x", *constants] if bits == 8 else ["x", "w", "s", "", "", "b"]  # it leaves out zeros and an order
        return helper.make_node(name, inputs, ["sum"], domain="com.microsoft", **how), constants

    def build(weight: Any, scale: Any, bias: Any) -> Bind:
        n, k = weight.shape
        node, constants = product(weight, scale, bias)
        graph = helper.make_graph(
            [node, helper.make_node("Relu", ["sum"], ["y"])],
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


def openvino(threads: int, bits: int, dynamic: bool) -> Build:
    """relu(x W^T + b) with W kept as int8 and a scale a row, or as u4 and a scale a group; sums in fp32 unless dynamic:
    then x is quantized, in groups like those of W. One stream; all tensors bound."""
    import openvino
    from openvino import op, opset13

    core = openvino.Core()
    config = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": threads}

    def widened(weight: Any, scale: Any) -> Any:
        if bits == 8:
            return opset13.multiply(opset13.convert(opset13.constant(weight), np.float32), scale[:, None])
        n, groups = scale.shape
        shapes = ((pairs(weight), [n, groups, weight.shape[1] // groups]), (np.array([8], np.uint8), [1, 1, 1]))
        tensors = [openvino.Tensor(data, shape, openvino.Type.u4) for data, shape in shapes]
        numbers, eight = (opset13.convert(op.Constant(each, shared_memory=False), np.float16) for each in tensors)
        centered = opset13.subtract(numbers, eight)
        flat = opset13.reshape(opset13.multiply(centered, scale[..., None]), [n, weight.shape[1]], False)
        return opset13.convert(flat, np.float32)

    def build(weight: Any, scale: Any, bias: Any) -> Bind:
        x = opset13.parameter([-1, weight.shape[1]], np.float32)
        product = opset13.matmul(x, widened(weight, scale), False, True)
        model = openvino.Model([opset13.relu(opset13.add(product, bias))], [x])
        group = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": weight.size // scale.size if dynamic else 0}
        compiled = core.compile_model(model, "CPU", {**config, **group, "INFERENCE_PRECISION_HINT": "f32"})

        def bind(x: Any, y: Any) -> Call:
            request = compiled.create_infer_request()
            request.set_input_tensor(openvino.Tensor(x, shared_memory=True))
            request.set_output_tensor(openvino.Tensor(y, shared_memory=True))
            return lambda _: request.infer(share_outputs=True)

        return bind

    return build


def pairs(codes: Any) -> Any:
    """Two to a byte, the first in its lower half."""
    return np.ascontiguousarray(codes[:, ::2] | codes[:, 1::2] << 4)


def llama_cpp(threads: int) -> Build:
    """relu(mul_mat + b) of ggml, as built into the wheel of xllamacpp, on weights in Q4_0, which its repacking
    interleaves."""
    import ggml

    return functools.partial(ggml.linear, threads=threads)


RIVALS: dict[str, Callable[[int], Build]] = {
    "onnxruntime": functools.partial(onnxruntime, bits=8),
    "onnxruntime_int4": functools.partial(onnxruntime, bits=4),
    "openvino": functools.partial(openvino, bits=8, dynamic=True),
    "openvino_fp32": functools.partial(openvino, bits=8, dynamic=False),
    "openvino_int4": functools.partial(openvino, bits=4, dynamic=True),
    "openvino_int4_fp32": functools.partial(openvino, bits=4, dynamic=False),
    "llama_cpp": llama_cpp,
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

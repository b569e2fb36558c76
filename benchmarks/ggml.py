"""A linear layer in ggml's Q4_0, by the C functions that the wheel of xllamacpp exports: no Python of it has them."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from ctypes import Structure, c_bool, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
from timing import Call

_F32, _Q4_0, _BLOCK = 0, 2, 32  # ggml_type, and the k of a block
SILENCE = ctypes.CFUNCTYPE(None, c_int, ctypes.c_char_p, c_void_p)(lambda level, text, of: None)
_REPACKED = "_Z35ggml_backend_cpu_repack_buffer_typev"  # a C++ function, the only one


class _Parameters(Structure):
    _fields_ = (("size", c_size_t), ("buffer", c_void_p), ("no_alloc", c_bool))


_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "ggml_init": (c_void_p, (_Parameters,)),
    "ggml_new_tensor_2d": (c_void_p, (c_void_p, c_int, c_int64, c_int64)),
    "ggml_new_tensor_1d": (c_void_p, (c_void_p, c_int, c_int64)),
    "ggml_mul_mat": (c_void_p, (c_void_p, c_void_p, c_void_p)),
    "ggml_add": (c_void_p, (c_void_p, c_void_p, c_void_p)),
    "ggml_relu": (c_void_p, (c_void_p, c_void_p)),
    "ggml_new_graph": (c_void_p, (c_void_p,)),
    "ggml_build_forward_expand": (None, (c_void_p, c_void_p)),
    "ggml_backend_cpu_init": (c_void_p, ()),
    "ggml_backend_cpu_set_n_threads": (None, (c_void_p, c_int)),
    "ggml_backend_cpu_buffer_type": (c_void_p, ()),
    _REPACKED: (c_void_p, ()),
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, (c_void_p, c_void_p)),
    "ggml_backend_tensor_set": (None, (c_void_p, c_void_p, c_size_t, c_size_t)),
    "ggml_backend_tensor_get": (None, (c_void_p, c_void_p, c_size_t, c_size_t)),
    "ggml_backend_graph_compute": (c_int, (c_void_p, c_void_p)),
}


@functools.cache
def library() -> Any:
    found = importlib.util.find_spec("xllamacpp")
    assert found is not None and found.origin is not None
    lib = ctypes.CDLL(str(Path(found.origin).with_name("xllamacpp.abi3.so")))
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    lib.ggml_log_set(SILENCE, None)
    return lib


def linear(weight: Any, scale: Any, bias: Any, threads: int) -> Any:
    """From codes uint8 [N, K], scales fp16 [N, groups] and bias fp32 [N] to what binds x and y."""
    lib, (n, k) = library(), weight.shape
    backend = _backend(threads)
    kept = lib.ggml_init(_Parameters(1 << 20, None, True))
    w = lib.ggml_new_tensor_2d(kept, _Q4_0, k, n)
    lib.ggml_backend_alloc_ctx_tensors_from_buft(kept, getattr(lib, _REPACKED)())
    _set(w, blocks(weight, scale))

    def bind(x: Any, y: Any) -> Call:
        used = lib.ggml_init(_Parameters(1 << 20, None, True))
        of_x, of_bias = lib.ggml_new_tensor_2d(used, _F32, k, len(x)), lib.ggml_new_tensor_1d(used, _F32, n)
        of_y = lib.ggml_relu(used, lib.ggml_add(used, lib.ggml_mul_mat(used, w, of_x), of_bias))
        graph = lib.ggml_new_graph(used)
        lib.ggml_build_forward_expand(graph, of_y)
        lib.ggml_backend_alloc_ctx_tensors_from_buft(used, lib.ggml_backend_cpu_buffer_type())
        _set(of_x, x)
        _set(of_bias, bias)
        lib.ggml_backend_graph_compute(backend, graph)
        lib.ggml_backend_tensor_get(of_y, y.ctypes.data, 0, y.nbytes)
        return lambda _: lib.ggml_backend_graph_compute(backend, graph)

    return bind


@functools.cache
def _backend(threads: int) -> Any:
    backend = library().ggml_backend_cpu_init()
    library().ggml_backend_cpu_set_n_threads(backend, threads)
    return backend


def _set(tensor: Any, values: Any) -> None:
    values = np.ascontiguousarray(values)
    library().ggml_backend_tensor_set(tensor, values.ctypes.data, 0, values.nbytes)


def blocks(codes: Any, scale: Any) -> Any:
    """Q4_0: of each 32 k an fp16 and 16 bytes, code j in the lower and code 16 + j in the upper half of byte j. Wider
    groups become several of equal scale."""
    n, k = codes.shape
    halves = codes.reshape(n, k // _BLOCK, 2, _BLOCK // 2)
    scales = np.repeat(scale.astype(np.float16), k // _BLOCK // scale.shape[1], axis=1)[..., None]
    return np.concatenate([scales.view(np.uint8), halves[:, :, 0] | halves[:, :, 1] << 4], axis=-1)

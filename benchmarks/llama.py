"""A language model in llama.cpp, by the C functions that the wheel of xllamacpp exports; its parameters stay what they
are by default, but for the length of the context and the number of threads."""

from __future__ import annotations

import functools
from ctypes import POINTER, Structure, c_bool, c_char_p, c_float, c_int32, c_uint32, c_void_p
from pathlib import Path
from typing import Any

import ggml
import numpy as np


class _Passed(Structure):
    """A struct passed on as it came: longer than all of llama.cpp's, of which it may hold any."""

    _fields_ = (("words", c_uint32 * 256),)


_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "llama_print_system_info": (c_char_p, ()),
    "llama_model_default_params": (_Passed, ()),
    "llama_model_load_from_file": (c_void_p, (c_char_p, _Passed)),
    "llama_model_get_vocab": (c_void_p, (c_void_p,)),
    "llama_vocab_n_tokens": (c_int32, (c_void_p,)),
    "llama_context_default_params": (_Passed, ()),
    "llama_init_from_model": (c_void_p, (c_void_p, _Passed)),
    "llama_set_n_threads": (None, (c_void_p, c_int32, c_int32)),
    "llama_get_memory": (c_void_p, (c_void_p,)),
    "llama_memory_clear": (None, (c_void_p, c_bool)),
    "llama_batch_get_one": (_Passed, (POINTER(c_int32), c_int32)),
    "llama_decode": (c_int32, (c_void_p, _Passed)),
    "llama_get_logits_ith": (POINTER(c_float), (c_void_p, c_int32)),
}
_BEGIN = [512, 2048, 512]  # of the context's parameters: tokens of the context, of a batch and of a step


@functools.cache
def library() -> Any:
    lib = ggml.library()
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    lib.llama_log_set(ggml.SILENCE, None)
    return lib


class Model:
    """One file, with a context of so many tokens, on so many threads."""

    def __init__(self, path: Path, tokens: int, threads: int) -> None:
        self._lib = lib = library()
        model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
        if model is None:
            raise RuntimeError(f"llama.cpp does not load {path}")
        wanted = lib.llama_context_default_params()
        assert wanted.words[:3] == _BEGIN, "llama_context_params begins with other fields than it did"
        wanted.words[0] = tokens
        self._context = lib.llama_init_from_model(model, wanted)
        lib.llama_set_n_threads(self._context, threads, threads)
        self._vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))

    def forget(self) -> None:
        """Begins a new text."""
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)

    def next_of(self, ids: list[int]) -> int:
        """The likeliest token after these, which go on with the text."""
        tokens = (c_int32 * len(ids))(*ids)  # whose address the batch has
        if self._lib.llama_decode(self._context, self._lib.llama_batch_get_one(tokens, len(ids))) != 0:
            raise RuntimeError(f"llama.cpp does not take {len(ids)} tokens more")
        logits = self._lib.llama_get_logits_ith(self._context, -1)
        return int(np.argmax(np.ctypeslib.as_array(logits, (self._vocabulary,))))


def about() -> str:
    """The instruction sets that it was built for."""
    return str(library().llama_print_system_info().decode())

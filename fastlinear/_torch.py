"""The names of torch that it does not promise to keep: each is looked up here, once, when the package is imported.

A row is the places where torch has, or had, it, and what stands in where none of them is there any more. Without one,
the import fails with a sentence that names it: answers would be wrong.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from importlib import import_module
from typing import Any, TypeVar

import torch
from torch.autograd import forward_ad

Function = TypeVar("Function", bound=Callable[..., Any])

_REQUIRED = object()


def _never(*_: object) -> bool:
    return False


class _NoSuch:
    """Of which nothing is an instance, and which no graph calls."""


def _depth(stack: str) -> Callable[[], int] | object:
    found = find(stack)
    return _REQUIRED if found is None else lambda: len(found())


def find(name: str) -> Any:
    """What torch has by this name below it, or None."""
    *modules, last = name.split(".")
    found: Any = torch
    for place, part in enumerate(modules, 1):
        found = getattr(found, part, None)
        if found is None:
            try:
                found = import_module(".".join(["torch", *modules[:place]]))
            except ImportError:
                return None
    return getattr(found, last, None)


PLACES: dict[str, tuple[tuple[str, ...], object]] = {
    # What may watch a call.
    "any_autocast": (("_C._is_any_autocast_enabled",), lambda: torch.is_autocast_enabled("cpu")),
    "is_tracing": (("_C._is_tracing",), torch.jit.is_tracing),  # type: ignore[attr-defined]
    "transform": (("_C._functorch.peek_interpreter_stack",), _REQUIRED),
    "is_batched": (("_C._functorch.is_legacy_batchedtensor",), _never),
    "dispatch_modes": (
        ("_C._len_torch_dispatch_stack",),
        _depth("utils._python_dispatch._get_current_dispatch_mode_stack"),
    ),
    "dispatch_mode_at": (("_C._get_dispatch_stack_at",), _REQUIRED),
    "function_modes": (("_C._len_torch_function_stack",), _depth("overrides._get_current_function_mode_stack")),
    "function_mode_at": (("_C._get_function_stack_at",), _REQUIRED),
    "DeviceContext": (("utils._device.DeviceContext",), _NoSuch),
    "unpack_dual": (("_VF._unpack_dual",), lambda tensor, level: forward_ad.unpack_dual(tensor)),
    # What the operator and its gradient say to the dispatcher.
    "set_grad_enabled": (("_C._set_grad_enabled",), torch.set_grad_enabled),
    "DispatchKey": (("_C.DispatchKey",), _REQUIRED),
    "DispatchKeySet": (("_C.DispatchKeySet",), _REQUIRED),
    "ExcludeDispatchKeyGuard": (("_C._ExcludeDispatchKeyGuard",), _REQUIRED),
    "after_autograd": (("_C._after_autograd_keyset",), _REQUIRED),
    # What a report counts: a mode of its own, and a recurrence step by step.
    "TorchDispatchMode": (("utils._python_dispatch.TorchDispatchMode",), _REQUIRED),
    "get_mkldnn_enabled": (("_C._get_mkldnn_enabled",), _never),
    "set_mkldnn_enabled": (("_C._set_mkldnn_enabled",), _never),
    # How often a tensor has changed.
    "version": (("Tensor._version",), _REQUIRED),
    # An int8 layer whose weight keeps changing.
    "int_mm": (("_int_mm",), lambda a, b: (a.double() @ b.double()).int()),
    # A frozen layer's lent weight.
    "TensorBase": (("_C.TensorBase", "_C._TensorBase"), _REQUIRED),
    "DisableTorchFunctionSubclass": (("_C.DisableTorchFunctionSubclass", "_C.DisableTorchFunction"), _REQUIRED),
    "swap_tensor": (("nn.utils._named_member_accessor.swap_tensor",), _never),  # of functional_call
    # What graphs of torch.compile call.
    "FakeTensor": (("_subclasses.FakeTensor",), _NoSuch),
    "OpOverload": (("_ops.OpOverload",), type(torch.ops.aten.add.Tensor)),
    "nn_gelu": (("_C._nn.gelu",), torch.nn.functional.gelu),
    "nn_linear": (("_C._nn.linear",), torch.nn.functional.linear),
    "enter_autocast": (("amp.autocast_mode._enter_autocast",), _NoSuch),
    "exit_autocast": (("amp.autocast_mode._exit_autocast",), _NoSuch),
    "TracingContext": (("_guards.TracingContext",), _NoSuch),
    "Guard": (("_guards.Guard",), _NoSuch),
    "compile_session": (("compiler._compile_session_context",), contextlib.nullcontext),  # models ask for it
    "encoder_layer": (("_transformer_encoder_layer_fwd",), _NoSuch),
    "native_attention": (("_native_multi_head_attention",), _NoSuch),
}

# Operators that the tuner races against. Where one is gone, its row of plan/rivals.py is no candidate.
OPERATORS = (
    "ops.mkl._mkl_linear",
    "ops.mkl._mkl_reorder_linear_weight",
    "ops.mkldnn._linear_pointwise",
    "ops.mkldnn._reorder_linear_weight",
    "ops.mkldnn._nbytes",
)


def look_up(name: str) -> Any:
    """What row `name` means to this torch. Raises ImportError where it is gone, and nothing can stand in for it."""
    places, stand_in = PLACES[name]
    for place in places:
        if (found := find(place)) is not None:
            return found
    if stand_in is _REQUIRED:
        raise ImportError(f"fastlinear needs torch.{places[0]}, which torch {torch.__version__} does not have")
    return stand_in


any_autocast = look_up("any_autocast")
is_tracing = look_up("is_tracing")
transform = look_up("transform")
is_batched = look_up("is_batched")
dispatch_modes = look_up("dispatch_modes")
dispatch_mode_at = look_up("dispatch_mode_at")
function_modes = look_up("function_modes")
function_mode_at = look_up("function_mode_at")
DeviceContext = look_up("DeviceContext")
unpack_dual = look_up("unpack_dual")
set_grad_enabled = look_up("set_grad_enabled")
DispatchKey = look_up("DispatchKey")
DispatchKeySet = look_up("DispatchKeySet")
ExcludeDispatchKeyGuard = look_up("ExcludeDispatchKeyGuard")
after_autograd = look_up("after_autograd")
TorchDispatchMode = look_up("TorchDispatchMode")
get_mkldnn_enabled = look_up("get_mkldnn_enabled")
set_mkldnn_enabled = look_up("set_mkldnn_enabled")
version = look_up("version")
int_mm = look_up("int_mm")
TensorBase = look_up("TensorBase")
DisableTorchFunctionSubclass = look_up("DisableTorchFunctionSubclass")
swap_tensor = look_up("swap_tensor")
FakeTensor = look_up("FakeTensor")
OpOverload = look_up("OpOverload")
nn_gelu = look_up("nn_gelu")
nn_linear = look_up("nn_linear")
enter_autocast = look_up("enter_autocast")
exit_autocast = look_up("exit_autocast")
TracingContext = look_up("TracingContext")
Guard = look_up("Guard")
compile_session = look_up("compile_session")
encoder_layer = look_up("encoder_layer")
native_attention = look_up("native_attention")


def is_constant(function: Function) -> Function:
    """As torch.compiler.assume_constant_result, which imports all of Dynamo, half a second of work, for those too who
    compile nothing."""
    vars(function)["_dynamo_marked_constant"] = True
    return function

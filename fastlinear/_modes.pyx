# cython: auto_pickle=False, language_level=3, boundscheck=False, wraparound=False, cdivision=True
# distutils: language = c++
"""What is on while a layer is called: modes of torch's that watch or rewrite, autocast, the profiler, gradients."""

import os

import torch
from torch.autograd import forward_ad, profiler

from libc.stdint cimport int64_t
from libcpp cimport bool as cbool

import fastlinear._environment as environment
import fastlinear._torch as _torch
from fastlinear._reasons import AUTOCAST, PROFILED, UNFIT

cdef extern from "fastlinear/host/dispatch.hpp" namespace "fastlinear" nogil:
    cppclass Dispatch:
        cbool attach(const char*, const char*)
        cbool attached()
        cbool plain()
        void learn()
        cbool gradients()
        int64_t function_modes()

cdef object is_grad_enabled = torch.is_grad_enabled
cdef object is_autocast_enabled = _torch.any_autocast
cdef dict forward_ad_state = vars(forward_ad)
cdef dict profiler_state = vars(profiler)
cdef tuple modes = (  # each returns None, False or 0 while nothing of its kind watches or rewrites torch calls
    _torch.transform,
    _torch.dispatch_modes,
    _torch.is_tracing,
)
cdef object is_tracing = _torch.is_tracing
cdef object function_modes = _torch.function_modes
cdef object function_mode = _torch.function_mode_at

cdef Dispatch dispatch
cdef str libraries = os.path.join(os.path.dirname(torch.__file__), "lib")
dispatch.attach(os.fsencode(os.path.join(libraries, "libc10.so")),
                os.fsencode(os.path.join(libraries, "libtorch_cpu.so")))

# What os.environ keeps its bytes in, where a look costs 15 ns; os.environ itself costs a small product.
cdef dict variables = getattr(os.environ, "_data", {})
cdef object is_disabled = environment.disabled
cdef bytes DISABLE = b"FASTLINEAR_DISABLE"


cdef bint disabled() except -1:
    return variables.get(DISABLE) is not None and is_disabled()


# UNFIT while a mode of torch's sees or rewrites what is called; else PROFILED or AUTOCAST where that is on, or None.
cdef object mode_of_call():
    cdef bint autocast = False
    if not dispatch.plain():
        for mode in modes:
            level = mode()
            if level is not None and level is not False and level != 0:
                return UNFIT
        autocast = is_autocast_enabled()
        if not autocast:
            dispatch.learn()
    if not dispatch.attached() or dispatch.function_modes() > 0:
        for i in range(<int> function_modes()):
            if type(function_mode(i)) is not _torch.DeviceContext:  # a default device changes nothing but factories
                return UNFIT
    if <int> forward_ad_state["_current_level"] >= 0:
        return UNFIT
    if profiler_state["_is_profiler_enabled"]:
        return PROFILED
    return AUTOCAST if autocast else None


def watched():
    """True while a mode of torch's sees or rewrites what is called."""
    return mode_of_call() is UNFIT


def undisturbed():
    """True where kernels may answer a call without gradients: nothing watches it, autocast is off, fastlinear is on."""
    if disabled():
        return False
    mode = mode_of_call()
    return mode is None or mode is PROFILED


# Whether autograd notes what is computed.
cdef bint gradients() except -1:
    return dispatch.gradients() if dispatch.attached() else is_grad_enabled()


# The dicts that nn.Module.__call__ looks at before it calls forward, whichever the module.
cdef tuple global_hooks = tuple(
    getattr(torch.nn.modules.module, "_global" + name)
    for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
)


# Whether somebody sees the calls of all modules: a hook, or torch.jit.trace, which notes in nn.Module.__call__ who is
# called.
cdef bint calls_are_seen() except -1:
    for hooks in global_hooks:
        if <dict> hooks:
            return True
    return not dispatch.plain() and is_tracing()

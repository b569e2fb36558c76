# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# distutils: language = c++
"""The hot path of one layer, from the module and its input to the output: guards, looks, plan, kernel; about 2 us."""

import torch
from torch.autograd import forward_ad, profiler

from fastlinear._kernels cimport Epilogue, Packed, Plan, View, as_rows, compute, look_at, need, pool_size

cdef extern from "Python.h":
    object PyObject_GenericGetDict(object, void*)

# Buckets of M: exact to 8, then two an octave (12 16 24 32 48 64 ...).
cdef enum:
    BUCKETS = 96

cdef int bucket_index(ptrdiff_t m) noexcept:
    cdef int octave = 3
    if m <= 8:
        return <int> m
    while m > <ptrdiff_t> 2 << octave:
        octave += 1
    return 8 + 2 * (octave - 3) + (1 if m <= <ptrdiff_t> 3 << (octave - 1) else 2)


def bucket(ptrdiff_t m):
    """The bucket of M: the smallest of 0..8, 12, 16, 24, 32, 48, 64, 96 ... that is not below it."""
    cdef int i = bucket_index(m) - 9
    return m if m <= 8 else (3 << (i // 2 + 2)) if i % 2 == 0 else (16 << (i // 2))


# Why the engine does not answer a call.
UNFIT = "unfit"          # it must go through torch: gradients, a mode that watches, another dtype or device
PROFILED = "profiled"    # it should show up in the profile
STALE = "stale"          # the weight is not packed, or changed since
UNPLANNED = "unplanned"  # no plan yet for this bucket of M and this number of threads

cdef object Tensor = torch.Tensor
cdef object float32 = torch.float32
cdef object is_grad_enabled = torch.is_grad_enabled
cdef object get_default_dtype = torch.get_default_dtype
cdef object empty = torch.empty
cdef object forward_ad_module = forward_ad
cdef object profiler_module = profiler
cdef tuple modes = (  # each returns None, False or 0 while nothing of its kind watches or rewrites torch calls
    torch._C._is_any_autocast_enabled,
    torch._C._functorch.peek_interpreter_stack,
    torch._C._len_torch_dispatch_stack,
    torch._C._len_torch_function_stack,
    torch._C._is_tracing,
)


cdef bint watched() except -1:
    for mode in modes:
        level = mode()
        if level is not None and level is not False and level != 0:
            return True
    return forward_ad_module._current_level >= 0


# The dicts that nn.Module.__call__ looks at before it calls forward.
cdef tuple own_hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
cdef tuple global_hooks = tuple(getattr(torch.nn.modules.module, "_global" + name) for name in own_hooks)


# None for a tensor made in inference mode, whose changes torch does not count.
def version_of(tensor):
    return None if tensor.is_inference() else tensor._version


cdef class Engine:
    """The hot path of one layer: looks at the module and the input, and runs the plan for this M; about 2 us.

    It holds no reference to its module. The weight is the module's parameter "weight": [n, k], or [k, n] if transposed.
    What it cannot answer goes to `module._slow(x, why)`, why being UNFIT, PROFILED, STALE or UNPLANNED.
    """

    cdef readonly Packed packed
    cdef readonly Epilogue epilogue
    cdef readonly bint transposed
    cdef object weight, version
    cdef float* weight_data
    cdef dict plans           # threads -> plans by bucket index
    cdef list current         # the plans for `threads`
    cdef ptrdiff_t threads

    def __init__(self, Epilogue epilogue not None, bint transposed=False):
        self.epilogue = epilogue
        self.transposed = transposed
        self.drop()

    def drop(self):
        """Forgets the packed weight and the plans."""
        self.packed = self.weight = None
        self.plans = {}
        self.threads = 0

    def take(self, weight, version, Packed packed not None):
        """Uses `packed`, which holds the parameter `weight` as it was when `version_of(weight)` was `version`."""
        cdef View v = need(weight, "weight")
        self.drop()
        self.weight, self.version, self.weight_data, self.packed = weight, version, v.data, packed

    def plan_for(self, ptrdiff_t m, ptrdiff_t threads, plan):
        """Sets what runs for the bucket of m while torch has `threads` threads: a Plan, or (x, weight, bias) -> y."""
        if isinstance(plan, Plan) and (<Plan> plan).layout != self.packed.layout:
            raise ValueError(f"kernel {plan.kernel!r} does not read layout {self.packed.layout!r}")
        self.plans.setdefault(threads, [None] * BUCKETS)[bucket_index(m)] = plan

    def fresh(self, module):
        """True while the packed weight is the module's."""
        return self.holds((<dict> module.__dict__)["_parameters"].get("weight"))

    # The identity of the parameter, the memory behind it and torch's count of its changes. `.data.copy_()` moves none
    # of them; that is what refresh() is for.
    cdef bint holds(self, object weight) except -1:
        cdef View w
        return (weight is not None and weight is self.weight and look_at(weight, &w) and w.data == self.weight_data
                and (self.version is None or weight._version == self.version))

    def __call__(self, module, x):
        """`module(x)`, or None where nn.Module.__call__ has to run it: hooks, a patched forward, module.compile(), an x
        that is no plain tensor."""
        cdef dict state = <dict> PyObject_GenericGetDict(module, NULL)
        if type(x) is not Tensor or "forward" in state or "_compiled_call_impl" in state:
            return None
        for name in own_hooks:
            if <dict> state[name]:
                return None
        for hooks in global_hooks:
            if <dict> hooks:
                return None
        return self.guarded(module, state, x)

    def forward(self, module, x):
        """`module.forward(x)`."""
        return self.guarded(module, <dict> PyObject_GenericGetDict(module, NULL), x)

    cdef object guarded(self, module, dict state, x):
        if type(x) is not Tensor or watched():
            return module._slow(x, UNFIT)
        if profiler_module._is_profiler_enabled:
            return module._slow(x, PROFILED)
        y = self.answer(state, x)
        return module._slow(x, y) if type(y) is str else y

    def attempt(self, module, x):
        """The output, or None where torch has to compute it; for callers that know that no mode watches."""
        y = self.answer(<dict> PyObject_GenericGetDict(module, NULL), x)
        return None if type(y) is str else y

    # The output, or why there is none.
    cdef object answer(self, dict state, object x):
        cdef View v, w, b
        cdef ptrdiff_t m, stride_x, threads
        cdef dict params = <dict> state["_parameters"]
        weight = params.get("weight")
        bias = params.get("bias", UNFIT)
        if weight is None or bias is UNFIT:  # computed by a parametrization or a hook
            return UNFIT
        if state["training"] is True or is_grad_enabled() and (
                x.requires_grad or weight.requires_grad or bias is not None and bias.requires_grad):
            return UNFIT
        if not self.holds(weight):
            return STALE
        # Torch lets go of the GIL where it allocates or copies, and another thread may then give this engine another
        # weight: whatever belongs to this one is held here.
        cdef Packed packed = self.packed

        if not look_at(x, &v) or v.ndim == 0 or v.shape[v.ndim - 1] != packed.k or x.is_neg():
            return UNFIT
        if not as_rows(&v, &m, &stride_x):
            dense = x.contiguous()
            return UNFIT if dense is x else self.answer(state, dense)
        b.data = NULL
        if bias is not None and not (look_at(bias, &b) and b.ndim == 1 and b.shape[0] == packed.n
                                     and (b.stride[0] == 1 or packed.n < 2)):
            return UNFIT

        threads = pool_size()
        if threads != self.threads:
            self.current = self.plans.setdefault(threads, [None] * BUCKETS)
            self.threads = threads
        plan = self.current[bucket_index(m)]
        if m > 0 and type(plan) is not Plan:
            return UNPLANNED if plan is None else plan(x, weight, bias)

        y = new_output(&v, packed.n)
        if m > 0 and packed.n > 0:
            look_at(y, &w)
            compute(packed, <Plan> plan, self.epilogue, m, v.data, stride_x, b.data, w.data, packed.n)
        return y


# torch.empty is quickest with nothing but integers.
cdef object new_output(View* x, ptrdiff_t n):
    if get_default_dtype() is not float32:
        return empty([x.shape[i] for i in range(x.ndim - 1)] + [n], dtype=float32)
    if x.ndim == 2:
        return empty(x.shape[0], n)
    if x.ndim == 3:
        return empty(x.shape[0], x.shape[1], n)
    return empty([x.shape[i] for i in range(x.ndim - 1)] + [n])

# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# distutils: language = c++
"""The hot path of one layer, from the module and its input to the output: guards, looks, plan, kernel; about 2 us."""

import torch
from torch.autograd import forward_ad, profiler

from fastlinear._kernels cimport (
    FP32, STATIC, Bias, Epilogue, Format, Matrix, Packed, Plan, RowQuantizer, View, answers, as_rows, compute,
    format_of_x, is_float, look_at, need, pool_size
)

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
AUTOCAST = "autocast"    # some autocast is on, and nothing else watches
PROFILED = "profiled"    # it should show up in the profile
STALE = "stale"          # the weight is not packed, or changed since
UNPLANNED = "unplanned"  # no plan yet for this bucket of M and this number of threads

cdef object Tensor = torch.Tensor
cdef object is_grad_enabled = torch.is_grad_enabled
cdef object is_autocast_enabled = torch._C._is_any_autocast_enabled
cdef object forward_ad_module = forward_ad
cdef object profiler_module = profiler
cdef tuple modes = (  # each returns None, False or 0 while nothing of its kind watches or rewrites torch calls
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
    `packed` may hold it in another format; x is then as free as the format is: fp32 for fp32, any for narrower ones.
    `rows` quantizes x for integer products; x may be integers, too, where it is static. What the engine cannot answer
    goes to `module._slow(x, why)`, why being UNFIT, AUTOCAST, PROFILED, STALE or UNPLANNED.
    """

    cdef readonly Packed packed
    cdef readonly Epilogue epilogue
    cdef readonly RowQuantizer rows
    cdef readonly bint transposed
    cdef object weight, version  # of the parameter that was packed; both None where there is none: a frozen layer
    cdef void* weight_data
    cdef dict plans           # (threads, format of x) -> plans by bucket index
    cdef list current         # the plans for `threads` and `x_format`
    cdef ptrdiff_t threads
    cdef Format x_format

    def __init__(self, Epilogue epilogue not None, bint transposed=False, RowQuantizer rows=None):
        self.epilogue = epilogue
        self.transposed = transposed
        self.rows = rows
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

    def hold(self, Packed packed not None):
        """Uses `packed` for a module without a parameter "weight", a frozen one."""
        self.drop()
        self.packed = packed

    def plan_for(self, ptrdiff_t m, ptrdiff_t threads, dtype, plan):
        """Sets what runs for x of `dtype` and the bucket of m while torch has `threads` threads: a Plan, or
        (x, weight, bias) -> y."""
        cdef int index = format_of_x(dtype)
        cdef Format x_format = <Format> index
        if isinstance(plan, Plan) and not answers(<Plan> plan, self.packed, self.rows, x_format):
            raise ValueError(f"kernel {plan.kernel!r} does not take x of {dtype} and layout {self.packed.layout!r}")
        plans_of(self.plans, threads, x_format)[bucket_index(m)] = plan

    def fresh(self, module):
        """True while the packed weight is the module's."""
        return self.holds((<dict> module.__dict__)["_parameters"].get("weight"))

    # The identity of the parameter, the memory behind it and torch's count of its changes. `.data.copy_()` moves none
    # of them; that is what refresh() is for.
    cdef bint holds(self, object weight) except -1:
        cdef View w
        if weight is None:
            return self.weight is None and self.packed is not None
        return (weight is self.weight and look_at(weight, &w) and w.data == self.weight_data
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
        if is_autocast_enabled():
            return module._slow(x, AUTOCAST)
        y = self.answer(state, x)
        return module._slow(x, y) if type(y) is str else y

    def attempt(self, module, x):
        """The output, or None where torch has to compute it; for callers that know that no mode watches."""
        y = self.answer(<dict> PyObject_GenericGetDict(module, NULL), x)
        return None if type(y) is str else y

    # The output, or why there is none.
    cdef object answer(self, dict state, object x):
        cdef View v, w, b
        cdef Matrix rows, out
        cdef Bias added
        cdef ptrdiff_t threads
        cdef dict params = <dict> state["_parameters"]
        weight = params.get("weight")
        bias = params.get("bias", UNFIT)
        if bias is UNFIT or weight is None and (self.weight is not None or self.packed is None):
            return UNFIT  # a parametrization or a hook computes it
        if state["training"] is True or is_grad_enabled() and (
                x.requires_grad or weight is not None and weight.requires_grad
                or bias is not None and bias.requires_grad):
            return UNFIT
        if not self.holds(weight):
            return STALE
        # Torch lets go of the GIL where it allocates or copies, and another thread may then give this engine another
        # weight, even of another format: whatever belongs to this one is held here.
        cdef Packed packed = self.packed
        cdef dict plans = self.plans
        cdef list current

        if not look_at(x, &v) or v.ndim == 0 or v.shape[v.ndim - 1] != packed.k or x.is_neg():
            return UNFIT
        if <int> v.format != FP32 and (<int> packed.shape.format == FP32 or not is_float(v.format) and (
                self.rows is None or <int> self.rows.quantizer.kind != STATIC)):
            return UNFIT
        if not as_rows(&v, &rows):
            dense = x.contiguous()
            return UNFIT if dense is x else self.answer(state, dense)
        added.data = NULL
        if bias is not None:
            if not (look_at(bias, &b) and is_float(b.format) and b.ndim == 1 and b.shape[0] == packed.n
                    and (b.stride[0] == 1 or packed.n < 2)
                    and (<int> b.format == FP32 or <int> packed.shape.format != FP32)):
                return UNFIT
            added.data, added.format = b.data, b.format

        threads = pool_size()
        if plans is self.plans and threads == self.threads and v.format == self.x_format:
            current = self.current
        else:
            current = plans_of(plans, threads, v.format)
            if plans is self.plans:
                self.current, self.threads, self.x_format = current, threads, v.format
        plan = current[bucket_index(rows.m)]
        if rows.m > 0 and type(plan) is not Plan:
            return UNPLANNED if plan is None else plan(x, weight, bias)

        y = new_output(x, &v, packed.n, self.epilogue.dtype)
        if rows.m > 0 and packed.n > 0:
            look_at(y, &w)
            out.data, out.format, out.m, out.stride = w.data, w.format, rows.m, packed.n
            compute(packed, <Plan> plan, self.epilogue, self.rows, &rows, added, &out)
        return y


cdef list plans_of(dict plans, ptrdiff_t threads, Format x_format):
    return plans.setdefault((threads, <int> x_format), [None] * BUCKETS)


# new_empty is quickest with nothing but integers. dtype: None for that of x, or fp32 where x is integers.
cdef object new_output(object x, View* v, ptrdiff_t n, object dtype):
    if dtype is not None or not is_float(v.format):
        return x.new_empty([v.shape[i] for i in range(v.ndim - 1)] + [n], dtype=dtype or torch.float32)
    if v.ndim == 2:
        return x.new_empty(v.shape[0], n)
    if v.ndim == 3:
        return x.new_empty(v.shape[0], v.shape[1], n)
    return x.new_empty([v.shape[i] for i in range(v.ndim - 1)] + [n])

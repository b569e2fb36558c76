# cython: auto_pickle=False, language_level=3, boundscheck=False, wraparound=False, cdivision=True
# distutils: language = c++
"""The hot path of one layer, from the module and its input to the output: guards, looks, plan, kernel; about 2 us."""

import os
from weakref import ref

import torch
from torch.autograd import forward_ad, profiler

from cpython.object cimport PyObject, PyTypeObject
from libc.stdint cimport int64_t
from libcpp cimport bool as cbool
from libcpp.vector cimport vector
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

import fastlinear._environment as environment
import fastlinear._torch as _torch
from fastlinear._calls cimport Tickets, leads_to, put_in_slot, quiet, stock_call
from fastlinear._plans cimport (
    MAX_OPERANDS, MEETS, MISSES, STATIC, Bias, COperand, Epilogue, Meeting, Plan, RowQuantizer, Segment, answers,
    columns_of, meet
)
from fastlinear._products cimport compute, pool_size
from fastlinear._tensors cimport (
    FP32, Format, Matrix, View, as_rows, element_bytes, format_of_x, is_float, look_at, need
)
from fastlinear._weights cimport Packed

cdef extern from "fastlinear/weight/sample.hpp" namespace "fastlinear" nogil:
    cppclass Sample:
        void take(const char*, ptrdiff_t, const int64_t*, const int64_t*)
        cbool holds(const char*)

cdef extern from "fastlinear/host/dispatch.hpp" namespace "fastlinear" nogil:
    cppclass Dispatch:
        cbool attach(const char*, const char*)
        cbool attached()
        cbool plain()
        void learn()
        cbool gradients()
        int64_t function_modes()

cdef extern from "Python.h":
    object PyObject_GenericGetDict(object, void*)
    PyObject* PyWeakref_GetObject(object)
    PyObject* _PyType_Lookup(PyTypeObject*, object)
    Py_ssize_t PyTuple_GET_SIZE(object)
    PyObject* PyTuple_GET_ITEM(object, Py_ssize_t)

# time.monotonic()
cdef double monotonic() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return now.tv_sec + 1e-9 * now.tv_nsec

# Buckets of M: exact to 8, then two an octave (12 16 24 32 48 64 ...) up to 2^40, which stands for all beyond it: more
# rows than memory holds, unless they are one row expanded.
cdef enum:
    LAST_OCTAVE = 40
    BUCKETS = 9 + 2 * (LAST_OCTAVE - 3)

cdef struct Bucket:
    int index       # in a list of plans
    ptrdiff_t rows  # the largest M in it, or 2^40

cdef inline Bucket bucket_of(ptrdiff_t m) noexcept:
    cdef Bucket b
    cdef int octave = 4
    b.index, b.rows = <int> m, m
    if m <= 8:
        return b
    while octave < LAST_OCTAVE and m > (<ptrdiff_t> 1) << octave:
        octave += 1
    b.index, b.rows = 8 + 2 * (octave - 3), (<ptrdiff_t> 1) << octave
    if m <= b.rows // 4 * 3:
        b.index, b.rows = b.index - 1, b.rows // 4 * 3
    return b


def bucket(ptrdiff_t m):
    """The bucket of M: the smallest of 0..8, 12, 16, 24, 32, 48, 64, 96 ... that is not below it; at most 2^40."""
    return bucket_of(m).rows


# Why the engine does not answer a call.
DISABLED = "disabled"    # FASTLINEAR_DISABLE says so
UNFIT = "unfit"          # it must go through torch: a mode that watches, another dtype or device
TRAINING = "training"    # training mode, in which torch computes on the parameter itself
GRADIENT = "gradient"    # the kernels may answer, but gradients are wanted of the answer
AUTOCAST = "autocast"    # some autocast is on, and nothing else watches
PROFILED = "profiled"    # it should show up in the profile
STALE = "stale"          # the weight is not packed, or changed since
CHANGING = "its weight keeps changing"  # in the report; the engine's word for it is STALE
UNPLANNED = "unplanned"  # no plan yet for this bucket of M and this number of threads, or one that is due

cdef object Tensor = torch.Tensor
cdef object Parameter = torch.nn.Parameter
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
cdef object is_neg = torch.Tensor.is_neg  # bound here, which saves 30 ns of looking it up
cdef object set_grad_enabled = _torch.set_grad_enabled

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


cdef inline bint gradients() except -1:
    return dispatch.gradients() if dispatch.attached() else is_grad_enabled()


# The dicts that nn.Module.__call__ looks at before it calls forward.
cdef tuple own_hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
cdef tuple global_hooks = tuple(getattr(torch.nn.modules.module, "_global" + name) for name in own_hooks)


cdef class Fingerprint:
    """What a weight is at the moment: its storage, address, shape, strides, dtype, torch's count of its changes, and a
    sample of its contents. TypeError for what is no dense CPU tensor of floats.

    The sample sees what torch does not count: fused optimizers, collectives, writes through an alias or by another
    process. The storage is held weakly, which keeps its identity from being used again, not its memory.
    """

    cdef View view
    cdef Sample sample
    cdef object version  # None for a tensor made in inference mode, whose changes torch does not count
    cdef object storage  # a weak reference: torch keeps the Python object of a storage as long as the storage itself

    def __init__(self, weight):
        self.view = need(weight, "weight")
        self.version = None if weight.is_inference() else weight._version
        self.storage = ref(weight.untyped_storage())
        cdef ptrdiff_t element = element_bytes(self.view.format)
        cdef int64_t[2] shape, stride
        if self.view.ndim == 1:  # a bias is one row
            shape[0], shape[1], stride[0], stride[1] = 1, self.view.shape[0], 0, self.view.stride[0]
            self.sample.take(self.view.data, element, shape, stride)
        elif self.view.ndim == 2:
            self.sample.take(self.view.data, element, self.view.shape, self.view.stride)
        elif self.view.ndim == 3 and self.view.stride[0] == self.view.shape[1] * self.view.stride[1]:  # of experts
            shape[0], shape[1] = self.view.shape[0] * self.view.shape[1], self.view.shape[2]
            stride[0], stride[1] = self.view.stride[1], self.view.stride[2]
            self.sample.take(self.view.data, element, shape, stride)

    @property
    def memory(self):
        """What storage and address are known by; others may be, once the storage is gone and this fits no more."""
        return id(self.storage()), <size_t> self.view.data

    def fits(self, weight):
        """Whether `weight` is, and holds, what it did."""
        return self.holds(weight)

    cdef bint holds(self, object weight) except -1:
        cdef View w
        cdef int i
        if not look_at(weight, &w) or w.data != self.view.data or w.ndim != self.view.ndim:
            return False
        if <int> w.format != <int> self.view.format:
            return False
        for i in range(w.ndim):
            if w.shape[i] != self.view.shape[i] or w.stride[i] != self.view.stride[i]:
                return False
        if PyWeakref_GetObject(self.storage) == <PyObject*> None:
            return False
        if self.version is not None and weight._version != self.version:
            return False
        return self.sample.holds(w.data)


# A pack pays for itself within some calls. One whose weight changed before that many were answered makes its successor
# wait until the weight has stood still for as many: meanwhile torch answers, as fast as for any other weight.
cdef enum:
    TRIAL = 8

trial = TRIAL


cdef class Engine:
    """The hot path of one layer: looks at the module and the input, and runs the plan for this M; about 2 us.

    It holds no reference to its module. The weight is the module's parameter "weight": [n, k], or [k, n] if transposed.
    `packed` may hold it in another format; x is then as free as the format is: fp32 for fp32, any for narrower ones.
    `rows` quantizes x for integer products; x may be integers, too, where it is static. What the engine cannot answer
    goes to `module._slow(x, why, bare, operands)`, why being one of the reasons above. Once the module has said how
    (`plainly`), the engine itself calls torch while training and while the weight keeps changing.

    What an epilogue does that only some callers want, an activation that was absorbed or integers for the next layer,
    is left out by a `bare` engine. The other, joined to it, answers where the call proves that its output goes there.
    """

    cdef readonly Packed packed
    cdef readonly Epilogue epilogue
    cdef readonly RowQuantizer rows
    cdef readonly bint transposed, bare
    cdef tuple widths               # of the outputs of a group; None for one output
    cdef readonly Engine elsewhere  # bare; None where all calls are alike
    cdef object marker, out         # where the output of this one goes, see leads_to
    cdef Tickets tickets            # of the marker
    cdef object weight        # the parameter that was packed; None for a frozen layer
    cdef Fingerprint fingerprint    # of it as it was then
    cdef object candidate     # the parameter that waits to be packed
    cdef Fingerprint last     # of it as it was at the last call
    cdef object plain         # (x, weight, bias) -> y in torch's ops while training; None until the module has told
    cdef object changing      # the same in the numbers of a pack, while the weight keeps changing; may be None
    cdef dict counts          # calls that it answered, by the words of the report
    cdef object attach        # (x, weight, bias, y, packed, operands, sums) -> y with gradients; may be None
    cdef bint keeps           # whether `attach` wants the sums
    cdef object bias          # the last one that was found fit
    cdef tuple stock          # a class, and the `forward` of it that this stands for
    cdef ptrdiff_t answered, waits  # calls by this pack, and those for which a weight has yet to stand still
    cdef tuple planned_for    # layout, n and k of the packs that `plans` are for
    cdef dict plans           # (threads, format of x) -> plans by bucket index
    cdef list current         # the plans for `threads` and `x_format`
    cdef ptrdiff_t threads
    cdef Format x_format

    def __init__(self, Epilogue epilogue not None, bint transposed=False, RowQuantizer rows=None, bint bare=False):
        self.epilogue = epilogue
        self.transposed = transposed
        self.rows = rows
        self.bare = bare
        self.drop()

    def split(self, tuple widths not None):
        """Answers with a tuple of contiguous tensors, which have the columns of the output one after another."""
        self.widths = widths

    def stand_for(self, stock: type, forward):
        """From now on calls are the module's (`_replaced`) if `stock` has got another forward than this one."""
        self.stock = stock, forward

    cdef inline bint replaced(self):
        return self.stock is not None and _PyType_Lookup(
            <PyTypeObject*> PyTuple_GET_ITEM(self.stock, 0), "forward") != PyTuple_GET_ITEM(self.stock, 1)

    def join(self, Engine elsewhere not None, marker, Tickets tickets, out):
        """Leaves to `elsewhere` the calls whose output does not go to `marker` (None: to whatever follows) and from
        there to a layer that takes the integers `out` (None: to anything). In `tickets` the marker finds its inputs."""
        self.elsewhere, self.marker, self.tickets, self.out = elsewhere, marker, tickets, out

    def drop(self):
        """Forgets the packed weight and the plans."""
        self.packed = self.weight = self.fingerprint = self.attach = self.bias = self.planned_for = None
        self.candidate = self.last = self.plain = self.changing = None
        self.plans = {}
        self.threads = self.answered = self.waits = 0

    def ready(self, weight):
        """Whether `weight`, of which there is no pack, is to be packed now rather than left to torch for this call. A
        pack of what it was is let go."""
        if self.packed is not None:
            self.waits = 0 if self.answered >= TRIAL else TRIAL
            self.packed = None
        if self.waits == 0:
            return True
        cdef Fingerprint last = self.last
        if weight is self.candidate and last.holds(weight):
            self.waits -= 1
        else:
            last = Fingerprint(weight)
            self.candidate, self.last, self.waits = weight, last, TRIAL
        return self.waits == 0

    def plainly(self, training, changing, dict counts not None):
        """Has training(x, weight, bias) answer in training mode, and changing(x, weight, bias), unless it is None,
        while the weight keeps changing; `counts` is where such calls are counted."""
        self.plain, self.changing, self.counts = training, changing, counts

    def settle(self):
        """Has the next call pack a weight that changed, however often it did."""
        self.answered, self.waits = TRIAL, 0

    def take(self, weight, Fingerprint fingerprint not None, Packed packed not None):
        """Uses `packed`, which holds the parameter `weight` as it was when `fingerprint` was taken. Kernels that were
        planned for a pack of the same layout and size stay, other plans go; False where all do."""
        return self.replace(weight, fingerprint, packed)

    def hold(self, Packed packed not None):
        """Uses `packed` for a module without a parameter "weight", a frozen one."""
        self.replace(None, None, packed)

    cdef bint replace(self, weight, Fingerprint fingerprint, Packed packed) except -1:
        cdef tuple planned_for = (packed.layout, packed.n, packed.k)
        cdef bint same = planned_for == self.planned_for
        cdef dict plans = {}
        if same:  # in a new dict: another thread may be using the old one, with the old pack
            for key, planned in self.plans.items():
                plans[key] = [plan if type(plan) is Plan else None for plan in planned]
        self.packed = self.attach = None  # not fresh until all the rest is set
        # The first pack has credit: many a model is called once before its weights are loaded.
        self.threads, self.answered, self.waits = 0, TRIAL if self.planned_for is None else 0, 0
        self.plans, self.planned_for = plans, planned_for
        self.weight, self.fingerprint = weight, fingerprint
        self.candidate = self.last = None
        self.packed = packed
        return same

    def planned(self, ptrdiff_t m, ptrdiff_t threads, dtype):
        """Whether there is a plan for x of `dtype` and the bucket of m while torch has `threads` threads."""
        cdef int index = format_of_x(dtype)
        return plans_of(self.plans, threads, <Format> index)[bucket_of(m).index] is not None

    def plan_for(self, ptrdiff_t m, ptrdiff_t threads, dtype, plan):
        """Sets what runs for x of `dtype` and the bucket of m while torch has `threads` threads: a Plan,
        (x, weight, bias, *operands) -> y, or None to have it asked for again."""
        cdef int index = format_of_x(dtype)
        cdef Format x_format = <Format> index
        if isinstance(plan, Plan) and not answers(<Plan> plan, self.packed, self.rows, x_format):
            raise ValueError(f"kernel {plan.kernel!r} does not take x of {dtype} and layout {self.packed.layout!r}")
        plans_of(self.plans, threads, x_format)[bucket_of(m).index] = plan

    def attach_by(self, attach, bint keeps):
        """Has `attach` give the answers of the present pack their gradients, where some are wanted: called with x, the
        parameters weight and bias, the answer, the pack, the operands, and with `keeps` what the epilogue was applied
        to, or None where that was not to be had."""
        self.attach, self.keeps = attach, keeps

    def fresh(self, module):
        """True while the packed weight is the module's."""
        return self.holds((<dict> module.__dict__)["_parameters"].get("weight"))

    cdef bint holds(self, object weight) except -1:
        if weight is None:
            return self.weight is None and self.packed is not None
        return self.packed is not None and weight is self.weight and self.fingerprint.holds(weight)

    # `module(x, *operands)`, or None where nn.Module.__call__ has to run it: hooks, a patched forward, compile(),
    # an x that is no plain tensor.
    cdef object called(self, object module, dict state, object x, tuple operands):
        if not is_plain(x) or not quiet(state) or self.replaced():
            return None
        if not dispatch.plain() and is_tracing():  # torch.jit.trace notes in nn.Module.__call__ who is called
            return None
        for hooks in global_hooks:
            if <dict> hooks:
                return None
        if self.elsewhere is None:
            return self.guarded(module, state, x, operands)
        if not leads_to(module, self.marker, self.out):
            return self.elsewhere.guarded(module, state, x, operands)
        y = self.guarded(module, state, x, operands)
        if self.tickets is not None:
            self.tickets.outputs.append(y)
        return y

    def forward(self, module, x, tuple operands=()):
        """`module.forward(x, *operands)`."""
        cdef Engine engine = self if self.elsewhere is None else self.elsewhere
        if self.replaced():
            return module._replaced(self.stock[0], x, operands)
        quicken(type(module))
        return engine.guarded(module, <dict> PyObject_GenericGetDict(module, NULL), x, operands)

    cdef object guarded(self, module, dict state, x, tuple operands):
        why = mode_of_call() if is_plain(x) else UNFIT
        if why is None:
            y = self.answer(state, x, operands)
            if y is GRADIENT:
                y = self.differentiable(state, x, operands)
            if y is TRAINING or y is STALE:
                y = self.in_torch(state, x, operands, y)
            if type(y) is not str:
                return y
            why = y
        return module._slow(x, why, self.bare, operands)

    # The output, which autograd can go back from, or why there is none.
    cdef object differentiable(self, dict state, x, tuple operands):
        cdef Packed packed = self.packed
        cdef list kept = [] if self.keeps else None
        attach = self.attach
        if attach is None or packed is None:
            return GRADIENT if self.waits == 0 else STALE
        set_grad_enabled(False)
        try:
            y = self.answer(state, x, operands, kept)
        finally:
            set_grad_enabled(True)
        if type(y) is str or packed is not self.packed:  # which another thread may have changed meanwhile
            return y if y is STALE else GRADIENT
        params = <dict> state["_parameters"]
        sums = kept[0] if kept else None
        return attach(x, params.get("weight"), params.get("bias"), y, packed, operands, sums)

    # Torch's answer in training mode or on a weight that keeps changing; `why` where it is for the module to find.
    cdef object in_torch(self, dict state, object x, tuple operands, str why):
        cdef View v, w
        params = <dict> state["_parameters"]
        weight = params.get("weight")
        if self.plain is None or weight is None or not is_plain(weight) or not look_at(weight, &w) or w.ndim != 2:
            return why
        if len(operands) > 0 or not look_at(x, &v) or v.ndim == 0 or <int> v.format != <int> w.format:
            return why  # operands are for the module to check
        if v.shape[v.ndim - 1] != w.shape[0 if self.transposed else 1]:
            return why
        run, word = self.plain, TRAINING
        if why is STALE:
            if self.changing is None or self.ready(weight):
                return why
            run, word = self.changing, CHANGING
        self.counts[word] = self.counts.get(word, 0) + 1
        return run(x, weight, params.get("bias"))

    def attempt(self, module, x, tuple operands=(), list kept=None):
        """The output, or None where torch has to compute it; for callers that know that no mode watches. What the
        epilogue was applied to is appended to `kept`, where that is to be had."""
        y = self.answer(<dict> PyObject_GenericGetDict(module, NULL), x, operands, kept)
        return None if type(y) is str else y

    # The output, or why there is none.
    cdef object answer(self, dict state, object x, tuple operands, list kept=None):
        cdef View v, w, b, z
        cdef Matrix rows
        cdef Segment out
        cdef Bias added
        cdef COperand[MAX_OPERANDS] beside
        cdef ptrdiff_t threads, columns
        cdef dict params = <dict> state["_parameters"]
        if disabled():
            return DISABLED
        weight = params.get("weight")
        bias = params.get("bias", UNFIT)
        if bias is UNFIT or weight is None and (self.weight is not None or self.packed is None):
            return UNFIT  # a parametrization or a hook computes it
        if state["training"] is True:
            return TRAINING
        if gradients() and (
                x.requires_grad or weight is not None and weight.requires_grad
                or bias is not None and bias.requires_grad or wants_grad(operands)):
            return GRADIENT
        if not self.holds(weight):
            return STALE
        # Torch lets go of the GIL where it allocates or copies, and another thread may then give this engine another
        # weight, even of another format: whatever belongs to this one is held here.
        cdef Packed packed = self.packed
        cdef dict plans = self.plans
        cdef list current

        if not look_at(x, &v) or v.ndim == 0 or v.shape[v.ndim - 1] != packed.k or is_neg(x):
            return UNFIT
        if <int> v.format != FP32 and (<int> packed.shape.format == FP32 or not is_float(v.format) and (
                self.rows is None or <int> self.rows.quantizer.kind != STATIC)):
            return UNFIT
        if not as_rows(&v, &rows):
            dense = x.contiguous()
            return UNFIT if dense is x else self.answer(state, dense, operands, kept)
        added.data = NULL
        if bias is not None:
            if bias is not self.bias:
                if not is_plain(bias) or is_neg(bias):
                    return UNFIT
                self.bias = bias
            if not (look_at(bias, &b) and is_float(b.format) and b.ndim == 1 and b.shape[0] == packed.n
                    and (b.stride[0] == 1 or packed.n < 2)
                    and (<int> b.format == FP32 or <int> packed.shape.format != FP32)):
                return UNFIT
            added.data, added.format = b.data, b.format
        if len(operands) != <ptrdiff_t> self.epilogue.operands:
            return UNFIT
        cdef list laid_out = None  # operands that were copied: to be held until the kernels have read them
        if len(operands) > 0:
            laid_out = self.laid(x, &v, operands, columns_of(packed, self.epilogue), beside)
            if laid_out is None:
                return UNFIT

        threads = pool_size()
        if plans is self.plans and threads == self.threads and v.format == self.x_format:
            current = self.current
        else:
            current = plans_of(plans, threads, v.format)
            if plans is self.plans:
                self.current, self.threads, self.x_format = current, threads, v.format
        plan = current[bucket_of(rows.m).index]
        if rows.m > 0:
            if plan is None or type(plan) is Plan and (<Plan> plan).due > 0 and monotonic() > (<Plan> plan).due:
                return UNPLANNED
        self.answered += 1
        if rows.m > 0 and type(plan) is not Plan:
            return plan(x, weight, bias, *operands) if kept is None else plan(x, weight, bias, *operands, kept=kept)

        if self.widths is not None:
            return self.parts(x, &v, packed, plan, &rows, added)
        columns = columns_of(packed, self.epilogue)
        y = new_output(x, &v, columns, self.epilogue.dtype)
        if rows.m > 0 and packed.n > 0:
            look_at(y, &w)
            out.data, out.format, out.stride, out.first = w.data, w.format, columns, 0
            z.data = NULL
            if kept is not None:
                kept.append(new_output(x, &v, packed.n, torch.float32))
                look_at(kept[0], &z)
            compute(packed, <Plan> plan, self.epilogue, self.rows, &rows, added, &out, 1, beside, <float*> z.data)
        return y

    # Where the operands lie for y, those laid out that do not lie as kernels read; None where one is unfit.
    cdef list laid(self, object x, View* v, tuple operands, ptrdiff_t columns, COperand* beside):
        cdef View t
        cdef Meeting how
        cdef list held = []
        for i in range(len(operands)):
            operand = operands[i]
            if not (is_plain(operand) and look_at(operand, &t) and is_float(t.format)) or is_neg(operand):
                return None
            how = meet(&t, v, columns, &beside[i])
            if how == MISSES:
                return None
            if how != MEETS:
                operand = operand.expand([v.shape[d] for d in range(v.ndim - 1)] + [columns]).contiguous()
                held.append(operand)
                look_at(operand, &t)
                meet(&t, v, columns, &beside[i])
        return held

    # The outputs of a group: a tensor for each of its widths.
    cdef tuple parts(self, object x, View* v, Packed packed, object plan, Matrix* rows, Bias bias):
        cdef vector[Segment] segments
        cdef Segment segment
        cdef View w
        cdef list ys = []
        segment.first = 0
        for n in self.widths:
            y = new_output(x, v, n, self.epilogue.dtype)
            ys.append(y)
            if n > 0:
                look_at(y, &w)
                segment.data, segment.format, segment.stride = w.data, w.format, n
                segments.push_back(segment)
                segment.first += segment.stride
        if rows.m > 0 and packed.n > 0:
            compute(packed, <Plan> plan, self.epilogue, self.rows, rows, bias, segments.data(), segments.size(),
                    NULL, NULL)
        return tuple(ys)


# ---- several layers as one product ----

cdef class Siblings:
    """The hot path of layers on one input that are packed as one; about 1 us and what one layer takes.

    It holds what a call of the whole depends on: the layers, the parameters and what these were when they were packed.
    `whole` is the module whose engine has the pack. Until something is known, nothing fits.
    """

    cdef readonly tuple layers
    cdef tuple states, engines  # of the layers: their dicts, and the engines that these held, new ones when they change
    cdef tuple known            # Fingerprints of the weights and then of the biases
    cdef readonly ptrdiff_t answered
    cdef object whole
    cdef dict whole_state

    def __init__(self, layers, whole):
        self.layers, self.whole = tuple(layers), whole
        self.states = tuple([<dict> PyObject_GenericGetDict(layer, NULL) for layer in self.layers])
        self.whole_state = <dict> PyObject_GenericGetDict(whole, NULL)
        self.engines = self.known = ()

    def know(self, tuple fingerprints):
        """From now on these, and the layers as they are now, are what `whole` has packed; none: nothing is."""
        self.answered = 0
        self.engines = tuple([state.get("_engine") for state in self.states])
        self.known = fingerprints

    def fit(self, tuple parameters not None):
        """Whether the parameters hold what they did, and no layer was told anything else since."""
        return self.holds(parameters)

    cdef bint holds(self, tuple parameters) except -1:
        cdef Fingerprint known
        cdef Py_ssize_t i, count = len(self.known)
        if count == 0 or count != len(parameters):
            return False
        for i in range(len(self.states)):
            if (<dict> self.states[i]).get("_engine") is not self.engines[i]:
                return False
        for i in range(count):
            known = <Fingerprint> self.known[i]
            parameter = parameters[i]
            if known is None or parameter is None:
                if known is not None or parameter is not None:
                    return False
            elif not known.holds(parameter):
                return False
        return True

    def answer(self, x, tuple parameters not None):
        """The outputs, of a call in which no gradient of a parameter is wanted; None where they do not fit, or the
        layers have to answer one by one."""
        if not self.holds(parameters):
            return None
        self.answered += 1
        engine = <Engine> self.whole_state["_engine"]
        return (<Engine> engine).guarded(self.whole, self.whole_state, x, ())

    # The parameters of the layers, as `know` has them; None where somebody watches a layer's calls, trains it, or wants
    # gradients.
    cdef tuple unwatched(self):
        cdef Py_ssize_t count = len(self.states), i
        cdef bint graded = gradients()
        cdef list weights = [], biases = []
        for i in range(count):
            state = <dict> self.states[i]
            if state["training"] is True or not quiet(state):
                return None
            engine = state.get("_engine")
            if type(engine) is not Engine or (<Engine> engine).replaced():
                return None
            params = <dict> state["_parameters"]
            weight, bias = params.get("weight"), params.get("bias")
            if weight is None or graded and (weight.requires_grad or bias is not None and bias.requires_grad):
                return None
            weights.append(weight)
            biases.append(bias)
        return tuple(weights + biases)

    def parameters(self):
        """The weights and then the biases; None where the layers have to be called."""
        return self.unwatched()

    # `group(x)`, or None where nn.Module.__call__ has to run it.
    cdef object called(self, dict state, object x):
        if not is_plain(x) or state["training"] is True or not quiet(state):
            return None
        if not dispatch.plain() and is_tracing():
            return None
        for hooks in global_hooks:
            if <dict> hooks:
                return None
        if not self.are(state):
            return None
        parameters = self.unwatched()
        return None if parameters is None else self.answer(x, <tuple> parameters)

    # Whether the group still has these layers.
    cdef bint are(self, dict state) except -1:
        held = (<dict> state["_modules"]).get("layers")
        if held is None:
            return False
        modules = <dict> (<dict> PyObject_GenericGetDict(held, NULL))["_modules"]
        cdef Py_ssize_t i = 0
        if len(modules) != len(self.layers):
            return False
        for layer in modules.values():
            if layer is not self.layers[i]:
                return False
            i += 1
        return True

    def are_in(self, group):
        """Whether the module `group` has these layers, and no others, in its "layers"."""
        return self.are(<dict> PyObject_GenericGetDict(group, NULL))


cdef object quick_group(object group, object args, PyObject* options):
    if options == NULL and PyTuple_GET_SIZE(args) == 1:
        state = <dict> PyObject_GenericGetDict(group, NULL)
        siblings = state.get("_siblings")
        if type(siblings) is Siblings:
            ys = (<Siblings> siblings).called(state, <object> PyTuple_GET_ITEM(args, 0))
            if ys is not None:
                return ys
    return stock_call(group, args, options)


def quicken_group(kind: type):
    """Has calls of groups of this class go to their Siblings, where nobody has patched nn.Module.__call__."""
    put_in_slot(kind, quick_group, module_call)


cdef bint wants_grad(tuple operands) except -1:
    for operand in operands:
        if operand.requires_grad:
            return True
    return False


# ---- module(x) ----

cdef object module_call = vars(torch.nn.Module)["__call__"]


# nn.Module.__call__ costs as much as a small product. What the engine does not answer goes on as that of any module
# does: hooks, tracers, a `__call__` that somebody has patched.
cdef object quick_call(object module, object args, PyObject* options):
    if timekeeper is None:
        return call_of(module, args, options)
    began = monotonic()
    y = call_of(module, args, options)
    timekeeper(module, monotonic() - began)
    return y


cdef object timekeeper = None


def tell_times(done):
    """From now on done(module, seconds) is called after each call of a module of a quick class; None ends that. Not a
    hook, and without a frame of Python's, so that calls are what they are otherwise."""
    global timekeeper
    timekeeper = done


cdef inline object call_of(object module, object args, PyObject* options):
    if options == NULL and PyTuple_GET_SIZE(args) == 1:
        state = <dict> PyObject_GenericGetDict(module, NULL)
        engine = (<dict> state).get("_engine")
        if type(engine) is Engine:
            y = (<Engine> engine).called(module, <dict> state, <object> PyTuple_GET_ITEM(args, 0), ())
            if y is not None:
                return y
    return stock_call(module, args, options)


def quicken(kind: type):
    """Has calls of modules of this class go to their engines, where it says `_is_quick` and nobody has patched
    nn.Module.__call__."""
    if kind._is_quick:
        put_in_slot(kind, quick_call, module_call)


# A subclass may mean another thing than its memory says.
cdef inline bint is_plain(object tensor):
    return type(tensor) is Tensor or type(tensor) is Parameter


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

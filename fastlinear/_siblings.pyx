# cython: auto_pickle=False, language_level=3, boundscheck=False, wraparound=False, cdivision=True
# distutils: language = c++
"""Several layers as one product."""

import torch

from cpython.object cimport PyObject
from libc.string cimport memcmp

from fastlinear._calls cimport put_in_slot, quiet, stock_call
from fastlinear._engine cimport Engine
from fastlinear._fingerprints cimport Fingerprint
from fastlinear._modes cimport calls_are_seen, disabled, gradients, mode_of_call
from fastlinear._operands cimport is_plain, is_readable, new_output, read_channels
from fastlinear._plans cimport COperand, CPlan, Plan, Problem, Segment, Segments, answers, bucket_of
from fastlinear._products cimport among_calls, answer_together, pool_size
from fastlinear._tensors cimport FP32, Matrix, View, as_rows, look_at
from fastlinear._timing cimport is_timed, monotonic
from fastlinear._weights cimport Packed

cdef extern from "Python.h":
    object PyObject_GenericGetDict(object, void*)
    Py_ssize_t PyTuple_GET_SIZE(object)
    PyObject* PyTuple_GET_ITEM(object, Py_ssize_t)

cdef object module_call = vars(torch.nn.Module)["__call__"]


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
        if is_timed():
            return (<Engine> engine).forward(self.whole, x)
        return (<Engine> engine).guarded(self.whole, self.whole_state, x, ())

    # The parameters of the layers, as `know` has them; None where somebody watches a layer's calls, trains it, or wants
    # gradients.
    cdef tuple unwatched(self):
        cdef Py_ssize_t count = len(self.states), i
        cdef bint graded = gradients()
        cdef list found = [None] * (2 * count)
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
            found[i], found[count + i] = weight, bias
        return tuple(found)

    def parameters(self):
        """The weights and then the biases; None where the layers have to be called."""
        return self.unwatched()

    # `group(x)`, or None where nn.Module.__call__ has to run it.
    cdef object called(self, dict state, object x):
        if not is_plain(x) or state["training"] is True or not quiet(state) or calls_are_seen() or not self.are(state):
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


cdef enum:
    FROZEN_LIMIT = 8  # layers of a FrozenGroup

MAX_FROZEN = FROZEN_LIMIT


cdef class FrozenGroup:
    """Frozen layers on one input as one call, each on its own pack; 2 us and 0.5 for each of them.

    layers: 2 to 8, of one input width, precision and layout; panels: what each holds for its weight. chained: they are
    as wide, and each but the first takes one operand, what the one before it makes; it is the last that answers.
    What runs is what the widest layer's plan says for all, on all threads where that is worth it.
    """

    cdef readonly tuple layers, panels
    cdef readonly bint chained
    cdef tuple states
    cdef Py_ssize_t widest

    def __init__(self, layers, panels, bint chained=False):
        self.layers, self.panels, self.chained = tuple(layers), tuple(panels), chained
        if not 2 <= len(self.layers) <= FROZEN_LIMIT or len(self.panels) != len(self.layers):
            raise ValueError(f"a group has 2 to {FROZEN_LIMIT} layers, each with its panels, not {len(self.layers)}")
        self.states = tuple([<dict> PyObject_GenericGetDict(layer, NULL) for layer in self.layers])
        widths = [layer.out_features for layer in self.layers]
        self.widest = widths.index(max(widths))

    # The engine of a layer that may be called by this, or None.
    cdef Engine engine_of(self, Py_ssize_t i):
        state = <dict> self.states[i]
        engine = state.get("_engine")
        if type(engine) is not Engine or state["training"] is True or (<Engine> engine).replaced():
            return None
        found = <Engine> engine
        if found.packed is None or found.weight is not None or found.elsewhere is not None or found.widths is not None:
            return None
        if (<dict> state["_parameters"]).get("weight") is not None or found.epilogue.program.gated:
            return None
        takes = <size_t> (self.chained and i > 0)
        return found if found.epilogue.operands == takes and found.epilogue.dtype is None else None

    def answer(self, x, tuple parameters not None):
        """The outputs, or that of the last layer of a chain; None where the layers have to answer one by one: for other
        `parameters` than their panels and then their biases, for modes that watch, and as long as no plan is known."""
        cdef Py_ssize_t count = len(self.layers), i
        cdef View v, w
        cdef Matrix rows
        cdef Engine engine
        cdef Packed packed, first = None
        cdef CPlan plan
        cdef ptrdiff_t threads, work = 0, most = 1
        cdef Problem[FROZEN_LIMIT] problems
        cdef Segment[FROZEN_LIMIT] outs
        cdef COperand[FROZEN_LIMIT] beside
        cdef bint given
        cdef list ys = []
        if len(parameters) != 2 * count or not is_plain(x) or mode_of_call() is not None or disabled() or is_timed():
            return None
        if gradients() and x.requires_grad:
            return None
        if not is_readable(x, &v) or not as_rows(&v, &rows) or rows.m == 0:
            return None
        threads = pool_size()
        cdef tuple engines = tuple([self.engine_of(i) for i in range(count)])
        cdef tuple key = (threads, <int> v.format)
        cdef Py_ssize_t bucket = bucket_of(rows.m).index
        cdef list plans = []
        for i in range(count):
            engine = engines[i]
            known = None if engine is None else engine.plans.get(key)
            known = None if known is None else (<list> known)[bucket]
            if type(known) is not Plan or (<Plan> known).due > 0 and monotonic() > (<Plan> known).due:
                return None
            plans.append(known)
            most = max(most, (<Plan> known).plan.threads)
        chosen = <Plan> plans[self.widest]
        for i in range(count):
            engine = engines[i]
            packed = engine.packed
            first = packed if first is None else first
            if self.panels[i] is not parameters[i] or v.shape[v.ndim - 1] != packed.k:
                return None
            if packed.layout != first.layout or self.chained and packed.n != first.n:
                return None
            if packed.shape.groups.ordered and (packed.k != first.k or memcmp(
                    packed.read().order, first.read().order, 4 * <size_t> packed.k) != 0):
                return None
            if <int> v.format != FP32 and <int> packed.shape.format == FP32:
                return None
            if not answers(chosen, packed, engine.rows, v.format):
                return None
            if not read_channels(parameters[count + i], packed.n, &problems[i].bias):
                return None
            given = problems[i].bias.data != NULL
            if given and <int> problems[i].bias.format != FP32 and <int> packed.shape.format == FP32:
                return None
            work += rows.m * packed.n * packed.k
        for i in range(count):
            engine = engines[i]
            packed = engine.packed
            engine.answered += 1
            y = new_output(x, &v, packed.n, None)
            ys.append(y)
            look_at(y, &w)
            outs[i].data, outs[i].format, outs[i].stride, outs[i].first = w.data, w.format, packed.n, 0
            problems[i].m, problems[i].n, problems[i].k = rows.m, packed.n, packed.k
            problems[i].x.data, problems[i].x.stride, problems[i].x.format = rows.data, rows.stride, rows.format
            if engine.rows is not None:
                problems[i].quantizer = engine.rows.quantizer
            problems[i].weight = packed.read()[0]
            problems[i].y = Segments(&outs[i], 1)
            problems[i].epilogue = engine.epilogue.program
            if self.chained and i > 0:
                beside[i].data, beside[i].format = outs[i - 1].data, outs[i - 1].format
                beside[i].row_stride, beside[i].column_stride = packed.n, 1
                problems[i].operands = &beside[i]
        plan = chosen.plan
        plan.threads = most
        plan = among_calls(plan, work, threads)
        if self.chained:
            plan.k_slices = 1
        answer_together(problems, count, plan, self.chained)
        return ys[count - 1] if self.chained else tuple(ys)


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

# cython: auto_pickle=False, language_level=3, boundscheck=False, wraparound=False, cdivision=True
# distutils: language = c++
"""Several layers as one product."""

import torch

from cpython.object cimport PyObject

from fastlinear._calls cimport put_in_slot, quiet, stock_call
from fastlinear._engine cimport Engine
from fastlinear._fingerprints cimport Fingerprint
from fastlinear._modes cimport calls_are_seen, gradients
from fastlinear._operands cimport is_plain
from fastlinear._timing cimport is_timed

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

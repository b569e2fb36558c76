# cython: language_level=3
# distutils: language = c++
"""What becomes of a layer's output, told from the frame that calls the layer: whether a marker gets it, and only that.

A layer whose activation was absorbed (fusion.Absorbed, the marker, stands where it stood) may apply it only if its
output goes to that marker. Two callers prove it: the loop of nn.Sequential, by what stands behind the layer just now,
and a method with `self.act(self.fc(x))` in its source, by the instruction that it is at. For any other the layer
computes without the activation, and the marker, which was handed no such output, applies the original.
"""

from torch import nn

from cpython.object cimport PyObject

cdef extern from "Python.h":
    """
    // The first argument of a running function, which PyFrame_GetVar tells from Python 3.12 on; borrowed, or NULL.
    #if PY_VERSION_HEX >= 0x030C0000
    static PyObject *receiver_of(PyFrameObject *frame) {
      PyObject *self = PyFrame_GetVarString(frame, "self");
      if (self == NULL) PyErr_Clear();
      Py_XDECREF(self);  // the frame goes on holding it
      return self;
    }
    #elif PY_VERSION_HEX >= 0x030B0000
    struct RunningFunction {  // the head of _PyInterpreterFrame
      PyObject *function, *globals, *builtins, *locals, *code, *frame;
      void *previous, *instruction;
      int top;
      bool entry;
      char owner;
      PyObject *first;
    };
    struct FrameOfFunction {  // the head of PyFrameObject
      PyObject_HEAD
      PyFrameObject *back;
      RunningFunction *running;
    };
    static PyObject *receiver_of(PyFrameObject *frame) {
      PyObject *self = reinterpret_cast<FrameOfFunction *>(frame)->running->first;
      return self != NULL && PyCell_Check(self) ? PyCell_GET(self) : self;
    }
    #else  // what instruction a frame is at says nothing there: it has no columns
    #include <frameobject.h>
    static PyObject *receiver_of(PyFrameObject *) { return NULL; }
    static int PyFrame_GetLasti(PyFrameObject *) { return -1; }
    #endif

    static PyObject *caller_of(PyFrameObject *frame) {  // or None
      PyFrameObject *back = PyFrame_GetBack(frame);
      return back != NULL ? reinterpret_cast<PyObject *>(back) : Py_NewRef(Py_None);
    }
    static PyObject *code_of(PyFrameObject *frame) { return reinterpret_cast<PyObject *>(PyFrame_GetCode(frame)); }
    """
    ctypedef struct PyFrameObject:
        pass
    PyFrameObject* PyEval_GetFrame()
    object caller_of(PyFrameObject*)
    object code_of(PyFrameObject*)
    int PyFrame_GetLasti(PyFrameObject*)
    PyObject* receiver_of(PyFrameObject*)
    object PyObject_GenericGetDict(object, void*)
    PyObject* _PyType_Lookup(PyTypeObject*, object)
    PyTypeObject* Py_TYPE(object)
    Py_ssize_t PyTuple_GET_SIZE(object)
    PyObject* PyTuple_GET_ITEM(object, Py_ssize_t)
    int PyDict_Next(object, Py_ssize_t*, PyObject**, PyObject**)

cdef object Module = nn.Module
cdef object Sequential = nn.Sequential
cdef object Identity = nn.Identity
cdef object Dropout = nn.Dropout
cdef object NOWHERE = object()
cdef object sequential_forward = nn.Sequential.forward
cdef object sequential_iter = nn.Sequential.__iter__
cdef object in_order_code = nn.Sequential.forward.__code__
cdef tuple calling = (nn.Module._call_impl.__code__, nn.Module._wrapped_call_impl.__code__)  # without hooks
cdef tuple own_hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
cdef dict known = {}  # code -> {offset of a call: slot} where its result goes to self.<slot>(...) and nowhere else
cdef object read_sites = None


def read_with(reader):
    """Sets what is asked about code that calls a layer and was not met before: reader(code) -> {offset: slot}."""
    global read_sites
    read_sites = reader


cdef dict sites_of(object code):
    sites = known.get(code)
    if sites is None:
        if len(known) > 10000:  # who makes so much code, makes it anew all the time
            known.clear()
        sites = known[code] = read_sites(code) if read_sites is not None else {}
    return <dict> sites


# Whether nothing but the forward of its class sees a call of the module that has this __dict__.
cdef bint quiet(dict state):
    for name in own_hooks:
        hooks = state.get(name)
        if hooks is not None and hooks:
            return False
    return "forward" not in state and "_compiled_call_impl" not in state


# Whether the output of the call of `module` that is running goes to `marker` (None: whatever follows), and from there
# to a layer that wants it as the integers `out` (None: to anything).
cdef bint leads_to(object module, object marker, object out) except -1:
    cdef PyFrameObject* running = PyEval_GetFrame()  # the caller: the engine has no frame
    cdef PyObject* container
    cdef list opened = []
    cdef bint met = marker is None
    if running == NULL:
        return False
    caller = <object> running
    container = receiver_of(<PyFrameObject*> caller)
    code = code_of(<PyFrameObject*> caller)
    if container == NULL or not isinstance(<object> container, Module):
        return False
    if code is not in_order_code:
        slot = sites_of(code).get(PyFrame_GetLasti(<PyFrameObject*> caller))
        return slot is not None and out is None and not met and holds(<object> container, slot, marker)

    current = <object> container
    while True:
        module = follower(current, module)
        while module is None:  # it was the last
            module = current
            if opened:
                current = opened.pop()
            else:
                caller = caller_of_call(caller)
                if caller is None:
                    return False
                container = receiver_of(<PyFrameObject*> caller)
                if container == NULL:
                    return False
                current = <object> container
            module = follower(current, module)
        while isinstance(module, Sequential) and quiet(<dict> PyObject_GenericGetDict(module, NULL)):
            opened.append(current)
            current, module = module, first(module)
        if not met:
            if module is not marker or not settled(marker):
                return False
            if out is None:
                return True
            met = True
        elif takes(module, out):
            return True
        elif not idle(module):
            return False


# What nn.Sequential's loop over `container` calls after `child`: None where that is the last, NOWHERE where it is not
# in there exactly once, or there is another loop.
cdef object follower(object container, object child):
    cdef Py_ssize_t at = 0
    cdef PyObject* name
    cdef PyObject* value
    cdef PyObject* found = NULL
    cdef bint seen = False
    if not in_order(container):
        return NOWHERE
    modules = (<dict> PyObject_GenericGetDict(container, NULL))["_modules"]
    while PyDict_Next(modules, &at, &name, &value):
        if value == <PyObject*> child:
            if seen:
                return NOWHERE
            seen = True
        elif seen and found == NULL:
            found = value
    return NOWHERE if not seen else None if found == NULL else <object> found


cdef object first(object container):
    modules = (<dict> PyObject_GenericGetDict(container, NULL))["_modules"]
    return next(iter(modules.values()), NOWHERE) if in_order(container) else NOWHERE


cdef bint in_order(object container):
    cdef PyTypeObject* kind = Py_TYPE(container)
    return (_PyType_Lookup(kind, "forward") == <PyObject*> sequential_forward
            and _PyType_Lookup(kind, "__iter__") == <PyObject*> sequential_iter)


# The frame of the loop that called the nn.Sequential, without a hook, whose loop `frame` is; None for another caller.
cdef object caller_of_call(object frame):
    for code in calling:
        frame = caller_of(<PyFrameObject*> frame)
        if frame is None or code_of(<PyFrameObject*> frame) is not code:
            return None
    frame = caller_of(<PyFrameObject*> frame)
    return None if frame is None or code_of(<PyFrameObject*> frame) is not in_order_code else frame


# Whether `container.slot` is the marker, and it is as it was.
cdef bint holds(object container, object slot, object marker):
    cdef dict state = <dict> PyObject_GenericGetDict(container, NULL)
    return ((<dict> state["_modules"]).get(slot) is marker and state.get(slot, marker) is marker
            and _PyType_Lookup(Py_TYPE(container), slot) == NULL and settled(marker))


# Whether nobody has put a hook on a marker or its original since, given that other parameters or its class another
# forward.
cdef bint settled(object marker):
    cdef dict state = <dict> PyObject_GenericGetDict(marker, NULL)
    original = state["original"]
    if not quiet(state):
        return False
    if not isinstance(original, Module):
        return True
    if _PyType_Lookup(Py_TYPE(original), "forward") != <PyObject*> state["_code"]:  # patched in its class
        return False
    cdef dict theirs = <dict> PyObject_GenericGetDict(original, NULL)
    for name, value in (<dict> state["_settings"]).items():
        now = theirs.get(name, NOWHERE)
        if now is not value and now != value:
            return False
    return quiet(theirs)


cdef bint idle(object module):
    if type(module) is not Identity and type(module) is not Dropout:
        return False
    cdef dict state = <dict> PyObject_GenericGetDict(module, NULL)
    return quiet(state) and (type(module) is Identity or state["training"] is False)


# Whether `module` is a layer in eval mode that quantizes its input as `out` says, and nobody else sees that.
cdef bint takes(object module, object out):
    precision = getattr(module, "_precision", None)
    if precision is None or precision.rows is None or precision.rows.smooth is not None:
        return False
    cdef dict state = <dict> PyObject_GenericGetDict(module, NULL)
    rows = precision.rows
    return (rows.kind == "static" and rows.scale == out.scale and rows.zero == out.zero and quiet(state)
            and state["training"] is False)


# No list: lists and dicts in a module torch.export puts back as copies, of which the layer knows nothing.
cdef class Tickets:
    """The outputs that a layer has handed over to its marker, on their way."""

    def __cinit__(self):
        self.outputs = []

    def __len__(self):
        return len(self.outputs)

    # Whether y itself is among the outputs, from which it is then taken.
    cdef bint redeem(self, object y):
        for i in range(len(self.outputs)):
            if self.outputs[i] is y:
                del self.outputs[i]
                return True
        return False

    def __reduce__(self):
        return Tickets, ()


# ---- the slot of a type that a call of its modules looks in ----

# No frame of Python's is there for a call that is answered from it, which saves 0.2 us, and for Dynamo to compile by
# itself: it traces layer and marker in the loop or method that calls them, or neither. Python puts its own function
# back where a `__call__` is set, in the class or a base.
cdef ternaryfunc stock_slot = (<PyTypeObject*> Module).tp_call


cdef object stock_call(object module, object args, PyObject* options):
    return stock_slot(module, args, options)


# Calls `quick` for `kind(...)`, if what stands there is Python's function for this `__call__`.
cdef int put_in_slot(object kind, ternaryfunc quick, object call) except -1:
    cdef PyTypeObject* slots = <PyTypeObject*> kind
    if slots.tp_call == stock_slot and _PyType_Lookup(slots, "__call__") == <PyObject*> call:
        slots.tp_call = quick
    return 0


cdef object call_of_marker(object marker, object args, PyObject* options):
    if options == NULL and PyTuple_GET_SIZE(args) == 1:
        y = <object> PyTuple_GET_ITEM(args, 0)
        tickets = (<dict> PyObject_GenericGetDict(marker, NULL)).get("_tickets")
        if type(tickets) is Tickets and (<Tickets> tickets).redeem(y):
            return y
    return stock_slot(marker, args, options)


def redeeming(kind: type):
    """Has calls of markers of this class return what was handed over to them; for others its `__call__` is there."""
    put_in_slot(kind, call_of_marker, vars(kind)["__call__"])
    return kind

# cython: auto_pickle=False, language_level=3, boundscheck=False, wraparound=False, cdivision=True
# distutils: language = c++
"""Trees of modules: whether one is what it was when it was last looked at, and the parameters in it."""

from types import BuiltinFunctionType, FunctionType
from weakref import ref

import torch

from cpython.object cimport PyObject, PyTypeObject
from libcpp.vector cimport vector

from fastlinear._tensors cimport View, look_at

cdef extern from "Python.h":
    object PyObject_GenericGetDict(object, void*)
    bint PyDict_CheckExact(PyObject*)
    int PyDict_Next(PyObject*, Py_ssize_t*, PyObject**, PyObject**)
    Py_ssize_t PyDict_Size(PyObject*)
    PyTypeObject* Py_TYPE(PyObject*)

cdef extern from *:
    """
    static unsigned int version_of(const PyTypeObject* type) { return type->tp_version_tag; }
    // Unlike any before after each change of a dict; 0 where Python has no such number any more.
    static unsigned long long changes_of(PyObject* table) {
    #if PY_VERSION_HEX < 0x030D0000
      return ((PyDictObject*)table)->ma_version_tag;
    #else
      return 0;
    #endif
    }
    """
    unsigned int version_of(const PyTypeObject*)
    unsigned long long changes_of(PyObject*)

cdef object Parameter = torch.nn.Parameter
cdef object graded = torch.Tensor.requires_grad.__get__
cdef tuple ATOMS = (bool, int, float, str, bytes, type(None))
cdef tuple FUNCTIONS = (BuiltinFunctionType, FunctionType)

# Sights of one tree that were of no use before the next was taken, from which on none is.
cdef enum:
    TRIAL = 8
    MOST = 128  # trees that are remembered


def is_atom(value) -> bool:
    """Whether a value is for ever what it is."""
    return type(value) in ATOMS or type(value) is tuple and all([is_atom(each) for each in value])


def is_function(value) -> bool:
    """Whether a value is a function, which is known by its identity."""
    return type(value) in FUNCTIONS


def is_steady(value) -> bool:
    """Whether a value is a Parameter that this module can tell from what it may become."""
    cdef View v
    return type(value) is Parameter and look_at(value, &v) and value.is_contiguous() and not value.is_neg()


cdef struct Entry:
    PyObject* key
    PyObject* value

# A dict: that of a module, or one of its tables; which of `entries` are its own.
cdef struct Contents:
    PyObject* table
    Py_ssize_t first, size
    unsigned long long changes

cdef struct Known:
    PyObject* module
    PyTypeObject* kind
    unsigned int version  # of the class, which changes with any of its attributes, and those of its bases
    int tables            # of `contents` that follow the module's own

cdef struct Seen:
    PyObject* tensor
    View view
    bint graded


cdef class Flag:
    cdef bint down

    def fall(self, _):
        self.down = True


cdef class Sight:
    """What the modules of a tree were: their classes, attributes, children and parameters.

    It keeps nothing alive but numbers and strings. All else is known by its address: from the root on, which is given,
    each is looked at only once its parent was seen to have it still, so that it lives, and by all that counts of it, so
    that another one in its place does as well. Functions are what they are, and `gone` falls when the first dies.
    """

    cdef vector[Known] modules
    cdef vector[Contents] contents
    cdef vector[Entry] entries
    cdef vector[Seen] parameters
    cdef list kept
    cdef Flag gone

    def __init__(self, root, tuple places, tuple parameters):
        cdef Known known
        self.kept, self.gone = [], Flag()
        fall = self.gone.fall
        for place, names in places:
            module = found(root, place)
            state = PyObject_GenericGetDict(module, NULL)
            tables = [state[name] for name in names]
            kind = type(module)
            known = Known(<PyObject*> module, <PyTypeObject*> kind, version_of(<PyTypeObject*> kind), len(tables))
            self.modules.push_back(known)
            for table in (state, *tables):
                self.note(<dict> table)
            self.kept += [value for value in state.values() if is_atom(value)]
            self.kept += [ref(value, fall) for value in state.values() if is_function(value)]
        for parameter in parameters:
            self.see(parameter)

    cdef void note(self, dict table):
        changes = changes_of(<PyObject*> table)
        self.contents.push_back(Contents(<PyObject*> table, self.entries.size(), len(table), changes))
        for key, value in table.items():
            self.entries.push_back(Entry(<PyObject*> key, <PyObject*> value))

    cdef void see(self, object parameter):
        cdef Seen seen
        seen.tensor = <PyObject*> parameter
        look_at(parameter, &seen.view)
        seen.graded = graded(parameter)
        self.parameters.push_back(seen)

    # Whether all of it is as it was.
    cdef bint holds(self, object root) except -1:
        cdef Py_ssize_t i
        if not self.has(root):
            return False
        for i in range(<Py_ssize_t> self.parameters.size()):
            if not same_form(&self.parameters[i]):
                return False
        return True

    # Whether the modules are, so that the parameters are those that they were.
    cdef bint has(self, object root) except -1:
        cdef Py_ssize_t i
        cdef size_t table = 0, last
        cdef Known* known
        if self.gone.down or self.modules[0].module != <PyObject*> root:
            return False
        for i in range(<Py_ssize_t> self.modules.size()):
            known = &self.modules[i]
            if Py_TYPE(known.module) != known.kind or version_of(known.kind) != known.version or known.version == 0:
                return False
            state = PyObject_GenericGetDict(<object> known.module, NULL)
            if <PyObject*> state != self.contents[table].table:
                return False
            last = table + 1 + known.tables
            while table < last:  # a table is what its module still has, as its dict was compared before
                if not same(&self.contents[table], self.entries.data()):
                    return False
                table += 1
        return True

    cdef tuple values(self):
        cdef Py_ssize_t i
        return tuple([<object> self.parameters[i].tensor for i in range(<Py_ssize_t> self.parameters.size())])


cdef bint same(Contents* contents, const Entry* entries) noexcept:
    cdef Py_ssize_t at = 0
    cdef PyObject* key
    cdef PyObject* value
    cdef unsigned long long changes = changes_of(contents.table)
    cdef const Entry* entry = entries + contents.first
    if changes == contents.changes and changes != 0:
        return True
    if not PyDict_CheckExact(contents.table) or PyDict_Size(contents.table) != contents.size:
        return False
    while PyDict_Next(contents.table, &at, &key, &value):
        if entry.key != key or entry.value != value:
            return False
        entry += 1
    contents.changes = changes
    return True


cdef bint same_form(Seen* seen) except -1:
    cdef View v
    cdef int i
    parameter = <object> seen.tensor
    if type(parameter) is not Parameter or not look_at(parameter, &v) or graded(parameter) is not (seen.graded != 0):
        return False
    if v.data != seen.view.data or <int> v.format != <int> seen.view.format or v.ndim != seen.view.ndim:
        return False
    for i in range(v.ndim):
        if v.shape[i] != seen.view.shape[i] or v.stride[i] != seen.view.stride[i]:
            return False
    return True


cdef class Tree:
    """Modules by their place below a root, and the parameters of theirs that a graph reads.

    parameters: pairs of a place, the names of children down to a module, and a name there.
    """

    cdef readonly tuple parameters
    cdef tuple places
    cdef object guards
    cdef dict sights   # by the address of the root; the number of those that were of no use, where that was too many
    cdef dict useless  # by the same, those in a row

    def __init__(self, parameters):
        self.parameters = tuple(parameters)
        self.places, self.guards, self.sights, self.useless = (), None, {}, {}

    def watch(self, places, guards):
        """From now on, what `guards(root)` said holds for as long as the modules in these places are what they were. It
        must depend on nothing but their classes, their attributes, as far as these are atoms, functions or tables, the
        contents of some tables, and `parameters`, each steady.

        places: pairs of a place, the root's, (), first and parents before children, and the names of those tables."""
        self.places, self.guards, self.sights, self.useless = tuple(places), guards, {}, {}

    def holds(self, root):
        """guards(root)."""
        cdef size_t address = <size_t> <PyObject*> root
        sight = self.sights.get(address)
        if sight is not None and (<Sight> sight).holds(root):
            if self.useless:
                self.useless.pop(address, None)
            return True
        if not self.guards(root):
            return False
        self.look(root, address)
        return True

    cdef void look(self, object root, size_t address):
        useless = self.useless.get(address, 0)
        self.sights.pop(address, None)
        if useless < TRIAL:
            if len(self.sights) >= MOST:
                self.sights.clear()
            if len(self.useless) >= MOST:
                self.useless.clear()
            self.useless[address] = useless + 1
            parameters = self.walk(root)
            if all([is_steady(parameter) for parameter in parameters]):
                self.sights[address] = Sight(root, self.places, parameters)

    cdef tuple walk(self, object root):
        return tuple([found(root, place)._parameters[name] for place, name in self.parameters])

    def values(self, root):
        """The parameters that there are now."""
        sight = self.sights.get(<size_t> <PyObject*> root)
        return (<Sight> sight).values() if sight is not None and (<Sight> sight).has(root) else self.walk(root)


def found(root, tuple place):
    """The module in a place below a root."""
    for name in place:
        root = root._modules[name]
    return root

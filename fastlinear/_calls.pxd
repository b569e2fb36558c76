from cpython.object cimport PyObject

cdef extern from "Python.h":
    ctypedef object (*ternaryfunc)(object, object, PyObject*)
    ctypedef struct PyTypeObject:
        ternaryfunc tp_call

cdef bint quiet(dict state)
cdef bint leads_to(object module, object marker, object out) except -1
cdef object stock_call(object module, object args, PyObject* options)
cdef int put_in_slot(object kind, ternaryfunc quick, object call) except -1


cdef class Tickets:
    cdef list outputs
    cdef bint redeem(self, object y)

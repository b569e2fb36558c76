from cpython.object cimport PyObject

ctypedef object (*Call)(object module, object args, PyObject* options)

cdef double monotonic() noexcept nogil
cdef bint is_timed()  # whether somebody is told of calls, see tell_times
cdef bint is_due()
cdef object timely(object module, object forward, tuple args, PyObject* options, Call call)

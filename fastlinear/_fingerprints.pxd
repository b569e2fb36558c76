from fastlinear._tensors cimport View
from libc.stdint cimport int64_t
from libcpp cimport bool as cbool


cdef extern from "fastlinear/weight/sample.hpp" namespace "fastlinear" nogil:
    cppclass Sample:
        void take(const char*, ptrdiff_t, const int64_t*, const int64_t*)
        cbool holds(const char*)


cdef class Fingerprint:
    cdef View view
    cdef Sample sample
    cdef object version  # None for a tensor made in inference mode, whose changes torch does not count
    cdef object storage  # a weak reference: torch keeps the Python object of a storage as long as the storage itself
    cdef bint holds(self, object weight) except -1

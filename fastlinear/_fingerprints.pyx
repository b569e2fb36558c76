# cython: auto_pickle=False, language_level=3, boundscheck=False, wraparound=False, cdivision=True
# distutils: language = c++
"""Whether a weight still is, and holds, what it did: by what torch counts, and by a sample for what it does not."""

from weakref import ref

import fastlinear._torch as _torch

from cpython.object cimport Py_TYPE, PyObject, descrgetfunc
from libc.stdint cimport int64_t

from fastlinear._tensors cimport View, element_bytes, look_at, need

cdef extern from "Python.h":
    PyObject* PyWeakref_GetObject(object)

# The attribute `_version` of a tensor, whose getter costs half of what looking it up by its name does.
cdef object version = _torch.version
cdef descrgetfunc version_of = Py_TYPE(version).tp_descr_get


cdef class Fingerprint:
    """What a weight is at the moment: its storage, address, shape, strides, dtype, torch's count of its changes, and a
    sample of its contents. TypeError for what is no dense CPU tensor of floats.

    The sample sees what torch does not count: fused optimizers, collectives, writes through an alias or by another
    process. The storage is held weakly, which keeps its identity from being used again, not its memory.
    """

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
        if self.version is not None and version_of(version, weight, None) != self.version:
            return False
        return self.sample.holds(w.data)

from libc.stdint cimport int32_t
from libcpp cimport bool as cbool

from fastlinear._tensors cimport Format, Layout


cdef extern from "fastlinear/formats/int8.hpp" namespace "fastlinear" nogil:
    ptrdiff_t kDotLimit
    ptrdiff_t kDotLimitWithZeros

cdef extern from "fastlinear/host/memory.hpp" namespace "fastlinear":
    cppclass PackMemory:
        char* take(size_t) except +
        void give_back(char*, size_t) except +

cdef extern from "<array>" namespace "std" nogil:
    cppclass Bytes "std::array<std::ptrdiff_t, 4>":
        ptrdiff_t operator[](size_t)

cdef extern from "fastlinear/weight/pack.hpp" namespace "fastlinear" nogil:
    ctypedef struct WeightView "fastlinear::WeightView<void>":
        void* data
        ptrdiff_t n
        ptrdiff_t k
        ptrdiff_t stride_n
        ptrdiff_t stride_k
    ctypedef struct ScaledGroups:
        float unit
        const char* scales
        const char* offsets
        ptrdiff_t panel_stride
        const float* table
    ctypedef struct Weight:
        const char* panels
        Layout layout
        ScaledGroups groups
        const float* scales
        const int32_t* sums
        const int32_t* zeros
        const int32_t* order
    ptrdiff_t panels_bytes(const Layout&, ptrdiff_t, ptrdiff_t)
    ptrdiff_t packed_bytes(const Layout&, ptrdiff_t, ptrdiff_t)
    ptrdiff_t channel_arrays(Format)
    Bytes c_arrays_of_panels "fastlinear::arrays_of_panels"(const Layout&, ptrdiff_t)
    Weight weight_at(const Layout&, ptrdiff_t, ptrdiff_t, const char*)
    void find_integers(ScaledGroups&)
    void pack_weight(const Layout&, const WeightView&, void*)
    void pack_channels(const Layout&, const WeightView&, const float*, const int32_t*, char*)
    void unpack_weight(const Layout&, const void*, const WeightView&)


cdef class Block:
    cdef char* data
    cdef readonly size_t nbytes

cdef class Packed:
    cdef readonly ptrdiff_t n, k, nbytes
    cdef readonly str layout, format
    cdef readonly object dtype
    cdef object memory  # what has the panels at its beginning and exports them as a buffer
    cdef Layout shape
    cdef Weight weight
    cdef bint zeros_known  # weight.zeros is null where there are none
    cdef readonly bint grouped
    cdef object __weakref__
    cdef int name_layout(self, str layout, ptrdiff_t n, ptrdiff_t k) except -1
    cdef int pack_codes(self, WeightView codes, object scale, object zero, object table, object offset,
                        object supers, object order) except -1
    cdef int find(self, const char* panels, bint zeros) except -1
    cdef int check_order(self) except -1
    cdef Weight* read(self) noexcept
    cdef object of_groups(self, const char* values)
    cdef int lay(self, const char* to, object scales, object supers) except -1
    cdef bint weight_has_table(self) noexcept
    cdef object channels(self, const void* values, object dtype)

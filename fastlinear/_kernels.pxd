from libcpp cimport bool as cbool

from fastlinear._cpu cimport CpuSource
from fastlinear._tensors cimport Format, Layout


cdef extern from "fastlinear/contract/isa.hpp" namespace "fastlinear" nogil:
    ctypedef struct Isa:
        const char* name
        const Isa* base
        cbool tiles
        const Vectors* vectors
    ctypedef struct Vectors:
        pass
    const Isa* isa_at(size_t)
    const char* refusal(const CpuSource&, const Isa&)
    cbool within(const Isa&, const Isa&)

cdef extern from "fastlinear/contract/kernel.hpp" namespace "fastlinear" nogil:
    ctypedef struct Kernel:
        const char* name
        const Isa& isa
        Format rows
        Layout layout
        ptrdiff_t mr
        ptrdiff_t panels
        Format accumulate
        ptrdiff_t row_step
        ptrdiff_t k_step
        ptrdiff_t columns()

cdef extern from "fastlinear/contract/isa.hpp" namespace "fastlinear" nogil:
    ctypedef struct EpilogueFunction:
        const char* name
        size_t params
        float* defaults
        size_t operands
        cbool gate
    const Kernel* kernel_at(size_t)
    const Kernel* find_kernel(const char*)
    const EpilogueFunction* function_at(size_t)

cdef extern from "fastlinear/driver/plan.hpp" namespace "fastlinear" nogil:
    ctypedef struct Caches:
        size_t l1d
        size_t l2
        size_t l3
    cbool reads_layout "fastlinear::reads"(const Kernel&, const Layout&)


cdef Caches own_caches
cdef const Vectors* best_vectors() noexcept
cdef const Vectors* runnable_vectors(str isa) except NULL
cdef tuple reads(const Kernel* kernel)
cdef const Kernel* runnable_kernel(str name) except NULL
cdef Layout parse_layout(str layout) except *

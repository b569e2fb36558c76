# What _kernels.pyx sees of C++, and what _engine.pyx sees of _kernels.pyx.

from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libcpp cimport bool as cbool


cdef extern from "fastlinear/dlpack.hpp" namespace "fastlinear" nogil:
    ctypedef struct DlDevice:
        int32_t device_type
    ctypedef struct DlDataType:
        uint8_t code
        uint8_t bits
    ctypedef struct DlTensor:
        void* data
        DlDevice device
        int32_t ndim
        DlDataType dtype
        int64_t* shape
        int64_t* strides
        uint64_t byte_offset
    ctypedef struct DlExchangeApi:
        uint32_t major
        int (*peek)(void*, DlTensor*)

cdef extern from "fastlinear/kernel.hpp" namespace "fastlinear" nogil:
    ctypedef int Format "fastlinear::Format"
    ctypedef int Isa "fastlinear::Isa"
    ctypedef struct Layout:
        Format format
        ptrdiff_t nr
        ptrdiff_t kr
    ctypedef struct Kernel:
        const char* name
        Isa isa
        Format rows
        Layout layout
        ptrdiff_t mr
        ptrdiff_t panels
        Format accumulate
        ptrdiff_t columns()
        cbool reads(const Layout&)
    size_t kFormats
    size_t kIsas
    const char** kIsaNames
    const char** kFormatNames
    ptrdiff_t element_bytes(Format)

cdef extern from "fastlinear/registry.hpp" namespace "fastlinear" nogil:
    ctypedef void (*Step)()
    ctypedef struct Activation "fastlinear::Activation":
        const char* name
        size_t params
        float* defaults
    const Kernel* kernel_at(size_t)
    const Kernel* find_kernel(const char*)
    const Activation* activation_at(size_t)
    Step find_step(Isa, size_t)

cdef extern from "fastlinear/parallel.hpp" namespace "fastlinear" nogil:
    cppclass ThreadPool:
        cbool attach(const char*)
        void stop_after_fork()
        cbool forked()
        ptrdiff_t size()
    ThreadPool& thread_pool()

cdef extern from "fastlinear/pack.hpp" namespace "fastlinear" nogil:
    ctypedef struct WeightView "fastlinear::WeightView<void>":
        void* data
        ptrdiff_t n
        ptrdiff_t k
        ptrdiff_t stride_n
        ptrdiff_t stride_k
    size_t kHugePage
    void advise_huge_pages(void*, size_t)
    ptrdiff_t packed_bytes(const Layout&, ptrdiff_t, ptrdiff_t)
    void pack_weight(const Layout&, const WeightView&, void*)
    void unpack_weight(const Layout&, const void*, const WeightView&)

cdef extern from "fastlinear/gemm.hpp" namespace "fastlinear" nogil:
    ctypedef struct CPlan "fastlinear::Plan":
        const Kernel* kernel
        ptrdiff_t threads
        ptrdiff_t k_slices
    ctypedef struct Rows:
        const char* data
        ptrdiff_t stride
        Format format
    ctypedef struct Weight:
        const char* panels
        Layout layout
    ctypedef struct Bias:
        const void* data
        Format format
    ctypedef struct Output:
        char* data
        ptrdiff_t stride
        Format format
    cppclass EpilogueProgram:
        Step* steps
        float** params
        size_t count
    ctypedef struct Problem:
        ptrdiff_t m
        ptrdiff_t n
        ptrdiff_t k
        Rows x
        Weight weight
        Bias bias
        Output y
        EpilogueProgram epilogue
    cbool gemm(const Problem&, const CPlan&)


cdef enum:
    MAX_DIMS = 8

# A dense tensor of one of our formats in this machine's memory, as the kernels see it; strides in elements.
cdef struct View:
    char* data
    Format format
    int ndim
    int64_t[MAX_DIMS] shape
    int64_t[MAX_DIMS] stride

# The rows of a tensor: `m` of them, `stride` elements apart.
cdef struct Matrix:
    char* data
    Format format
    ptrdiff_t m
    ptrdiff_t stride

cdef ptrdiff_t pool_size() noexcept
cdef bint look_at(object tensor, View* v)
cdef bint as_rows(View* v, Matrix* rows) noexcept
cdef View need(object tensor, str what) except *

cdef class Packed:
    cdef readonly ptrdiff_t n, k
    cdef readonly str layout, format
    cdef readonly object data, dtype
    cdef Layout shape
    cdef char* panels
    cdef object __weakref__

cdef class Plan:
    cdef readonly str kernel, layout
    cdef CPlan plan

cdef class Epilogue:
    cdef EpilogueProgram[5] program  # one an ISA
    cdef readonly tuple steps

cdef bint answers(Plan plan, Packed w, Format x) noexcept
cdef int compute(Packed w, Plan plan, Epilogue epilogue, Matrix* x, Bias bias, Matrix* y) except -1

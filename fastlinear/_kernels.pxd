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

cdef extern from "fastlinear/cpu.hpp" namespace "fastlinear" nogil:
    ctypedef struct CpuidRegisters:
        uint32_t eax
        uint32_t ebx
        uint32_t ecx
        uint32_t edx
    ctypedef struct CpuSource:
        CpuidRegisters (*cpuid)(uint32_t, uint32_t, void*) noexcept
        uint64_t (*xcr0)(void*) noexcept
        void* context
    ctypedef struct Cpu:
        char[13] vendor
        char[49] model
        cbool[3] isa
        size_t[3] cache
    Cpu detect_cpu(const CpuSource&)
    CpuSource this_cpu()
    void flush(const char*, size_t)

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
        ptrdiff_t columns()
    size_t kIsas
    const char** kIsaNames
    const char** kFormatNames

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
    cppclass WeightView[T]:
        T* data
        ptrdiff_t n, k, stride_n, stride_k
    size_t kHugePage
    void advise_huge_pages(void*, size_t)
    ptrdiff_t packed_elements(const Layout&, ptrdiff_t, ptrdiff_t)
    void pack_weight(const Layout&, const WeightView[const float]&, float*)
    void unpack_weight(const Layout&, const float*, const WeightView[float]&)

cdef extern from "fastlinear/gemm.hpp" namespace "fastlinear" nogil:
    ctypedef struct CPlan "fastlinear::Plan":
        const Kernel* kernel
        ptrdiff_t threads
        ptrdiff_t k_slices
    ctypedef struct Rows:
        const float* data
        ptrdiff_t stride
    cppclass EpilogueProgram:
        Step* steps
        float** params
        size_t count
    ctypedef struct Problem:
        ptrdiff_t m
        ptrdiff_t n
        ptrdiff_t k
        Rows x
        const char* packed
        const float* bias
        float* y
        ptrdiff_t stride_y
        EpilogueProgram epilogue
    cbool gemm(const Problem&, const CPlan&)


cdef enum:
    MAX_DIMS = 8

# A dense fp32 tensor in this machine's memory, as the kernels see it; strides in elements.
cdef struct View:
    float* data
    int ndim
    int64_t[MAX_DIMS] shape
    int64_t[MAX_DIMS] stride

cdef ptrdiff_t pool_size() noexcept
cdef bint look_at(object tensor, View* v)
cdef bint as_rows(View* v, ptrdiff_t* rows, ptrdiff_t* stride) noexcept
cdef View need(object tensor, str what) except *

cdef class Packed:
    cdef readonly ptrdiff_t n, k
    cdef readonly str layout
    cdef readonly object data
    cdef Layout shape
    cdef float* panels
    cdef object __weakref__

cdef class Plan:
    cdef readonly str kernel, layout
    cdef CPlan plan

cdef class Epilogue:
    cdef EpilogueProgram[3] program  # one an ISA
    cdef readonly tuple steps

cdef int compute(Packed w, Plan plan, Epilogue epilogue, ptrdiff_t m, const float* x, ptrdiff_t stride_x,
                 const float* bias, float* y, ptrdiff_t stride_y) except -1

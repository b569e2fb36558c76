# What _kernels.pyx sees of C++, and what _engine.pyx sees of _kernels.pyx.

from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libcpp cimport bool as cbool
from libcpp.vector cimport vector

from fastlinear._cpu cimport CpuSource


cdef extern from "fastlinear/host/dlpack.hpp" namespace "fastlinear" nogil:
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

cdef extern from "fastlinear/formats/all.hpp" namespace "fastlinear" nogil:
    ctypedef int Format "fastlinear::Format"
    ctypedef struct Groups:
        ptrdiff_t size
        Format scales
        cbool offsets
    ctypedef struct Layout:
        Format format
        ptrdiff_t nr
        ptrdiff_t kr
        Groups groups
    ctypedef struct FormatInfo:
        const char* name
        cbool floating
        cbool grouped
        void* pack
    const FormatInfo* format_at(size_t)
    cbool is_float(Format)
    ptrdiff_t element_bytes(Format)

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

cdef extern from "fastlinear/formats/int8.hpp" namespace "fastlinear" nogil:
    ptrdiff_t kDotLimit
    ptrdiff_t kDotLimitWithZeros

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

cdef extern from "fastlinear/host/parallel.hpp" namespace "fastlinear" nogil:
    cppclass ThreadPool:
        cbool attach(const char*)
        void before_fork()
        void after_fork()
        cbool forked()
        ptrdiff_t size()
    ThreadPool& thread_pool()
    vector[long] thread_ids(const ThreadPool&) except +

cdef extern from "fastlinear/host/memory.hpp" namespace "fastlinear":
    cppclass PackMemory:
        char* take(size_t) except +
        void give_back(char*, size_t) except +

cdef extern from "fastlinear/weight/pack.hpp" namespace "fastlinear" nogil:
    ctypedef struct WeightView "fastlinear::WeightView<void>":
        void* data
        ptrdiff_t n
        ptrdiff_t k
        ptrdiff_t stride_n
        ptrdiff_t stride_k
    ctypedef struct ScaledGroups:
        const char* scales
        const char* offsets
        ptrdiff_t panel_stride
        const float* table
    ctypedef struct Weight:
        const char* panels
        Layout layout
        ScaledGroups groups
        const float* totals
        const float* scales
        const int32_t* sums
        const int32_t* zeros
    ptrdiff_t panels_bytes(const Layout&, ptrdiff_t, ptrdiff_t)
    ptrdiff_t packed_bytes(const Layout&, ptrdiff_t, ptrdiff_t)
    ptrdiff_t channel_arrays(Format)
    Weight weight_at(const Layout&, ptrdiff_t, ptrdiff_t, const char*)
    void pack_weight(const Layout&, const WeightView&, void*)
    void pack_channels(const Layout&, const WeightView&, const float*, const int32_t*, char*)
    void pack_groups(const Layout&, const WeightView&, const void*, const void*, const float*, char*)
    void unpack_weight(const Layout&, const void*, const WeightView&)

cdef extern from "fastlinear/driver/gemm.hpp" namespace "fastlinear" nogil:
    ctypedef struct Caches:
        size_t l1d
        size_t l2
        size_t l3
    ctypedef struct Blocks:
        ptrdiff_t panels
        ptrdiff_t rows
        ptrdiff_t prepared
    ctypedef struct RowForm:
        pass
    ctypedef struct CPlan "fastlinear::Plan":
        const Kernel* kernel
        ptrdiff_t threads
        ptrdiff_t k_slices
        Blocks blocks
        const RowForm* form
    CPlan make_plan(const Kernel&, ptrdiff_t, ptrdiff_t, const Caches&)
    cbool reads_layout "fastlinear::reads"(const Kernel&, const Layout&)
    ctypedef struct Rows:
        const char* data
        ptrdiff_t stride
        Format format
        const int64_t* index
    ctypedef int RowKind "fastlinear::RowKind"
    cppclass CRowQuantizer "fastlinear::RowQuantizer":
        RowKind kind
        float scale
        int32_t zero
        const float* smooth
        Format format
        cbool makes_integers()
    ctypedef struct Affine:
        float inverse
        float low
        float high
        int32_t zero
    ctypedef struct Bias:
        const void* data
        Format format
    ctypedef struct Segment:
        char* data
        ptrdiff_t stride
        Format format
        ptrdiff_t first
    cppclass Segments "std::span<const fastlinear::Segment>":
        Segments()
        Segments(const Segment*, size_t)
    ctypedef struct EpilogueStep:
        uint32_t function
        int32_t operand
        float* params
    cppclass EpilogueProgram:
        EpilogueStep* steps
        size_t count
        cbool gated
        Affine out
    size_t kMaxSteps "fastlinear::EpilogueProgram::kMaxSteps"
    size_t kMaxOperands "fastlinear::EpilogueProgram::kMaxOperands"
    ctypedef struct COperand "fastlinear::Operand":
        const char* data
        ptrdiff_t row_stride
        ptrdiff_t column_stride
        Format format
    cppclass Problem:
        ptrdiff_t m
        ptrdiff_t n
        ptrdiff_t k
        Rows x
        CRowQuantizer quantizer
        Weight weight
        Bias bias
        Segments y
        EpilogueProgram epilogue
        const COperand* operands
        const int64_t* y_index
    cppclass Problems "std::span<const fastlinear::Problem>":
        Problems(const Problem*, size_t)
    cbool gemm(const Problem&, const CPlan&)
    cbool gemm(Problems, const CPlan&)


cdef enum:
    MAX_DIMS = 8

cdef extern from "fastlinear/driver/cut.hpp" namespace "fastlinear" nogil:
    ctypedef struct Range:
        ptrdiff_t begin
        ptrdiff_t end
    ctypedef struct Piece:
        ptrdiff_t part
        ptrdiff_t thread
        Range rows
        Range columns
        Range k
    vector[Piece] cut "fastlinear::cut"(const Problem&, const CPlan&) except +

cdef extern from "fastlinear/driver/ceiling.hpp" namespace "fastlinear::ceiling" nogil:
    double operations(const CPlan&) except +
    double bandwidth(const char*, ptrdiff_t, ptrdiff_t, int, ptrdiff_t) except +
    double clock()

cdef extern from *:
    int STATIC "int(fastlinear::RowKind::fixed)"
    int ROUNDED "int(fastlinear::RowKind::rounded)"
    int FP32 "int(fastlinear::Format::fp32)"
    int BF16 "int(fastlinear::Format::bf16)"
    int FP16 "int(fastlinear::Format::fp16)"
    int INT8 "int(fastlinear::Format::int8)"
    int UINT8 "int(fastlinear::Format::uint8)"

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
cdef const Vectors* best_vectors() noexcept
cdef const Vectors* runnable_vectors(str isa) except NULL
cdef int format_of_x(object dtype) except -1
cdef bint look_at(object tensor, View* v)
cdef bint as_rows(View* v, Matrix* rows) noexcept
cdef View need(object tensor, str what, bint integers=*) except *

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
    cdef int pack_codes(self, WeightView codes, object scale, object zero, object table, object offset) except -1
    cdef int find(self, const char* panels, bint zeros) except -1
    cdef Weight* read(self) noexcept
    cdef object of_groups(self, const char* values)
    cdef object channels(self, const void* values, object dtype)

cdef class Plan:
    cdef readonly str kernel, layout
    cdef public double due
    cdef CPlan plan

cdef class Epilogue:
    cdef EpilogueProgram program
    cdef readonly tuple steps, out
    cdef readonly size_t operands  # how many a call has to bring
    cdef object dtype  # of y, where it is requantized

cdef class RowQuantizer:
    cdef readonly str kind
    cdef readonly float scale
    cdef readonly int zero
    cdef readonly object smooth
    cdef object padded  # `smooth`, as the kernels read it
    cdef CRowQuantizer quantizer

cdef enum:
    MAX_OPERANDS = 8

# How an operand meets y.
cdef enum Meeting:
    MEETS
    SCATTERED  # its rows do not lie a constant stride apart, or their elements not side by side
    MISSES     # it does not broadcast to y

cdef Meeting meet(View* operand, View* x, ptrdiff_t columns, COperand* found) noexcept
cdef ptrdiff_t columns_of(Packed w, Epilogue epilogue) noexcept

cdef bint answers(Plan plan, Packed w, RowQuantizer rows, Format x) noexcept
cdef int compute(
    Packed w, Plan plan, Epilogue epilogue, RowQuantizer rows, Matrix* x, Bias bias, const Segment* y,
    size_t segments, const COperand* operands
) except -1

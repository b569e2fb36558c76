from libc.stdint cimport int32_t, int64_t, uint32_t
from libcpp cimport bool as cbool

from fastlinear._kernels cimport Caches, Kernel
from fastlinear._tensors cimport Format, View
from fastlinear._weights cimport Packed, Weight


cdef extern from "fastlinear/driver/plan.hpp" namespace "fastlinear" nogil:
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

cdef extern from "fastlinear/driver/problem.hpp" namespace "fastlinear" nogil:
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
        float* sums

cdef extern from *:
    int STATIC "int(fastlinear::RowKind::fixed)"
    int ROUNDED "int(fastlinear::RowKind::rounded)"
    int GROUPS "int(fastlinear::RowKind::groups)"
    int SYMMETRIC "int(fastlinear::RowKind::symmetric)"


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
cdef COperand as_operand(object tensor, ptrdiff_t m, ptrdiff_t columns) except *
cdef bint answers(Plan plan, Packed w, RowQuantizer rows, Format x) noexcept

# Buckets of M: exact to 8, then two an octave (12 16 24 32 48 64 ...) up to 2^40, which stands for all beyond it: more
# rows than memory holds, unless they are one row expanded.
cdef enum:
    LAST_OCTAVE = 40
    BUCKETS = 9 + 2 * (LAST_OCTAVE - 3)

cdef struct Bucket:
    int index       # in a list of plans
    ptrdiff_t rows  # the largest M in it, or 2^40

cdef inline Bucket bucket_of(ptrdiff_t m) noexcept:
    cdef Bucket b
    cdef int octave = 4
    b.index, b.rows = <int> m, m
    if m <= 8:
        return b
    while octave < LAST_OCTAVE and m > (<ptrdiff_t> 1) << octave:
        octave += 1
    b.index, b.rows = 8 + 2 * (octave - 3), (<ptrdiff_t> 1) << octave
    if m <= b.rows // 4 * 3:
        b.index, b.rows = b.index - 1, b.rows // 4 * 3
    return b

from libc.stdint cimport int8_t, int32_t, int64_t, uint8_t
from libcpp cimport bool as cbool
from libcpp.vector cimport vector

from fastlinear._kernels cimport Kernel, Vectors
from fastlinear._plans cimport (
    Bias, COperand, CPlan, CRowQuantizer, Epilogue, Format, Packed, Plan, Problem, RowQuantizer, Rows, Segment
)
from fastlinear._tensors cimport Matrix

# What runs the driver is in _products.pyx: it must be compiled in one shared library only.
cdef extern from "fastlinear/driver/norm.hpp" namespace "fastlinear" nogil:
    ctypedef struct OutRows:
        char* data
        ptrdiff_t stride
        Format format
    ctypedef struct NormProblem:
        ptrdiff_t m
        ptrdiff_t n
        Rows x
        Rows residual
        OutRows sum
        OutRows y
        Bias weight
        Bias bias
        float offset
        float eps
        cbool centered


cdef extern from "fastlinear/driver/integers.hpp" namespace "fastlinear" nogil:
    ctypedef struct IntegersProblem:
        ptrdiff_t m
        ptrdiff_t k
        Rows x
        const CRowQuantizer* how
        int8_t* integers
        float* scales
        int32_t* zeros
    enum: kStarts, kEnds
    ctypedef struct End "fastlinear::CodeSearch::End":
        float number
        float upper
    ctypedef struct CodeSearch:
        ptrdiff_t group
        Format scales
        cbool offsets
        cbool coded
        cbool even
        float low
        float high
        float more
        float* shrunk
        End* extremes
        ptrdiff_t ends
        float* numbers
        float* between
        uint8_t* order
    ctypedef struct CodesProblem:
        ptrdiff_t m
        ptrdiff_t k
        Rows x
        CodeSearch how
        uint8_t* codes
        char* scales
        char* offsets


cdef extern from "fastlinear/driver/experts.hpp" namespace "fastlinear" nogil:
    ctypedef struct Routing:
        ptrdiff_t tokens
        ptrdiff_t top_k
        ptrdiff_t experts
        const int64_t* ids
    cppclass Routes:
        vector[int64_t] first
        vector[int64_t] pairs
        vector[int64_t] tokens
    cbool route(const Routing&, Routes&) except +
    ctypedef struct Mixture:
        Routing routing
        ptrdiff_t n
        const float* parts
        const float* weights
        char* y
        Format format


cdef extern from "fastlinear/driver/heads.hpp" namespace "fastlinear" nogil:
    ctypedef struct Heads:
        char* data
        Format format
        ptrdiff_t batch
        ptrdiff_t head
        ptrdiff_t row
    ctypedef struct AttentionProblem:
        ptrdiff_t batches
        ptrdiff_t heads
        ptrdiff_t kv_heads
        ptrdiff_t queries
        ptrdiff_t keys
        ptrdiff_t size
        Heads q
        Heads k
        Heads v
        Heads y
        Heads mask
        const float* sinks
        float scale
        float cap
        cbool causal

cdef extern from "fastlinear/driver/cache.hpp" namespace "fastlinear" nogil:
    ctypedef struct CacheProblem:
        ptrdiff_t batches
        ptrdiff_t heads
        ptrdiff_t kv_heads
        ptrdiff_t rows
        ptrdiff_t size
        ptrdiff_t at
        ptrdiff_t dropped
        Heads q
        Heads k
        Heads v
        Heads rotated
        Heads keys
        Heads values
        Heads cos
        Heads sin


cdef ptrdiff_t pool_size() noexcept
cdef CPlan among_calls(const CPlan& plan, ptrdiff_t work, ptrdiff_t threads) noexcept
cdef int compute(
    Packed w, const CPlan& plan, Epilogue epilogue, RowQuantizer rows, Matrix* x, Bias bias, const Segment* y,
    size_t segments, const COperand* operands, float* sums
) except -1
cdef int answer(const Problem* p, size_t problems, const CPlan& plan) except -1
cdef int answer_together(const Problem* p, size_t problems, const CPlan& plan, bint chained) except -1
cdef cbool make_mixture(const Mixture& p, const Vectors& vectors, ptrdiff_t threads) noexcept nogil
cdef cbool make_integers(const IntegersProblem& p, const Vectors& vectors, ptrdiff_t threads) noexcept nogil
cdef cbool make_codes(const CodesProblem& p, const Vectors& vectors, ptrdiff_t threads) noexcept nogil
cdef cbool make_norm(const NormProblem& p, const Vectors& vectors, ptrdiff_t threads) noexcept nogil
cdef cbool make_attention(
    const AttentionProblem& p, const Vectors& vectors, const Kernel* kernel, ptrdiff_t threads
) noexcept nogil
cdef const Kernel* rounding_kernel(str name) except NULL
cdef cbool make_cache(const CacheProblem& p, const Vectors& vectors, ptrdiff_t threads) noexcept nogil

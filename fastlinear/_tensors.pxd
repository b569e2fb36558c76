from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libcpp cimport bool as cbool


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

cdef extern from "fastlinear/formats/all.hpp" namespace "fastlinear" nogil:
    ctypedef int Format "fastlinear::Format"
    ctypedef struct Groups:
        ptrdiff_t size
        Format scales
        cbool offsets
        cbool ordered
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
    cbool is_two_level(Format)

cdef extern from *:
    int FP32 "int(fastlinear::Format::fp32)"
    int BF16 "int(fastlinear::Format::bf16)"
    int FP16 "int(fastlinear::Format::fp16)"
    int INT8 "int(fastlinear::Format::int8)"
    int UINT8 "int(fastlinear::Format::uint8)"
    int INT4 "int(fastlinear::Format::int4)"


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

cdef str format_name(size_t format)
cdef list all_formats()
cdef object dtype_of(size_t format)
cdef int format_of_x(object dtype) except -1
cdef bint look_at(object tensor, View* v)
cdef bint as_rows(View* v, Matrix* rows) noexcept
cdef View need(object tensor, str what, bint integers=*) except *
cdef object need_vector(object values, object dtype, ptrdiff_t n, str what)
cdef object need_groups(object values, object dtype, tuple shape, str what)
cdef str describe(object value)

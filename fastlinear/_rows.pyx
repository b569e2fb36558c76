# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# distutils: language = c++
"""Operations on the rows of a tensor: norms, and what quantizes them. A call on a few rows takes about 1 us beside its
outputs."""

import torch

from fastlinear._tensors import FORMATS

from libc.stdint cimport int8_t, int32_t, uint8_t
from libcpp cimport bool as cbool

from fastlinear._kernels cimport Vectors, best_vectors, runnable_vectors
from fastlinear._operands cimport is_readable, read_channels
from fastlinear._plans cimport GROUPS, RowQuantizer, Rows
from fastlinear._products cimport (
    CodesProblem, CodeSearch, IntegersProblem, NormProblem, OutRows, kEnds, kStarts, make_codes, make_integers,
    make_norm, pool_size
)
from fastlinear._tensors cimport Matrix, View, as_rows, look_at

cdef object empty = torch.empty
cdef object empty_like = torch.empty_like
cdef object int8 = torch.int8
cdef object int32 = torch.int32
cdef object float32 = torch.float32

# Elements from which on the GIL is released: about 20 us.
cdef enum:
    LARGE = 1 << 17


# The rows of `tensor`, [..., n]; where they are not a constant stride apart, those of a copy, which is returned.
cdef object rows_of(object tensor, View* v, Matrix* rows):
    if as_rows(v, rows):
        return tensor
    tensor = tensor.contiguous()
    return tensor if is_readable(tensor, v) and as_rows(v, rows) else None


def norm(
    x, weight, bias, double eps, double offset=0.0, bint centered=True, residual=None, bint keep=False,
    bint over=False, str isa=None
):
    """y = norm(x + residual), as fastlinear/spec/norms.py says; (y, x + residual) with `keep`. None for tensors that it
    does not take: all are dense fp32, bf16 or fp16 CPU tensors.

    x: [..., n]; residual: of its shape, or None; weight, bias: [n] or None. Outputs have the shape and dtype of x.
    over: the sum, if it is kept, or else y is x itself, whose memory the caller gives; of a dense x only.
    isa: whose vectors to use, by name; else the best that may run. ValueError for one that may not, MemoryError where
    scratch memory ran out. Gradients are the caller's business.
    """
    cdef View v, w
    cdef Matrix rows, others
    cdef NormProblem p
    cdef const Vectors* vectors = best_vectors() if isa is None else runnable_vectors(isa)
    cdef ptrdiff_t threads
    cdef int i
    cdef cbool done
    cdef bint keep_sum
    if not is_readable(x, &v) or v.ndim == 0 or v.shape[v.ndim - 1] == 0:
        return None
    x = rows_of(x, &v, &rows)
    if x is None:
        return None
    p.m, p.n = rows.m, v.shape[v.ndim - 1]
    p.x.data, p.x.stride, p.x.format = rows.data, rows.stride, rows.format
    p.residual.data = p.sum.data = NULL
    if residual is not None:
        if not is_readable(residual, &w) or w.ndim != v.ndim:
            return None
        for i in range(v.ndim):
            if w.shape[i] != v.shape[i]:
                return None
        residual = rows_of(residual, &w, &others)
        if residual is None:
            return None
        p.residual.data, p.residual.stride, p.residual.format = others.data, others.stride, others.format
    if not read_channels(weight, p.n, &p.weight) or not read_channels(bias, p.n, &p.bias):
        return None
    p.eps, p.offset, p.centered = eps, offset, centered
    over = over and is_dense(&v)
    keep_sum = keep and residual is not None
    y = x if over and not keep_sum else empty_like(x) if is_dense(&v) else x.new_empty(x.shape)
    out(y, &p.y)
    total = x
    if keep_sum:
        total = x if over else empty_like(y)
        out(total, &p.sum)
    if p.m > 0:
        threads = pool_size()
        if p.m * p.n < LARGE:
            done = make_norm(p, vectors[0], threads)
        else:
            with nogil:
                done = make_norm(p, vectors[0], threads)
        if not done:
            raise MemoryError(f"no memory for the scratch rows of a norm of {p.n} channels")
    return (y, total) if keep else y


def quantize_channels(weight, str isa=None):
    """(values int8 [n, k], scale fp32 [n]) of a weight [n, k], as `quantize_channels` of fastlinear/spec/int8.py says.
    None for what it does not take: the weight is a dense fp32, bf16 or fp16 CPU tensor, and finite.

    isa: whose vectors to use, by name; else the best that may run."""
    made = integers(weight, None, isa)
    return None if made is None or not bool(made[1].isfinite().all()) else made[:2]


def quantize_rows(x, RowQuantizer rows not None, str isa=None):
    """(u - 128 int8 [m, k], scale fp32 [m], zero int32 [m]) of x [m, k], as `quantize_rows` of fastlinear/spec/int8.py
    says. None for what it does not take: x is dense, of fp32, bf16 or fp16, on a CPU, and not quantized in groups.

    isa: whose vectors to use, by name; else the best that may run."""
    if not rows.quantizer.makes_integers() or <int> rows.quantizer.kind == GROUPS:
        return None
    return integers(x, rows, isa)


# A matrix [m, k] with something in its rows, or the copy that `rows_of` makes of it, whose owner is returned; None for
# anything else.
cdef object matrix_of(object x, ptrdiff_t* m, ptrdiff_t* k, Rows* at):
    cdef View v
    cdef Matrix rows
    if not is_readable(x, &v) or v.ndim != 2 or v.shape[1] == 0:
        return None
    x = rows_of(x, &v, &rows)
    if x is not None:
        m[0], k[0] = rows.m, v.shape[1]
        at.data, at.stride, at.format = rows.data, rows.stride, rows.format
    return x


cdef tuple integers(object x, RowQuantizer how, str isa):
    cdef View w
    cdef IntegersProblem p
    cdef const Vectors* vectors = best_vectors() if isa is None else runnable_vectors(isa)
    cdef ptrdiff_t threads = pool_size()
    cdef cbool done
    x = matrix_of(x, &p.m, &p.k, &p.x)
    if x is None:
        return None
    p.how = NULL
    if how is not None:
        p.how = &how.quantizer
    values = empty((p.m, p.k), dtype=int8, device="cpu")
    scale = empty(p.m, dtype=float32, device="cpu")
    zero = None if how is None else empty(p.m, dtype=int32, device="cpu")
    look_at(values, &w)
    p.integers = <int8_t*> w.data
    look_at(scale, &w)
    p.scales = <float*> w.data
    p.zeros = NULL
    if zero is not None:
        p.zeros = <int32_t*> <size_t> zero.data_ptr()
    with nogil:
        done = make_integers(p, vectors[0], threads)
    if not done:
        raise MemoryError(f"no memory for the scratch rows of {p.k} numbers that are quantized")
    return values, scale, zero


def quantize_groups(weight, coding, tuple shrunk, list ends, double more, str isa=None):
    """(codes uint8 or int8 [n, k], scale [n, groups], offset likewise or None) of a weight [n, k], as `quantize_weight`
    of fastlinear/spec/grouping.py says, which has SHRUNK, ends_of and finer. None for what it does not take: the weight
    is dense and finite, of fp32, bf16 or fp16, on a CPU, and its scales are one of these.

    isa: whose vectors to use, by name; else the best that may run."""
    cdef View w
    cdef CodesProblem p
    cdef const Vectors* vectors = best_vectors() if isa is None else runnable_vectors(isa)
    cdef ptrdiff_t threads = pool_size()
    cdef cbool done
    if coding.scales not in FORMATS or len(ends) > kEnds or len(shrunk) != kStarts:
        return None
    weight = matrix_of(weight, &p.m, &p.k, &p.x)
    if weight is None:
        return None
    read_coding(coding, shrunk, ends, more, &p.how)
    scales = (p.m, (p.k + p.how.group - 1) // p.how.group)
    codes = empty((p.m, p.k), dtype=torch.uint8 if coding.table else int8, device="cpu")
    scale = empty(scales, dtype=coding.scales, device="cpu")
    offset = empty(scales, dtype=coding.scales, device="cpu") if coding.offsets else None
    look_at(scale, &w)
    p.how.scales, p.scales = w.format, w.data
    p.offsets = NULL
    p.codes = <uint8_t*> <size_t> codes.data_ptr()
    if offset is not None:
        p.offsets = <char*> <size_t> offset.data_ptr()
    with nogil:
        done = make_codes(p, vectors[0], threads)
    if not done:
        raise MemoryError(f"no memory for groups of {coding.group} numbers that are quantized")
    if not bool(scale.isfinite().all()) or offset is not None and not bool(offset.isfinite().all()):
        return None
    return codes, scale, offset


cdef int read_coding(object coding, tuple shrunk, list ends, double more, CodeSearch* how) except -1:
    cdef Py_ssize_t i
    numbers = coding.numbers
    how.group, how.offsets, how.coded, how.even = coding.group, coding.offsets, len(coding.table) > 0, coding.is_even
    how.low, how.high, how.more, how.ends = min(numbers), max(numbers), more, len(ends)
    for i in range(kStarts):
        how.shrunk[i] = shrunk[i]
    for i in range(how.ends):
        how.extremes[i].number, how.extremes[i].upper = ends[i]
    if how.even:
        return 0
    places = sorted(range(16), key=numbers.__getitem__)
    for i in range(16):
        how.numbers[i], how.order[i] = numbers[i], places[i]
    for i in range(15):  # in fp32, as the specification
        how.between[i] = (how.numbers[how.order[i + 1]] + how.numbers[how.order[i]]) / <float> 2
    return 0


cdef void out(object tensor, OutRows* rows) noexcept:
    cdef View v
    look_at(tensor, &v)
    rows.data, rows.format, rows.stride = v.data, v.format, v.shape[v.ndim - 1]


# Whether the rows lie one behind the other.
cdef bint is_dense(View* v) noexcept:
    cdef ptrdiff_t expected = 1
    cdef int i
    for i in range(v.ndim - 1, -1, -1):
        if v.shape[i] != 1 and v.stride[i] != expected:
            return False
        expected *= v.shape[i]
    return True

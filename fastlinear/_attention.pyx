# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# distutils: language = c++
"""Attention, softmax(q k^T) v, and the cache of keys and values that it reads, by kernels of our own."""

import torch

from libc.math cimport sqrt
from libcpp cimport bool as cbool

from fastlinear._kernels cimport Kernel, Vectors, best_vectors, runnable_vectors
from fastlinear._products cimport (
    AttentionProblem, CacheProblem, Heads, make_attention, make_cache, pool_size, rounding_kernel
)
from fastlinear._tensors cimport BF16, FP32, Format, View, is_float, look_at

cdef object Tensor = torch.Tensor
cdef object boolean = torch.bool
cdef object byte = torch.uint8
cdef object is_neg = torch.Tensor.is_neg

# Multiplications from which on the GIL is released: about 20 us.
cdef enum:
    LARGE = 1 << 21


# [batch, head, row, element] of a floating format, elements side by side; [batch, row, count * element] where `count`
# is given, and [row, batch, count * element] where `length_first` is, too.
cdef bint heads_of(object tensor, View* v, Heads* heads, ptrdiff_t count, bint length_first=False) except -1:
    if type(tensor) is not Tensor or not look_at(tensor, v) or not is_float(v.format) or is_neg(tensor):
        return False
    if count > 0:
        if v.ndim != 3 or v.stride[2] != 1 or v.shape[2] % count != 0:
            return False
        v.shape[3] = v.shape[2] // count
        v.shape[2], v.shape[1], v.ndim = v.shape[1], count, 4
        v.stride[2], v.stride[1], v.stride[3] = v.stride[1], v.shape[3], 1
        if length_first:
            v.shape[0], v.shape[2] = v.shape[2], v.shape[0]
            v.stride[0], v.stride[2] = v.stride[2], v.stride[0]
    if v.ndim != 4 or (v.stride[3] != 1 and v.shape[3] != 1):
        return False
    heads.data, heads.format = v.data, v.format
    heads.batch, heads.head, heads.row = v.stride[0], v.stride[1], v.stride[2]
    return True


# What is broadcast to [batches, heads, queries, keys].
cdef bint mask_of(object mask, AttentionProblem* p) except -1:
    cdef View v
    cdef ptrdiff_t[4] wanted
    cdef ptrdiff_t[4] stride
    cdef int i, missing
    if type(mask) is not Tensor:
        return False
    boolean_mask = mask.dtype is boolean
    if boolean_mask:
        mask = mask.view(byte)
    if not look_at(mask, &v) or is_neg(mask) or v.ndim < 2 or v.ndim > 4:
        return False
    if not boolean_mask and v.format != <Format> FP32 and v.format != p.q.format:
        return False
    wanted[0], wanted[1], wanted[2], wanted[3] = p.batches, p.heads, p.queries, p.keys
    missing = 4 - v.ndim
    for i in range(4):
        stride[i] = 0
        if i >= missing:
            if v.shape[i - missing] == wanted[i]:
                stride[i] = v.stride[i - missing] if wanted[i] > 1 else 0
            elif v.shape[i - missing] != 1:
                return False
    if stride[3] != 1 and p.keys > 1:
        return False
    p.mask.data, p.mask.format = v.data, v.format
    p.mask.batch, p.mask.head, p.mask.row = stride[0], stride[1], stride[2]
    return True


def attention(
    q, k, v, mask=None, bint causal=False, scale=None, bint grouped=False, str isa=None, tuple rows=(0, 0),
    bint joined=False, str products=None, bint length_first=False, sinks=None, cap=None
):
    """softmax(q k^T * scale + mask) v, as fastlinear/spec/attention.py says. None for what it does not take: all are
    dense fp32, bf16 or fp16 CPU tensors of one dtype, whose elements lie side by side.

    q: [B, H, L, D], k, v: [B, G, S, D] with G = H or, where `grouped`, a divisor of it; mask: bool, or fp32 or of their
    dtype, two to four dimensions that broadcast to [B, H, L, S]; scale: None for 1 / sqrt(D); sinks: [H], dense and
    fp32, or None; cap: above 0, or None.
    The result is [B, H, L, D], the transpose of a contiguous [B, L, H, D]. rows: (H, G) where q, k, v and the result
    are instead as linear layers have them, [B, L, H * D] and [B, S, G * D]; length_first: those with B second; joined:
    where the result alone is.
    isa: whose vectors to use, by name; else the best that may run. products: the name of a kernel of bf16 rows that
    multiplies fp32 or bf16 in bf16, rounding what is not, where k has its elements in pairs; None for fp32. ValueError
    for one that may not, MemoryError where scratch memory ran out. Gradients are the caller's business.
    """
    cdef View a, b, c
    cdef AttentionProblem p
    cdef const Kernel* kernel = NULL
    cdef const Vectors* vectors = best_vectors() if isa is None else runnable_vectors(isa)
    cdef ptrdiff_t threads
    cdef cbool done
    cdef ptrdiff_t count = rows[0], kv_count = rows[1]
    if not heads_of(q, &a, &p.q, count, length_first) or not heads_of(k, &b, &p.k, kv_count, length_first):
        return None
    if not heads_of(v, &c, &p.v, kv_count, length_first):
        return None
    if b.format != a.format or c.format != a.format:
        return None
    p.batches, p.heads, p.queries, p.size = a.shape[0], a.shape[1], a.shape[2], a.shape[3]
    p.kv_heads, p.keys = b.shape[1], b.shape[2]
    if b.shape[0] != p.batches or b.shape[3] != p.size:
        return None
    if c.shape[0] != p.batches or c.shape[1] != p.kv_heads or c.shape[2] != p.keys or c.shape[3] != p.size:
        return None
    if min(p.batches, p.heads, p.queries, p.kv_heads) == 0 or min(p.keys, p.size) == 0:
        return None
    if p.kv_heads != p.heads and (not grouped or p.heads % p.kv_heads != 0):
        return None
    p.mask.data = NULL
    if mask is not None and (causal or not mask_of(mask, &p)):
        return None
    p.sinks = NULL
    if sinks is not None:
        if type(sinks) is not Tensor or not look_at(sinks, &c) or c.format != <Format> FP32 or is_neg(sinks):
            return None
        if c.ndim != 1 or c.shape[0] != p.heads or (c.stride[0] != 1 and p.heads > 1):
            return None
        p.sinks = <const float*> c.data
    p.cap = 0 if cap is None else cap
    if products is not None:
        kernel = rounding_kernel(products)
    if kernel != NULL and p.q.format != <Format> BF16 and p.q.format != <Format> FP32:
        return None
    p.scale = 1.0 / sqrt(p.size) if scale is None else scale
    p.causal = causal
    length_first = length_first and count > 0
    outer = (p.queries, p.batches) if length_first else (p.batches, p.queries)
    y = q.new_empty(*outer, p.heads * p.size)
    if not heads_of(y, &a, &p.y, p.heads, length_first):
        return None
    threads = pool_size()
    if 2 * p.batches * p.heads * p.queries * p.keys * p.size < LARGE:
        done = make_attention(p, vectors[0], kernel, threads)
    else:
        with nogil:
            done = make_attention(p, vectors[0], kernel, threads)
    if not done:
        raise MemoryError(f"no memory for the scratch rows of attention over {p.keys} keys of {p.size}")
    return y if count > 0 or joined else y.view(p.batches, p.queries, p.heads, p.size).transpose(1, 2)


# cos or sin of positions, [batch or 1, row, element] of the format of what is rotated.
cdef bint angles_of(object tensor, CacheProblem* p, Heads* heads) except -1:
    cdef View v
    if type(tensor) is not Tensor or not look_at(tensor, &v) or v.format != p.q.format or is_neg(tensor):
        return False
    if v.ndim != 3 or v.shape[0] not in (1, p.batches) or v.shape[1] != p.rows or v.shape[2] != p.size:
        return False
    if v.stride[2] != 1:
        return False
    heads.data, heads.format = v.data, v.format
    heads.batch, heads.head, heads.row = v.stride[0] if v.shape[0] > 1 else 0, 0, v.stride[1]
    return True


cdef bint is_of(View* v, CacheProblem* p, ptrdiff_t heads, ptrdiff_t rows) noexcept:
    return (
        v.format == p.q.format and v.shape[0] == p.batches and v.shape[1] == heads and v.shape[3] == p.size
        and (v.shape[2] == rows or rows < 0)
    )


# Part of a cache, [batch, head, row, element], that the rows from `at` on fit in; only they do where rows are dropped.
cdef bint cache_of(object tensor, CacheProblem* p, Heads* heads) except -1:
    cdef View v
    if not heads_of(tensor, &v, heads, 0) or not is_of(&v, p, p.kv_heads, -1):
        return False
    if p.dropped > 0:
        return v.shape[2] == p.at + p.rows and v.stride[2] == p.size
    return v.shape[2] >= p.at + p.rows


def store(
    q, k, v, cos, sin, keys, values, ptrdiff_t at, bint full=False, str isa=None, tuple rows=(0, 0)
):
    """q and k rotated, as fastlinear/spec/attention.py says: the former is returned, [B, H, L, D], the transpose of a
    contiguous [B, L, H, D]; the latter goes to keys, and v to values, [B, G, S, D], from row `at` on. None, and nothing
    written, for what it does not take: dense fp32, bf16 or fp16 CPU tensors of one dtype.

    q: [B, H, L, D], k, v: [B, G, L, D], cos, sin: [B or 1, L, D]; D is even, elements lie side by side, and the rows
    fit in the cache. full: L rows leave the cache at its front, and all that is behind them moves up, before L = S - at
    rows are written. rows: (H, G) where q, k and v are instead [B, L, H * D] and [B, L, G * D]. isa, errors: as in
    `attention`.
    """
    cdef View a
    cdef CacheProblem p
    cdef const Vectors* vectors = best_vectors() if isa is None else runnable_vectors(isa)
    cdef ptrdiff_t count = rows[0], kv_count = rows[1]
    if not heads_of(q, &a, &p.q, count):
        return None
    p.batches, p.heads, p.rows, p.size, p.at = a.shape[0], a.shape[1], a.shape[2], a.shape[3], at
    p.dropped = p.rows if full else 0
    if min(p.batches, p.heads, p.rows, p.size) == 0 or p.size % 2 != 0 or at < 0:
        return None
    if not heads_of(k, &a, &p.k, kv_count):
        return None
    p.kv_heads = a.shape[1]
    if not is_of(&a, &p, p.kv_heads, p.rows):
        return None
    if not heads_of(v, &a, &p.v, kv_count) or not is_of(&a, &p, p.kv_heads, p.rows):
        return None
    if not cache_of(keys, &p, &p.keys) or not cache_of(values, &p, &p.values):
        return None
    if not angles_of(cos, &p, &p.cos) or not angles_of(sin, &p, &p.sin):
        return None
    rotated = q.new_empty((p.batches, p.rows, p.heads, p.size)).transpose(1, 2)
    heads_of(rotated, &a, &p.rotated, 0)
    if not make_cache(p, vectors[0], pool_size()):
        raise MemoryError(f"no memory for the scratch rows of heads of {p.size}")
    return rotated

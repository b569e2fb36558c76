# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# distutils: language = c++
"""A mixture of experts as one call: rows sorted by expert, two grouped products, and their weighted sum."""

import torch

from libc.stdint cimport int64_t
from libcpp cimport bool as cbool
from libcpp.vector cimport vector

from fastlinear._kernels cimport Vectors, best_vectors, reads_layout
from fastlinear._plans cimport Bias, Epilogue, Plan, Problem, RowQuantizer, Segment, Segments, answers
from fastlinear._products cimport Mixture, Routes, Routing, answer, make_mixture, pool_size, route
from fastlinear._tensors cimport FP32, Format, View, describe, element_bytes, need
from fastlinear._weights cimport Packed, Weight

cdef object int64 = torch.int64
cdef object float32 = torch.float32


cdef class Projection:
    """The weights of all experts for one of their products: packs of one layout and size, in the order of the experts.

    bias: [experts, n], fp32, bf16 or fp16, or None; epilogue: what is done with the sums. ValueError where a bias or
    packs are not so.
    """

    cdef readonly tuple packs
    cdef readonly ptrdiff_t n, k
    cdef readonly Epilogue epilogue
    cdef vector[Weight] weights
    cdef object bias
    cdef Bias first_bias
    cdef ptrdiff_t bias_bytes  # from the bias of an expert to that of the next one

    def __init__(self, packs, Epilogue epilogue not None, bias=None):
        cdef Packed packed, first
        cdef View v
        self.packs, self.epilogue, self.bias = tuple(packs), epilogue, bias
        if not self.packs:
            raise ValueError("there are no experts")
        first = self.packs[0]
        self.n, self.k = first.n, first.k
        for packed in self.packs:
            if packed.layout != first.layout or packed.n != first.n or packed.k != first.k:
                raise ValueError(f"experts are alike, but one is {first.n} x {first.k} in {first.layout!r} and one "
                                 f"{packed.n} x {packed.k} in {packed.layout!r}")
            self.weights.push_back(packed.read()[0])
        self.first_bias.data, self.first_bias.format = NULL, <Format> FP32
        if bias is not None:
            v = need(bias, "bias")
            if v.ndim != 2 or v.shape[0] != len(self.packs) or v.shape[1] != self.n or not bias.is_contiguous():
                raise ValueError(f"bias must be contiguous [{len(self.packs)}, {self.n}], not {describe(bias)}")
            self.first_bias.data, self.first_bias.format = v.data, v.format
            self.bias_bytes = self.n * bias.element_size()

    @property
    def columns(self):
        """Of what it makes."""
        return self.n // 2 if self.epilogue.program.gated else self.n

    @property
    def layout(self):
        return (<Packed> self.packs[0]).layout

    cdef int check(self, Plan plan, RowQuantizer rows, Format x) except -1:
        cdef Packed packed = self.packs[0]
        if not reads_layout(plan.plan.kernel[0], packed.shape) or not answers(plan, packed, rows, x):
            raise ValueError(f"kernel {plan.kernel!r} does not multiply such rows by experts in {packed.layout!r}")
        return 0

    cdef void ask(self, Problem* p, size_t expert, RowQuantizer rows) noexcept:
        p.n, p.k = self.n, self.k
        if rows is not None:
            p.quantizer = rows.quantizer
        p.weight = self.weights[expert]
        p.bias = self.first_bias
        if p.bias.data != NULL:
            p.bias.data = <const char*> p.bias.data + <ptrdiff_t> expert * self.bias_bytes
        p.epilogue = self.epilogue.program


def run(
    Projection first not None, Projection second not None, Plan first_plan not None, Plan second_plan not None,
    x, ids, weights, RowQuantizer rows=None
):
    """y[t] = sum_j weights[t, j] * second_e(first_e(x[t])), e = ids[t, j], in the order of j: [M, N] of x's dtype.

    x: [M, K], elements of a row side by side; ids: int64 [M, T] of 0 to E, which stands for no expert; weights: fp32
    [M, T]; both contiguous. Only experts that have rows are read. What `first` makes is of the dtype of x, what
    `second` makes fp32. Raises ValueError or TypeError where tensors are not so, IndexError for another id, MemoryError
    for want of memory.
    """
    cdef View vx = need(x, "x"), vw = need(weights, "weights"), vy
    cdef size_t experts = first.weights.size(), e, count = 0
    cdef ptrdiff_t pairs, columns, begin, element = element_bytes(vx.format)
    if vx.ndim != 2 or vx.shape[1] != first.k or (vx.stride[1] != 1 and first.k > 1):
        raise ValueError(f"x must be [M, {first.k}] with unit stride in a row, not {describe(x)}")
    fit = ids.dtype is int64 and ids.dim() == 2 and ids.is_contiguous() and ids.device.type == "cpu"
    if not fit or len(ids) != vx.shape[0]:
        raise ValueError(f"ids must be contiguous int64 [{vx.shape[0]}, top_k], not {describe(ids)}")
    if <int> vw.format != FP32 or weights.shape != ids.shape or not weights.is_contiguous():
        raise ValueError(f"weights must be contiguous fp32 {tuple(ids.shape)}, not {describe(weights)}")
    columns = first.columns
    if second.weights.size() != experts or second.k != columns:
        raise ValueError(f"{experts} experts that make {columns} columns do not go before {second.weights.size()} that "
                         f"take {second.k}")
    first.check(first_plan, rows, vx.format)
    second.check(second_plan, rows, vx.format)
    cdef Routing routing
    cdef Routes routes
    routing.tokens, routing.top_k, routing.experts = vx.shape[0], ids.shape[1], <ptrdiff_t> experts
    routing.ids = <const int64_t*> <size_t> ids.data_ptr()
    if not route(routing, routes):
        raise IndexError(f"ids are 0 to {experts}, not {int(ids.min())} to {int(ids.max())}")
    pairs = routes.first[experts]
    hidden, parts = x.new_empty(pairs, columns), x.new_empty((vx.shape[0] * routing.top_k, second.n), dtype=float32)
    y = x.new_empty(vx.shape[0], second.n)
    cdef char* between = <char*> <size_t> hidden.data_ptr()
    cdef vector[Problem] problems = vector[Problem](experts)
    cdef vector[Segment] segments = vector[Segment](experts)
    cdef Problem* p
    cdef Problem blank
    for e in range(experts):
        begin = routes.first[e]
        if routes.first[e + 1] == begin:
            continue
        p = &problems[count]
        first.ask(p, e, rows)
        p.m = routes.first[e + 1] - begin
        p.x.data, p.x.stride, p.x.format, p.x.index = vx.data, vx.stride[0], vx.format, &routes.tokens[begin]
        segments[count].data = between + begin * columns * element
        segments[count].stride, segments[count].format, segments[count].first = columns, vx.format, 0
        p.y = Segments(&segments[count], 1)
        count += 1
    if count > 0:
        answer(problems.data(), count, first_plan.plan)
    count = 0
    for e in range(experts):
        begin = routes.first[e]
        if routes.first[e + 1] == begin:
            continue
        p = &problems[count]
        p[0] = blank
        second.ask(p, e, rows)
        p.m = routes.first[e + 1] - begin
        p.x.data, p.x.stride, p.x.format = between + begin * columns * element, columns, vx.format
        p.y_index = &routes.pairs[begin]
        segments[count].data = <char*> <size_t> parts.data_ptr()
        segments[count].stride, segments[count].format, segments[count].first = second.n, <Format> FP32, 0
        p.y = Segments(&segments[count], 1)
        count += 1
    if count > 0:
        answer(problems.data(), count, second_plan.plan)
    cdef Mixture mixture
    mixture.routing, mixture.n = routing, second.n
    mixture.parts = <const float*> <size_t> parts.data_ptr()
    mixture.weights = <const float*> vw.data
    vy = need(y, "y")
    mixture.y, mixture.format = vy.data, vy.format
    cdef const Vectors* vectors = best_vectors()
    cdef ptrdiff_t threads = pool_size()
    cdef cbool done
    with nogil:
        done = make_mixture(mixture, vectors[0], threads)
    if not done:
        raise MemoryError(f"no memory for a row of {second.n} sums")
    return y

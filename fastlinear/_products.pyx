# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# distutils: language = c++
"""Products and what else threads share.

The driver (include/fastlinear/driver) is compiled here and nowhere else: the pool of threads that it runs on, and the
scratch memory of each thread, are those of this shared library.
"""

import logging
import os

import torch

from libc.stdint cimport int64_t
from libcpp cimport bool as cbool
from libcpp.vector cimport vector

from fastlinear._kernels cimport Kernel, Vectors, parse_layout, reads, reads_layout, runnable_kernel
from fastlinear._plans cimport (
    MAX_OPERANDS, Bias, COperand, CPlan, Epilogue, Plan, Problem, RowQuantizer, Segment, Segments, answers,
    as_operand, columns_of
)
from fastlinear._tensors cimport FP32, Format, Matrix, View, as_rows, describe, format_of_x, is_float, need
from fastlinear._weights cimport Packed

cdef extern from "fastlinear/host/parallel.hpp" namespace "fastlinear" nogil:
    cppclass ThreadPool:
        cbool attach(const char*)
        void before_fork()
        void after_fork()
        cbool forked()
        ptrdiff_t size()
    ThreadPool& thread_pool()
    vector[long] thread_ids(const ThreadPool&) except +

cdef extern from "fastlinear/driver/attention.hpp" namespace "fastlinear" nogil:
    cbool attend(const AttentionProblem&, const Vectors&, const Kernel*, ptrdiff_t)
    cbool rounds_attention(const Kernel&)

cdef extern from "fastlinear/driver/cache.hpp" namespace "fastlinear" nogil:
    cbool store(const CacheProblem&, const Vectors&, ptrdiff_t)

cdef extern from "fastlinear/driver/gemm.hpp" namespace "fastlinear" nogil:
    cppclass Problems "std::span<const fastlinear::Problem>":
        Problems(const Problem*, size_t)
    cbool gemm(const Problem&, const CPlan&)
    cbool gemm(Problems, const CPlan&)
    cbool gemm_together(Problems, const CPlan&, cbool)

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

cdef extern from "fastlinear/driver/experts.hpp" namespace "fastlinear" nogil:
    cbool mix(const Mixture&, const Vectors&, ptrdiff_t)

cdef extern from "fastlinear/driver/norm.hpp" namespace "fastlinear" nogil:
    cbool normalize(const NormProblem&, const Vectors&, ptrdiff_t)

cdef extern from "fastlinear/driver/integers.hpp" namespace "fastlinear" nogil:
    cbool to_codes(const CodesProblem&, const Vectors&, ptrdiff_t)
    cbool to_integers(const IntegersProblem&, const Vectors&, ptrdiff_t)

cdef extern from "fastlinear/driver/ceiling.hpp" namespace "fastlinear::ceiling" nogil:
    double operations(const CPlan&) except +
    double bandwidth(const char*, ptrdiff_t, ptrdiff_t, int, ptrdiff_t) except +
    double clock()

cdef object Tensor = torch.Tensor


# ---- threads ----

cdef ptrdiff_t pool_size() noexcept:
    return thread_pool().size()


def num_threads():
    """Threads that a call may use: torch's own count, or 1 in a child whose pool was lost in a fork."""
    return pool_size()


def pool_threads():
    """The kernel's ids of the threads that run calls of this thread, itself first."""
    return tuple(dict.fromkeys(thread_ids(thread_pool())))


def _attach_pool():
    folder = os.path.join(os.path.dirname(torch.__file__), "lib")
    return any(thread_pool().attach(os.fsencode(os.path.join(folder, name)))
               for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"))


def forked():
    """True in a process that was forked while its thread pool could not be let go: everything runs on one thread."""
    return thread_pool().forked()


def _before_fork():
    thread_pool().before_fork()


def _after_fork():
    thread_pool().after_fork()
    if thread_pool().forked():
        logging.getLogger("fastlinear").warning(
            "this process was forked from one whose thread pool it lacks: fastlinear runs on one thread here; start "
            "processes by spawn or forkserver, or fork before torch computes in parallel"
        )


pool_attached = _attach_pool()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_child=_after_fork)


# ---- products ----

cdef void ask(
    Problem* p, Packed w, Epilogue epilogue, RowQuantizer rows, Matrix* x, Bias bias, const Segment* y, size_t segments
) noexcept:
    p.m, p.n, p.k = x.m, w.n, w.k
    p.x.data, p.x.stride, p.x.format = x.data, x.stride, x.format
    if rows is not None:
        p.quantizer = rows.quantizer
    p.weight = w.read()[0]
    p.bias = bias
    p.y = Segments(y, segments)
    p.epilogue = epilogue.program


# Large products release the GIL: 2e6 multiply-adds are about 20 us, where handing it over costs nothing.
cdef enum:
    LARGE = 2000000


cdef ptrdiff_t work_of(const Problem* p, size_t problems) noexcept:
    cdef ptrdiff_t work = 0
    cdef size_t i
    for i in range(problems):
        work += p[i].m * p[i].n * p[i].k
    return work


cdef int answer(const Problem* p, size_t problems, const CPlan& plan) except -1:
    cdef cbool done
    if problems == 1 and work_of(p, problems) <= LARGE:
        done = gemm(p[0], plan)
    else:
        with nogil:
            done = gemm(p[0], plan) if problems == 1 else gemm(Problems(p, problems), plan)
    return ended(done, p, problems)


# The same of problems on one x, each of which may have what the one before it makes as an operand, if they are chained.
cdef int answer_together(const Problem* p, size_t problems, const CPlan& plan, bint chained) except -1:
    cdef cbool done
    if work_of(p, problems) <= LARGE:
        done = gemm_together(Problems(p, problems), plan, chained)
    else:
        with nogil:
            done = gemm_together(Problems(p, problems), plan, chained)
    return ended(done, p, problems)


cdef int ended(cbool done, const Problem* p, size_t problems) except -1:
    if not done:
        raise MemoryError(f"no memory for the scratch tiles of {problems} products, the first with M={p[0].m}, "
                          f"N={p[0].n}, K={p[0].k}")
    return 0


# Multiply-adds from which on a product among others has all threads. Nothing has to be woken for it, which is what the
# tuner has to reckon with; and from memory, as all weights of a language model come, 4 bits of so many take 10 us.
cdef enum:
    SHARED_WORK = 300000


# A plan for so many multiply-adds, as it is for a call that others of the same threads come before and after.
cdef CPlan among_calls(const CPlan& plan, ptrdiff_t work, ptrdiff_t threads) noexcept:
    cdef CPlan found = plan
    if work >= SHARED_WORK:
        found.threads = max(plan.threads, threads)
    return found


cdef int compute(
    Packed w, const CPlan& plan, Epilogue epilogue, RowQuantizer rows, Matrix* x, Bias bias, const Segment* y,
    size_t segments, const COperand* operands, float* sums
) except -1:
    cdef Problem p
    ask(&p, w, epilogue, rows, x, bias, y, segments)
    p.operands, p.sums = operands, sums
    return answer(&p, 1, plan)


# Row numbers [m] below `rows`.
cdef const int64_t* as_index(object index, ptrdiff_t rows, str what) except? NULL:
    fit = (isinstance(index, Tensor) and index.dtype is torch.int64 and index.dim() == 1 and index.is_contiguous()
           and index.device.type == "cpu")
    if not fit:
        raise ValueError(f"{what} must be a contiguous int64 CPU tensor of one dimension, not {describe(index)}")
    if len(index) > 0 and not (0 <= int(index.min()) and int(index.max()) < rows):
        raise ValueError(f"{what} must lie from 0 to {rows - 1}, not from {int(index.min())} to {int(index.max())}")
    return <const int64_t*> <size_t> index.data_ptr()


cdef float* as_sums(object sums, ptrdiff_t m, ptrdiff_t n) except? NULL:
    cdef View v = need(sums, "sums")
    if <int> v.format != FP32 or v.ndim != 2 or v.shape[0] != m or v.shape[1] != n or not sums.is_contiguous():
        raise ValueError(f"sums must be a dense fp32 tensor [{m}, {n}], not {describe(sums)}")
    return <float*> v.data


cdef enum:
    MAX_SEGMENTS = 8


# Checks the arguments of `run` and puts them into a problem, its segments and its operands.
cdef int fill(
    Problem* p, Segment* segments, COperand* beside, Plan plan, Packed packed, Epilogue epilogue, object x, object bias,
    object out, RowQuantizer rows, tuple operands, object x_index, object y_index
) except -1:
    cdef View vx = need(x, "x", integers=True)
    cdef View vy, vb
    cdef Matrix rows_x, rows_y
    cdef Bias b
    cdef ptrdiff_t first = 0, m, columns = columns_of(packed, epilogue)
    cdef size_t count = 0, i
    cdef bint fit
    if epilogue.program.gated and packed.n % 2:
        raise ValueError(f"a gate takes a weight of an even number of channels, not of {packed.n}")
    if not reads_layout(plan.plan.kernel[0], packed.shape):
        raise ValueError(f"kernel {plan.kernel!r} reads {' or '.join(reads(plan.plan.kernel))}, "
                         f"the weight is in {packed.layout!r}")
    if not answers(plan, packed, rows, vx.format) or (packed.shape.format != vx.format and packed.format == "fp32"):
        by = "" if rows is None else f" with {rows.kind} rows"
        raise ValueError(f"kernel {plan.kernel!r} on a weight in {packed.layout!r} does not take x of {x.dtype}{by}")
    if rows is not None and rows.smooth is not None and rows.smooth.numel() != packed.k:
        raise ValueError(f"smooth must be [{packed.k}], not {describe(rows.smooth)}")
    if vx.ndim != 2 or vx.shape[1] != packed.k or not as_rows(&vx, &rows_x):
        raise ValueError(f"x must be [M, {packed.k}] with unit stride in a row, not {describe(x)}")
    m = rows_x.m if x_index is None else len(x_index)
    cdef tuple parts = tuple(out) if type(out) is list or type(out) is tuple else (out,)
    if not 1 <= len(parts) <= MAX_SEGMENTS:
        raise ValueError(f"out is 1 to {MAX_SEGMENTS} tensors, not {len(parts)}")
    for part in parts:
        vy = need(part, "out", integers=True)
        if epilogue.dtype is not (None if is_float(vy.format) else part.dtype):
            raise ValueError(f"out is {part.dtype}, but the epilogue makes {epilogue.dtype or 'numbers'}")
        fit = vy.ndim == 2 and as_rows(&vy, &rows_y) and (y_index is not None or vy.shape[0] == m)
        if not fit or (len(parts) == 1 and vy.shape[1] != columns):
            wanted = columns if len(parts) == 1 else "columns"
            raise ValueError(f"out must be [{m}, {wanted}] with unit stride in a row, not {describe(part)}")
        segments[count].data, segments[count].stride = rows_y.data, rows_y.stride
        segments[count].format, segments[count].first = rows_y.format, first
        first += vy.shape[1]
        count += 1
    if first != columns:
        raise ValueError(f"the parts of out have {first} columns together, not {columns}")
    b.data = NULL
    if bias is not None:
        vb = need(bias, "bias")
        if vb.ndim != 1 or vb.shape[0] != packed.n or (vb.stride[0] != 1 and packed.n > 1):
            raise ValueError(f"bias must be [{packed.n}] with unit stride, not {describe(bias)}")
        b.data, b.format = vb.data, vb.format
    if len(operands) != <ptrdiff_t> epilogue.operands:
        raise ValueError(f"the epilogue names {epilogue.operands} operands, not {len(operands)}")
    for i in range(epilogue.operands):
        beside[i] = as_operand(operands[i], m, columns)
    ask(p, packed, epilogue, rows, &rows_x, b, segments, count)
    p.m, p.operands = m, beside
    if x_index is not None:
        p.x.index = as_index(x_index, rows_x.m, "x_index")
    if y_index is not None:
        if len(y_index) != m:
            raise ValueError(f"y_index has {len(y_index)} rows, not {m}")
        p.y_index = as_index(y_index, min(len(part) for part in parts), "y_index")
    return 0


def run(
    Packed packed not None, Plan plan not None, Epilogue epilogue not None, x, bias, out, RowQuantizer rows=None,
    operands=(), x_index=None, y_index=None, sums=None
):
    """out = epilogue(x @ weight.T + bias).

    x: [M, K]; bias: [N] or None; out: [M, N], written in place; each fp32, bf16 or fp16, but x fp32 where the weight
    is, and of the rows' format for a kernel that reads 16-bit rows. Integer products quantize x by `rows`; x may be
    integers where `rows` is static, and out is, where the epilogue says so. Rows may have any stride, elements of a row
    must be side by side. `out` may be several tensors, which have the columns one after another. `operands` are those
    that the epilogue names: fp32, bf16 or fp16, [M, N] or what broadcasts to it; one may be `out` itself. With x_index
    (int64 [M]), row i is that of x[x_index[i]]; with y_index, it goes to out[y_index[i]], no two to the same one.
    `sums`, fp32 [M, N] and dense, gets what the epilogue is applied to, with the bias, in the order of the bias.
    Raises TypeError or ValueError where a tensor is not of that form.
    """
    cdef Problem p
    cdef Segment[MAX_SEGMENTS] segments
    cdef COperand[MAX_OPERANDS] beside
    fill(&p, segments, beside, plan, packed, epilogue, x, bias, out, rows, tuple(operands), x_index, y_index)
    if sums is not None:
        p.sums = as_sums(sums, p.m, packed.n)
    answer(&p, 1, plan.plan)


def run_all(Plan plan not None, calls):
    """`run` for many products of one plan that do not wait for one another: threads share them as if they were one.

    calls: of each its arguments but the plan, as a dict: packed, epilogue, x, bias, out, and what else `run` may have.
    """
    cdef size_t count = len(calls), i
    cdef vector[Problem] problems = vector[Problem](count)
    cdef vector[Segment] segments = vector[Segment](count * MAX_SEGMENTS)
    cdef vector[COperand] beside = vector[COperand](count * MAX_OPERANDS)
    for i, call in enumerate(calls):
        fill(&problems[i], &segments[i * MAX_SEGMENTS], &beside[i * MAX_OPERANDS], plan, call["packed"],
             call["epilogue"], call["x"], call.get("bias"), call["out"], call.get("rows"),
             tuple(call.get("operands", ())), call.get("x_index"), call.get("y_index"))
    if count > 0:
        answer(problems.data(), count, plan.plan)


def pieces(Plan plan not None, str layout not None, x, ptrdiff_t m, ptrdiff_t n, ptrdiff_t k):
    """Who computes what of x [m, k], of a dtype, times a weight [n, k] in a layout that the plan's kernel reads, by the
    code that cuts products; nothing is computed. Of each unit (part, thread, rows, columns, range of k), ranges as
    pairs: threads have them in this order, but those that are done take others'; parts follow one another."""
    cdef Problem p
    p.m, p.n, p.k = m, n, k
    p.x.data, p.x.stride, p.x.format = <const char*> NULL, k, <Format> format_of_x(x)
    p.weight.layout = parse_layout(layout)
    cdef vector[Piece] found = cut(p, plan.plan)
    cdef size_t i
    return [(found[i].part, found[i].thread, (found[i].rows.begin, found[i].rows.end),
             (found[i].columns.begin, found[i].columns.end), (found[i].k.begin, found[i].k.end))
            for i in range(found.size())]


# ---- experts ----

cdef cbool make_mixture(const Mixture& p, const Vectors& vectors, ptrdiff_t threads) noexcept nogil:
    return mix(p, vectors, threads)


# ---- rows ----

cdef cbool make_integers(const IntegersProblem& p, const Vectors& vectors, ptrdiff_t threads) noexcept nogil:
    return to_integers(p, vectors, threads)


cdef cbool make_codes(const CodesProblem& p, const Vectors& vectors, ptrdiff_t threads) noexcept nogil:
    return to_codes(p, vectors, threads)


cdef cbool make_norm(const NormProblem& p, const Vectors& vectors, ptrdiff_t threads) noexcept nogil:
    return normalize(p, vectors, threads)


# ---- attention ----

cdef cbool make_attention(
    const AttentionProblem& p, const Vectors& vectors, const Kernel* kernel, ptrdiff_t threads
) noexcept nogil:
    return attend(p, vectors, kernel, threads)


cdef const Kernel* rounding_kernel(str name) except NULL:
    cdef const Kernel* kernel = runnable_kernel(name)
    if not rounds_attention(kernel[0]):
        raise ValueError(f"attention multiplies by a kernel of rows and panels of bf16, not by {name!r}")
    return kernel


cdef cbool make_cache(const CacheProblem& p, const Vectors& vectors, ptrdiff_t threads) noexcept nogil:
    return store(p, vectors, threads)


# ---- ceilings ----

def peak(Plan plan not None):
    """Operations a second, two a multiply-add, that the plan's kernel does on its threads with its rows in L1 and its
    panels in L2."""
    cdef double found
    with nogil:
        found = operations(plan.plan)
    return found


def read_rate(memory, ptrdiff_t threads=1, int passes=1, ptrdiff_t ahead=0):
    """Bytes a second that so many threads read of a contiguous CPU tensor, each its share, `passes` times, with lines
    prefetched `ahead` bytes before they are read (0: as the hardware does)."""
    cdef ptrdiff_t nbytes = memory.numel() * memory.element_size()
    cdef const char* data = <const char*> <size_t> memory.data_ptr()
    cdef double found
    with nogil:
        found = bandwidth(data, nbytes, threads, passes, ahead)
    return found


def clock_rate():
    """Cycles a second that this thread gets now."""
    return clock()

# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# distutils: language = c++
"""The only door to C++: a tensor is looked at once, checked once, and the kernels are called.

No torch header is used. A tensor is read through the C table that torch.Tensor publishes
(``__dlpack_c_exchange_api__``, DLPack 1.3), or through its Python attributes where torch is too old to have one.
"""

import errno
import logging
import os

import torch

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_FillInfo, PyBuffer_Release, PyObject_GetBuffer
from cpython.pycapsule cimport PyCapsule_GetPointer
from libc.stdint cimport int32_t, int64_t
from libc.string cimport memcpy
from libcpp cimport bool as cbool
from libcpp.vector cimport vector

from fastlinear._cpu cimport CpuSource, describe_cpu, source_of
from fastlinear._cpu import evict  # no-cython-lint


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


# ---- instruction sets ----

def isas():
    """Names of all ISAs that the library has kernels for, the plainest first."""
    names = []
    cdef size_t i = 0
    while isa_at(i) != NULL:
        names.insert(0, isa_at(i).name.decode())
        i += 1
    return names


cdef const Isa* isa_named(str name) except NULL:
    cdef size_t i = 0
    while isa_at(i) != NULL:
        if isa_at(i).name == name.encode():
            return isa_at(i)
        i += 1
    raise ValueError(f"FASTLINEAR_MAX_ISA is {name!r}; it may be one of {', '.join(isas())}")


cdef dict refusals_of(const CpuSource& source):
    """Name -> "" or why it is not there, of every ISA, the plainest first; the system is asked for nothing."""
    reasons = {}
    cdef const char* why
    for name in isas():
        why = refusal(source, isa_named(name)[0])
        reasons[name] = "" if why == NULL else why.decode()
    return reasons


# This machine, or what it pretends to be: its description, and "" or why an ISA may not run. Tiles are asked for when
# somebody first wants to know whether they may be used: a thread whose signal stack is small then stands in the way,
# and no such thread may come to be afterwards.
cdef dict pretended = None
cdef dict refusals = {}
cdef bint asked = False
cdef Caches own_caches

ANSWERS = {
    errno.ENOSPC: "a thread's signal stack is too small for tiles",
    errno.EINVAL: "the system does not know tiles; Linux does from 5.16 on",
}


def pretend(machine):
    """From now on `cpu_info`, and with it what may run here, is that of a machine described as for `detect`, or of this
    one again if that is None. For tests, which bring what carries out the instructions that this CPU lacks."""
    global pretended, refusals, asked, own_vectors
    cdef dict reasons = refusals_of(source_of(machine))
    highest = os.environ.get("FASTLINEAR_MAX_ISA")
    if highest is not None:
        for name in reasons:
            if not within(isa_named(highest)[0], isa_named(name)[0]):
                reasons[name] = reasons[name] or f"FASTLINEAR_MAX_ISA is {highest}"
    pretended, refusals, asked = machine, reasons, False
    for name, refused in reasons.items():
        if not refused and isa_named(name).vectors != NULL:
            own_vectors = isa_named(name).vectors
    cdef dict found = describe_cpu(source_of(machine))
    own_caches.l1d, own_caches.l2, own_caches.l3 = found["l1d"], found["l2"], found["l3"]


cdef const Vectors* own_vectors = NULL  # of the best ISA that may run
pretend(None)


cdef dict settled_refusals():
    global asked
    cdef CpuSource source
    cdef int answer
    wanted = [] if asked else [name for name in refusals if isa_named(name).tiles and not refusals[name]]
    asked = True
    if wanted:
        source = source_of(pretended)
        answer = source.ask_for_tiles(source.context)
        if answer != 0:
            why = ANSWERS.get(answer, f"the system refuses it ({os.strerror(answer)})")
            refusals.update(dict.fromkeys(wanted, why))
    return refusals


cdef bint may_run(const Isa* isa):
    return not (settled_refusals() if isa.tiles else refusals)[isa.name.decode()]


# Rows are worked on with vectors that the system need not be asked for.
cdef const Vectors* best_vectors() noexcept:
    return own_vectors


cdef const Vectors* runnable_vectors(str isa) except NULL:
    may = [name for name in isas() if isa_named(name).vectors != NULL and not refusals[name]]
    if isa not in may:
        raise ValueError(f"isa is one of {', '.join(may)} here, not {isa!r}")
    return isa_named(isa).vectors


cdef dict info_of(const CpuSource& source, dict reasons):
    return describe_cpu(source) | {
        "isas": [name for name in reasons if not reasons[name]],
        "refused": {name: why for name, why in reasons.items() if why},
    }


def cpu_info():
    """What this CPU is: vendor, brand ("model"), the numbers of its family, model and stepping, cache sizes in bytes (0
    if unknown), the ISAs that may run, the plainest first, and why others may not ("refused"): CPUID, XCR0, the
    system's answer where it has to be asked, FASTLINEAR_MAX_ISA."""
    return info_of(source_of(pretended), settled_refusals())


def detect(machine: dict):
    """`cpu_info` of a machine described by {(leaf, subleaf): (eax, ebx, ecx, edx), "xcr0": bits}, whatever is allowed
    here and whatever its system would say."""
    cdef CpuSource source = source_of(machine)
    return info_of(source, refusals_of(source))


# ---- the table ----

cdef str isa_of(const Kernel* kernel):
    cdef const Isa* isa = &kernel.isa
    return isa.name.decode()


cdef bint runnable(const Kernel* kernel):
    return may_run(&kernel.isa)


cdef str layout_name(const Layout& layout):
    return f"{format_name(<size_t> layout.format)}/{layout.nr}x{layout.kr}"


cdef tuple reads(const Kernel* kernel):
    names = {}  # a dict, to keep the order
    if reads_layout(kernel[0], kernel.layout):
        names[layout_name(kernel.layout)] = None
    cdef size_t i = 0
    cdef const Kernel* k = kernel_at(0)
    while k != NULL:
        if reads_layout(kernel[0], k.layout):
            names[layout_name(k.layout)] = None
        i += 1
        k = kernel_at(i)
    return tuple(names)


cdef tuple kernel_rows():
    rows = []
    cdef size_t i = 0
    cdef const Kernel* k = kernel_at(0)
    while k != NULL:
        rows.append({
            "name": k.name.decode(), "isa": isa_of(k),
            "format": format_name(<size_t> k.layout.format), "rows": format_name(<size_t> k.rows),
            "layout": reads(k)[0], "nr": k.layout.nr, "kr": k.layout.kr, "mr": k.mr, "panels": k.panels,
            "columns": k.columns(), "accumulate": format_name(<size_t> k.accumulate), "reads": reads(k),
            "row_step": k.row_step, "k_step": k.k_step, "grouped": format_at(<size_t> k.layout.format).grouped,
        })
        i += 1
        k = kernel_at(i)
    return tuple(rows)


cdef tuple table = kernel_rows()


def rows():
    """The kernel table, the same on every machine, best ISA first: one dict a kernel. `reads` tells which layouts it
    runs on: first the one that weights are packed in for it, then those that are widened to it as well; `row_step`
    and `k_step` what it takes at a time."""
    return [dict(row) for row in table]


def kernels():
    """`rows`, and `runnable`: whether this CPU, its system and FASTLINEAR_MAX_ISA allow it."""
    cdef dict reasons = settled_refusals()
    return [row | {"runnable": not reasons[row["isa"]]} for row in table]


def functions():
    """Name -> (default parameters, operands beside the sums, whether it is a gate) of every function of an epilogue."""
    table = {}
    cdef size_t i = 0
    cdef const EpilogueFunction* f = function_at(0)
    while f != NULL:
        table[f.name.decode()] = tuple(f.defaults[j] for j in range(f.params)), f.operands, bool(f.gate)
        i += 1
        f = function_at(i)
    return table


def activations():
    """Name -> default parameters of every function of one sum alone; "identity" is the first."""
    return {name: defaults for name, (defaults, operands, gate) in functions().items() if operands == 0 and not gate}


cdef const Kernel* runnable_kernel(str name) except NULL:
    cdef const Kernel* kernel = find_kernel(name.encode())
    if kernel == NULL or kernel.name != name.encode() or not runnable(kernel):
        may = ", ".join(row["name"] for row in kernels() if row["runnable"])
        raise ValueError(f"no kernel {name!r} runs here; there are {may}")
    return kernel


# Of "bf16/32x2", or "int4/32x8:32:fp16", which says how a weight is scaled: the size of a group and the format of its
# scales, and with ":offsets" behind them that there are offsets.
cdef Layout parse_layout(str layout) except *:
    cdef size_t i = 0
    cdef const Kernel* k = kernel_at(0)
    base, _, scaled = layout.partition(":")
    while k != NULL and not (layout_name(k.layout) == base and reads_layout(k[0], k.layout)):
        i += 1
        k = kernel_at(i)
    if k == NULL:
        raise ValueError(f"no kernel reads layout {layout!r}; there are {sorted({row['layout'] for row in kernels()})}")
    cdef Layout shape = k.layout
    if format_at(<size_t> shape.format).grouped:
        offsets = scaled.endswith(":offsets")
        size, _, scales = scaled.removesuffix(":offsets").partition(":")
        if size not in map(str, GROUP_SIZES) or scales not in FORMATS.values():
            raise ValueError(f"layout {layout!r} must tell how it is scaled, as {base + ':32:fp16'!r} does: a group of "
                             f"16 to 2^40, a power of two, and a format of {', '.join(FORMATS.values())}")
        names = all_formats()
        at = names.index(scales)
        shape.groups.size, shape.groups.scales, shape.groups.offsets = int(size), <Format> <int> at, offsets
    elif scaled:
        raise ValueError(f"layout {layout!r} has no groups: {base!r}")
    return shape


GROUP_SIZES = tuple(1 << i for i in range(4, 41))


include "_tensors.pxi"
include "_packed.pxi"
include "_operands.pxi"


# ---- plans, epilogues, products ----

cdef class Plan:
    """How to run one product: the kernel by its name in the table, threads (at least 1), slices of K (at least 1).

    `due`: when, by time.monotonic(), an engine is to ask for a better plan than this; 0 for never. `caches`: bytes of
    L1d, L2 and L3, by which K and rows are cut in blocks; those of this machine unless tests want another's.
    """

    def __init__(self, str kernel not None, ptrdiff_t threads=1, ptrdiff_t k_slices=1, caches=None):
        if threads < 1 or k_slices < 1 or threads > 4096 or k_slices > 4096:
            raise ValueError(f"a plan takes 1 to 4096 threads and K slices, not {threads} and {k_slices}")
        self.kernel = kernel
        cdef Caches sizes = own_caches
        if caches is not None:
            sizes.l1d, sizes.l2, sizes.l3 = caches
        self.plan = make_plan(runnable_kernel(kernel)[0], threads, k_slices, sizes)
        self.layout = reads(self.plan.kernel)[0]

    @property
    def threads(self):
        return self.plan.threads

    @property
    def k_slices(self):
        return self.plan.k_slices

    @property
    def blocks(self):
        """Bytes of a K block of panels, of a block of rows, and of rows that are prepared at a time."""
        return self.plan.blocks.panels, self.plan.blocks.rows, self.plan.blocks.prepared

    def __repr__(self):
        return f"Plan({self.kernel!r}, threads={self.plan.threads}, k_slices={self.plan.k_slices})"


cdef class Epilogue:
    """What happens to the sums: the bias is added, then each (activation name, parameters) is applied in turn.

    A function of two operands takes (name, (), i) and the i-th of the call's operands, or (name, (number,)). A gate may
    be the first step: of 2 N channels, which lie as `spec.gates` says, y has N columns. `out`, (torch.uint8 or
    torch.int8, scale, zero), makes integers of the result: y = scale * (u - zero), where u, of 0 to 255, is stored as
    it is or 128 lower.
    """

    def __init__(self, steps=(), out=None):
        table = functions()
        names = list(table)
        self.steps = tuple((name, tuple(params), *more) for name, params, *more in steps) or (("identity", ()),)
        self.out = out
        if len(self.steps) > <ptrdiff_t> kMaxSteps:
            raise ValueError(f"an epilogue has at most {kMaxSteps} steps, not {len(self.steps)}")
        cdef size_t i, j
        if out is not None:
            self.dtype, scale, zero = out
            if self.dtype not in (torch.uint8, torch.int8) or not check_affine(scale, zero):
                raise ValueError(f"out is (torch.uint8 or torch.int8, scale above 0, zero from 0 to 255), not {out}")
            self.program.out.inverse = <float> 1.0 / <float> scale
            self.program.out.low, self.program.out.high = -zero, 255 - zero
            self.program.out.zero = zero
        self.program.count = len(self.steps)
        for i, (name, params, *more) in enumerate(self.steps):
            if name not in table:
                raise ValueError(f"unknown function {name!r}; there are {', '.join(names)}")
            known, operands, gate = len(table[name][0]), table[name][1], table[name][2]
            if operands and len(params) == 1 and not more:  # a number stands for the operand
                known, operands = 1, 0
            if len(params) != known:
                raise ValueError(f"{name!r} takes {known} parameters, not {len(params)}: {params}")
            if len(more) != operands or any(not 0 <= at < <ptrdiff_t> kMaxOperands for at in more):
                wanted = f"an operand, by its place from 0 to {kMaxOperands - 1}" if operands else "no operand"
                raise ValueError(f"{name!r} takes {wanted}, not {tuple(more)}")
            if gate and i > 0:
                raise ValueError(f"{name!r} is a gate, and may be the first step only")
            self.program.gated = self.program.gated or gate
            self.program.steps[i].function = names.index(name)
            self.program.steps[i].operand = more[0] if more else -1
            for j in range(<size_t> known):
                self.program.steps[i].params[j] = params[j]
            self.operands = max(self.operands, more[0] + 1 if more else 0)


cdef bint check_affine(scale, zero) except -1:
    return isinstance(zero, int) and 0 <= zero <= 255 and 2.0**-126 <= scale < 3.4e38


ROW_KINDS = ("symmetric", "asymmetric", "static")  # in the order of enum RowKind


cdef class RowQuantizer:
    """How the rows of x become integers u, x * smooth = scale * (u - zero), as fastlinear/spec/int8.py says; or, as
    `rounding` has it, the nearest numbers of a floating format.

    kind: "symmetric" or "asymmetric", of each row's own range; or "static": by `scale` and `zero`, 0 to 255, also of x
    that is uint8 already, or int8, which lies 128 lower. smooth: fp32 [K], or None for 1. ValueError otherwise.
    """

    def __init__(self, str kind not None, scale=0.0, zero=0, smooth=None):
        if kind not in ROW_KINDS:
            raise ValueError(f"kind is one of {', '.join(ROW_KINDS)}, not {kind!r}")
        if kind == "static" and not check_affine(scale, zero):
            raise ValueError(f"static rows take a scale above 0 and a zero from 0 to 255, not {scale} and {zero}")
        self.kind, self.scale, self.zero, self.smooth = kind, scale, zero, smooth
        cdef int index = ROW_KINDS.index(kind)
        self.quantizer.kind, self.quantizer.scale, self.quantizer.zero = <RowKind> index, scale, zero
        self.quantizer.smooth = NULL
        if smooth is not None:
            smooth = need_vector(smooth, torch.float32, smooth.numel(), "smooth")
            self.padded = torch.nn.functional.pad(smooth, (0, 16))
            self.quantizer.smooth = <const float*> <size_t> self.padded.data_ptr()

    @staticmethod
    def rounding(dtype):
        """Rows of any floats as numbers of `dtype`: to nearest, ties to even. ValueError where that is no 16-bit
        format."""
        if dtype not in FORMATS or dtype is torch.float32:
            raise ValueError(f"rows are rounded to torch.bfloat16 or torch.float16, not {dtype}")
        cdef RowQuantizer rows = RowQuantizer.__new__(RowQuantizer)
        cdef int kind = ROUNDED, index = format_of_x(dtype)
        rows.kind = "rounded"
        rows.quantizer.kind, rows.quantizer.format = <RowKind> kind, <Format> index
        return rows


# Whether the plan's kernel reads this weight, and x or what x can be made into.
cdef bint answers(Plan plan, Packed w, RowQuantizer rows, Format x) noexcept:
    cdef const Kernel* kernel = plan.plan.kernel
    if not reads_layout(kernel[0], w.shape):
        return False
    if plan.plan.form != NULL:
        return rows is not None and rows.quantizer.makes_integers() and (
            is_float(x) or <int> rows.quantizer.kind == STATIC)
    if rows is not None and <int> rows.quantizer.kind == ROUNDED:
        x = rows.quantizer.format if is_float(x) else x
    return is_float(x) and (<int> kernel.rows == FP32 or kernel.rows == x)


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


# Of y.
cdef ptrdiff_t columns_of(Packed w, Epilogue epilogue) noexcept:
    return w.n // 2 if epilogue.program.gated else w.n


# Large products release the GIL: 2e6 multiply-adds are about 20 us, where handing it over costs nothing.
cdef int answer(const Problem* p, size_t problems, const CPlan& plan) except -1:
    cdef cbool done
    cdef ptrdiff_t work = 0
    cdef size_t i
    for i in range(problems):
        work += p[i].m * p[i].n * p[i].k
    if problems == 1 and work <= 2000000:
        done = gemm(p[0], plan)
    else:
        with nogil:
            done = gemm(p[0], plan) if problems == 1 else gemm(Problems(p, problems), plan)
    if not done:
        raise MemoryError(f"no memory for the scratch tiles of {problems} products, the first with M={p[0].m}, "
                          f"N={p[0].n}, K={p[0].k}")
    return 0


cdef int compute(
    Packed w, Plan plan, Epilogue epilogue, RowQuantizer rows, Matrix* x, Bias bias, const Segment* y, size_t segments,
    const COperand* operands
) except -1:
    cdef Problem p
    ask(&p, w, epilogue, rows, x, bias, y, segments)
    p.operands = operands
    return answer(&p, 1, plan.plan)


# Row numbers [m] below `rows`.
cdef const int64_t* as_index(object index, ptrdiff_t rows, str what) except? NULL:
    fit = (isinstance(index, Tensor) and index.dtype is torch.int64 and index.dim() == 1 and index.is_contiguous()
           and index.device.type == "cpu")
    if not fit:
        raise ValueError(f"{what} must be a contiguous int64 CPU tensor of one dimension, not {describe(index)}")
    if len(index) > 0 and not (0 <= int(index.min()) and int(index.max()) < rows):
        raise ValueError(f"{what} must lie from 0 to {rows - 1}, not from {int(index.min())} to {int(index.max())}")
    return <const int64_t*> <size_t> index.data_ptr()


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
    operands=(), x_index=None, y_index=None
):
    """out = epilogue(x @ weight.T + bias).

    x: [M, K]; bias: [N] or None; out: [M, N], written in place; each fp32, bf16 or fp16, but x fp32 where the weight
    is, and of the rows' format for a kernel that reads 16-bit rows. Integer products quantize x by `rows`; x may be
    integers where `rows` is static, and out is, where the epilogue says so. Rows may have any stride, elements of a row
    must be side by side. `out` may be several tensors, which have the columns one after another. `operands` are those
    that the epilogue names: fp32, bf16 or fp16, [M, N] or what broadcasts to it; one may be `out` itself. With x_index
    (int64 [M]), row i is that of x[x_index[i]]; with y_index, it goes to out[y_index[i]], no two to the same one.
    Raises TypeError or ValueError where a tensor is not of that form.
    """
    cdef Problem p
    cdef Segment[MAX_SEGMENTS] segments
    cdef COperand[MAX_OPERANDS] beside
    fill(&p, segments, beside, plan, packed, epilogue, x, bias, out, rows, tuple(operands), x_index, y_index)
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

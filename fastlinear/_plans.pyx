# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# distutils: language = c++
"""What runs, and what it does beside multiplying: plans, epilogues with their operands, and the quantizers of rows."""

import torch

from libc.stdint cimport int64_t

from fastlinear._kernels import functions
from fastlinear._tensors import FORMATS

from fastlinear._kernels cimport Caches, Kernel, own_caches, reads, reads_layout, runnable_kernel
from fastlinear._tensors cimport FP32, INT8, Format, View, describe, format_of_x, is_float, need, need_vector
from fastlinear._weights cimport Packed

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


def bucket(ptrdiff_t m):
    """The bucket of M: the smallest of 0..8, 12, 16, 24, 32, 48, 64, 96 ... that is not below it; at most 2^40."""
    return bucket_of(m).rows


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


ROW_KINDS = ("symmetric", "asymmetric", "static", "groups")  # in the order of enum RowKind


cdef class RowQuantizer:
    """How the rows of x become integers u, x * smooth = scale * (u - zero), as fastlinear/spec/int8.py says; or, as
    `rounding` has it, the nearest numbers of a floating format.

    kind: "symmetric" or "asymmetric", of each row's own range; or "static": by `scale` and `zero`, 0 to 255, also of x
    that is uint8 already, or int8, which lies 128 lower; or "groups", of a weight's that is in groups. smooth: fp32
    [K], or None for 1. ValueError otherwise.
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
    if <int> kernel.rows == INT8:  # in groups
        return rows is not None and <int> rows.quantizer.kind in (SYMMETRIC, GROUPS) and is_float(x) and (
            w.read().groups.unit > 0)
    if plan.plan.form != NULL:
        return rows is not None and rows.quantizer.makes_integers() and <int> rows.quantizer.kind != GROUPS and (
            is_float(x) or <int> rows.quantizer.kind == STATIC)
    if rows is not None and rows.quantizer.makes_integers():
        return False
    if rows is not None and <int> rows.quantizer.kind == ROUNDED:
        x = rows.quantizer.format if is_float(x) else x
    return is_float(x) and (<int> kernel.rows == FP32 or kernel.rows == x)


# Of y.
cdef ptrdiff_t columns_of(Packed w, Epilogue epilogue) noexcept:
    return w.n // 2 if epilogue.program.gated else w.n


# ---- operands ----

# Where an operand lies for y [..., columns], whose leading dimensions are those of x.
cdef Meeting meet(View* operand, View* x, ptrdiff_t columns, COperand* found) noexcept:
    cdef int i, at
    cdef int lead = x.ndim - 1, own = operand.ndim - 1
    cdef int64_t stride, expected = -1
    found.data, found.format = operand.data, operand.format
    found.row_stride = found.column_stride = 0
    if operand.ndim > x.ndim:
        return MISSES
    cdef Meeting how = MEETS
    if operand.ndim > 0 and operand.shape[own] != 1:
        if operand.shape[own] != columns:
            return MISSES
        found.column_stride = operand.stride[own]
        if found.column_stride not in (0, 1):
            how = SCATTERED
    for i in range(lead - 1, -1, -1):
        at = i - lead + own
        if at >= 0 and operand.shape[at] not in (1, x.shape[i]):
            return MISSES
        if x.shape[i] == 1:
            continue
        stride = 0 if at < 0 or operand.shape[at] == 1 else operand.stride[at]
        if expected == -1:
            found.row_stride = stride
        elif stride != expected:
            how = SCATTERED
        expected = stride * x.shape[i]
    return how


# The same for y [m, columns], of whatever is to be an operand.
cdef COperand as_operand(object tensor, ptrdiff_t m, ptrdiff_t columns) except *:
    cdef View v = need(tensor, "operand")
    cdef View rows
    cdef COperand operand
    rows.ndim, rows.shape[0] = 2, m
    if meet(&v, &rows, columns, &operand) != MEETS:
        raise ValueError(f"an operand must be [{m}, {columns}] or broadcast to it, with unit stride in a row, not "
                         f"{describe(tensor)}")
    return operand

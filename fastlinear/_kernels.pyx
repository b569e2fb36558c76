# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# distutils: language = c++
"""The only door to C++: a tensor is looked at once, checked once, and the kernels are called.

No torch header is used. A tensor is read through the C table that torch.Tensor publishes
(``__dlpack_c_exchange_api__``, DLPack 1.3), or through its Python attributes where torch is too old to have one.
"""

import os
import threading
import weakref

import torch

from cpython.pycapsule cimport PyCapsule_GetPointer
from libc.stdint cimport int32_t, int64_t
from libcpp cimport bool as cbool

from fastlinear._cpu cimport isa_allowed
from fastlinear._cpu import cpu_info, detect, evict  # no-cython-lint


# ---- threads ----

cdef ptrdiff_t pool_size() noexcept:
    return thread_pool().size()


def num_threads():
    """Threads that a call may use: torch's own count, or 1 in a forked child."""
    return pool_size()


def _attach_pool():
    folder = os.path.join(os.path.dirname(torch.__file__), "lib")
    return any(thread_pool().attach(os.fsencode(os.path.join(folder, name)))
               for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"))


def forked():
    """True in a process that was forked after fastlinear was imported: everything there runs on one thread."""
    return thread_pool().forked()


def _after_fork():
    global placing
    placing = threading.Lock()  # another thread may have held it
    thread_pool().stop_after_fork()


pool_attached = _attach_pool()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


# ---- the table ----

cdef bint runnable(const Kernel* kernel) noexcept:
    return isa_allowed(<size_t> kernel.isa)


cdef str layout_name(const Layout& layout):
    return f"{kFormatNames[<size_t> layout.format].decode()}/{layout.nr}x{layout.kr}"


cdef tuple reads(const Kernel* kernel):
    names = {layout_name(kernel.layout): None}  # a dict, to keep the order
    cdef size_t i = 0
    cdef const Kernel* k = kernel_at(0)
    while k != NULL:
        if kernel.reads(k.layout):
            names[layout_name(k.layout)] = None
        i += 1
        k = kernel_at(i)
    return tuple(names)


def kernels():
    """The kernel table, best ISA first: one dict a kernel. `runnable` tells whether this CPU (and FASTLINEAR_MAX_ISA)
    allows it, `reads` which layouts it runs on: its own, and those that are widened to it panel by panel."""
    rows = []
    cdef size_t i = 0
    cdef const Kernel* k = kernel_at(0)
    while k != NULL:
        rows.append({
            "name": k.name.decode(), "isa": kIsaNames[<size_t> k.isa].decode(),
            "format": kFormatNames[<size_t> k.layout.format].decode(), "rows": kFormatNames[<size_t> k.rows].decode(),
            "layout": layout_name(k.layout), "nr": k.layout.nr, "kr": k.layout.kr, "mr": k.mr, "panels": k.panels,
            "columns": k.columns(), "accumulate": kFormatNames[<size_t> k.accumulate].decode(), "reads": reads(k),
            "runnable": runnable(k),
        })
        i += 1
        k = kernel_at(i)
    return rows


def activations():
    """Name -> default parameters of every activation an epilogue may apply; "identity" is the first."""
    table = {}
    cdef size_t i = 0
    cdef const Activation* a = activation_at(0)
    while a != NULL:
        table[a.name.decode()] = tuple(a.defaults[j] for j in range(a.params))
        i += 1
        a = activation_at(i)
    return table


cdef const Kernel* runnable_kernel(str name) except NULL:
    cdef const Kernel* kernel = find_kernel(name.encode())
    if kernel == NULL or kernel.name != name.encode() or not runnable(kernel):
        may = ", ".join(row["name"] for row in kernels() if row["runnable"])
        raise ValueError(f"no kernel {name!r} runs here; there are {may}")
    return kernel


cdef const Kernel* kernel_of_layout(str layout) except NULL:
    cdef size_t i = 0
    cdef const Kernel* k = kernel_at(0)
    while k != NULL:
        if layout_name(k.layout) == layout:
            return k
        i += 1
        k = kernel_at(i)
    raise ValueError(f"no kernel reads layout {layout!r}; there are {sorted({row['layout'] for row in kernels()})}")


# ---- tensors ----

cdef object Tensor = torch.Tensor
cdef tuple dtypes = (  # in the order of enum Format
    torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.int8, torch.uint8, torch.int16, torch.int32
)
FORMATS = {dtypes[i]: kFormatNames[i].decode() for i in range(kFloatFormats)}
PACKED = {kFormatNames[i].decode(): dtypes[i] for i in range(kPackedFormats)}

cdef enum:  # of enum Format
    FP32, BF16, FP16, INT8WO, INT8, UINT8, INT16, INT32


# DLPack's codes: 0 and 1 are integers with and without a sign, 2 is IEEE floating point, 4 is bfloat. Negative for what
# no kernel reads.
cdef inline int format_of(DlDataType t) noexcept:
    if t.bits == 8:
        return INT8 if t.code == 0 else UINT8 if t.code == 1 else -1
    if t.code == 2:
        return FP32 if t.bits == 32 else FP16 if t.bits == 16 else -1
    return BF16 if t.code == 4 and t.bits == 16 else -1


cdef DlExchangeApi* find_exchange_api():
    capsule = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if capsule is None:
        return NULL
    api = <DlExchangeApi*> PyCapsule_GetPointer(capsule, b"dlpack_exchange_api")
    return api if api.major == 1 else NULL


cdef DlExchangeApi* exchange_api = find_exchange_api()


# False where `tensor` is not a dense CPU tensor of one of our formats with memory behind it. It must be exactly a
# torch.Tensor or an nn.Parameter, since subclasses may not mean what their storage says; a negative view does not
# either, and says so only by is_neg().
cdef bint look_at(object tensor, View* v):
    cdef DlTensor t
    cdef int i
    cdef int64_t elements = 1
    if exchange_api == NULL:
        return look_at_slowly(tensor, v)
    try:
        if exchange_api.peek(<void*> tensor, &t) != 0:
            raise
    except Exception:  # sparse, quantised, functorch-wrapped, meta ...: whatever DLPack refuses
        return False
    cdef int format = format_of(t.dtype)
    if t.device.device_type != 1 or format < 0 or t.ndim > MAX_DIMS:
        return False
    v.data = <char*> t.data + t.byte_offset
    v.format = <Format> format
    v.ndim = t.ndim
    for i in range(t.ndim):
        v.shape[i] = t.shape[i]
        v.stride[i] = t.strides[i]
        elements *= t.shape[i]
    return t.data != NULL or elements == 0


cdef bint look_at_slowly(object tensor, View* v):
    cdef int i
    if (tensor.dtype not in dtypes[:INT16] or tensor.device.type != "cpu" or tensor.layout is not torch.strided
            or tensor.is_nested or tensor.dim() > MAX_DIMS):
        return False
    v.data = <char*> <size_t> tensor.data_ptr()
    i = INT8 if tensor.dtype is torch.int8 else dtypes.index(tensor.dtype)
    v.format = <Format> i
    v.ndim = tensor.dim()
    for i in range(v.ndim):
        v.shape[i] = tensor.size(i)
        v.stride[i] = tensor.stride(i)
    return v.data != NULL or tensor.numel() == 0


# Folds all dimensions but the last into rows a constant stride apart; False where the memory has no such form.
cdef bint as_rows(View* v, Matrix* rows) noexcept:
    cdef int i
    cdef int last = v.ndim - 1
    rows.data, rows.format, rows.m, rows.stride = v.data, v.format, 1, v.shape[last]
    for i in range(last):
        rows.m *= v.shape[i]
    if rows.m == 0 or v.shape[last] == 0:
        return True
    if v.stride[last] != 1:
        return False
    cdef int64_t expected = -1
    for i in range(last - 1, -1, -1):
        if v.shape[i] == 1:
            continue
        if expected == -1:
            rows.stride = v.stride[i]
        elif v.stride[i] != expected:
            return False
        expected = v.stride[i] * v.shape[i]
    return True


cdef View need(object tensor, str what, bint integers=False) except *:
    cdef View v
    fit = type(tensor) in (Tensor, torch.nn.Parameter) and look_at(tensor, &v) and not tensor.is_neg()
    if not fit or not (integers or is_float(v.format)):
        allowed = " or ".join([*FORMATS.values(), *(["int8", "uint8"] if integers else [])])
        raise TypeError(f"{what} must be a dense {allowed} CPU tensor, not {describe(tensor)}")
    return v


# Numbers beside a weight, one for each of `n` channels or columns.
cdef object need_vector(object values, object dtype, ptrdiff_t n, str what):
    if not isinstance(values, Tensor) or values.dtype is not dtype or values.shape != (n,) or values.device.type != "cpu":
        raise ValueError(f"{what} must be a {dtype} CPU tensor of shape ({n},), not {describe(values)}")
    return values.detach().contiguous()


cdef str describe(object value):
    if not isinstance(value, Tensor) or value.is_nested:
        return f"a {'nested tensor' if isinstance(value, Tensor) else type(value).__name__}"
    return f"a {value.dtype} {value.layout} {type(value).__name__} of shape {tuple(value.shape)} on {value.device}"


# ---- weights, plans, epilogues ----

# Packs lie one behind the other in chunks of 2 MB pages, since most are too small to fill one. A chunk is freed with
# the last pack in it; `newest` is the pack that new ones are put behind while it lives.
cdef enum:
    CHUNK = 32 << 20

newest = None  # a weak reference
placing = threading.Lock()


cdef object place(size_t nbytes):
    cdef size_t begin
    last = None if newest is None else newest()
    if last is not None:
        begin = last.data.storage_offset() + (last.data.nbytes + 63) // 64 * 64
        if begin + nbytes <= last.data.untyped_storage().nbytes():
            return torch.empty(0, dtype=torch.uint8).set_(last.data.untyped_storage(), begin, (nbytes,))
    chunk = torch.empty(max(nbytes, CHUNK) + kHugePage, dtype=torch.uint8)
    begin = <size_t> -<ptrdiff_t> <size_t> chunk.data_ptr() % kHugePage
    advise_huge_pages(<void*> <size_t> chunk.data_ptr(), chunk.nbytes)
    return chunk[begin : begin + nbytes]


def packed_nbytes(str layout not None, ptrdiff_t n, ptrdiff_t k):
    """Bytes of a weight [n, k] in the panels of `layout`; ValueError for a size that no memory holds."""
    cdef Layout shape = kernel_of_layout(layout).layout
    if n < 0 or k < 0 or n >= 1 << 40 or k >= 1 << 40 or int(n + shape.nr) * int(k + shape.kr) >= 1 << 60:
        raise ValueError(f"a weight of {n} x {k} has no packed form")
    check_dot_limit(shape, k, False)
    return packed_bytes(shape, n, k)


def dot_limit(bint zeros=False):
    """The largest K of integer products, whose sums are int32; `zeros`: of weights with zero points."""
    return kDotLimitWithZeros if zeros else kDotLimit


cdef int check_dot_limit(Layout shape, ptrdiff_t k, bint zeros) except -1:
    if <int> shape.format == INT8 and k > dot_limit(zeros):
        points = " with zero points" if zeros else ""
        raise ValueError(f"int8 products of weights{points} have K of at most {dot_limit(zeros)}, where int32 holds all "
                         f"their sums, but this weight has {k}")
    return 0


cdef WeightView as_weight(View* v) noexcept:
    cdef WeightView w
    w.data, w.n, w.k, w.stride_n, w.stride_k = v.data, v.shape[0], v.shape[1], v.stride[0], v.stride[1]
    return w


cdef class Packed:
    """A weight [n, k] in the panels of `layout`.

    weight: CPU tensor of shape [n, k] and of the layout's format, any strides. An int8 one means scale * (weight -
    zero), with the fp32 [n] `scale` and the int32 [n] `zero`, or None for 0, which alone a weight-only layout takes.
    `data` is the 1-D uint8 tensor that holds the panels, and these. Raises TypeError or ValueError where the weight or
    the layout is not one the kernels read.
    """

    def __init__(self, weight, str layout not None, scale=None, zero=None):
        cdef View w = need(weight, "weight", integers=True)
        if w.ndim != 2:
            raise ValueError(f"weight must have 2 dimensions, not {w.ndim}: shape {tuple(weight.shape)}")
        self.name_layout(layout, w.shape[0], w.shape[1])
        if dtypes[<size_t> w.format] is not self.dtype:
            raise TypeError(f"layout {layout!r} holds {self.dtype}, the weight is {weight.dtype}")
        cdef ptrdiff_t arrays = channel_arrays(self.shape.format)
        if arrays > 0:
            scale = need_vector(scale, torch.float32, self.n, "scale")
            zero = None if zero is None or not zero.any() else need_vector(zero, torch.int32, self.n, "zero")
        if zero is not None and arrays < 3 or scale is not None and arrays < 1:
            raise ValueError(f"layout {layout!r} holds no {'scales' if arrays < 1 else 'zero points'}")
        check_dot_limit(self.shape, self.k, zero is not None)
        global newest
        with placing:
            self.data = place(packed_bytes(self.shape, self.n, self.k))
            newest = weakref.ref(self)
        self.find(zero is not None)
        cdef char* panels = <char*> self.weight.panels
        cdef const float* scales = <const float*> <size_t> (0 if scale is None else scale.data_ptr())
        cdef const int32_t* zeros = <const int32_t*> <size_t> (0 if zero is None else zero.data_ptr())
        cdef WeightView source = as_weight(&w)
        with nogil:
            pack_weight(self.shape, source, panels)
            if arrays > 0:
                pack_channels(self.shape, source, scales, zeros, panels)

    cdef int name_layout(self, str layout, ptrdiff_t n, ptrdiff_t k) except -1:
        self.shape = kernel_of_layout(layout).layout
        self.dtype, self.format = dtypes[<size_t> self.shape.format], kFormatNames[<size_t> self.shape.format].decode()
        self.layout, self.n, self.k = layout, n, k
        return 0

    cdef int find(self, bint zeros) except -1:
        self.weight = weight_at(self.shape, self.n, self.k, <const char*> <size_t> self.data.data_ptr())
        self.zeros_known = self.weight.zeros == NULL or not zeros
        if not zeros:
            self.weight.zeros = NULL
        return 0

    # What the kernels read. Whether a mapped weight has zero points is looked up at its first use, not when it is
    # loaded.
    cdef Weight* read(self) noexcept:
        cdef ptrdiff_t i
        if not self.zeros_known:
            for i in range(self.n):
                if self.weight.zeros[i] != 0:
                    break
            else:
                self.weight.zeros = NULL
            self.zeros_known = True
        return &self.weight

    @staticmethod
    def over(data, str layout not None, ptrdiff_t n, ptrdiff_t k):
        """The weight [n, k] whose panels `data` holds, a file's mapping, say: 1-D uint8 CPU tensor of exactly
        `packed_nbytes(layout, n, k)` bytes at a multiple of 64. It is kept alive, not copied and never written.

        Raises ValueError where it is not of that form.
        """
        cdef Packed packed = Packed.__new__(Packed)
        cdef size_t nbytes = packed_nbytes(layout, n, k)
        fit = data.dtype is torch.uint8 and data.dim() == 1 and data.device.type == "cpu" and data.is_contiguous()
        if not fit or <size_t> data.numel() != nbytes or data.data_ptr() % 64:
            raise ValueError(f"panels of [{n}, {k}] in {layout!r} are {nbytes} bytes of uint8 at a multiple of 64, not "
                             f"{describe(data)} at {data.data_ptr() % 64} beyond one")
        packed.name_layout(layout, n, k)
        packed.data = data
        packed.find(True)
        return packed

    @property
    def nbytes(self):
        return self.data.nbytes

    def head(self, ptrdiff_t n):
        """The first n output channels, in the same memory. n is rounded up to whole panels, down to what there is."""
        cdef Packed part = Packed.__new__(Packed)
        n = min(self.n, (n + self.shape.nr - 1) // self.shape.nr * self.shape.nr)
        part.name_layout(self.layout, n, self.k)
        part.weight, part.zeros_known = self.read()[0], True
        part.data = self.data[: panels_bytes(self.shape, n, self.k)]
        return part

    def unpack(self):
        """The weight [n, k], bit for bit as it was packed."""
        weight = torch.empty((self.n, self.k), dtype=self.dtype)
        cdef View w = need(weight, "weight", integers=True)
        cdef WeightView target = as_weight(&w)
        with nogil:
            unpack_weight(self.shape, self.weight.panels, target)
        return weight

    cdef object channels(self, const void* values, object dtype):
        if values == NULL:
            return None
        cdef ptrdiff_t begin = <const char*> values - <const char*> <size_t> self.data.data_ptr()
        return self.data[begin : begin + 4 * self.n].view(dtype)

    @property
    def scale(self):
        """The scales [n] of an int8 weight, fp32; None for another."""
        return self.channels(self.weight.scales, torch.float32)

    @property
    def zero(self):
        """The zero points [n] of an int8 weight, int32; None where there are none."""
        return self.channels(self.read().zeros, torch.int32)


cdef class Plan:
    """How to run one product: the kernel by its name in the table, threads (at least 1), slices of K (at least 1)."""

    def __init__(self, str kernel not None, ptrdiff_t threads=1, ptrdiff_t k_slices=1):
        if threads < 1 or k_slices < 1 or threads > 4096 or k_slices > 4096:
            raise ValueError(f"a plan takes 1 to 4096 threads and K slices, not {threads} and {k_slices}")
        self.kernel = kernel
        self.plan.kernel = runnable_kernel(kernel)
        self.plan.threads, self.plan.k_slices = threads, k_slices
        self.layout = layout_name(self.plan.kernel.layout)

    @property
    def threads(self):
        return self.plan.threads

    @property
    def k_slices(self):
        return self.plan.k_slices

    def __repr__(self):
        return f"Plan({self.kernel!r}, threads={self.plan.threads}, k_slices={self.plan.k_slices})"


cdef class Epilogue:
    """What happens to the sums: the bias is added, then each (activation name, parameters) is applied in turn.

    `out`, (torch.uint8 or torch.int8, scale, zero), makes integers of the result: y = scale * (u - zero), where u, of 0
    to 255, is stored as it is or 128 lower.
    """

    def __init__(self, steps=(), out=None):
        names = list(activations())
        steps = tuple((name, tuple(params)) for name, params in steps) or (("identity", ()),)
        if len(steps) > 4:
            raise ValueError(f"an epilogue has at most 4 steps, not {len(steps)}")
        self.steps, self.out = steps, out
        cdef size_t isa, i, j
        if out is not None:
            self.dtype, scale, zero = out
            if self.dtype not in (torch.uint8, torch.int8) or not check_affine(scale, zero):
                raise ValueError(f"out is (torch.uint8 or torch.int8, a scale above 0, a zero from 0 to 255), not {out}")
            for isa in range(kIsas):
                self.program[isa].out.inverse = <float> 1.0 / <float> scale
                self.program[isa].out.low, self.program[isa].out.high = -zero, 255 - zero
                self.program[isa].out.zero = zero
        for i, (name, params) in enumerate(steps):
            if name not in names:
                raise ValueError(f"unknown activation {name!r}; there are {', '.join(names)}")
            known = activation_at(names.index(name)).params
            if <size_t> len(params) != known:
                raise ValueError(f"activation {name!r} takes {known} parameters, not {len(params)}: {params}")
            for isa in range(kIsas):
                self.program[isa].steps[i] = find_step(<Isa> isa, names.index(name))
                self.program[isa].count = len(steps)
                for j in range(known):
                    self.program[isa].params[i][j] = params[j]


cdef bint check_affine(scale, zero) except -1:
    return isinstance(zero, int) and 0 <= zero <= 255 and 1.2e-38 < scale < 3.4e38


ROW_KINDS = ("symmetric", "asymmetric", "static")  # in the order of enum RowKind


cdef class RowQuantizer:
    """How the rows of x become integers u, x * smooth = scale * (u - zero), as fastlinear/quantize.py says.

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


# Whether the plan's kernel reads this weight, and x or what x can be made into.
cdef bint answers(Plan plan, Packed w, RowQuantizer rows, Format x) noexcept:
    cdef const Kernel* kernel = plan.plan.kernel
    if not kernel.reads(w.shape):
        return False
    if <int> kernel.accumulate == INT32:
        return rows is not None and (is_float(x) or <int> rows.quantizer.kind == STATIC)
    return is_float(x) and (<int> kernel.rows == FP32 or kernel.rows == x)


# One product. Large ones release the GIL: 2e6 multiply-adds are about 20 us, where handing it over costs nothing.
cdef int compute(
    Packed w, Plan plan, Epilogue epilogue, RowQuantizer rows, Matrix* x, Bias bias, Matrix* y
) except -1:
    cdef Problem p
    p.m, p.n, p.k = x.m, w.n, w.k
    p.x.data, p.x.stride, p.x.format = x.data, x.stride, x.format
    if rows is not None:
        p.quantizer = rows.quantizer
    p.weight = w.read()[0]
    p.bias = bias
    p.y.data, p.y.stride, p.y.format = y.data, y.stride, y.format
    p.epilogue = epilogue.program[<size_t> plan.plan.kernel.isa]
    cdef CPlan c = plan.plan
    cdef cbool done
    if x.m * w.n * w.k > 2000000:
        with nogil:
            done = gemm(p, c)
    else:
        done = gemm(p, c)
    if not done:
        raise MemoryError(f"no memory for the scratch tiles of a product with M={x.m}, N={w.n}, K={w.k}")
    return 0


def run(
    Packed packed not None, Plan plan not None, Epilogue epilogue not None, x, bias, out, RowQuantizer rows=None
):
    """out = epilogue(x @ weight.T + bias).

    x: [M, K]; bias: [N] or None; out: [M, N], written in place; each fp32, bf16 or fp16, but x fp32 where the weight
    is, and of the rows' format for a kernel that reads 16-bit rows. Integer products quantize x by `rows`; x may be
    integers where `rows` is static, and out is, where the epilogue says so. Rows may have any stride, elements of a row
    must be side by side. Raises TypeError or ValueError where a tensor is not of that form.
    """
    cdef View vx = need(x, "x", integers=True)
    cdef View vy = need(out, "out", integers=True)
    cdef View vb
    cdef Matrix rows_x, rows_y
    cdef Bias b
    if not plan.plan.kernel.reads(packed.shape):
        raise ValueError(f"kernel {plan.kernel!r} reads {' or '.join(reads(plan.plan.kernel))}, "
                         f"the weight is in {packed.layout!r}")
    if not answers(plan, packed, rows, vx.format) or (packed.shape.format != vx.format and packed.format == "fp32"):
        by = "" if rows is None else f" with {rows.kind} rows"
        raise ValueError(f"kernel {plan.kernel!r} on a weight in {packed.layout!r} does not take x of {x.dtype}{by}")
    if rows is not None and rows.smooth is not None and rows.smooth.numel() != packed.k:
        raise ValueError(f"smooth must be [{packed.k}], not {describe(rows.smooth)}")
    if epilogue.dtype is not (None if is_float(vy.format) else out.dtype):
        raise ValueError(f"out is {out.dtype}, but the epilogue makes {epilogue.dtype or 'numbers'}")
    if vx.ndim != 2 or vx.shape[1] != packed.k or not as_rows(&vx, &rows_x):
        raise ValueError(f"x must be [M, {packed.k}] with unit stride in a row, not {describe(x)}")
    if vy.ndim != 2 or vy.shape[0] != rows_x.m or vy.shape[1] != packed.n or not as_rows(&vy, &rows_y):
        raise ValueError(f"out must be [{rows_x.m}, {packed.n}] with unit stride in a row, not {describe(out)}")
    b.data = NULL
    if bias is not None:
        vb = need(bias, "bias")
        if vb.ndim != 1 or vb.shape[0] != packed.n or (vb.stride[0] != 1 and packed.n > 1):
            raise ValueError(f"bias must be [{packed.n}] with unit stride, not {describe(bias)}")
        b.data, b.format = vb.data, vb.format
    compute(packed, plan, epilogue, rows, &rows_x, b, &rows_y)

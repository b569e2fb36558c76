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
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libcpp cimport bool as cbool


# ---- this machine ----

cdef Cpu cpu = detect_cpu(this_cpu())
cdef size_t isa_limit = kIsas


def _read_isa_limit():
    global isa_limit
    wanted = os.environ.get("FASTLINEAR_MAX_ISA")
    if wanted is None:
        return
    names = [kIsaNames[i].decode() for i in range(kIsas)]
    if wanted not in names:
        raise ValueError(f"FASTLINEAR_MAX_ISA is {wanted!r}; it may be one of {', '.join(names)}")
    isa_limit = <size_t> names.index(wanted) + 1


_read_isa_limit()


cdef bint runnable(const Kernel* kernel) noexcept:
    cdef size_t isa = <size_t> kernel.isa
    return isa < isa_limit and cpu.isa[isa]


cdef dict describe_cpu(Cpu& c):
    return {
        "vendor": (<bytes> (<const char*> c.vendor)).decode(errors="replace"),
        "model": (<bytes> (<const char*> c.model)).decode(errors="replace").strip(),
        "isas": [kIsaNames[i].decode() for i in range(kIsas) if c.isa[i]],
        "l1d": c.cache[0],
        "l2": c.cache[1],
        "l3": c.cache[2],
    }


def cpu_info():
    """What this CPU is: vendor, model, the ISAs that may run (CPUID and XCR0), cache sizes in bytes (0 if unknown)."""
    info = describe_cpu(cpu)
    info["isas"] = [name for i, name in enumerate(info["isas"]) if i < isa_limit]
    return info


cdef CpuidRegisters fake_cpuid(uint32_t leaf, uint32_t subleaf, void* context) noexcept with gil:
    cdef CpuidRegisters r
    r.eax, r.ebx, r.ecx, r.edx = (<dict> context).get((leaf, subleaf), (0, 0, 0, 0))
    return r


cdef uint64_t fake_xcr0(void* context) noexcept with gil:
    return (<dict> context).get("xcr0", 0)


def detect(machine: dict):
    """`cpu_info` of a machine described by {(leaf, subleaf): (eax, ebx, ecx, edx), "xcr0": bits}."""
    cdef CpuSource source
    source.cpuid = fake_cpuid
    source.xcr0 = fake_xcr0
    source.context = <void*> machine
    cdef Cpu c = detect_cpu(source)
    return describe_cpu(c)


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

cdef str layout_name(const Layout& layout):
    return f"{kFormatNames[<size_t> layout.format].decode()}/{layout.nr}x{layout.kr}"


def kernels():
    """The kernel table, best ISA first: one dict a kernel, with `runnable` telling whether this CPU (and
    FASTLINEAR_MAX_ISA) allows it."""
    rows = []
    cdef size_t i = 0
    cdef const Kernel* k = kernel_at(0)
    while k != NULL:
        rows.append({
            "name": k.name.decode(), "isa": kIsaNames[<size_t> k.isa].decode(),
            "format": kFormatNames[<size_t> k.layout.format].decode(), "rows": kFormatNames[<size_t> k.rows].decode(),
            "layout": layout_name(k.layout), "nr": k.layout.nr, "kr": k.layout.kr, "mr": k.mr, "panels": k.panels,
            "columns": k.columns(), "runnable": runnable(k),
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
cdef object float32 = torch.float32


cdef DlExchangeApi* find_exchange_api():
    capsule = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if capsule is None:
        return NULL
    api = <DlExchangeApi*> PyCapsule_GetPointer(capsule, b"dlpack_exchange_api")
    return api if api.major == 1 else NULL


cdef DlExchangeApi* exchange_api = find_exchange_api()


# False where `tensor` is not a dense CPU fp32 tensor with memory behind it. It must be exactly a torch.Tensor or an
# nn.Parameter, since subclasses may not mean what their storage says; a negative view does not either, and says so only
# by is_neg().
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
    if t.device.device_type != 1 or t.dtype.code != 2 or t.dtype.bits != 32 or t.ndim > MAX_DIMS:
        return False
    v.data = <float*> (<char*> t.data + t.byte_offset)
    v.ndim = t.ndim
    for i in range(t.ndim):
        v.shape[i] = t.shape[i]
        v.stride[i] = t.strides[i]
        elements *= t.shape[i]
    return t.data != NULL or elements == 0


cdef bint look_at_slowly(object tensor, View* v):
    cdef int i
    if (tensor.dtype is not float32 or tensor.device.type != "cpu" or tensor.layout is not torch.strided
            or tensor.is_nested or tensor.dim() > MAX_DIMS):
        return False
    v.data = <float*> <size_t> tensor.data_ptr()
    v.ndim = tensor.dim()
    for i in range(v.ndim):
        v.shape[i] = tensor.size(i)
        v.stride[i] = tensor.stride(i)
    return v.data != NULL or tensor.numel() == 0


# Folds all dimensions but the last into rows a constant stride apart; False where the memory has no such form.
cdef bint as_rows(View* v, ptrdiff_t* rows, ptrdiff_t* stride) noexcept:
    cdef int i
    cdef int last = v.ndim - 1
    rows[0] = 1
    stride[0] = v.shape[last]
    for i in range(last):
        rows[0] *= v.shape[i]
    if rows[0] == 0 or v.shape[last] == 0:
        return True
    if v.stride[last] != 1:
        return False
    cdef int64_t expected = -1
    for i in range(last - 1, -1, -1):
        if v.shape[i] == 1:
            continue
        if expected == -1:
            stride[0] = v.stride[i]
        elif v.stride[i] != expected:
            return False
        expected = v.stride[i] * v.shape[i]
    return True


cdef View need(object tensor, str what) except *:
    cdef View v
    if type(tensor) not in (Tensor, torch.nn.Parameter) or not look_at(tensor, &v) or tensor.is_neg():
        raise TypeError(f"{what} must be a dense fp32 CPU tensor, not {describe(tensor)}")
    return v


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


cdef class Packed:
    """A weight [n, k] in the panels of `layout`.

    weight: fp32 CPU tensor of shape [n, k], any strides. `data` is the 1-D uint8 tensor that holds the panels.
    Raises TypeError or ValueError where the weight or the layout is not one the kernels read.
    """

    def __init__(self, weight, str layout not None):
        cdef View w = need(weight, "weight")
        if w.ndim != 2:
            raise ValueError(f"weight must have 2 dimensions, not {w.ndim}: shape {tuple(weight.shape)}")
        self.shape = kernel_of_layout(layout).layout
        self.layout = layout
        self.n, self.k = w.shape[0], w.shape[1]
        global newest
        with placing:
            self.data = place(packed_elements(self.shape, self.n, self.k) * sizeof(float))
            newest = weakref.ref(self)
        self.panels = <float*> <size_t> self.data.data_ptr()
        cdef WeightView[const float] source
        source.data, source.n, source.k = w.data, self.n, self.k
        source.stride_n, source.stride_k = w.stride[0], w.stride[1]
        with nogil:
            pack_weight(self.shape, source, self.panels)

    @property
    def nbytes(self):
        return self.data.nbytes

    def head(self, ptrdiff_t n):
        """The first n output channels, in the same memory. n is rounded up to whole panels, down to what there is."""
        cdef Packed part = Packed.__new__(Packed)
        n = min(self.n, (n + self.shape.nr - 1) // self.shape.nr * self.shape.nr)
        part.shape, part.layout, part.panels, part.k, part.n = self.shape, self.layout, self.panels, self.k, n
        part.data = self.data[: packed_elements(self.shape, n, self.k) * sizeof(float)]
        return part

    def unpack(self):
        """The weight [n, k], bit for bit as it was packed."""
        weight = torch.empty((self.n, self.k), dtype=torch.float32)
        cdef WeightView[float] target
        target.data, target.n, target.k = <float*> <size_t> weight.data_ptr(), self.n, self.k
        target.stride_n, target.stride_k = self.k, 1
        with nogil:
            unpack_weight(self.shape, self.panels, target)
        return weight


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
    """What happens to the sums: the bias is added, then each (activation name, parameters) is applied in turn."""

    def __init__(self, steps=()):
        names = list(activations())
        steps = tuple((name, tuple(params)) for name, params in steps) or (("identity", ()),)
        if len(steps) > 4:
            raise ValueError(f"an epilogue has at most 4 steps, not {len(steps)}")
        self.steps = steps
        cdef size_t isa, i, j
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


# One product. Large ones release the GIL: 2e6 multiply-adds are about 20 us, where handing it over costs nothing.
cdef int compute(Packed w, Plan plan, Epilogue epilogue, ptrdiff_t m, const float* x, ptrdiff_t stride_x,
                 const float* bias, float* y, ptrdiff_t stride_y) except -1:
    cdef Problem p
    p.m, p.n, p.k = m, w.n, w.k
    p.x.data, p.x.stride = x, stride_x
    p.packed, p.bias, p.y, p.stride_y = <const char*> w.panels, bias, y, stride_y
    p.epilogue = epilogue.program[<size_t> plan.plan.kernel.isa]
    cdef CPlan c = plan.plan
    cdef cbool done
    if m * w.n * w.k > 2000000:
        with nogil:
            done = gemm(p, c)
    else:
        done = gemm(p, c)
    if not done:
        raise MemoryError(f"no memory for the scratch tiles of a product with M={m}, N={w.n}, K={w.k}")
    return 0


def run(Packed packed not None, Plan plan not None, Epilogue epilogue not None, x, bias, out):
    """out = epilogue(x @ weight.T + bias).

    x: fp32 [M, K]; bias: fp32 [N] or None; out: fp32 [M, N], written in place. Rows may have any stride, elements of a
    row must be side by side. Raises TypeError or ValueError where a tensor is not of that form.
    """
    cdef View vx = need(x, "x")
    cdef View vy = need(out, "out")
    cdef View vb
    cdef ptrdiff_t m = 0, stride_x = 0, m_y = 0, stride_y = 0
    if packed.layout != plan.layout:
        raise ValueError(f"kernel {plan.kernel!r} reads layout {plan.layout!r}, the weight is in {packed.layout!r}")
    if vx.ndim != 2 or vx.shape[1] != packed.k or not as_rows(&vx, &m, &stride_x):
        raise ValueError(f"x must be [M, {packed.k}] with unit stride in a row, not {describe(x)}")
    if vy.ndim != 2 or vy.shape[0] != m or vy.shape[1] != packed.n or not as_rows(&vy, &m_y, &stride_y):
        raise ValueError(f"out must be [{m}, {packed.n}] with unit stride in a row, not {describe(out)}")
    vb.data = NULL
    if bias is not None:
        vb = need(bias, "bias")
        if vb.ndim != 1 or vb.shape[0] != packed.n or (vb.stride[0] != 1 and packed.n > 1):
            raise ValueError(f"bias must be [{packed.n}] with unit stride, not {describe(bias)}")
    compute(packed, plan, epilogue, m, vx.data, stride_x, vb.data, vy.data, stride_y)


def evict(size_t address, size_t nbytes):
    """Drops memory from every cache level, so that its next use is a cold one. The memory must exist."""
    with nogil:
        flush(<const char*> address, nbytes)

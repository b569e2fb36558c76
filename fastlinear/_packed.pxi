# Part of _kernels.pyx: packed weights, and where they lie.

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
            return torch.empty(0, dtype=torch.uint8, device="cpu").set_(last.data.untyped_storage(), begin, (nbytes,))
    chunk = torch.empty(max(nbytes, CHUNK) + kHugePage, dtype=torch.uint8, device="cpu")
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
        raise ValueError(f"int8 products of weights{points} have K of at most {dot_limit(zeros)}, where int32 holds "
                         f"all their sums, but this weight has {k}")
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
        weight = torch.empty((self.n, self.k), dtype=self.dtype, device="cpu")
        cdef View w = need(weight, "weight", integers=True)
        cdef WeightView target = as_weight(&w)
        with nogil:
            unpack_weight(self.shape, self.weight.panels, target)
        return weight

    cdef object channels(self, const void* values, object dtype):
        if values == NULL:
            return None
        # In the storage, since those of a head lie beyond its panels.
        cdef ptrdiff_t begin = <const char*> values - <const char*> <size_t> self.data.untyped_storage().data_ptr()
        return self.data.as_strided((4 * self.n,), (1,), begin).view(dtype)

    @property
    def scale(self):
        """The scales [n] of an int8 weight, fp32; None for another."""
        return self.channels(self.weight.scales, torch.float32)

    @property
    def zero(self):
        """The zero points [n] of an int8 weight, int32; None where there are none."""
        return self.channels(self.read().zeros, torch.int32)

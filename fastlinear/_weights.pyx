# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# distutils: language = c++
"""Packed weights, and the memory that they lie in."""

import torch

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_FillInfo, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport int32_t
from libc.string cimport memcpy

from fastlinear._tensors import SUPER

from fastlinear._kernels cimport parse_layout
from fastlinear._tensors cimport (
    INT4, INT8, Groups, Layout, View, dtype_of, format_at, format_name, is_two_level, need, need_groups, need_vector
)


cdef PackMemory pack_memory


# Memory of a pack. It goes when nobody has it any more: neither the pack nor a tensor over it.
cdef class Block:
    def __cinit__(self, size_t nbytes):
        self.data = pack_memory.take(nbytes)
        self.nbytes = nbytes

    def __dealloc__(self):
        if self.data != NULL:
            pack_memory.give_back(self.data, self.nbytes)

    def __getbuffer__(self, Py_buffer* buffer, int flags):
        PyBuffer_FillInfo(buffer, self, self.data, <Py_ssize_t> self.nbytes, False, flags)


def packed_nbytes(str layout not None, ptrdiff_t n, ptrdiff_t k):
    """Bytes of a weight [n, k] in the panels of `layout`; ValueError for a size that no memory holds."""
    cdef Layout shape = parse_layout(layout)
    if n < 0 or k < 0 or n >= 1 << 40 or k >= 1 << 40 or int(n + shape.nr) * int(k + shape.kr) >= 1 << 60:
        raise ValueError(f"a weight of {n} x {k} has no packed form")
    check_dot_limit(shape, k, False)
    return packed_bytes(shape, n, k)


def arrays_of_panels(str layout not None, ptrdiff_t k):
    """Bytes that each panel of a weight [n, k] has in each of the arrays of panels that the weight begins with."""
    cdef Bytes found = c_arrays_of_panels(parse_layout(layout), k)
    return tuple([found[i] for i in range(4) if found[i] > 0])


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


# fp8 is looked at as bytes: no x is of it, and no kernel reads it but in panels.
cdef object as_bytes(object weight):
    fp8 = isinstance(weight, torch.Tensor) and weight.dtype is torch.float8_e4m3fn
    return weight.view(torch.uint8) if fp8 else weight


# Scales or offsets [n, groups] of a weight in groups, and with integers what they multiply, as the bytes that stand
# behind panels of nr channels (include/fastlinear/formats/scales.hpp).
cdef object lay_scales(scales, supers, ptrdiff_t nr, ptrdiff_t size):
    panels = -(-scales.shape[0] // nr)
    if supers is None:
        return by_panel(scales.view(WORDS[scales.dtype.itemsize]), nr).view(torch.uint8).flatten()
    per = SUPER // size
    count = supers.shape[1]
    if supers.numel() == 0:
        return torch.empty(0, dtype=torch.uint8, device="cpu")
    if scales.dtype is torch.uint8 and scales.numel() > 0 and int(scales.max()) > 63:
        raise ValueError(f"scales of 6 bits are 0 to 63, not {int(scales.max())}")
    small = torch.nn.functional.pad(scales, (0, count * per - scales.shape[1]))
    small = by_panel(small, nr).view(panels, count, per, nr)
    if scales.dtype is torch.uint8:
        six = small.int()
        rest = six[:, :, 6] & 15, six[:, :, 6] >> 4 | (six[:, :, 7] & 3) << 2, six[:, :, 7] >> 2
        words = torch.stack([six[:, :, 2 * i] | six[:, :, 2 * i + 1] << 6 | rest[i] << 12 for i in range(3)], 2)
        small = words.to(torch.int16)
    small = small.reshape(panels, count, -1).view(torch.uint8)
    above = by_panel(supers.view(torch.int16), nr).view(torch.uint8)
    return torch.cat([small, above.view(panels, count, -1)], 2).flatten()


# What `lay_scales` was given.
cdef tuple read_scales(laid, dtype, ptrdiff_t nr, ptrdiff_t size, ptrdiff_t n, ptrdiff_t k):
    panels, groups = (n + nr - 1) // nr, (k + size - 1) // size
    if dtype not in (torch.int8, torch.uint8):
        return of_panels(laid.view(WORDS[dtype.itemsize]).view(panels, groups, nr), n).view(dtype), None
    per = SUPER // size
    count = -(-k // SUPER)  # of Python's numbers
    if n == 0 or k == 0:
        return (torch.empty(n, groups, dtype=dtype, device="cpu"),
                torch.empty(n, count, dtype=torch.float16, device="cpu"))
    laid = laid.view(panels, count, -1)
    small, above = laid[:, :, : -2 * nr].contiguous(), laid[:, :, -2 * nr:].contiguous()
    if dtype is torch.uint8:
        a, b, c = (small.view(torch.int16).view(panels, count, 3, nr).int() & 0xFFFF).unbind(2)
        six = [each >> shift & 63 for each in (a, b, c) for shift in (0, 6)]
        small = torch.stack([*six, a >> 12 | (b >> 12 & 3) << 4, b >> 14 | c >> 12 << 2], 2)
    small = of_panels(small.view(dtype) if dtype is torch.int8 else small.to(dtype), n, panels, count * per, nr)
    return small[:, :groups].contiguous(), of_panels(above.view(torch.int16), n, panels, count, nr).view(torch.float16)


cdef dict WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


# [n, groups] -> [panels, groups, nr], zeros in the last.
cdef object by_panel(values, ptrdiff_t nr):
    n, groups = values.shape
    padded = torch.nn.functional.pad(values, (0, 0, 0, -n % nr))
    return padded.view(-(-n // nr), nr, groups).transpose(1, 2).contiguous()


cdef object of_panels(values, ptrdiff_t n, panels=None, groups=None, nr=None):
    values = values if panels is None else values.reshape(panels, groups, nr)
    panels, groups, nr = values.shape
    return values.transpose(1, 2).reshape(panels * nr, groups)[:n].clone(memory_format=torch.contiguous_format)


cdef class Packed:
    """A weight [n, k] in the panels of `layout`.

    weight: CPU tensor of shape [n, k] and of the layout's format, any strides. An int8 one means scale * (weight -
    zero), with the fp32 [n] `scale` and the int32 [n] `zero`, or None for 0, which alone a weight-only layout takes.
    Where the layout is of groups ("int4/32x8:32:fp16"), the weight is uint8 codes and stands for scale * table[code] +
    offset, or int8 ("int8g/32x4:16:fp16") or float8_e4m3fn ("fp8/32x2:128:fp32") and stands for scale * weight +
    offset: `table` fp32 [16], `scale` and `offset`, or None for 0, [n, groups] in the layout's format. Where that is of
    integers, int8 or uint6 (uint8 up to 63), those are to be multiplied by `supers`, fp16 [n, ceil(k / 256)], behind
    which in each row stand as many for the offsets, if there are any. Where it ends in ":ordered", column j multiplies
    the column order[j] of x, int32 [k], in which each stands once.
    Raises TypeError or ValueError where the weight or the layout is not one the kernels read, MemoryError for want of
    memory.

    The kernels read memory that no tensor owns. `data` is a view of it by a new tensor with a storage of its own, which
    may outlive the pack, and whose memory may move without harm; `scale` and `zero` are copies.
    """

    def __init__(self, weight, str layout not None, scale=None, zero=None, table=None, offset=None, supers=None,
                 order=None):
        cdef View w = need(as_bytes(weight), "weight", integers=True)
        if w.ndim != 2:
            raise ValueError(f"weight must have 2 dimensions, not {w.ndim}: shape {tuple(weight.shape)}")
        self.name_layout(layout, w.shape[0], w.shape[1])
        if weight.dtype is not self.dtype:
            raise TypeError(f"layout {layout!r} holds {self.dtype}, the weight is {weight.dtype}")
        cdef ptrdiff_t arrays = channel_arrays(self.shape.format)
        if self.grouped:
            self.pack_codes(as_weight(&w), scale, zero, table, offset, supers, order)
            return
        if table is not None or offset is not None or supers is not None or order is not None:
            raise ValueError(f"layout {layout!r} holds no groups")
        if arrays > 0:
            scale = need_vector(scale, torch.float32, self.n, "scale")
            zero = None if zero is None or not zero.any() else need_vector(zero, torch.int32, self.n, "zero")
        if zero is not None and arrays < 3 or scale is not None and arrays < 1:
            raise ValueError(f"layout {layout!r} holds no {'scales' if arrays < 1 else 'zero points'}")
        check_dot_limit(self.shape, self.k, zero is not None)
        cdef Block block = Block(packed_nbytes(layout, self.n, self.k))
        self.memory = block
        self.find(block.data, zero is not None)
        cdef char* panels = <char*> self.weight.panels
        cdef const float* scales = <const float*> <size_t> (0 if scale is None else scale.data_ptr())
        cdef const int32_t* zeros = <const int32_t*> <size_t> (0 if zero is None else zero.data_ptr())
        cdef WeightView source = as_weight(&w)
        with nogil:
            pack_weight(self.shape, source, panels)
            if arrays > 0:
                pack_channels(self.shape, source, scales, zeros, panels)

    cdef int name_layout(self, str layout, ptrdiff_t n, ptrdiff_t k) except -1:
        self.shape = parse_layout(layout)
        self.dtype, self.format = dtype_of(<size_t> self.shape.format), format_name(<size_t> self.shape.format)
        self.grouped = format_at(<size_t> self.shape.format).grouped
        self.layout, self.n, self.k = layout, n, k
        return 0

    cdef int pack_codes(self, WeightView codes, scale, zero, table, offset, supers, order) except -1:
        cdef Groups groups = self.shape.groups
        cdef tuple shape = (self.n, (self.k + groups.size - 1) // groups.size)
        two_level = is_two_level(groups.scales)
        if zero is not None:
            raise ValueError(f"layout {self.layout!r} holds offsets, not zero points")
        if (offset is None) == groups.offsets:
            raise ValueError(f"layout {self.layout!r} holds {'' if groups.offsets else 'no '}offsets")
        if (order is None) == groups.ordered:
            raise ValueError(f"layout {self.layout!r} holds {'an' if groups.ordered else 'no'} order of columns")
        if (supers is None) == two_level:
            raise ValueError(f"layout {self.layout!r} holds {'' if two_level else 'no '}scales of two levels")
        scale = need_groups(scale, dtype_of(<size_t> groups.scales), shape, "scale")
        offset = None if offset is None else need_groups(offset, scale.dtype, shape, "offset")
        if two_level:
            columns, kinds = -(-self.k // SUPER), 2 if groups.offsets else 1
            supers = need_groups(supers, torch.float16, (self.n, kinds * columns), "supers")
            supers = supers.reshape(self.n, kinds, columns)
        if self.weight_has_table():
            table = need_vector(table, torch.float32, 16, "table")
        elif table is not None:
            raise ValueError(f"layout {self.layout!r} holds no table")
        cdef Block block = Block(packed_nbytes(self.layout, self.n, self.k))
        self.memory = block
        self.find(block.data, False)
        cdef char* panels = <char*> self.weight.panels
        with nogil:
            pack_weight(self.shape, codes, panels)
        self.lay(self.weight.groups.scales, scale, None if supers is None else supers[:, 0])
        if offset is not None:
            self.lay(self.weight.groups.offsets, offset, None if supers is None else supers[:, 1])
        if table is not None:
            memcpy(<void*> self.weight.groups.table, <const void*> <size_t> table.data_ptr(), 64)
        if order is not None:
            order = need_vector(order, torch.int32, self.k, "order")
            memcpy(<void*> self.weight.order, <const void*> <size_t> order.data_ptr(), 4 * <size_t> self.k)
            self.check_order()
        return 0

    # Kernels follow it into the rows of x.
    cdef int check_order(self) except -1:
        if self.shape.groups.ordered and not torch.equal(self.order.sort()[0], torch.arange(self.k, device="cpu")):
            raise ValueError(f"the order of columns names other ones than the {self.k} of x, each once")
        return 0

    cdef bint weight_has_table(self) noexcept:
        return <int> self.shape.format == INT4

    cdef int lay(self, const char* to, scales, supers) except -1:
        laid = lay_scales(scales, supers, self.shape.nr, self.shape.groups.size)
        memcpy(<void*> to, <const void*> <size_t> laid.data_ptr(), <size_t> laid.numel())
        return 0

    cdef int find(self, const char* panels, bint zeros) except -1:
        self.nbytes = packed_bytes(self.shape, self.n, self.k)
        self.weight = weight_at(self.shape, self.n, self.k, panels)
        self.zeros_known = (self.weight.zeros == NULL or not zeros) and not self.weight_has_table()
        if not zeros:
            self.weight.zeros = NULL
        return 0

    # What the kernels read. Whether a mapped weight has zero points, and its table integers, is looked up at its first
    # use, not when it is loaded.
    cdef Weight* read(self) noexcept:
        cdef ptrdiff_t i
        if not self.zeros_known and self.weight_has_table():
            find_integers(self.weight.groups)
            self.zeros_known = True
        if not self.zeros_known:
            for i in range(self.n):
                if self.weight.zeros[i] != 0:
                    break
            else:
                self.weight.zeros = NULL
            self.zeros_known = True
        return &self.weight

    @classmethod
    def over(cls, data, str layout not None, ptrdiff_t n, ptrdiff_t k):
        """The weight [n, k] whose panels `data` holds, a file's mapping, say: any buffer (PEP 3118) of exactly
        `packed_nbytes(layout, n, k)` bytes at a multiple of 64, which stay where they are as long as it lives. It is
        kept alive, not copied and never written.

        Raises ValueError where it is not of that form.
        """
        cdef Packed packed = cls.__new__(cls)
        cdef Py_ssize_t nbytes = packed_nbytes(layout, n, k)
        cdef Py_buffer found
        packed.memory = memoryview(data)
        PyObject_GetBuffer(packed.memory, &found, PyBUF_SIMPLE)
        cdef const char* panels = <const char*> found.buf
        cdef Py_ssize_t given = found.len
        PyBuffer_Release(&found)  # the memoryview holds it, too
        if given != nbytes or nbytes > 0 and <size_t> panels % 64 != 0:
            raise ValueError(f"panels of [{n}, {k}] in {layout!r} are {nbytes} bytes at a multiple of 64, not {given} "
                             f"bytes at {<size_t> panels % 64} beyond one")
        packed.name_layout(layout, n, k)
        packed.find(panels, True)
        packed.check_order()
        return packed

    @property
    def data(self):
        """The panels, and what stands behind them: 1-D uint8."""
        if self.nbytes == 0:  # which frombuffer refuses
            return torch.empty(0, dtype=torch.uint8, device="cpu")
        return torch.frombuffer(self.memory, dtype=torch.uint8, count=self.nbytes)

    def head(self, ptrdiff_t n):
        """The first n output channels, in the same memory. n is rounded up to whole panels, down to what there is."""
        cdef Packed part = Packed.__new__(Packed)
        n = min(self.n, (n + self.shape.nr - 1) // self.shape.nr * self.shape.nr)
        part.name_layout(self.layout, n, self.k)
        part.weight, part.zeros_known = self.read()[0], True
        part.memory, part.nbytes = self.memory, panels_bytes(self.shape, n, self.k)
        return part

    def unpack(self):
        """The weight [n, k], bit for bit as it was packed."""
        weight = torch.empty((self.n, self.k), dtype=self.dtype, device="cpu")
        cdef View w = need(as_bytes(weight), "weight", integers=True)
        cdef WeightView target = as_weight(&w)
        with nogil:
            unpack_weight(self.shape, self.weight.panels, target)
        return weight

    cdef object channels(self, const void* values, object dtype):
        if values == NULL or self.n == 0:
            return None
        copy = torch.empty(self.n, dtype=dtype, device="cpu")
        memcpy(<void*> <size_t> copy.data_ptr(), values, 4 * self.n)
        return copy

    # The scales or offsets, from where panels have them, and their supers or None.
    cdef object of_groups(self, const char* values):
        cdef ptrdiff_t nbytes = (self.n + self.shape.nr - 1) // self.shape.nr * self.weight.groups.panel_stride
        copy = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
        if nbytes > 0:
            memcpy(<void*> <size_t> copy.data_ptr(), values, <size_t> nbytes)
        dtype = dtype_of(<size_t> self.shape.groups.scales)
        return read_scales(copy, dtype, self.shape.nr, self.shape.groups.size, self.n, self.k)

    @property
    def scale(self):
        """The scales [n] of an int8 weight, fp32, or [n, groups] of one in groups; None for another."""
        if self.grouped:
            return self.of_groups(self.weight.groups.scales)[0]
        if self.n == 0 and channel_arrays(self.shape.format) > 0:
            return torch.empty(0, dtype=torch.float32, device="cpu")
        return self.channels(self.weight.scales, torch.float32)

    @property
    def offset(self):
        """The offsets [n, groups] of a weight in groups; None where there are none."""
        return self.of_groups(self.weight.groups.offsets)[0] if self.shape.groups.offsets else None

    @property
    def supers(self):
        """What scales, and offsets behind them, of two levels are to be multiplied by, fp16 [n, ceil(k / 256)] or twice
        as many; None where they are of one level."""
        if not self.grouped or not is_two_level(self.shape.groups.scales):
            return None
        of_scales = self.of_groups(self.weight.groups.scales)[1]
        if not self.shape.groups.offsets:
            return of_scales
        return torch.cat([of_scales, self.of_groups(self.weight.groups.offsets)[1]], 1)

    @property
    def table(self):
        """What the codes of a weight in groups stand for, fp32 [16]; None where it has none."""
        if not self.weight_has_table():
            return None
        copy = torch.empty(16, dtype=torch.float32, device="cpu")
        memcpy(<void*> <size_t> copy.data_ptr(), self.weight.groups.table, 64)
        return copy

    @property
    def order(self):
        """The columns of x that those of a weight in groups multiply, int32 [k]; None where they have the same."""
        if not self.shape.groups.ordered:
            return None
        copy = torch.empty(self.k, dtype=torch.int32, device="cpu")
        memcpy(<void*> <size_t> copy.data_ptr(), self.weight.order, 4 * <size_t> self.k)
        return copy

    @property
    def zero(self):
        """The zero points [n] of an int8 weight, int32; None where there are none."""
        return self.channels(self.read().zeros, torch.int32)

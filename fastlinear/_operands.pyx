# cython: auto_pickle=False, language_level=3, boundscheck=False, wraparound=False, cdivision=True
# distutils: language = c++
"""The tensors of a call beside x and the weight: its operands, as they lie or laid out anew, and its output."""

import torch

from fastlinear._plans cimport MEETS, MISSES, Bias, COperand, Meeting, meet
from fastlinear._tensors cimport View, is_float, look_at

cdef object Tensor = torch.Tensor
cdef object Parameter = torch.nn.Parameter
cdef object is_neg = torch.Tensor.is_neg  # bound here, which saves 30 ns of looking it up


# A subclass may mean another thing than its memory says.
cdef bint is_plain(object tensor):
    return type(tensor) is Tensor or type(tensor) is Parameter


# Whether the memory of a tensor of floats means what it says.
cdef bint is_readable(object tensor, View* v) except -1:
    return is_plain(tensor) and look_at(tensor, v) and is_float(v.format) and not is_neg(tensor)


# A number for each of n channels, as kernels take them, or none; False for a tensor that is none of these.
cdef bint read_channels(object tensor, ptrdiff_t n, Bias* to) except -1:
    cdef View v
    to.data = NULL
    if tensor is None:
        return True
    if not is_readable(tensor, &v) or v.ndim != 1 or v.shape[0] != n or (v.stride[0] != 1 and n > 1):
        return False
    to.data, to.format = v.data, v.format
    return True


cdef bint are_plain(tuple tensors):
    for tensor in tensors:
        if not is_plain(tensor):
            return False
    return True


cdef bint wants_grad(tuple operands) except -1:
    for operand in operands:
        if operand.requires_grad:
            return True
    return False


# Where the operands lie for y, whose leading dimensions are those of x, and those laid out anew that do not lie as
# kernels read: to be held until they have; None where one is unfit.
cdef list laid(View* x, tuple operands, ptrdiff_t columns, COperand* beside):
    cdef View t
    cdef Meeting how
    cdef list held = []
    for i in range(len(operands)):
        operand = operands[i]
        if not is_readable(operand, &t):
            return None
        how = meet(&t, x, columns, &beside[i])
        if how == MISSES:
            return None
        if how != MEETS:
            operand = operand.expand([x.shape[d] for d in range(x.ndim - 1)] + [columns]).contiguous()
            held.append(operand)
            look_at(operand, &t)
            meet(&t, x, columns, &beside[i])
    return held


# new_empty is quickest with nothing but integers. dtype: None for that of x, or fp32 where x is integers.
cdef object new_output(object x, View* v, ptrdiff_t n, object dtype):
    if dtype is not None or not is_float(v.format):
        return x.new_empty([v.shape[i] for i in range(v.ndim - 1)] + [n], dtype=dtype or torch.float32)
    if v.ndim == 2:
        return x.new_empty(v.shape[0], n)
    if v.ndim == 3:
        return x.new_empty(v.shape[0], v.shape[1], n)
    return x.new_empty([v.shape[i] for i in range(v.ndim - 1)] + [n])


# Whether y is what `new_output` would make, in memory that somebody has already.
cdef bint is_output(object y, object x, View* v, ptrdiff_t n, object dtype) except -1:
    cdef View w
    cdef ptrdiff_t stride = 1
    cdef int i
    if not is_readable(y, &w) or w.ndim != v.ndim or w.shape[w.ndim - 1] != n:
        return False
    if y.dtype is not (dtype or (x.dtype if is_float(v.format) else torch.float32)):
        return False
    for i in range(w.ndim - 1, -1, -1):
        if w.stride[i] != stride and w.shape[i] > 1 or i < w.ndim - 1 and w.shape[i] != v.shape[i]:
            return False
        stride *= w.shape[i]
    return True

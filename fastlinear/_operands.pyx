# cython: auto_pickle=False, language_level=3, boundscheck=False, wraparound=False, cdivision=True
# distutils: language = c++
"""The tensors of a call beside x and the weight: its operands, as they lie or laid out anew, and its output."""

import torch

from fastlinear._plans cimport MEETS, MISSES, COperand, Meeting, meet
from fastlinear._tensors cimport View, is_float, look_at

cdef object Tensor = torch.Tensor
cdef object Parameter = torch.nn.Parameter
cdef object is_neg = torch.Tensor.is_neg  # bound here, which saves 30 ns of looking it up


# A subclass may mean another thing than its memory says.
cdef bint is_plain(object tensor):
    return type(tensor) is Tensor or type(tensor) is Parameter


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
        if not (is_plain(operand) and look_at(operand, &t) and is_float(t.format)) or is_neg(operand):
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

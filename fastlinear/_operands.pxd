from fastlinear._plans cimport Bias, COperand
from fastlinear._tensors cimport View


cdef bint is_plain(object tensor)
cdef bint is_readable(object tensor, View* v) except -1
cdef bint read_channels(object tensor, ptrdiff_t n, Bias* to) except -1
cdef bint are_plain(tuple tensors)
cdef bint wants_grad(tuple operands) except -1
cdef list laid(View* x, tuple operands, ptrdiff_t columns, COperand* beside)
cdef object new_output(object x, View* v, ptrdiff_t n, object dtype)
cdef bint is_output(object y, object x, View* v, ptrdiff_t n, object dtype) except -1

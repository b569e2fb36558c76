# Part of _kernels.pyx: what comes with a call beside x.

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

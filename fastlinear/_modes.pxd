cdef bint disabled() except -1
cdef object mode_of_call()
cdef bint gradients() except -1
cdef bint calls_are_seen() except -1

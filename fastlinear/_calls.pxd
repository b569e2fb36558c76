cdef bint quiet(dict state)
cdef bint leads_to(object module, object marker, object out) except -1


cdef class Tickets:
    cdef list outputs

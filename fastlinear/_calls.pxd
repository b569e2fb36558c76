cdef bint quiet(dict state)
cdef bint leads_to(object module, object marker, object out) except -1

# cython: language_level=3
# distutils: language = c++
"""Who is told how many seconds calls of fast layers take."""

from cpython.object cimport PyObject
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

# time.monotonic()
cdef double monotonic() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return now.tv_sec + 1e-9 * now.tv_nsec


cdef object timekeeper = None
cdef bint timed = False  # within a call that is timed


cdef bint is_timed():
    return timekeeper is not None


# Whether a call that begins now is to be timed: the outermost of fast layers within one another.
cdef bint is_due():
    return timekeeper is not None and not timed


# The answer of `call`, or of `forward` with these arguments if that is given, of whose seconds `timekeeper` is told.
cdef object timely(object module, object forward, tuple args, PyObject* options, Call call):
    global timed
    keeper, began, timed = timekeeper, monotonic(), True
    try:
        y = call(module, args, options) if forward is None else forward(*args)
    finally:
        timed = False
    keeper(module, monotonic() - began)
    return y


def tell_times(done):
    """From now on done(module, seconds) is called after each call of a module of a quick class, of a graph's layer and
    of the product of a stack; None ends that. Not a hook, and without a frame of Python's, so that calls are what they
    are otherwise."""
    global timekeeper
    timekeeper = done

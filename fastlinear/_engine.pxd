from fastlinear._calls cimport Tickets
from fastlinear._fingerprints cimport Fingerprint
from fastlinear._plans cimport Bias, Epilogue, RowQuantizer
from fastlinear._tensors cimport Format, Matrix, View
from fastlinear._weights cimport Packed


cdef class Engine:
    cdef readonly Packed packed
    cdef readonly Epilogue epilogue
    cdef readonly RowQuantizer rows
    cdef readonly bint transposed, bare
    cdef tuple widths               # of the outputs of a group; None for one output
    cdef readonly Engine elsewhere  # bare; None where all calls are alike
    cdef object marker, out         # where the output of this one goes, see leads_to
    cdef Tickets tickets            # of the marker
    cdef object weight        # the parameter that was packed; None for a frozen layer
    cdef bint among_others    # calls follow others of the same threads
    cdef bint by_memory       # any other tensor over the memory that was packed is as good
    cdef Fingerprint fingerprint    # of it as it was then
    cdef object candidate     # weakly, the storage of the parameter that waits to be packed
    cdef Fingerprint last     # of it as it was at the last call
    cdef object plain         # (x, weight, bias) -> y in torch's ops while training; None until the module has told
    cdef object changing      # the same in the numbers of a pack, while the weight keeps changing; may be None
    cdef bint mixed           # whether `changing` takes x of another dtype than the weight's
    cdef dict counts          # calls that it answered, by the words of the report
    cdef object attach        # (x, weight, bias, y, packed, operands, sums) -> y with gradients; may be None
    cdef bint keeps           # whether `attach` wants the sums
    cdef object bias          # the last one that was found fit
    cdef tuple stock          # a class, and the `forward` of it that this stands for
    cdef ptrdiff_t answered, waits  # calls by this pack, and those for which a weight has yet to stand still
    cdef tuple planned_for    # layout, n and k of the packs that `plans` are for
    cdef dict plans           # (threads, format of x) -> plans by bucket index
    cdef list current         # the plans for `threads` and `x_format`
    cdef ptrdiff_t threads
    cdef Format x_format

    cdef bint same(self, object weight, object known)
    cdef bint replaced(self)
    cdef bint replace(self, weight, Fingerprint fingerprint, Packed packed) except -1
    cdef bint holds(self, object weight) except -1
    cdef object called(self, object module, dict state, object x, tuple operands)
    cdef object guarded(self, module, dict state, x, tuple operands, into=*)
    cdef object differentiable(self, dict state, x, tuple operands)
    cdef object in_torch(self, dict state, object x, tuple operands, str why)
    cdef object answer(self, dict state, object x, tuple operands, list kept=*, object into=*)
    cdef tuple parts(self, object x, View* v, Packed packed, object plan, Matrix* rows, Bias bias)

# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# distutils: language = c++
"""The table of kernels and instruction sets, and which of them may run here. The shared library of this module holds
the kernels themselves; the others reach them through it."""

import errno
import os

import fastlinear._environment as environment
from fastlinear._tensors import SCALES, SUPER

from fastlinear._cpu cimport CpuSource, describe_cpu, source_of
from fastlinear._tensors cimport Format, Layout, all_formats, format_at, format_name


# ---- instruction sets ----

def isas():
    """Names of all ISAs that the library has kernels for, the plainest first."""
    names = []
    cdef size_t i = 0
    while isa_at(i) != NULL:
        names.insert(0, isa_at(i).name.decode())
        i += 1
    return names


cdef const Isa* isa_named(str name) except NULL:
    cdef size_t i = 0
    while isa_at(i) != NULL:
        if isa_at(i).name == name.encode():
            return isa_at(i)
        i += 1
    raise ValueError(f"{name!r} is no instruction set; there are {', '.join(isas())}")


cdef dict refusals_of(const CpuSource& source):
    """Name -> "" or why it is not there, of every ISA, the plainest first; the system is asked for nothing."""
    reasons = {}
    cdef const char* why
    for name in isas():
        why = refusal(source, isa_named(name)[0])
        reasons[name] = "" if why == NULL else why.decode()
    return reasons


# This machine, or what it pretends to be: its description, and "" or why an ISA may not run. Tiles are asked for when
# somebody first wants to know whether they may be used: a thread whose signal stack is small then stands in the way,
# and no such thread may come to be afterwards.
cdef dict pretended = None
cdef dict refusals = {}
cdef bint asked = False
cdef Caches own_caches

ANSWERS = {
    errno.ENOSPC: "a thread's signal stack is too small for tiles",
    errno.EINVAL: "the system does not know tiles; Linux does from 5.16 on",
}


def pretend(machine):
    """From now on `cpu_info`, and with it what may run here, is that of a machine described as for `detect`, or of this
    one again if that is None. For tests, which bring what carries out the instructions that this CPU lacks."""
    global pretended, refusals, asked, own_vectors
    cdef dict reasons = refusals_of(source_of(machine))
    highest = environment.max_isa(isas())
    if highest is not None:
        for name in reasons:
            if not within(isa_named(highest)[0], isa_named(name)[0]):
                reasons[name] = reasons[name] or f"FASTLINEAR_MAX_ISA is {highest}"
    pretended, refusals, asked = machine, reasons, False
    for name, refused in reasons.items():
        if not refused and isa_named(name).vectors != NULL:
            own_vectors = isa_named(name).vectors
    cdef dict found = describe_cpu(source_of(machine))
    own_caches.l1d, own_caches.l2, own_caches.l3 = found["l1d"], found["l2"], found["l3"]


cdef const Vectors* own_vectors = NULL  # of the best ISA that may run
pretend(None)


cdef dict settled_refusals():
    global asked
    cdef CpuSource source
    cdef int answer
    if not asked:
        environment.check_max_isa(isas())
    wanted = [] if asked else [name for name in refusals if isa_named(name).tiles and not refusals[name]]
    asked = True
    if wanted:
        source = source_of(pretended)
        answer = source.ask_for_tiles(source.context)
        if answer != 0:
            why = ANSWERS.get(answer, f"the system refuses it ({os.strerror(answer)})")
            refusals.update(dict.fromkeys(wanted, why))
    return refusals


cdef bint may_run(const Isa* isa):
    return not (settled_refusals() if isa.tiles else refusals)[isa.name.decode()]


# Rows are worked on with vectors that the system need not be asked for.
cdef const Vectors* best_vectors() noexcept:
    return own_vectors


cdef const Vectors* runnable_vectors(str isa) except NULL:
    may = [name for name in isas() if isa_named(name).vectors != NULL and not refusals[name]]
    if isa not in may:
        raise ValueError(f"isa is one of {', '.join(may)} here, not {isa!r}")
    return isa_named(isa).vectors


cdef dict info_of(const CpuSource& source, dict reasons):
    return describe_cpu(source) | {
        "isas": [name for name in reasons if not reasons[name]],
        "refused": {name: why for name, why in reasons.items() if why},
    }


def cpu_info():
    """What this CPU is: vendor, brand ("model"), the numbers of its family, model and stepping, cache sizes in bytes (0
    if unknown), the ISAs that may run, the plainest first, and why others may not ("refused"): CPUID, XCR0, the
    system's answer where it has to be asked, FASTLINEAR_MAX_ISA."""
    return info_of(source_of(pretended), settled_refusals())


def detect(machine: dict):
    """`cpu_info` of a machine described by {(leaf, subleaf): (eax, ebx, ecx, edx), "xcr0": bits}, whatever is allowed
    here and whatever its system would say."""
    cdef CpuSource source = source_of(machine)
    return info_of(source, refusals_of(source))


# ---- the table ----

cdef str isa_of(const Kernel* kernel):
    cdef const Isa* isa = &kernel.isa
    return isa.name.decode()


cdef bint runnable(const Kernel* kernel):
    return may_run(&kernel.isa)


cdef str layout_name(const Layout& layout):
    return f"{format_name(<size_t> layout.format)}/{layout.nr}x{layout.kr}"


cdef tuple reads(const Kernel* kernel):
    names = {}  # a dict, to keep the order
    if reads_layout(kernel[0], kernel.layout):
        names[layout_name(kernel.layout)] = None
    cdef size_t i = 0
    cdef const Kernel* k = kernel_at(0)
    while k != NULL:
        if reads_layout(kernel[0], k.layout):
            names[layout_name(k.layout)] = None
        i += 1
        k = kernel_at(i)
    return tuple(names)


cdef tuple kernel_rows():
    rows = []
    cdef size_t i = 0
    cdef const Kernel* k = kernel_at(0)
    while k != NULL:
        rows.append({
            "name": k.name.decode(), "isa": isa_of(k),
            "format": format_name(<size_t> k.layout.format), "rows": format_name(<size_t> k.rows),
            "layout": reads(k)[0], "nr": k.layout.nr, "kr": k.layout.kr, "mr": k.mr, "panels": k.panels,
            "columns": k.columns(), "accumulate": format_name(<size_t> k.accumulate), "reads": reads(k),
            "row_step": k.row_step, "k_step": k.k_step, "grouped": format_at(<size_t> k.layout.format).grouped,
        })
        i += 1
        k = kernel_at(i)
    return tuple(rows)


cdef tuple table = kernel_rows()


def rows():
    """The kernel table, the same on every machine, best ISA first: one dict a kernel. `reads` tells which layouts it
    runs on: first the one that weights are packed in for it, then those that are widened to it as well; `row_step`
    and `k_step` what it takes at a time."""
    return [dict(row) for row in table]


def kernels():
    """`rows`, and `runnable`: whether this CPU, its system and FASTLINEAR_MAX_ISA allow it."""
    cdef dict reasons = settled_refusals()
    return [row | {"runnable": not reasons[row["isa"]]} for row in table]


def functions():
    """Name -> (default parameters, operands beside the sums, whether it is a gate) of every function of an epilogue."""
    table = {}
    cdef size_t i = 0
    cdef const EpilogueFunction* f = function_at(0)
    while f != NULL:
        table[f.name.decode()] = tuple(f.defaults[j] for j in range(f.params)), f.operands, bool(f.gate)
        i += 1
        f = function_at(i)
    return table


def activations():
    """Name -> default parameters of every function of one sum alone; "identity" is the first."""
    return {name: defaults for name, (defaults, operands, gate) in functions().items() if operands == 0 and not gate}


cdef const Kernel* runnable_kernel(str name) except NULL:
    cdef const Kernel* kernel = find_kernel(name.encode())
    if kernel == NULL or kernel.name != name.encode() or not runnable(kernel):
        may = ", ".join(row["name"] for row in kernels() if row["runnable"])
        raise ValueError(f"no kernel {name!r} runs here; there are {may}")
    return kernel


# Of "bf16/32x2", or "int4/32x8:32:fp16", which says how a weight is scaled: the size of a group and the format of its
# scales, and with ":offsets" behind them that there are offsets.
cdef Layout parse_layout(str layout) except *:
    cdef size_t i = 0
    cdef const Kernel* k = kernel_at(0)
    base, _, scaled = layout.partition(":")
    while k != NULL and not (layout_name(k.layout) == base and reads_layout(k[0], k.layout)):
        i += 1
        k = kernel_at(i)
    if k == NULL:
        raise ValueError(f"no kernel reads layout {layout!r}; there are {sorted({row['layout'] for row in kernels()})}")
    cdef Layout shape = k.layout
    if format_at(<size_t> shape.format).grouped:
        ordered = scaled.endswith(":ordered")
        scaled = scaled.removesuffix(":ordered")
        offsets = scaled.endswith(":offsets")
        size, _, scales = scaled.removesuffix(":offsets").partition(":")
        if size not in map(str, GROUP_SIZES) or scales not in SCALES.values():
            raise ValueError(f"layout {layout!r} must tell how it is scaled, as {base + ':32:fp16'!r} does: a group of "
                             f"16 to 2^40, a power of two, and a format of {', '.join(SCALES.values())}")
        if scales == "int8" and int(size) > SUPER or scales == "uint6" and int(size) != 32:
            raise ValueError(f"layout {layout!r}: groups scaled by {scales} are of "
                             f"{'32 k' if scales == 'uint6' else f'at most {SUPER} k'}")
        names = all_formats()
        at = names.index(scales)
        shape.groups.size, shape.groups.scales = int(size), <Format> <int> at
        shape.groups.offsets, shape.groups.ordered = offsets, ordered
    elif scaled:
        raise ValueError(f"layout {layout!r} has no groups: {base!r}")
    return shape


GROUP_SIZES = tuple(1 << i for i in range(4, 41))

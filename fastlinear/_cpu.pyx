# cython: language_level=3, boundscheck=False, wraparound=False
# distutils: language = c++
"""A CPU: what it is called, its caches, and where CPUID is read. _kernels knows which instruction sets may run."""

from libc.stdint cimport uint32_t, uint64_t


cdef CpuidRegisters fake_cpuid(uint32_t leaf, uint32_t subleaf, void* context) noexcept with gil:
    cdef CpuidRegisters r
    r.eax, r.ebx, r.ecx, r.edx = (<dict> context).get((leaf, subleaf), (0, 0, 0, 0))
    return r


cdef uint64_t fake_xcr0(void* context) noexcept with gil:
    return (<dict> context).get("xcr0", 0)


cdef int fake_answer(void* context) noexcept with gil:
    return (<dict> context)["tiles"].pop() if (<dict> context).get("tiles") else 0


# Of a machine described by {(leaf, subleaf): (eax, ebx, ecx, edx), "xcr0": bits, "tiles": [errnos, with which asking
# for tiles is answered, the last one first]}, which must outlive it; or this one.
cdef CpuSource source_of(dict machine):
    cdef CpuSource source = this_cpu()
    if machine is not None:
        source.cpuid, source.xcr0, source.ask_for_tiles = fake_cpuid, fake_xcr0, fake_answer
        source.context = <void*> machine
    return source


# Vendor, brand ("model"), the numbers of family, model and stepping, cache sizes in bytes (0 if unknown).
cdef dict describe_cpu(const CpuSource& source):
    cdef Cpu c = detect_cpu(source)
    return {
        "vendor": (<bytes> (<const char*> c.vendor)).decode(errors="replace"),
        "model": (<bytes> (<const char*> c.model)).decode(errors="replace").strip(),
        "family": c.family,
        "number": c.number,
        "stepping": c.stepping,
        "l1d": c.cache[0],
        "l2": c.cache[1],
        "l3": c.cache[2],
    }


def evict(size_t address, size_t nbytes):
    """Drops memory from every cache level, so that its next use is a cold one. The memory must exist."""
    with nogil:
        flush(<const char*> address, nbytes)

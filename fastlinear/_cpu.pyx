# cython: language_level=3, boundscheck=False, wraparound=False
# distutils: language = c++
"""A CPU: what it is called, its caches, and where CPUID is read. _kernels knows which instruction sets may run."""

import os
from glob import glob

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
# for tiles is answered, the last one first], "system": a folder like SYSTEM_CACHES}, which must outlive it; or of this
# one.
cdef CpuSource source_of(dict machine):
    cdef CpuSource source = this_cpu()
    if machine is not None:
        source.cpuid, source.xcr0, source.ask_for_tiles = fake_cpuid, fake_xcr0, fake_answer
        source.context = <void*> machine
    return source


SYSTEM_CACHES = "/sys/devices/system/cpu/cpu0/cache"


def caches_of_system(str folder not None):
    """Bytes of the first CPU's L1d, L2 and L3 as Linux tells them in `folder`; 0 for those that it does not know."""
    sizes = [0, 0, 0]
    for cache in glob(os.path.join(folder, "index*")):
        kind, level, size = (told(os.path.join(cache, name)) for name in ("type", "level", "size"))
        kib = size.removesuffix("K")
        if kind != "Instruction" and level in ("1", "2", "3") and kib != size and kib.isdigit():
            sizes[int(level) - 1] = int(kib) << 10
    return tuple(sizes)


cdef str told(str path):
    try:
        with open(path) as file:
            return file.read().strip()
    except OSError:
        return ""


# Bytes of L1d, L2 and L3, 0 if unknown. What CPUID does not tell, or tells smaller than the level before, as some
# hypervisors have it, is what the system tells; of a described machine that is in a folder "system", if it has one.
cdef tuple caches_of(const CpuSource& source, const Cpu& cpu):
    cdef size_t below = 0
    cdef int i
    sizes = []
    for i in range(3):
        below = cpu.cache[i] if cpu.cache[i] >= below else 0
        sizes.append(below)
    if 0 not in sizes:
        return tuple(sizes)
    folder = SYSTEM_CACHES if source.context == NULL else (<dict> source.context).get("system", "")
    return tuple(size or other for size, other in zip(sizes, caches_of_system(folder)))


# Vendor, brand ("model"), the numbers of family, model and stepping, cache sizes in bytes (0 if unknown).
cdef dict describe_cpu(const CpuSource& source):
    cdef Cpu c = detect_cpu(source)
    l1d, l2, l3 = caches_of(source, c)
    return {
        "vendor": (<bytes> (<const char*> c.vendor)).decode(errors="replace"),
        "model": (<bytes> (<const char*> c.model)).decode(errors="replace").strip(),
        "family": c.family,
        "number": c.number,
        "stepping": c.stepping,
        "l1d": l1d,
        "l2": l2,
        "l3": l3,
    }


def evict(size_t address, size_t nbytes):
    """Drops memory from every cache level, so that its next use is a cold one. The memory must exist."""
    with nogil:
        flush(<const char*> address, nbytes)

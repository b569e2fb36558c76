# cython: language_level=3, boundscheck=False, wraparound=False
# distutils: language = c++
"""This CPU: what it is, which instruction sets may run, and its caches."""

import os

from libc.stdint cimport uint32_t, uint64_t


cdef Cpu cpu = detect_cpu(this_cpu())
cdef size_t isa_limit = kIsas


def _read_isa_limit():
    global isa_limit
    wanted = os.environ.get("FASTLINEAR_MAX_ISA")
    if wanted is None:
        return
    names = [kIsaNames[i].decode() for i in range(kIsas)]
    if wanted not in names:
        raise ValueError(f"FASTLINEAR_MAX_ISA is {wanted!r}; it may be one of {', '.join(names)}")
    isa_limit = <size_t> names.index(wanted) + 1


_read_isa_limit()


cdef bint isa_allowed(size_t isa) noexcept:
    return isa < isa_limit and cpu.isa[isa]


cdef dict describe_cpu(Cpu& c):
    return {
        "vendor": (<bytes> (<const char*> c.vendor)).decode(errors="replace"),
        "model": (<bytes> (<const char*> c.model)).decode(errors="replace").strip(),
        "family": c.family,
        "number": c.number,
        "stepping": c.stepping,
        "isas": [kIsaNames[i].decode() for i in range(kIsas) if c.isa[i]],
        "l1d": c.cache[0],
        "l2": c.cache[1],
        "l3": c.cache[2],
    }


def cpu_info():
    """What this CPU is: vendor, brand ("model"), the numbers of its family, model and stepping, the ISAs that may run
    (CPUID and XCR0), cache sizes in bytes (0 if unknown)."""
    info = describe_cpu(cpu)
    info["isas"] = [kIsaNames[i].decode() for i in range(kIsas) if isa_allowed(i)]
    return info


cdef CpuidRegisters fake_cpuid(uint32_t leaf, uint32_t subleaf, void* context) noexcept with gil:
    cdef CpuidRegisters r
    r.eax, r.ebx, r.ecx, r.edx = (<dict> context).get((leaf, subleaf), (0, 0, 0, 0))
    return r


cdef uint64_t fake_xcr0(void* context) noexcept with gil:
    return (<dict> context).get("xcr0", 0)


cdef CpuSource described(dict machine):
    cdef CpuSource source
    source.cpuid = fake_cpuid
    source.xcr0 = fake_xcr0
    source.context = <void*> machine
    return source


def detect(machine: dict):
    """`cpu_info` of a machine described by {(leaf, subleaf): (eax, ebx, ecx, edx), "xcr0": bits}."""
    cdef Cpu c = detect_cpu(described(machine))
    return describe_cpu(c)


def pretend(machine):
    """From now on `cpu_info`, and with it what may run here, is that of a machine described as for `detect`, or of this
    one again if that is None. For tests, which bring what carries out the instructions that this CPU lacks."""
    global cpu
    cpu = detect_cpu(this_cpu() if machine is None else described(machine))


def evict(size_t address, size_t nbytes):
    """Drops memory from every cache level, so that its next use is a cold one. The memory must exist."""
    with nogil:
        flush(<const char*> address, nbytes)

from libc.stdint cimport uint32_t, uint64_t


cdef extern from "fastlinear/host/cpu.hpp" namespace "fastlinear" nogil:
    ctypedef struct CpuidRegisters:
        uint32_t eax
        uint32_t ebx
        uint32_t ecx
        uint32_t edx
    ctypedef struct CpuSource:
        CpuidRegisters (*cpuid)(uint32_t, uint32_t, void*) noexcept
        uint64_t (*xcr0)(void*) noexcept
        int (*ask_for_tiles)(void*) noexcept
        void* context
    ctypedef struct Cpu:
        char[13] vendor
        char[49] model
        uint32_t family
        uint32_t number
        uint32_t stepping
        size_t[3] cache
    Cpu detect_cpu(const CpuSource&)
    CpuSource this_cpu()
    void flush(const char*, size_t)


cdef CpuSource source_of(dict machine)
cdef dict describe_cpu(const CpuSource& source)

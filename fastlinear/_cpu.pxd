from libc.stdint cimport uint32_t, uint64_t
from libcpp cimport bool as cbool


cdef extern from "fastlinear/host/cpu.hpp" namespace "fastlinear" nogil:
    ctypedef struct CpuidRegisters:
        uint32_t eax
        uint32_t ebx
        uint32_t ecx
        uint32_t edx
    ctypedef struct CpuSource:
        CpuidRegisters (*cpuid)(uint32_t, uint32_t, void*) noexcept
        uint64_t (*xcr0)(void*) noexcept
        void* context
    ctypedef struct Cpu:
        char[13] vendor
        char[49] model
        uint32_t family
        uint32_t number
        uint32_t stepping
        cbool[7] isa
        size_t[3] cache
    Cpu detect_cpu(const CpuSource&)
    CpuSource this_cpu()
    void flush(const char*, size_t)

cdef extern from "fastlinear/contract/kernel.hpp" namespace "fastlinear" nogil:
    size_t kIsas
    const char** kIsaNames


cdef bint isa_allowed(size_t isa) noexcept

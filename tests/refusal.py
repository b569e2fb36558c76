"""A process that the system gives no tiles, so that AMX faults in it and the emulator answers, whatever the CPU has."""

import ctypes
import struct

_ARCH_PRCTL, _REQUEST, _EPERM = 158, 0x1023, 1  # ARCH_REQ_XCOMP_PERM of asm/prctl.h
_LOAD, _IF_EQUAL, _RETURN = 0x20, 0x15, 0x06  # of classic BPF: a word of the call, a jump, the verdict
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_FILTER = (  # operation, lines to skip if true, if false, operand
    (_LOAD, 0, 0, 0),  # the number of the system call
    (_IF_EQUAL, 0, 3, _ARCH_PRCTL),
    (_LOAD, 0, 0, 16),  # its first argument
    (_IF_EQUAL, 0, 1, _REQUEST),
    (_RETURN, 0, 0, _ERRNO | _EPERM),
    (_RETURN, 0, 0, _ALLOW),
)
_NO_NEW_PRIVILEGES, _SECCOMP, _SET_FILTER, _ALL_THREADS = 38, 317, 1, 1


def refuse_tiles() -> None:
    """From now on every request for tiles fails, from this process and its children. OSError where the system knows
    no filters."""
    libc = ctypes.CDLL(None, use_errno=True)
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in _FILTER))
    program = ctypes.create_string_buffer(struct.pack("HP", len(_FILTER), ctypes.addressof(code)))
    done = libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0) == 0
    if not done or libc.syscall(_SECCOMP, _SET_FILTER, _ALL_THREADS, program) != 0:
        raise OSError(ctypes.get_errno(), "system calls cannot be filtered")

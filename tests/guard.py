"""Operands whose neighbors are forbidden: a kernel that touches a byte outside them dies, or is found out.

Memory is mapped with a PROT_NONE page on both sides. An operand lies flush against the page at its end or at its
beginning, so that one element too far is a SIGSEGV there and then, whatever the compiler or assembler did.
"""

import ctypes
import math
import mmap
import os
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

PAGE = mmap.PAGESIZE
PROT_NONE = 0
MAP_NORESERVE = 0x4000  # Linux; the mmap module has a name for it only from Python 3.13 on
CANARY = -17280.0  # a number of every floating format; far from all results, so that arithmetic on it shows
CANARY_BYTE = 113  # of integers

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def _fence(memory: mmap.mmap, offset: int) -> None:
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory, offset))
    if _libc.mprotect(address, PAGE, PROT_NONE) != 0:
        raise OSError(ctypes.get_errno(), f"mprotect: {os.strerror(ctypes.get_errno())}")


def guarded(values: Tensor, at: Literal["start", "end"], *, stride: int | None = None, offset: int = 0) -> Tensor:
    """A copy of `values` [..., columns] flush against a PROT_NONE page, its rows `stride` elements apart.

    `stride` (default: columns, contiguous) leaves gaps filled with CANARY; nothing follows the last row. `offset` moves
    the operand that many elements away from the page, which changes its alignment. The mapping lives as long as the
    tensor.
    """
    columns = values.shape[-1]
    rows = math.prod(values.shape[:-1])
    stride = columns if stride is None else stride
    if values.numel() == 0:
        return values.clone()
    count = (rows - 1) * stride + columns
    size = values.element_size()
    room = -(-(count + offset) * size // PAGE) * PAGE
    memory = mmap.mmap(-1, room + 2 * PAGE)
    first = PAGE + offset * size if at == "start" else PAGE + room - (count + offset) * size
    flat = torch.frombuffer(memory, dtype=values.dtype, count=count, offset=first)
    flat.fill_(canary(values.dtype))
    strides = (*(stride * math.prod(values.shape[i + 1 : -1]) for i in range(values.dim() - 1)), 1)
    operand = flat.as_strided(values.shape, strides)
    operand.copy_(values)
    _fence(memory, 0)
    _fence(memory, PAGE + room)
    return operand


def canary(dtype: torch.dtype) -> float:
    return CANARY if dtype.is_floating_point else CANARY_BYTE


def canaried(
    rows: int, columns: int, stride: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Callable[[], bool]]:
    """An output [rows, columns] with CANARY before, after and in the gaps, and a function: are they all intact?"""
    margin = 16
    flat = torch.full((margin + rows * stride + margin,), canary(dtype), dtype=dtype)
    outside = torch.ones(flat.shape, dtype=torch.bool)
    outside.as_strided((rows, columns), (stride, 1), margin).fill_(False)
    output = flat.as_strided((rows, columns), (stride, 1), margin)
    output.fill_(math.nan if dtype.is_floating_point else canary(dtype))  # what is never written shows, too
    return output, lambda: bool((flat[outside] == canary(dtype)).all())


def sparse(elements: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Zeros by the billion that cost memory only where they are written: for offsets past 2^31."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    return torch.frombuffer(mmap.mmap(-1, elements * dtype.itemsize, flags=flags), dtype=dtype)

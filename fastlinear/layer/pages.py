"""Pages of mapped files, which need not stay in memory once a weight was read from them."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Collection

import numpy as np
from torch import Tensor

_ENTRY = 8  # bytes of /proc/self/pagemap for a page
_THERE = np.uint64(3 << 62)  # in memory, or swapped out
_OF_A_FILE = np.uint64(1 << 61)  # or of shared memory; else it is the process's own
_MANY = 1 << 20  # pages looked at at a time


def let_go(*tensors: Tensor) -> None:
    """Has the system take back the pages below tensors of a mapped file. Who reads them again finds them again.

    Does nothing for other memory, nor where a page was written to, whose contents are nowhere else.
    """
    for tensor in tensors:
        if tensor.numel() > 0:
            begin = tensor.data_ptr()
            strides = ((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            _let_go(begin, begin + (sum(strides) + 1) * tensor.element_size())


def let_go_of_files(paths: Collection[str]) -> None:
    """The same for all that this process has mapped of these files."""
    names = {os.path.realpath(path) for path in paths}
    try:
        with open("/proc/self/maps") as file:
            lines = [line.split(maxsplit=5) for line in file]
    except OSError:
        return
    for place, *_, name in (words for words in lines if len(words) == 6):
        if name.rstrip("\n") in names:
            begin, end = (int(address, 16) for address in place.split("-"))
            _let_go(begin, end)


def _let_go(begin: int, end: int) -> None:
    first, last = begin // mmap.PAGESIZE, -(-end // mmap.PAGESIZE)
    madvise = getattr(ctypes.CDLL(None), "madvise", None)
    try:
        pagemap = os.open("/proc/self/pagemap", os.O_RDONLY)
    except OSError:  # of a system that does not tell whose pages they are
        return
    try:
        for start in range(first, last, _MANY):
            count = min(last - start, _MANY)
            pages = np.frombuffer(os.pread(pagemap, count * _ENTRY, start * _ENTRY), np.uint64)
            there = (pages & _THERE) != 0
            if madvise is None or len(pages) != count or np.any(there & ((pages & _OF_A_FILE) == 0)):
                return
            if there.any():
                where, size = start * mmap.PAGESIZE, count * mmap.PAGESIZE
                madvise(ctypes.c_void_p(where), ctypes.c_size_t(size), ctypes.c_int(mmap.MADV_DONTNEED))
    finally:
        os.close(pagemap)

"""The file of a frozen model: safetensors, written whole or not at all, and mapped to be read.

Any reader of safetensors reads it. What is particular: packed weights ("blobs", dtype U8) come first, each starting on
a page of the file, so that a mapping has them as the kernels want them; the padding behind a blob belongs to it.
"""

from __future__ import annotations

import errno
import mmap
import os
import secrets
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from fastlinear.file.header import LENGTH, MAX_BYTES, PAGE, Contents, build, faults_of, parse

AnyPath = str | os.PathLike[str]


class Blob(NamedTuple):
    """Bytes to be written, starting on a page. `make` is called when their turn comes: 1-D uint8, `nbytes` of them."""

    nbytes: int
    make: Callable[[], Tensor]


class Mapped(NamedTuple):
    """A file in memory: every tensor is a view of one private mapping, which reads a page when it is first touched.

    Processes that map a file share its pages. Who writes to such a tensor gets a copy of that page and changes neither
    the file nor another process. The mapping lives as long as any of its tensors.
    """

    contents: Contents
    memory: mmap.mmap

    def tensor(self, name: str) -> Tensor:
        """The tensor `name`; its storage has no more than its own bytes."""
        entry = self.contents.entries[name]
        return self._view(entry.dtype, entry.begin, entry.nbytes).reshape(entry.shape)

    def blob(self, name: str, nbytes: int) -> memoryview:
        """The first `nbytes` bytes of the entry `name`."""
        begin = self.contents.entries[name].begin
        return memoryview(self.memory)[begin : begin + nbytes]

    def _view(self, dtype: torch.dtype, begin: int, nbytes: int) -> Tensor:
        if nbytes == 0:  # which frombuffer refuses
            return torch.empty(0, dtype=dtype, device="cpu")
        return torch.frombuffer(self.memory, dtype=dtype, count=nbytes // dtype.itemsize, offset=begin)


def read(path: AnyPath) -> Contents:
    """What the header of a file says; FormatError where that is not sound, OSError as the system gives it."""
    with _opened(path) as (_, _, contents):
        return contents


def open_mapped(path: AnyPath) -> Mapped:
    """The file, of which no more than the header is read; errors as of `read`."""
    with _opened(path) as (handle, size, contents):
        memory = mmap.mmap(handle, size, access=mmap.ACCESS_COPY)
        with suppress(OSError):  # of a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)  # what still has to come from the disk comes in these: up to 4 % faster
        return Mapped(contents, memory)


@contextmanager
def _opened(path: AnyPath) -> Iterator[tuple[int, int, Contents]]:
    """Descriptor, size and checked header."""
    with faults_of(path), open(path, "rb", opener=_at_once) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is no regular file")
        size, length = status.st_size, int.from_bytes(file.read(LENGTH), "little")
        if length > MAX_BYTES:
            raise ValueError(f"its header claims to have {length} bytes, and {MAX_BYTES} are allowed")
        if size < LENGTH + length:
            raise ValueError(f"it ends after {size} bytes, within its header")
        yield file.fileno(), size, parse(file.read(length), LENGTH + length, size)


def _at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)  # O_NONBLOCK: a FIFO must not hang us


def write(path: AnyPath, blobs: Mapping[str, Blob], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a file, or leaves what was there: who opens `path`, or has mapped it, meets the old file or the new one.

    No more than one blob is in memory. TypeError for a dtype that the format lacks, OSError as the system gives it.
    """
    ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))  # which aligns them all
    padded = [(name, torch.uint8, (-(-blob.nbytes // PAGE) * PAGE,)) for name, blob in blobs.items()]
    plain = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in ordered.items()]
    head, nbytes = build([*padded, *plain], metadata)
    with _replacing(path) as file:
        file.write(head)
        for blob in blobs.values():
            _put(file, blob.make())
            file.write(bytes(-blob.nbytes % PAGE))
        for tensor in ordered.values():
            _put(file, tensor)
        if file.tell() != len(head) + nbytes:
            raise RuntimeError(f"a tensor changed its size while it was written to {os.fspath(path)!r}")


def _put(file: BinaryIO, tensor: Tensor) -> None:
    dense = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    file.write(dense.reshape(-1).view(torch.uint8).numpy().data)


@contextmanager
def _replacing(path: AnyPath) -> Iterator[BinaryIO]:
    """A file to write to. It takes the place of `path` in one step, once it is whole and on the disk."""
    target = os.path.realpath(path)
    if os.path.isdir(target):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    folder = os.path.dirname(target)
    temporary = os.path.join(folder, f".fastlinear-{secrets.token_hex(8)}.tmp")
    mode = None
    with suppress(FileNotFoundError):  # nobody may read the new one who may not read the old one
        mode = stat.S_IMODE(os.stat(target).st_mode)
    created = 0o666 if mode is None else mode & 0o700  # less the umask, which the mode of an old file knew already
    try:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, created)
    except OSError as error:
        error.filename = folder  # which is what lacks, or forbids it; the temporary name tells nobody anything
        raise
    try:
        with open(handle, "wb") as file:
            if mode is not None:
                os.fchmod(handle, mode)
            yield file
            file.flush()
            os.fsync(handle)
        os.replace(temporary, target)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(opened)  # the name is on the disk, too
    finally:
        os.close(opened)

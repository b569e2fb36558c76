"""The file of a frozen model: safetensors, written whole or not at all, read with distrust, and mapped.

    8 bytes: length of the header | JSON, padded with spaces so that the tensors' bytes, which follow, start on a page

Any reader of safetensors reads it. What is particular: packed weights ("blobs", dtype U8) come first, each starting on
a page of the file, so that a mapping has them as the kernels want them; the padding behind a blob belongs to it. The
safetensors package can write no such alignment, and reads files in which a name stands twice; everything else is
checked here as it checks it, before anything is allocated by what the header says.
"""

from __future__ import annotations

import errno
import json
import math
import mmap
import os
import reprlib
import secrets
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

AnyPath = str | os.PathLike[str]

PAGE = 4096
LENGTH = 8  # bytes of the number in front
MAX_BYTES = 16 << 20  # some 100,000 tensors; what is parsed takes 24 times its size at worst
MAX_DIMS = 64
# Of any number, and of the elements of a tensor without its empty dimensions: strides must not overflow.
LIMIT = 1 << 60
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_METADATA = "__metadata__"
_MESSAGE = 2000  # characters; of what a file says none may be longer


class FormatError(ValueError):
    """A file that cannot be loaded: damaged, forged, newer than this library, or of another model."""


class Entry(NamedTuple):
    """Where a tensor lies."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int  # bytes from the start of the file
    nbytes: int


class Contents(NamedTuple):
    """What a header says. Every entry lies within the file, none overlaps another, and no byte is left over."""

    metadata: dict[str, str]
    entries: dict[str, Entry]


@contextmanager
def faults_of(path: AnyPath) -> Iterator[None]:
    """What is found to be wrong with what a file says becomes a FormatError that names the file."""
    try:
        yield
    except FormatError:
        raise
    except (ValueError, OverflowError) as error:
        text = str(error)
        text = text if len(text) <= _MESSAGE else f"{text[:_MESSAGE]} ..."
        raise FormatError(f"{os.fspath(path)!r} cannot be loaded: {text}") from error


def shown(value: object) -> str:
    """What a file says, for a message: not long, and no control characters."""
    return _repr.repr(value)


_repr = reprlib.Repr()
_repr.maxlevel, _repr.maxdict, _repr.maxlist, _repr.maxstring, _repr.maxlong = 2, 3, 4, 100, 100


# ---- the header ----


def build(
    tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, int]:
    """The bytes that stand before those of the tensors (name, dtype, shape), and how many these are."""
    header: dict[str, Any] = {_METADATA: dict(metadata)}
    end = 0
    for name, dtype, shape in tensors:
        if name in header:
            raise ValueError(f"two tensors of the file would be called {name!r}")
        if dtype not in _NAMES:
            raise TypeError(f"{name!r} is {dtype}, which a safetensors file cannot hold")
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": (begin, end)}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(LENGTH + len(text)) % PAGE)
    if len(text) > MAX_BYTES:
        raise ValueError(f"names and shapes of {len(header)} tensors take {len(text)} bytes, and {MAX_BYTES} may be")
    return len(text).to_bytes(LENGTH, "little") + text, end


def parse(text: bytes, begin: int, end: int) -> Contents:
    """What the JSON of a header says of a file whose tensors lie from `begin` to `end`; ValueError where
    that cannot be."""
    header = parse_json("its header", text.decode())
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    metadata = header.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"the {_METADATA} in its header is no object of strings")
    entries = {name: _entry(name, raw, begin) for name, raw in header.items()}
    reached = begin
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].nbytes)):
        if entry.begin != reached:
            fault = "a hole before" if entry.begin > reached else "an overlap at"
            raise ValueError(f"its header leaves {fault} the tensor {shown(name)}")
        reached += entry.nbytes
    if reached != end:
        raise ValueError(f"its tensors should end at byte {reached}, and it has {end} bytes")
    return Contents(metadata, entries)


def parse_json(what: str, text: str) -> Any:
    """JSON in which no object has a name twice; ValueError, calling it `what`, for any other text."""
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{what} is no JSON: {error}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"it has {shown(twice)} twice in one JSON object")
    return found


def _entry(name: str, raw: object, data: int) -> Entry:
    """One tensor of the header; `data` is where the tensors' bytes begin."""
    who = f"the tensor {shown(name)} in its header"
    if not isinstance(raw, dict) or raw.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{who} has not just dtype, shape and data_offsets")
    dtype = DTYPES.get(raw["dtype"]) if isinstance(raw["dtype"], str) else None
    if dtype is None:
        raise ValueError(f"{who} is of the unknown dtype {shown(raw['dtype'])}")
    shape, offsets = raw["shape"], raw["data_offsets"]
    if not _are_sizes(shape) or math.prod(max(extent, 1) for extent in shape) >= LIMIT:
        raise ValueError(f"{who} has the shape {shown(shape)}, which no memory holds")
    nbytes = math.prod(shape) * dtype.itemsize
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[1] - offsets[0] != nbytes:
        raise ValueError(f"{who} takes {nbytes} bytes by its shape, but lies at {shown(offsets)}")
    begin = data + offsets[0]
    if begin % dtype.itemsize:
        raise ValueError(f"{who} begins at byte {begin}, where no {dtype} can be read")
    return Entry(dtype, tuple(shape), begin, nbytes)


def _are_sizes(numbers: object) -> bool:
    if not isinstance(numbers, list) or len(numbers) > MAX_DIMS:
        return False
    return all(type(number) is int and 0 <= number < LIMIT for number in numbers)


# ---- the file ----


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
    with faults_of(path), open(path, "rb", opener=at_once) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is no regular file")
        size, length = status.st_size, int.from_bytes(file.read(LENGTH), "little")
        if length > MAX_BYTES:
            raise ValueError(f"its header claims to have {length} bytes, and {MAX_BYTES} are allowed")
        if size < LENGTH + length:
            raise ValueError(f"it ends after {size} bytes, within its header")
        yield file.fileno(), size, parse(file.read(length), LENGTH + length, size)


def at_once(path: str, flags: int) -> int:
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

"""GGUF files (as ggml specifies them), read with distrust, and mapped.

    "GGUF" | version u32 | tensors u64 | fields u64 | fields: name, type u32, value ...
    | tensors: name, dimensions u32, extents u64 ..., kind u32, offset u64 ... | padding | bytes of the tensors

Numbers are little-endian, a string is its length u64 and its bytes. The first extent is the innermost. Of arrays, which
are a tokenizer's words, only the length is kept; whatever the header claims is held against the size of the file
before anything is made of it. A model may lie in several files, "...-00001-of-00003.gguf", of which the first has the
fields.
"""

from __future__ import annotations

import mmap
import os
import stat
import struct
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlinear.file.safetensors import LIMIT, AnyPath, at_once, faults_of, shown
from fastlinear.spec.ggml import KINDS, UNREAD

MAGIC = b"GGUF"
VERSIONS = (2, 3)
_MANY = 1 << 16  # fields, or tensors; the largest models have some thousands
_LONG = 1 << 10  # bytes of a name
_TEXT = 1 << 20  # bytes of a text that is kept
_DIMS, _DEPTH = 4, 4  # of tensors, and of arrays in arrays
_ALIGNMENT = 32
_FILES = 1 << 10  # of one model

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # ids of types
_STRING, _ARRAY = 8, 9
_SIZE = struct.Struct("<Q")  # of a text
_BY_NUMBER = {kind.number: name for name, kind in KINDS.items()}


class Entry(NamedTuple):
    """A tensor. shape: as torch has it, the innermost extent last."""

    kind: str  # of spec.ggml.KINDS
    shape: tuple[int, ...]
    begin: int  # bytes from the start of the file
    nbytes: int
    file: int = 0  # of those of the model


class Gguf(NamedTuple):
    """A model's files in memory: fields, and tensors that are views of private mappings, which live as long as they."""

    fields: dict[str, Any]  # numbers and texts; of an array its length
    entries: dict[str, Entry]
    memories: tuple[mmap.mmap, ...]

    def rows(self, name: str) -> Tensor:
        """The bytes of a tensor, uint8 [all rows, bytes of one]."""
        entry = self.entries[name]
        n = entry.nbytes // row_nbytes(entry.kind, entry.shape[-1]) if entry.nbytes else 0
        if n == 0:
            return torch.empty(0, row_nbytes(entry.kind, entry.shape[-1]), dtype=torch.uint8, device="cpu")
        memory = self.memories[entry.file]
        return torch.frombuffer(memory, dtype=torch.uint8, count=entry.nbytes, offset=entry.begin).view(n, -1)

    def release(self, name: str) -> None:
        """Takes what was read of a tensor, and never written, out of memory; who reads it again has it again."""
        entry = self.entries[name]
        begin = -(-entry.begin // mmap.PAGESIZE) * mmap.PAGESIZE
        nbytes = (entry.begin + entry.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - begin
        if nbytes > 0 and hasattr(mmap, "MADV_DONTNEED"):
            self.memories[entry.file].madvise(mmap.MADV_DONTNEED, begin, nbytes)


def row_nbytes(kind: str, k: int) -> int:
    """Bytes of k weights of a kind, of which they fill whole blocks."""
    return k // KINDS[kind].size * KINDS[kind].nbytes


def open_mapped(path: AnyPath) -> Gguf:
    """The file, or all files of the model whose first it is, of which no more than the headers are read; FormatError
    where they are not sound, OSError as the system gives it."""
    with faults_of(path):
        first = _open(path)
        count = first.fields.get("split.count", 1)
        if type(count) is not int or not 0 <= count <= _FILES:
            raise ValueError(f"its split.count is {shown(count)}, no number of files up to {_FILES}")
        return first if count <= 1 else _joined(os.fsdecode(path), first, count)


def _open(path: AnyPath) -> Gguf:
    with open(path, "rb", opener=at_once) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is no regular file")
        if status.st_size < len(MAGIC):
            raise ValueError(f"it ends after {status.st_size} bytes, within its header")
        memory = mmap.mmap(file.fileno(), status.st_size, access=mmap.ACCESS_COPY)
        return Gguf(*_parse(_Cursor(memory)), (memory,))


def _joined(path: str, first: Gguf, count: int) -> Gguf:
    """All files of a model, of which the first was opened; ValueError where one is another's."""
    end = f"-{{:05d}}-of-{count:05d}.gguf".format
    if not path.endswith(end(1)):
        raise ValueError(f"it is one of {count} files of a model, which are read by the first, '...{end(1)}'")
    files = [first, *(_open(path.removesuffix(end(1)) + end(i + 1)) for i in range(1, count))]
    entries: dict[str, Entry] = {}
    for i, file in enumerate(files):
        if (file.fields.get("split.no"), file.fields.get("split.count")) != (i, count):
            raise ValueError(f"its file '...{end(i + 1)}' does not say that it is that one of {count}")
        for name, entry in file.entries.items():
            if name in entries:
                raise ValueError(f"two of its files have a tensor {shown(name)}")
            entries[name] = entry._replace(file=i)
    return Gguf(first.fields, entries, tuple(memory for file in files for memory in file.memories))


class _Cursor:
    """Reads on in the header; ValueError where the file ends."""

    def __init__(self, memory: mmap.mmap) -> None:
        self.memory, self.at, self.end = memory, 0, len(memory)

    def skip(self, nbytes: int) -> int:
        """Where the next `nbytes` begin, which must be there."""
        if nbytes > self.end - self.at:
            raise ValueError(f"it ends after {self.end} bytes, within its header")
        begin, self.at = self.at, self.at + nbytes
        return begin

    def number(self, code: str) -> Any:
        form = struct.Struct(f"<{code}")
        return form.unpack_from(self.memory, self.skip(form.size))[0]

    def text(self, what: str, most: int) -> str:
        nbytes = self.number("Q")
        begin = self.skip(nbytes)
        if nbytes > most:
            raise ValueError(f"{what} in its header has {nbytes} bytes, and {most} may be")
        return self.memory[begin : begin + nbytes].decode()

    def skip_texts(self, count: int) -> None:
        """So many, of which a tokenizer has hundreds of thousands."""
        memory, at, end, unpack = self.memory, self.at, self.end, _SIZE.unpack_from
        for _ in range(count):
            if at + _SIZE.size > end:
                at = end + 1
                break
            at += _SIZE.size + unpack(memory, at)[0]
        self.skip(at - self.at)

    def value(self, name: str, kind: int, depth: int = 0) -> Any:
        """A field's value; of an array its length."""
        if kind == _STRING:
            return self.text(f"the field {shown(name)}", _TEXT)
        if kind == _ARRAY:
            kind, length = self.number("I"), self.number("Q")
            if kind in _SCALARS:
                self.skip(length * struct.calcsize(f"<{_SCALARS[kind]}"))
            elif kind == _STRING:
                self.skip_texts(length)
            elif kind == _ARRAY and depth < _DEPTH:
                for _ in range(length):
                    self.value(name, kind, depth + 1)
            else:
                raise ValueError(f"the field {shown(name)} in its header is an array of the unknown type {kind}")
            return length
        if kind not in _SCALARS:
            raise ValueError(f"the field {shown(name)} in its header is of the unknown type {kind}")
        return self.number(_SCALARS[kind])


def _parse(cursor: _Cursor) -> tuple[dict[str, Any], dict[str, Entry]]:
    if cursor.memory[cursor.skip(len(MAGIC)) : cursor.at] != MAGIC:
        raise ValueError("it does not begin with 'GGUF', and read are GGUF files, and folders of safetensors files")
    version, tensors, many = cursor.number("I"), cursor.number("Q"), cursor.number("Q")
    if int.from_bytes(version.to_bytes(4, "big"), "little") in VERSIONS:
        raise ValueError("its numbers are big-endian, and little-endian ones are read")
    if version not in VERSIONS:
        raise ValueError(f"it is of version {version}, and versions {' and '.join(map(str, VERSIONS))} are read")
    if tensors > _MANY or many > _MANY:
        raise ValueError(f"its header claims {tensors} tensors and {many} fields, and {_MANY} of each may be")
    fields: dict[str, Any] = {}
    for _ in range(many):
        name = cursor.text("the name of a field", _LONG)
        if name in fields:
            raise ValueError(f"it has the field {shown(name)} twice")
        fields[name] = cursor.value(name, cursor.number("I"))
    alignment = fields.get("general.alignment", _ALIGNMENT)
    if type(alignment) is not int or not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
        raise ValueError(f"its general.alignment is {shown(alignment)}, no power of two up to 2^20")
    entries: dict[str, Entry] = {}
    for _ in range(tensors):
        name, entry = _entry(cursor, alignment)
        if name in entries:
            raise ValueError(f"it has the tensor {shown(name)} twice")
        entries[name] = entry
    return fields, _placed(entries, -(-cursor.at // alignment) * alignment, cursor.end)


def _entry(cursor: _Cursor, alignment: int) -> tuple[str, Entry]:
    """A tensor of the header, whose place is still told from where the tensors begin."""
    name = cursor.text("the name of a tensor", _LONG)
    who = f"the tensor {shown(name)}"
    dims = cursor.number("I")
    if not 1 <= dims <= _DIMS:
        raise ValueError(f"{who} has {dims} dimensions, not 1 to {_DIMS}")
    shape = tuple(cursor.number("Q") for _ in range(dims))[::-1]
    number, offset = cursor.number("I"), cursor.number("Q")
    elements = 1
    for extent in shape:
        elements *= max(extent, 1)
        if elements >= LIMIT:
            raise ValueError(f"{who} has the shape {shown(list(shape))}, which no memory holds")
    kind = _BY_NUMBER.get(number)
    if kind is None:
        called = f" ({UNREAD[number]})" if number in UNREAD else ""
        raise ValueError(f"{who} is of ggml's type {number}{called}, and read are {', '.join(KINDS)}")
    size = KINDS[kind].size
    if shape[-1] % size:
        raise ValueError(f"{who} has rows of {shape[-1]} weights, but blocks of {kind} have {size}")
    if offset % alignment:
        raise ValueError(f"{who} lies at byte {offset}, not at a multiple of {alignment}")
    rows = 0 if 0 in shape else elements // shape[-1]
    return name, Entry(kind, shape, offset, rows * row_nbytes(kind, shape[-1]))


def _placed(entries: dict[str, Entry], begin: int, end: int) -> dict[str, Entry]:
    """The same in places from the start of the file; ValueError where two share bytes, or the file ends before."""
    placed = {name: entry._replace(begin=begin + entry.begin) for name, entry in entries.items()}
    reached, before = begin, ""
    for name, entry in sorted(placed.items(), key=lambda item: (item[1].begin, item[1].nbytes)):
        if entry.begin < reached:
            raise ValueError(f"the tensors {shown(before)} and {shown(name)} share bytes")
        reached, before = entry.begin + entry.nbytes, name
        if reached > end:
            raise ValueError(f"the tensor {shown(name)} should end at byte {reached}, and the file has {end} bytes")
    return placed

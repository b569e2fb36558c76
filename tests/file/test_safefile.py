"""The container: any reader of safetensors reads it, a mapping shares it, a failed write leaves no trace, and a header
that lies is refused."""

import errno
import gc
import json
import os
import resource
import signal
import stat
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import zygote
from forge import forge, join, split
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastlinear.file import safetensors as safefile
from fastlinear.file.safetensors import DTYPES, MAX_BYTES, MAX_DIMS, PAGE, Blob, FormatError

METADATA = {"fastlinear": "{}", "ключ": 'with "quotes"\n'}


def bytes_of(count: int) -> Tensor:
    return torch.arange(count).to(torch.uint8)


def blobs() -> dict[str, Blob]:
    """Below, at and above a page, and none at all."""
    return {f"blob{n}": Blob(n, lambda n=n: bytes_of(n)) for n in (1, PAGE, PAGE + 1, 0, 3 * PAGE - 1)}


def tensors() -> dict[str, Tensor]:
    """Every dtype of the format, every number of dimensions, and memory of every order."""
    numbers = torch.arange(1, 8)
    every = {str(dtype): numbers.to(dtype) for dtype in DTYPES.values()}
    dense = torch.randn(3, 4, 5)
    return every | {
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "transposed": dense.transpose(0, 2),
        "strided": dense[:, ::2],
        "expanded": torch.tensor([1.0]).expand(3),
        "conjugate": torch.randn(3, dtype=torch.complex64).conj(),
        "parameter": torch.nn.Parameter(dense),
    }


def written(path: Path) -> Path:
    safefile.write(path, blobs(), tensors(), METADATA)
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return written(tmp_path / "file.safetensors")


def same(a: Tensor, b: Tensor) -> bool:
    a, b = a.resolve_conj().contiguous(), b.resolve_conj().contiguous()
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8))
    )


# ---- what is written ----


def test_the_safetensors_package_reads_it(file: Path) -> None:
    """Names, dtypes, shapes, values and metadata are what any reader of the format finds."""
    found = safetensors.torch.load_file(file)
    assert found.keys() == {*blobs(), *tensors()}
    assert all(same(found[name], tensor.detach()) for name, tensor in tensors_of(file).items())
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == METADATA


def tensors_of(file: Path) -> dict[str, Tensor]:
    mapped = safefile.open_mapped(file)
    return {name: mapped.tensor(name) for name in mapped.contents.entries}


def test_what_is_mapped_is_what_was_written(tmp_path: Path) -> None:
    """Bit for bit, for every dtype and memory order; as plain contiguous tensors that begin where their dtype may."""
    wanted = tensors()
    safefile.write(tmp_path / "file", blobs(), wanted, METADATA)
    mapped = safefile.open_mapped(tmp_path / "file")
    assert mapped.contents.metadata == METADATA
    for name, tensor in wanted.items():
        found = mapped.tensor(name)
        assert same(found, tensor.detach()), name
        assert found.is_contiguous() and type(found) is Tensor and not found.requires_grad
        assert found.data_ptr() % found.dtype.itemsize == 0
    for name, blob in blobs().items():
        assert bytes(mapped.blob(name, blob.nbytes)) == bytes(bytes_of(blob.nbytes).numpy())


def test_blobs_lie_on_pages_before_all_else(file: Path) -> None:
    """So that they are aligned in memory as in the file; what fills their last page is zero."""
    contents, raw = safefile.read(file), file.read_bytes()
    firsts, rest = ([contents.entries[name] for name in names] for names in (blobs(), tensors()))
    assert all(entry.begin % PAGE == 0 and entry.nbytes % PAGE == 0 for entry in firsts)
    assert max(entry.begin + entry.nbytes for entry in firsts) <= min(entry.begin for entry in rest)
    for entry, blob in zip(firsts, blobs().values(), strict=True):
        assert raw[entry.begin + blob.nbytes : entry.begin + entry.nbytes].strip(b"\0") == b""
    assert torch.frombuffer(safefile.open_mapped(file).blob("blob1", 1), dtype=torch.uint8).data_ptr() % PAGE == 0
    assert contents.entries["blob1"].begin == PAGE


def test_one_blob_is_in_memory_at_a_time(tmp_path: Path) -> None:
    """Each is made when it is its turn and let go before the next: a model is never there twice."""
    alive: list[weakref.ref[Tensor]] = []

    def make() -> Tensor:
        gc.collect()
        assert not any(ref() is not None for ref in alive)
        data = bytes_of(100)
        alive.append(weakref.ref(data))
        return data

    safefile.write(tmp_path / "file", {str(i): Blob(100, make) for i in range(5)}, {}, {})
    assert len(alive) == 5


def test_a_blob_of_another_size_is_no_file(tmp_path: Path) -> None:
    """A weight that is replaced by another while its model is saved is noticed."""
    with pytest.raises(RuntimeError, match="changed its size"):
        safefile.write(tmp_path / "file", {"a": Blob(10, lambda: bytes_of(2 * PAGE))}, {}, {})
    assert not os.listdir(tmp_path)


def test_what_the_format_cannot_hold(tmp_path: Path) -> None:
    """A dtype, a name and a number of names that no reader would take are refused before anything is written."""
    path = tmp_path / "file"
    with pytest.raises(TypeError, match=r"'a' is torch.complex128"):
        safefile.write(path, {}, {"a": torch.zeros(1, dtype=torch.complex128)}, {})
    with pytest.raises(ValueError, match="'__metadata__'"):
        safefile.write(path, {}, {"__metadata__": torch.zeros(1)}, {})
    with pytest.raises(ValueError, match="'a'"):
        safefile.write(path, {"a": Blob(1, lambda: bytes_of(1))}, {"a": torch.zeros(1)}, {})
    with pytest.raises(ValueError, match=str(MAX_BYTES)):
        safefile.write(path, {}, {}, {"long": "x" * MAX_BYTES})
    assert not os.listdir(tmp_path)


# ---- in one step, or not at all ----


def test_a_mapped_file_is_replaced_safely(file: Path) -> None:
    """Who has mapped the old file keeps it, when it is replaced and when it is deleted."""
    mapped = safefile.open_mapped(file)
    before = {name: mapped.tensor(name).clone() for name in tensors()}
    safefile.write(file, {}, {"other": torch.zeros(5)}, {})
    file.unlink()
    assert all(same(mapped.tensor(name), tensor) for name, tensor in before.items())


def failures() -> dict[str, Callable[[pytest.MonkeyPatch], None]]:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def write_fails(patch: pytest.MonkeyPatch, after: int) -> None:
        put, calls = safefile._put, iter(range(after))
        patch.setattr(safefile, "_put", lambda f, t: put(f, t) if next(calls, None) is not None else full())

    steps: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
        f"write {n}": lambda patch, n=n: write_fails(patch, n) for n in (0, 1, 5, 12)
    }
    for step in ("fsync", "replace", "open"):
        steps[step] = lambda patch, step=step: patch.setattr(os, step, full)
    return steps


@pytest.mark.parametrize("step", failures())
@pytest.mark.parametrize("old", [True, False], ids=["over an old file", "new"])
def test_a_full_disk_leaves_what_was_there(tmp_path: Path, step: str, old: bool) -> None:
    """Wherever ENOSPC strikes: the old file or none, and no litter."""
    path = tmp_path / "file"
    if old:
        safefile.write(path, {}, {"old": torch.ones(3)}, {})
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match="No space left"):
        failures()[step](patch)
        written(path)
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before


def test_the_systems_own_limit(file: Path) -> None:
    """A limit that the kernel enforces in the middle of a write: its own error, the old file, no litter."""
    before = file.read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3 * PAGE + 7, limit[1]))
        with pytest.raises(OSError, match="File too large"):
            written(file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert file.read_bytes() == before and os.listdir(file.parent) == [file.name]


def test_an_interrupt_leaves_no_litter(file: Path) -> None:
    """Ctrl-C is no Exception, and cleans up as one."""

    def interrupted() -> Tensor:
        raise KeyboardInterrupt

    before = file.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        safefile.write(file, {"a": Blob(1, interrupted)}, {}, {})
    assert file.read_bytes() == before and os.listdir(file.parent) == [file.name]


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    """A folder in its place, a folder that is not there: the system's error, which names the folder."""
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError, match="folder"):
        written(tmp_path / "folder")
    with pytest.raises(FileNotFoundError, match=r"missing'$"):
        written(tmp_path / "missing" / "file")
    assert os.listdir(tmp_path) == ["folder"] and not os.listdir(tmp_path / "folder")


def test_modes_and_links_stay(file: Path, tmp_path: Path) -> None:
    """A private file stays private, a new one has what the umask leaves, a link goes on pointing to its file."""
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~mask
    file.chmod(0o600)
    link = tmp_path / "link"
    link.symlink_to(file.name)
    safefile.write(link, {}, {"a": torch.zeros(1)}, {})
    assert link.is_symlink() and stat.S_IMODE(file.stat().st_mode) == 0o600
    assert safefile.read(file).entries.keys() == {"a"}


# ---- what is mapped ----


def test_writing_to_a_mapped_tensor_stays_here(file: Path) -> None:
    """A private mapping: neither the file nor another mapping of it changes, even of a file that is read-only."""
    file.chmod(0o400)
    before = file.read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one, other = (safefile.open_mapped(file) for _ in range(2))
        one.tensor("parameter").zero_()
    assert not one.tensor("parameter").any() and other.tensor("parameter").any()
    assert file.read_bytes() == before


def test_a_tensor_keeps_the_mapping_and_no_more(file: Path) -> None:
    """It outlives the object that it came from, and its storage is its own bytes: torch.save writes no whole file."""
    tensor = safefile.open_mapped(file).tensor("parameter")
    gc.collect()
    assert torch.isfinite(tensor).all()
    assert tensor.untyped_storage().nbytes() == tensor.nbytes
    assert mappings(file) == 1
    del tensor
    gc.collect()
    assert mappings(file) == 0


def mappings(file: Path) -> int:
    return Path("/proc/self/maps").read_text().count(str(file))


def test_opening_reads_the_header_alone(tmp_path: Path) -> None:
    """Of 64 MB no page is in memory before it is used, and nothing is allocated for them."""
    path = tmp_path / "file"
    safefile.write(path, {"blob": Blob(64 << 20, lambda: torch.ones(64 << 20, dtype=torch.uint8))}, {}, {})
    mapped = safefile.open_mapped(path)
    blob = torch.frombuffer(mapped.blob("blob", 64 << 20), dtype=torch.uint8)
    resident = next(
        int(line.split()[1])
        for line in Path("/proc/self/smaps").read_text().split(str(path))[1].splitlines()
        if line.startswith("Rss:")
    )
    assert resident == 0 and blob[-1] == 1


# ---- what is refused ----


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="a kernel without huge pages")
def test_a_mapping_asks_for_huge_pages(file: Path) -> None:
    """The kernel's flags of the mapping say so."""
    mapped = safefile.open_mapped(file)
    about = Path("/proc/self/smaps").read_text().split(str(file))[1]
    assert "hg" in next(line for line in about.splitlines() if line.startswith("VmFlags:")).split()
    del mapped


def test_what_is_no_regular_file(tmp_path: Path) -> None:
    """A folder and a missing file give the system's error; a FIFO does not hang, and is no file of ours."""
    with pytest.raises(IsADirectoryError):
        safefile.read(tmp_path)
    with pytest.raises(FileNotFoundError):
        safefile.read(tmp_path / "missing")
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", Path("/dev/zero")):
        with pytest.raises(FormatError, match="no regular file"):
            safefile.read(path)


def test_no_permission(file: Path) -> None:
    """The system's error, for reading and for writing, as a user who is not root."""
    file.chmod(0o600)
    file.parent.chmod(0o755)
    for parent in file.parents[1:3]:  # pytest's own folders are private
        parent.chmod(0o755)
    program = """
import os, sys
from fastlinear.file import safetensors as safefile
if os.getuid() == 0:
    os.setuid(65534)
else:
    os.chmod(sys.argv[1], 0)
    os.chmod(os.path.dirname(sys.argv[1]), 0o500)
for act in (lambda: safefile.read(sys.argv[1]), lambda: safefile.write(sys.argv[1], {}, {}, {})):
    try:
        act()
    except PermissionError as error:
        print("refused", error.filename is not None)
"""
    printed = zygote.checked(program, str(file))
    file.parent.chmod(0o755)
    assert printed.split("\n")[:2] == ["refused True"] * 2


def tensor(dtype: str = "F32", shape: object = (2,), offsets: object = (0, 8), **more: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def headers() -> dict[str, tuple[Any, str]]:
    """Header -> what its refusal says; 16 bytes of tensors follow."""
    rest = tensor(offsets=(8, 16))
    good = {"a": tensor(), "b": rest}
    return {
        "not JSON": ("{", "cannot be loaded"),
        "no object": ("[]", "no JSON object"),
        "two texts": (json.dumps(good) + "{}", "Extra data"),
        "a name twice": (json.dumps(good).replace('"b"', '"a"'), "'a' twice"),
        "a field twice": (json.dumps(good).replace('"shape"', '"dtype"', 1), "'dtype' twice"),
        "metadata twice": ('{"__metadata__": {"x": "1", "x": "2"}}', "'x' twice"),
        "metadata of numbers": ({"__metadata__": {"x": 1}, **good}, "no object of strings"),
        "metadata is a list": ({"__metadata__": ["x"], **good}, "no object of strings"),
        "an entry is a list": ({"a": [], "b": rest}, "has not just dtype"),
        "a field too many": ({"a": tensor(surprise=1), "b": rest}, "has not just dtype"),
        "a field too few": ({"a": {"dtype": "F32", "shape": [2]}, "b": rest}, "has not just dtype"),
        "an unknown dtype": ({"a": tensor("F33"), "b": rest}, "unknown dtype 'F33'"),
        "a dtype that is a list": ({"a": tensor(["F32"]), "b": rest}, "unknown dtype"),
        "a negative extent": ({"a": tensor(shape=[-1, -2]), "b": rest}, "no memory holds"),
        "an extent that is true": ({"a": tensor(shape=[2, True]), "b": rest}, "no memory holds"),
        "an extent that is 2.0": ({"a": tensor(shape=[2.0]), "b": rest}, "no memory holds"),
        "a shape that is text": ({"a": tensor(shape="2"), "b": rest}, "no memory holds"),
        "a shape that overflows": ({"a": tensor(shape=[1 << 32, 1 << 32]), "b": rest}, "no memory holds"),
        "an empty shape that overflows": (
            {"a": tensor(shape=[0, 1 << 40, 1 << 40], offsets=[0, 0]), "b": tensor(shape=[4], offsets=[0, 16])},
            "no memory holds",
        ),
        "a number beyond all": ({"a": tensor(shape=[1 << 64]), "b": rest}, "no memory holds"),
        "a number too long to parse": ('{"a": {"shape": [' + "9" * 5000 + "]}}", "cannot be loaded"),
        "too many dimensions": ({"a": tensor(shape=[1] * MAX_DIMS + [2]), "b": rest}, "no memory holds"),
        "millions of dimensions": ({"a": tensor(shape=[3] * 1_000_000), "b": rest}, "no memory holds"),
        "a shape smaller than its bytes": ({"a": tensor(shape=[1]), "b": rest}, "takes 4 bytes"),
        "a shape larger than its bytes": ({"a": tensor(shape=[3]), "b": rest}, "takes 12 bytes"),
        "offsets backwards": ({"a": tensor(offsets=[8, 0]), "b": rest}, "lies at"),
        "three offsets": ({"a": tensor(offsets=[0, 8, 8]), "b": rest}, "lies at"),
        "negative offsets": ({"a": tensor(offsets=[-8, 0]), "b": rest}, "lies at"),
        "an overlap": ({"a": tensor(), "b": tensor(offsets=[4, 12])}, "overlap at the tensor 'b'"),
        "a tensor over another": ({"a": tensor(), "b": tensor()}, "overlap at the tensor"),
        "a hole": ({"a": tensor(shape=[1], offsets=[0, 4]), "b": rest}, "hole before the tensor 'b'"),
        "a hole at the start": ({"b": rest}, "hole before the tensor 'b'"),
        "bytes left over": ({"a": tensor()}, "should end at byte"),
        "bytes that are not there": ({**good, "c": tensor(offsets=[16, 24])}, "should end at byte"),
        "an odd place": ({"a": tensor("U8", [1], [0, 1]), "b": tensor(shape=[3], offsets=[1, 13])}, "no torch.float32"),
        "deep nesting": ("[" * 100_000, "cannot be loaded"),
        "deep nesting in an entry": ('{"a":' * 50_000, "cannot be loaded"),
        "no text at all": ("", "cannot be loaded"),
    }


@pytest.mark.parametrize("case", headers())
def test_a_header_that_lies_is_refused(tmp_path: Path, case: str) -> None:
    """With a FormatError of one sentence that names the file and the fault."""
    text, said = headers()[case]
    path = tmp_path / "forged.safetensors"
    join(path, json.dumps(text) if not isinstance(text, str) else text, bytes(16))
    with pytest.raises(FormatError) as caught:
        safefile.open_mapped(path)
    message = str(caught.value)
    assert message.startswith(f"'{path}' cannot be loaded: ") and said in message
    assert len(message) < 400 and "\n" not in message


def test_not_utf8(tmp_path: Path) -> None:
    """JSON in another encoding is none, though Python's parser would take UTF-16."""
    path = tmp_path / "file"
    for text in (b'{"\xff": 1}', "{}".encode("utf-16")):
        path.write_bytes(len(text).to_bytes(8, "little") + text)
        with pytest.raises(FormatError):
            safefile.read(path)


@pytest.mark.parametrize("length", [MAX_BYTES + 1, 200 << 20, 1 << 40, (1 << 64) - 1])
@pytest.mark.parametrize("there", [True, False], ids=["there", "claimed"])
def test_a_header_that_is_too_long(tmp_path: Path, length: int, there: bool) -> None:
    """200 MB of it are refused unread, whether the file has them or only says so."""
    path = tmp_path / "file"
    path.write_bytes(length.to_bytes(8, "little") + b"{}")
    if there and length < 1 << 40:
        os.truncate(path, 8 + length)
    with pytest.raises(FormatError, match=f"claims to have {length} bytes"):
        safefile.read(path)


def test_what_we_take_safetensors_takes(tmp_path: Path) -> None:
    """Its package, an implementation of its own, opens whatever we open: nothing is let through that is no safetensors
    file. (The reverse is not so: it takes a name that stands twice.)"""
    path = tmp_path / "file"
    taken = 0
    for text, _ in headers().values():
        join(path, json.dumps(text) if not isinstance(text, str) else text, bytes(16))
        taken += opens(path)
    assert taken == 0
    for edit in (lambda h: None, lambda h: h.update(__metadata__={"fastlinear": ""}), lambda h: h.pop("empty")):
        written(path)
        forge(path, edit)
        assert opens(path)
    header_, data = split(written(path))
    join(path, header_, data + b"\0")
    assert not opens(path)


def opens(path: Path) -> bool:
    """Whether we open it; if so, safetensors must."""
    try:
        safefile.open_mapped(path)
    except FormatError:
        return False
    try:
        with safe_open(path, "pt"):
            return True
    except SafetensorError as error:
        raise AssertionError("we open what safetensors refuses") from error


def test_header_round_trip() -> None:
    """parse() of what build() made gives names, dtypes, shapes, places and metadata back, in order."""
    wanted = [("a", torch.float32, (2, 3)), ("b", torch.bool, ()), ("c", torch.int8, (0, 7))]
    raw, nbytes = safefile.build(wanted, METADATA)
    assert len(raw) % PAGE == 0 and nbytes == 25
    contents = safefile.parse(raw[8:], len(raw), len(raw) + nbytes)
    assert contents.metadata == METADATA
    assert [(name, entry.dtype, entry.shape) for name, entry in contents.entries.items()] == wanted
    assert [entry.begin - len(raw) for entry in contents.entries.values()] == [0, 24, 25]

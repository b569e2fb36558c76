"""fastlinear.layer.pages: of mapped files go the pages that hold nothing but what the file has."""

import mmap
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fastlinear.layer import pages

PAGES = 64


def there(tensor: Tensor) -> int:
    """How many of a tensor's pages are in the memory of this process."""
    with open("/proc/self/pagemap", "rb") as file:
        file.seek(tensor.data_ptr() // mmap.PAGESIZE * 8)
        entries = np.frombuffer(file.read(tensor.nbytes // mmap.PAGESIZE * 8), np.uint64)
    return int((entries >> np.uint64(63)).sum())


def mapped(path: Path, *, shared: bool = False) -> Tensor:
    tensor = torch.from_file(str(path), shared=shared, size=PAGES * mmap.PAGESIZE, dtype=torch.uint8)
    tensor.sum()  # reads them
    assert there(tensor) == PAGES
    return tensor


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "numbers"
    file.write_bytes(os.urandom(PAGES * mmap.PAGESIZE))
    return file


@pytest.mark.parametrize("by_name", [False, True])
def test_what_was_read_comes_again(path: Path, by_name: bool) -> None:
    """Pages go, by their place or by the name of their file, and whoever reads them finds the same."""
    tensor = mapped(path)
    pages.let_go_of_files([str(path)]) if by_name else pages.let_go(tensor)
    assert there(tensor) == 0
    assert tensor.numpy().tobytes() == path.read_bytes()


def test_strided_tensors(path: Path) -> None:
    """Of a view that skips numbers go the pages from the first to the last of them."""
    whole = mapped(path)
    pages.let_go(whole.view(PAGES, mmap.PAGESIZE)[8:16, ::2].t())
    assert there(whole) == PAGES - 8
    pages.let_go(whole[:0])
    assert there(whole) == PAGES - 8


def test_what_was_written_stays(path: Path) -> None:
    """A private mapping has its own page there; a shared one has the file."""
    tensor = mapped(path)
    want = tensor[7] = tensor[7] ^ 255
    pages.let_go(tensor)
    assert there(tensor) == PAGES and tensor[7] == want
    tensor = mapped(path, shared=True)
    want = tensor[7] = tensor[7] ^ 255
    pages.let_go(tensor)
    assert there(tensor) == 0 and tensor[7] == want


def test_other_memory(path: Path) -> None:
    """The heap's stays as it is, and names of files that are not mapped say nothing."""
    tensor = torch.arange(PAGES * mmap.PAGESIZE, device="cpu")
    pages.let_go(tensor)
    pages.let_go_of_files([str(path), "/no/such/file"])
    assert torch.equal(tensor, torch.arange(len(tensor), device="cpu"))

"""The guards themselves: one byte outside kills, everything inside does not, a touched canary is seen."""

import ctypes
import faulthandler
import os
import resource
import signal
from collections.abc import Callable
from typing import Literal

import guard
import pytest
import torch

Edge = Literal["start", "end"]


def _dies_of(action: Callable[[], object]) -> int:
    """The signal that ends a child process which runs `action`, or 0."""
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        action()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) * -1


every_size = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8], ids=str)


@every_size
@pytest.mark.parametrize("stride", [37, 64])
@pytest.mark.parametrize("shape", [(1, 37), (5, 37), (2, 3, 37), (40, 37)], ids=str)
@pytest.mark.parametrize("at", ["start", "end"])
def test_one_byte_outside_is_fatal(at: Edge, shape: tuple[int, ...], stride: int, dtype: torch.dtype) -> None:
    """Reading or writing the first byte past the guarded edge raises SIGSEGV; the last byte inside is fine."""
    values = torch.randn(shape).to(dtype)
    operand = guard.guarded(values, at, stride=stride)
    assert torch.equal(operand, values)
    begin = operand.data_ptr()
    end = begin + dtype.itemsize * (sum((n - 1) * s for n, s in zip(operand.shape, operand.stride(), strict=True)) + 1)
    inside, outside = (begin, begin - 1) if at == "start" else (end - 1, end)
    assert _dies_of(lambda: ctypes.string_at(inside, 1)) == 0
    assert _dies_of(lambda: ctypes.memset(inside, 0, 1)) == 0
    assert _dies_of(lambda: ctypes.string_at(outside, 1)) == signal.SIGSEGV
    assert _dies_of(lambda: ctypes.memset(outside, 0, 1)) == signal.SIGSEGV


@every_size
@pytest.mark.parametrize("at", ["start", "end"])
def test_offset_changes_the_alignment(at: Edge, dtype: torch.dtype) -> None:
    """`offset` moves the operand by single elements, so every alignment modulo 64 bytes is reachable."""
    values = torch.randn(4, 32).to(dtype)
    addresses = {guard.guarded(values, at, offset=offset).data_ptr() % 64 for offset in range(64)}
    assert addresses == set(range(0, 64, dtype.itemsize))


def test_an_empty_operand_is_allowed() -> None:
    """A tensor without elements has no page to lie against; it keeps its shape."""
    assert guard.guarded(torch.empty(3, 0), "end").shape == (3, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int8], ids=str)
@pytest.mark.parametrize("position", [15, 16 + 5, 16 + 7, 16 + 3 * 8, 16 + 3 * 8 + 15])
def test_a_touched_canary_is_seen(position: int, dtype: torch.dtype) -> None:
    """A write before, between or after the rows of an output is found; writes to the output are not."""
    output, intact = guard.canaried(3, 5, stride=8, dtype=dtype)
    output.zero_()
    assert intact()
    output.as_strided((1,), (1,), position).fill_(0.0)
    assert not intact()


def test_sparse_memory_reaches_past_2_to_31() -> None:
    """Ten gigabytes of zeros can be addressed at both ends, at the price of a few pages."""
    flat = guard.sparse(2**31 + 2**29)
    flat[0], flat[-1] = 1.0, 2.0
    assert flat[-1] == 2.0 and flat[2**31] == 0.0 and flat.numel() > 2**31

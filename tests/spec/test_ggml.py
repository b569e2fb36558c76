"""The kinds of ggml: what a block stands for, number for number, as gguf's own dequantization has it."""

import numpy as np
import pytest
import torch
from ggufs import blocks

from fastlinear.spec import ggml
from fastlinear.spec.packed import stands_for

gguf = pytest.importorskip("gguf", reason="gguf is the reference reader")


@pytest.mark.parametrize("kind", ggml.KINDS)
def test_numbers_are_those_of_the_reference(kind: str) -> None:
    """Sizes, numbers and the values of every block of random bytes are gguf's, infinities and NaN included."""
    theirs, ours = gguf.GGMLQuantizationType[kind], ggml.KINDS[kind]
    assert (theirs.value, *gguf.GGML_QUANT_SIZES[theirs]) == (ours.number, ours.size, ours.nbytes)
    torch.manual_seed(0)
    count = 24 if ours.size > 1 else 512
    wild = torch.randint(256, (5, count * ours.nbytes), dtype=torch.uint8)
    tame = blocks(kind, 5, count * ours.size).data.view(5, -1)
    for rows in (wild, tame):
        with np.errstate(all="ignore"):
            expected = torch.from_numpy(np.array(gguf.dequantize(rows.numpy(), theirs)))
        got = stands_for(ggml.unpack(kind, rows)).float()
        assert got.shape == (5, count * ours.size)
        assert torch.equal(got.nan_to_num(1e30), expected.nan_to_num(1e30))


def test_every_code_of_every_kind_is_met() -> None:
    """All values that the codes of a kind have come up in the test's blocks, so that none is right by chance."""
    torch.manual_seed(0)
    for kind, row in ggml.KINDS.items():
        if row.size == 1:
            continue
        unpacked = ggml.unpack(kind, blocks(kind, 5, 24 * row.size).data.view(5, -1))
        codes = unpacked.codes  # type: ignore[union-attr]
        bits = 8 if kind == "Q8_0" else int(kind.removeprefix("I")[1])
        assert len(codes.unique()) == 1 << bits, kind

"""The specification of 4 bits: what codes stand for, and that the search for scales beats plain rounding."""

import itertools

import pytest
import torch
from grouped import WEIGHTS
from torch import Tensor

from fastlinear.spec import grouping, int4
from fastlinear.spec.int4 import TABLES, Coding

CODINGS = [
    Coding(group, table, scales, offsets)
    for (group, table), (scales, offsets) in itertools.product(
        zip((16, 32, 64, 128, 32), (*TABLES.values(), ()), strict=True),
        ((torch.float16, False), (torch.bfloat16, True)),
    )
]
every_coding = pytest.mark.parametrize("coding", CODINGS, ids=lambda coding: coding.layout(str(coding.numbers[0])))


def plain(w: Tensor, coding: Coding) -> Tensor:
    """w as nearest numbers of the table for the scale that takes the largest magnitude of each group to its end."""
    k, out, table = w.shape[1], [], torch.tensor(coding.numbers)
    for begin in range(0, k, coding.group):
        part = w[:, begin : begin + coding.group]
        if coding.offsets:
            scale = (part.amax(1) - part.amin(1)) / (table.max() - table.min())
            offset = (part.amax(1) + part.amin(1)) / 2 - scale * (table.max() + table.min()) / 2
        else:
            largest = part.gather(1, part.abs().argmax(1, keepdim=True))[:, 0]
            scale, offset = largest / (table[table.abs().argmax()]), torch.zeros(len(w))
        scale, offset = scale.to(coding.scales).float(), offset.to(coding.scales).float()
        every = scale[:, None, None] * table + offset[:, None, None]
        out.append(every.expand(-1, part.shape[1], -1).gather(2, (part[..., None] - every).abs().argmin(2)[..., None]))
    return torch.cat(out, 1)[..., 0]


def error(w: Tensor, approximate: Tensor, group: int) -> Tensor:
    """Squared, of each group."""
    return torch.stack([part.square().sum(1) for part in (w - approximate).double().split(group, 1)], 1)


@every_coding
def test_the_search_beats_plain_rounding(coding: Coding) -> None:
    """No group errs more than by plain rounding, and all together at least 5 % less (with codes of 8 bits there is
    less to find), where K ends in a group, too."""
    w = torch.randn(48, 3 * coding.group + 5, generator=torch.Generator().manual_seed(1))
    searched = int4.dequantize(grouping.quantize_weight(w, coding))
    ours, theirs = error(w, searched, coding.group), error(w, plain(w, coding), coding.group)
    assert bool((ours <= theirs * (1 + 1e-5) + 1e-12).all())
    assert float(ours.sum()) < (0.95 if coding.table else 0.99) * float(theirs.sum())


@pytest.mark.costly
@pytest.mark.parametrize("offsets", [False, True])
@pytest.mark.parametrize("scales", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("group", "k"), [(16, 48), (32, 45), (64, 64), (256, 300)])
@pytest.mark.parametrize("table", TABLES)
def test_what_codes_stand_for_is_quantized_to_them(
    table: str, group: int, k: int, scales: torch.dtype, offsets: bool
) -> None:
    """Bit for bit: a weight that was thawed, or loaded from a frozen layer's state dict, is what it was. So says the
    traceable form, too, which looks at all groups."""
    coding = Coding(group, TABLES[table], scales, offsets)
    r = torch.randn(8, k, generator=torch.Generator().manual_seed(k))
    for kind, weight in WEIGHTS.items():
        found = grouping.quantize_weight(weight(r), coding)
        again = grouping.quantize_weight(int4.dequantize(found), coding)
        traced = grouping.quantize_channels(weight(r), coding)
        for name, one, other in zip(("codes", "scale", "offset"), contents(found), contents(again), strict=False):
            assert torch.equal(one, other), (kind, name)
        assert all(map(torch.equal, contents(found), traced)), kind


def contents(coded: int4.Coded) -> list[Tensor]:
    return [t for t in (coded.codes, coded.scale, coded.offset) if t is not None]


@every_coding
def test_what_codes_hold_comes_back(coding: Coding) -> None:
    """Groups of zeros are zeros; with offsets, constant ones are their constant."""
    zeros = grouping.quantize_weight(torch.zeros(3, 40), coding)
    assert not int4.dequantize(zeros).any() and zeros.scale.dtype is coding.scales
    if coding.offsets:
        constant = torch.full((3, 40), 0.75)
        assert torch.equal(int4.dequantize(grouping.quantize_weight(constant, coding)), constant)


def test_a_weight_of_codes_is_found_again() -> None:
    """What is scale * integers of -8 to 7 already loses nothing, whatever the sign of the extreme."""
    integers = torch.randint(-7, 8, (16, 64))
    integers[:, ::32] = torch.tensor([-8, 8]).repeat(8)[:, None].clamp(-8, 8)
    scale = torch.rand(16, 2).half().float() + 0.1
    scale = scale.half().float()
    w = integers * scale.repeat_interleave(32, 1)
    assert torch.equal(int4.dequantize(grouping.quantize_weight(w, Coding())), w)


def test_no_rows_and_no_columns() -> None:
    for shape in ((0, 40), (3, 0)):
        assert int4.dequantize(grouping.quantize_weight(torch.zeros(shape), Coding())).shape == shape


@pytest.mark.parametrize("odd", [torch.nan, torch.inf, -torch.inf])
def test_odd_weights_are_refused(odd: float) -> None:
    w = torch.randn(4, 40)
    w[2, 33] = odd
    with pytest.raises(ValueError, match=r"at \[2, 33\]"):
        grouping.quantize_weight(w, Coding())
    with pytest.raises(ValueError, match=r"torch\.float16 does not hold"):
        grouping.quantize_weight(torch.full((4, 40), 1e7), Coding())


@every_coding
def test_a_coding_is_read_as_it_is_spelled(coding: Coding) -> None:
    assert int4.spelling(coding.spelled()) == coding

"""How a weight becomes codes in groups (spec/int4.py), in plain torch.

The scale of a group is searched for: the codes that each of some scales rounds to, with the scale, and the offset if
there are any, of least squares for those codes; the best of all is kept, and never one that is worse than plain
rounding. Sums over a group are made by halves: the latter half is added to the former until one number is left. So
include/fastlinear/generic/coding.hpp makes them, which finds the same bits. Nothing here is meant for speed.

What codes of 4 bits stand for is quantized to those codes again, bit for bit: numbers that some scale of a few hold
exactly get the first such scale, and what a search has found is spelled by the first that holds it, too. Several may:
of "int4" without -8 its negative, of even codes its double. Those few take the largest magnitude of a group to one of
the larger numbers of the table, or its extremes to numbers near the ends; none of those, and plain rounding is kept; a
group that its offset leaves no bits for becomes that offset.
"""

from __future__ import annotations

import torch
from torch import Tensor

import fastlinear._tensors as _tensors
from fastlinear.spec.int4 import FP8, Coded, Coding, as_tensor, table_in

SHRUNK = (1.05, 0.95, 0.875, 0.8, 0.725)  # scales to begin with, over that of the largest magnitude
_NEAR = 0.6  # of the largest magnitude of the table: the search takes that of a group to no smaller one
_BITS = {torch.bfloat16: 8, torch.float16: 11}  # of scales and offsets; of those in fp32 12
_BLOCK = 1 << 16  # so many numbers are quantized at a time


def quantize_weight(weight: Tensor, coding: Coding) -> Coded:
    """A floating-point weight [N, K] as codes.

    Raises ValueError for infinities and NaN, and for a weight so large that `coding.scales` does not hold its scales.
    """
    w = weight.detach()
    with torch.autocast("cpu", enabled=False):
        parts = [quantize_channels(part, coding, True) for part in w.split(max(1, _BLOCK // max(1, w.shape[1])))]
        codes, scale, *offset = map(torch.cat, zip(*parts, strict=True))
    if not all(bool(each.isfinite().all()) for each in (scale, *offset)):
        odd = (~w.isfinite()).nonzero()
        if len(odd):
            row, column = odd[0].tolist()
            raise ValueError(
                f"a weight with {w[row, column].item()} (at [{row}, {column}]) cannot be quantized in groups"
            )
        raise ValueError(f"a weight of up to {w.abs().max().item():g} has scales that {coding.scales} does not hold")
    table = as_tensor(coding.table) if coding.table else None
    return Coded(codes, scale, table, coding.group, *offset)


def quantize_into(layout: str, weight: Tensor, group: int, offsets: bool = False) -> Coded:
    """The same in the codes that a layout holds, with fp16 scales, for checks of what reads it. Those of fp8, in which
    weights come and which none becomes, are just the nearest under the scale of the largest of a group."""
    coding = Coding(group, table_in(layout), offsets=offsets)
    if _tensors.GROUPED[layout.split("/")[0]] is not FP8:
        return quantize_weight(weight, coding)
    n, k = weight.shape
    w = torch.nn.functional.pad(weight, (0, -k % group)).unflatten(1, (-1, group))
    offset = w.mean(-1).half() if offsets else torch.zeros(n, w.shape[1], dtype=torch.float16, device="cpu")
    w = w - offset[..., None]
    most = torch.finfo(FP8).max
    scale = (w.abs().amax(-1) / most).half()
    codes = (w / scale[..., None].float().clamp_min(2.0**-24)).clamp(-most, most).to(FP8).flatten(1)[:, :k]
    return Coded(codes.contiguous(), scale, None, group, offset if offsets else None)


def quantize_channels(weight: Tensor, coding: Coding, eager: bool = False) -> tuple[Tensor, ...]:
    """The codes uint8 or int8 [..., N, K], scales [..., N, groups] and offsets, if there are any, of `quantize_weight`,
    but unchecked, and traceable unless `eager`, which looks at groups only as long as something is left to be found."""
    k, group = weight.shape[-1], coding.group
    padding = -k % group
    w = torch.nn.functional.pad(weight.float(), (0, padding)).unflatten(-1, (-1, group))
    # Padding counts for nothing; without it there is nothing to leave out. A trace warns of every look at a shape.
    whole = not torch.jit.is_tracing() and padding == 0  # type: ignore[attr-defined,no-untyped-call]
    inside = None if whole else (torch.arange(k + padding, device=w.device).view(-1, group) < k).float()
    table = table_of(coding, w)
    plain, starts = _starts(w, inside, table, coding.offsets)
    fitted = _fitted(w, inside, table, coding, starts)
    first, second = (_rounded(w, inside, table, coding, *each) for each in (plain, fitted))
    found = _where(second[0] < first[0], second[1:], first[1:])
    if coding.table:
        inside = None if inside is None else inside.expand(w.shape)
        found = _spelled(w, inside, table, coding, found, first[1:], eager)
    codes, scale, offset = found
    codes = codes.flatten(-2)[..., :k]
    codes = codes.to(torch.uint8) if coding.table else (codes - 128).to(torch.int8)
    return (codes, scale, offset) if coding.offsets else (codes, scale)


def table_of(coding: Coding, beside: Tensor) -> Tensor:
    """`coding.numbers`, fp32, where `beside` is; one by one, since a trace warns of torch.tensor."""
    if not coding.table:
        return torch.arange(256, dtype=torch.float32, device=beside.device) - 128
    return torch.stack([beside.new_full((), number, dtype=torch.float32) for number in coding.table])


Affine = tuple[Tensor, Tensor]  # scale and offset, [..., groups]


def _starts(w: Tensor, inside: Tensor | None, table: Tensor, offsets: bool) -> tuple[Affine, list[Affine]]:
    """What plain rounding takes, and what a search begins with."""
    low, high = table.min(), table.max()
    if offsets:
        # The first of a group is inside.
        held = w if inside is None else torch.where(inside > 0, w, w[..., :1])
        least, most = held.amin(-1), held.amax(-1)
        scale, middle, between = (most - least) / (high - low), (most + least) / 2, (high + low) / 2
        return (scale, middle - scale * between), [(scale * f, middle - scale * f * between) for f in SHRUNK]
    # The largest magnitude goes to that end of the table which is the farther one, by a negative scale if need be.
    most, least = w.amax(-1), w.amin(-1)
    scale = torch.where(most >= -least, most, least) / torch.where(-low >= high, low, high)
    zero = torch.zeros_like(scale)
    return (scale, zero), [(scale * f, zero) for f in SHRUNK]


def _fitted(w: Tensor, inside: Tensor | None, table: Tensor, coding: Coding, starts: list[Affine]) -> Affine:
    """Of the codes that each start rounds to, with the scale and offset of least squares, what errs least."""
    count = w.shape[-1] if inside is None else inside.sum(-1)
    mean_w = _total(w) / count if coding.offsets else torch.zeros_like(w[..., 0])
    best_gain = best = None
    for scale, offset in starts:
        t = _nearest(_steps(w, scale, offset), table, coding)
        t = t if inside is None else t * inside
        mean_t = _total(t) / count if coding.offsets else mean_w
        square = _total(t * t) - count * mean_t * mean_t
        product = _total(t * w) - count * mean_t * mean_w
        varies = square > 0
        found = torch.where(varies, product / square, scale)
        gain = torch.where(varies, product * found, 0.0)  # by which the squared error is below that of the mean
        fit = found, mean_w - found * mean_t
        if best is None or best_gain is None:
            best, best_gain = fit, gain
        else:
            more = gain > best_gain
            best_gain = torch.where(more, gain, best_gain)
            best = torch.where(more, fit[0], best[0]), torch.where(more, fit[1], best[1])
    assert best is not None
    return best


Spelling = tuple[Tensor, Tensor, Tensor]  # codes int32 [..., groups, group], and scale and offset as they are held


def _rounded(
    w: Tensor, inside: Tensor | None, table: Tensor, coding: Coding, scale: Tensor, offset: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Squared error [..., groups], and the spelling."""
    scale, offset = _held(scale, offset, coding)
    codes = _codes(_steps(w, scale.float(), offset.float()), table, coding)
    error = w - _stands_for(table, (codes, scale, offset))
    return _total((error if inside is None else error * inside).square()), codes, scale, offset


def _held(scale: Tensor, offset: Tensor, coding: Coding) -> Affine:
    """Scale and offset in `coding.scales`, with no more bits than the numbers of a group tell again: 12 of fp32, no
    offset that is lost in the largest of them, no scale that is lost in an offset."""
    far, span = max(map(abs, coding.numbers)), max(coding.numbers) - min(coding.numbers)
    if coding.scales is torch.float32:
        scale, offset = (t * 4097 - (t * 4097 - t) for t in (scale, offset))  # Dekker 1971
    scale, offset = scale.to(coding.scales), offset.to(coding.scales)
    if not coding.offsets or not coding.table:
        return scale, offset
    reach, least = scale.float().abs(), offset.float().abs()
    more = finer(coding)
    scale = torch.where(least > reach * span * more, 0.0, scale)
    return scale, torch.where(least < reach * far / more, 0.0, offset)


def finer(coding: Coding) -> float:
    """How much more fp32 tells than scales and offsets, but for two roundings."""
    return float(2.0 ** (21 - _BITS.get(coding.scales, 12)))


def _stands_for(table: Tensor, spelling: Spelling) -> Tensor:
    codes, scale, offset = spelling
    return scale.float()[..., None] * _take(table, codes) + offset.float()[..., None]


def _where(chosen: Tensor, first: Spelling, second: Spelling) -> Spelling:
    """Of each group."""
    codes, scale, offset = (
        torch.where(chosen if a.dim() == chosen.dim() else chosen[..., None], a, b)
        for a, b in zip(first, second, strict=True)
    )
    return codes, scale, offset


def _spelled(
    w: Tensor, inside: Tensor | None, table: Tensor, coding: Coding, found: Spelling, plain: Spelling, eager: bool
) -> Spelling:
    """What was found, or plain rounding, spelled by the first scale that holds it; or w, if some scale holds that."""

    def exact(values: Tensor, inside: Tensor | None, least: int = 0) -> tuple[Tensor, Spelling]:
        starts = _ends(values, inside, coding)
        if eager and least:  # what no scale holds shows at the first numbers
            few = None if inside is None else inside[..., :least]
            likely, _ = _exact(values[..., :least], few, table, coding, starts, eager)
            if not bool(likely.any()):
                return likely, found
        return _exact(values, inside, table, coding, starts, eager)

    held, again = exact(_stands_for(table, found), inside)
    if not eager or not bool(held.all()):
        of_plain, plainly = exact(_stands_for(table, plain), inside)
        if coding.offsets:  # what is not told again then is lost in the offset, or finer than scales are
            middle = plain[2].float() + plain[1].float() * (table.max() + table.min()) / 2
            _, *level = _rounded(w, inside, table, coding, torch.zeros_like(middle), middle)
            plain = level[0], level[1], level[2]
        again = _where(held, again, _where(of_plain, plainly, plain))
    own, spelled = exact(w, inside, 8)
    return again if eager and not bool(own.any()) else _where(own, spelled, again)


def ends_of(coding: Coding) -> list[tuple[float, float]]:
    """Numbers of the table, one or two, to which the extremes of a group may have been taken: with offsets how far the
    two are apart and the upper one, else the one and 0."""
    numbers = sorted({*coding.numbers})
    if coding.offsets:
        pairs = ((0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (2, 0))
        return [(numbers[-1 - high] - numbers[low], numbers[-1 - high]) for low, high in pairs]
    far = max(map(abs, numbers))

    def is_like_its_negative(number: float) -> bool:
        return number > 0 and all(-each in numbers for each in numbers if abs(each) <= number)

    ends = [each for each in numbers if abs(each) >= _NEAR * far and not is_like_its_negative(each)]
    return [(end, 0.0) for end in sorted(ends, key=lambda end: (-abs(end), end))]


def _ends(w: Tensor, inside: Tensor | None, coding: Coding) -> list[Affine]:
    """The scales and offsets that take the extremes of a group to those."""
    if coding.offsets:
        held = w if inside is None else torch.where(inside > 0, w, w[..., :1])
        least, most = held.amin(-1), held.amax(-1)
        found = []
        for apart, upper in ends_of(coding):
            scale = (most - least) / apart
            scale = torch.where(scale == 0, scale, _held(scale, most, coding._replace(offsets=False))[0].float())
            found.append((scale, most - scale * upper))
        return found
    masked = w if inside is None else w * inside
    most, least = masked.amax(-1), masked.amin(-1)
    extreme = torch.where(most >= -least, most, least)
    return [(extreme / end, torch.zeros_like(extreme)) for end, _ in ends_of(coding)]


def _exact(
    w: Tensor, inside: Tensor | None, table: Tensor, coding: Coding, starts: list[Affine], eager: bool
) -> tuple[Tensor, Spelling]:
    """Which groups some start holds without an error, and the spelling by the first that does."""
    error, *spelled = _rounded(w, inside, table, coding, *starts[0])
    fits, spelling = error == 0, (spelled[0], spelled[1], spelled[2])
    if len(starts) == 1 or (eager and bool(fits.all())):
        return fits, spelling
    if not eager:
        others, more = _exact(w, inside, table, coding, starts[1:], eager)
        return fits | others, _where(fits, spelling, more)
    rest = ~fits
    starts = [(scale[rest], offset[rest]) for scale, offset in starts[1:]]
    others, more = _exact(w[rest], None if inside is None else inside[rest], table, coding, starts, eager)
    for to, of in zip((fits, *spelling), (others, *more), strict=True):
        to[rest] = of
    return fits, spelling


def _total(numbers: Tensor) -> Tensor:
    """The sums along the last dimension, a power of two."""
    while (half := numbers.shape[-1] // 2) > 0:
        numbers = numbers[..., :half] + numbers[..., half:]
    return numbers[..., 0]


def _steps(w: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """w in the units of the table; 0 where the scale is."""
    return (w - offset[..., None]) * torch.where(scale == 0, 0.0, 1 / scale)[..., None]


def _nearest(steps: Tensor, table: Tensor, coding: Coding) -> Tensor:
    """The nearest numbers of the table."""
    if coding.is_even:
        return torch.round(steps).clamp(coding.numbers[0], coding.numbers[-1])
    return _take(table, _codes(steps, table, coding))


def _codes(steps: Tensor, table: Tensor, coding: Coding) -> Tensor:
    """The codes, int32, of the numbers of the table that are nearest."""
    if coding.is_even:
        nearest = torch.round(steps.nan_to_num(0.0)).clamp(coding.numbers[0], coding.numbers[-1])
        return (nearest - coding.numbers[0]).int()
    order = table.argsort(stable=True)
    ascending = table[order]
    places = torch.bucketize(steps, (ascending[1:] + ascending[:-1]) / 2, out_int32=True)
    return _take(order.int(), places)


def _take(table: Tensor, codes: Tensor) -> Tensor:
    return table.index_select(0, codes.flatten()).view(codes.shape)

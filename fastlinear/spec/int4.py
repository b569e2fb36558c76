"""What weights in groups mean here, in plain torch: the specification that packs and kernels follow.

A weight [N, K] is codes of 4 bits, a table of 16 numbers, and for each channel and group of consecutive k a scale and
perhaps an offset:

    W[n, k] = scale[n, g] * table[code[n, k]] + offset[n, g],    g = k // group

in fp32, the product and the sum each rounded. Groups may be of other k than consecutive ones: then the columns of codes
have an order, and column j is that of x[order[j]] (GPTQ's desc_act). Codes of 8 bits are integers from -128 to 127, or
fp8 (float8_e4m3fn, but no NaN), and need no table. The last group ends where K does. Products are those of x and W;
where they are of bf16, W is rounded to that first.

Scales and offsets are floats; or integers of 8 or 6 bits, each of which is to be multiplied by an fp16 that 256
consecutive k share, which fp32 holds exactly. How a weight becomes codes stands in spec/grouping.py. Nothing here is
meant for speed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

import fastlinear._tensors as _tensors
import fastlinear._weights as _weights
from fastlinear.spec.int8 import TINY

# nf4: Dettmers et al. 2023, arXiv:2305.14314, appendix E; fp4: Open Compute Project, Microscaling Formats (MX) v1.0,
# section 5.3.3; iq4_nl: ggml's kvalues_iq4nl.
ROW_KINDS = ("groups", "symmetric")
TABLES: dict[str, tuple[float, ...]] = {
    "int4": tuple(map(float, range(-8, 8))),
    "nf4": (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
    "fp4": (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0),
    "iq4_nl": tuple(map(float, (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113))),
}
_BYTES = tuple(map(float, range(-128, 128)))
FP8 = torch.float8_e4m3fn
SUPER = _tensors.SUPER  # k that share the upper level of scales of two


class Coding(NamedTuple):
    """How a weight becomes codes. group: k that share a scale, a power of two from 16 on; table: 16 numbers, or none
    for integers of 8 bits; scales: the dtype of scales and offsets (a key of `_tensors.SCALES`, of which torch.int8 and
    torch.uint8 are those of two levels); offsets: whether there are any."""

    group: int = 32
    table: tuple[float, ...] = TABLES["int4"]
    scales: torch.dtype = torch.float16
    offsets: bool = False

    @property
    def is_even(self) -> bool:
        """Whether rounding finds the nearest number of the table: neighbors are 1 apart."""
        return all(number == self.numbers[0] + i for i, number in enumerate(self.numbers))

    @property
    def numbers(self) -> tuple[float, ...]:
        """What codes from 0 on stand for, those of 8 bits being counted from -128."""
        return self.table or _BYTES

    def layout(self, base: str) -> str:
        """The layout of such a weight in panels of `base`."""
        return f"{base}:{self.group}:{_tensors.SCALES[self.scales]}" + ":offsets" * self.offsets

    @property
    def is_whole(self) -> bool:
        """Whether what codes stand for is integers of 8 bits, or halves of such, as integer products want it."""
        return any(all((n * by).is_integer() and -128 <= n * by <= 127 for n in self.numbers) for by in (1, 2))

    def spelled(self) -> str:
        """One string for it, which `spelling` reads."""
        return " ".join([self.layout(""), *(float(number).hex() for number in self.table)])


def spelling(spelled: str) -> Coding:
    """What `Coding.spelled` wrote."""
    layout, *table = spelled.split(" ")
    return _of_layout(layout, tuple(map(float.fromhex, table)))


def as_tensor(table: tuple[float, ...]) -> Tensor:
    """A table as kernels and packs take it."""
    return torch.tensor(table, dtype=torch.float32, device="cpu")


def table_in(layout: str) -> tuple[float, ...]:
    """A table for weights packed in this layout: "int4", or none for codes of 8 bits."""
    return TABLES["int4"] if layout.startswith("int4") else ()


def coding_of(packed: _weights.Packed) -> Coding | None:
    """That of a packed weight; None for one that is not in groups, or of fp8, which no weight becomes."""
    if not packed.grouped or packed.dtype is FP8:
        return None
    return _of_layout(packed.layout, () if packed.table is None else tuple(packed.table.tolist()))


def _of_layout(layout: str, table: tuple[float, ...]) -> Coding:
    _, group, scales, *more = layout.split(":")
    dtype = next(dtype for dtype, name in _tensors.SCALES.items() if name == scales)
    return Coding(int(group), table, dtype, "offsets" in more)


@dataclass(frozen=True, eq=False)
class Coded:
    """A weight in groups.

    codes: uint8 [N, K], from 0 to 15, and what they stand for in `table`, fp32 [16]; or, without a table, int8 or
        torch.float8_e4m3fn, of which none is NaN.
    scale: [N, ceil(K / group)], of fp32, bf16, fp16 or torch.float8_e8m0fnu; or integers, int8 or uint8 up to 63, which
        are to be multiplied by `supers`, fp16 [N, ceil(K / 256)]. Groups have at most 256 k then, those of uint8 32.
    group: k that share a scale, a power of two from 16 on.
    order: int32 [K], the number in x of each column of codes; None where that is its own.
    offset: like scale, or None for 0. With two levels its own fp16 stand in `supers` behind those of the scales, [N, 2
        * ceil(K / 256)] in all.
    """

    codes: Tensor
    scale: Tensor
    table: Tensor | None
    group: int
    offset: Tensor | None = None
    supers: Tensor | None = None
    order: Tensor | None = None

    @property
    def coding(self) -> Coding:
        """How a weight would become this; of fp8, which none does, it is all but the codes."""
        table = () if self.table is None else tuple(self.table.tolist())
        return Coding(self.group, table, self.scale.dtype, self.offset is not None)

    @property
    def packed(self) -> str:
        """The format that it is packed in."""
        return next(name for name, dtype in _tensors.GROUPED.items() if dtype is self.codes.dtype)

    def layout(self, base: str) -> str:
        """The layout of this weight in panels of `base`."""
        return self.coding.layout(base) + ":ordered" * (self.order is not None)

    def channels(self, every: int) -> Coded:
        """The first channel and each `every`-th after it."""
        offset, supers = (t if t is None else t[::every] for t in (self.offset, self.supers))
        return replace(self, codes=self.codes[::every], scale=self.scale[::every], offset=offset, supers=supers)

    def contents(self) -> tuple[Tensor | None, ...]:
        """As _weights.Packed takes it, behind the layout or the codes: scale, zero, table, offset, supers, order."""
        return self.scale, None, self.table, self.offset, self.supers, self.order


def coded_of(packed: _weights.Packed) -> Coded:
    """What a pack in groups was made of."""
    group = int(packed.layout.split(":")[1])
    assert packed.scale is not None
    return Coded(packed.unpack(), packed.scale, packed.table, group, packed.offset, packed.supers, packed.order)


def dequantize(weight: Coded) -> Tensor:
    """The weight [N, K] that this stands for, in fp32."""
    return _in_order(weight, _numbers(weight), *scales_of(weight))


def _numbers(weight: Coded) -> Tensor:
    """What the codes stand for, fp32."""
    return weight.codes.float() if weight.table is None else weight.table[weight.codes.long()]


def _in_order(weight: Coded, numbers: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
    """scale * number + offset of the columns of x one after another."""
    k = numbers.shape[-1]
    scaled = _spread(scale, weight.group, k) * numbers
    values = scaled if offset is None else scaled + _spread(offset, weight.group, k)
    return values if weight.order is None else values[..., weight.order.long().argsort()]


def scales_of(weight: Coded) -> tuple[Tensor, Tensor | None]:
    """Scales and offsets [..., N, groups] in fp32, those of two levels multiplied."""
    scale, offset = weight.scale.float(), None if weight.offset is None else weight.offset.float()
    if weight.supers is None:
        return scale, offset
    supers = weight.supers.float().chunk(1 if offset is None else 2, -1)
    per, groups = SUPER // weight.group, scale.shape[-1]
    scale = scale * _spread(supers[0], per, groups)
    return scale, None if offset is None else offset * _spread(supers[1], per, groups)


def magnitudes(weight: Coded) -> Tensor:
    """|scale * number| + |offset| of each of its numbers, [N, K], in fp32: what sums made by groups err by."""
    scale, offset = scales_of(weight)
    return _in_order(weight, _numbers(weight).abs(), scale.abs(), None if offset is None else offset.abs())


def _spread(values: Tensor, group: int, k: int) -> Tensor:
    """[..., groups] -> [..., K], in fp32."""
    return values.float()[..., torch.arange(k, device=values.device) // group]


def quantize_rows(x: Tensor, group: int, kind: str) -> tuple[Tensor, Tensor]:
    """Rows of x [..., K] as (u int8 [..., K], scale fp32 [..., groups]), x ~ scale * u; traceable.

    kind: "groups", each scaled by its own largest magnitude, which becomes 127, or "symmetric", all by the row's. A
    scale below 2^-126 is 0; one of a group, or a row, with an infinity or NaN is NaN, and its u are 0.
    """
    k = x.shape[-1]
    padded = torch.nn.functional.pad(x.float(), (0, -k % group)).unflatten(-1, (-1, group))
    most = padded.abs().amax(-1)
    if kind == "symmetric":
        most = torch.where(most.isnan().any(-1, True), math.nan, most.amax(-1, True)).expand(most.shape)
    scale = most / 127
    whole = (scale >= TINY) & scale.isfinite()
    scale = torch.where(whole | (scale < TINY), torch.where(whole, scale, 0.0), math.nan)
    steps = torch.round((padded * scale.reciprocal()[..., None]).clamp(-127, 127))
    u = torch.where(whole[..., None], steps, 0.0).flatten(-2)[..., :k]
    return u.to(torch.int8), scale


def dequantize_rows(u: Tensor, scale: Tensor, group: int) -> Tensor:
    """The rows [..., K] that the result of `quantize_rows` stands for, in fp32."""
    return _spread(scale, group, u.shape[-1]) * u.float()


def linear(x: Tensor, weight: Coded, kind: str) -> Tensor:
    """y [M, N] of integer products: those of each group are summed exactly, and then in fp32, one group after another,

        y = fma(float(sum_k u code) * scale_w, scale_x, y)    and with offsets    y = fma(scale_x * sum_k u, offset, y)

    Numbers of the table that are halves are taken twice, and scale_x half.
    """
    x = x if weight.order is None else x[:, weight.order.long()]
    u, scale_x = quantize_rows(x, weight.group, kind)
    numbers = _numbers(weight).double()
    unit = 1.0 if bool((numbers == numbers.round()).all()) else 0.5
    scale_w, offset = scales_of(weight)
    y = x.new_zeros(len(x), len(numbers), dtype=torch.float32)
    for g in range(scale_x.shape[1]):
        us, ns = (t[:, g * weight.group : (g + 1) * weight.group] for t in (u.double(), numbers / unit))
        products = (us @ ns.t()).float() * scale_w[:, g]
        y = (products.double() * (scale_x[:, g : g + 1] * unit).double() + y.double()).float()
        if offset is not None:
            of_x = scale_x[:, g : g + 1] * us.sum(1, keepdim=True).float()
            y = (of_x.double() * offset[:, g].double() + y.double()).float()
    return y


def is_table(numbers: tuple[float, ...]) -> bool:
    """Whether codes can stand for these."""
    finite = all(a == a and abs(a) < 1e30 for a in numbers)
    return len(numbers) == 16 and finite and len({*numbers}) > 1

"""What the instructions compute, one number after another, in exact fractions rounded once: the emulator's oracle.

Numbers are Python floats, which hold all of fp32, bf16 and fp16.
"""

import math
import struct
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple


class Format(NamedTuple):
    """A binary format: digits of the significand, exponents of the smallest and largest normal number."""

    digits: int
    least: int
    greatest: int


FP32, FP16 = Format(24, -126, 127), Format(11, -14, 15)
NAN = math.nan


def of_bf16(bits: int) -> float:
    return float(struct.unpack("<f", struct.pack("<I", bits << 16))[0])


def of_fp16(bits: int) -> float:
    return float(struct.unpack("<e", struct.pack("<H", bits))[0])


def of_fp32(bits: int) -> float:
    return float(struct.unpack("<f", struct.pack("<I", bits))[0])


def nearest(x: Fraction, format: Format, flush: bool) -> float:
    """x, not 0, rounded to the nearest number of the format, ties to even; a denormal result is 0 if `flush`."""
    sign = -1.0 if x < 0 else 1.0
    exponent = abs(x.numerator).bit_length() - x.denominator.bit_length()  # of the leading digit, or one too many
    exponent -= abs(x) < Fraction(2) ** exponent
    place = exponent if flush else max(exponent, format.least)
    unit = Fraction(2) ** (place - format.digits + 1)
    rounded = round(abs(x) / unit) * unit  # Python rounds fractions to the nearest, ties to even
    if rounded >= Fraction(2) ** (format.greatest + 1):
        return sign * math.inf
    return sign * (0.0 if flush and rounded < Fraction(2) ** format.least else float(rounded))


def daz(x: float, format: Format) -> float:
    return math.copysign(0.0, x) if abs(x) < 2.0**format.least else x


def fma(a: float, b: float, c: float, format: Format = FP32, flush: bool = True) -> float:
    """a * b + c, rounded once; denormals are zeros, before and after, if `flush`."""
    if flush:
        a, b, c = (daz(x, format) for x in (a, b, c))
    if math.isnan(a) or math.isnan(b) or math.isnan(c):
        return NAN
    if math.isinf(a) or math.isinf(b):
        return a * b + c  # an infinity or NaN, the same in every format
    if math.isinf(c):
        return c
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    if exact == 0:
        zero = math.copysign(1.0, a) * math.copysign(1.0, b) * 0.0
        return zero + c if a == 0 or b == 0 else 0.0
    return nearest(exact, format, flush)


Matrix = list[list[float]]


def dot_of_pairs(c: Matrix, a: Matrix, b: Matrix) -> Matrix:
    """TDPBF16PS and TDPFP16PS: c [M, N] + a [M, 2K] @ b [K, 2N], whose columns lie in pairs of even and odd k."""
    result = []
    for row, sums in zip(a, c, strict=True):
        out = []
        for n, before in enumerate(sums):
            even = odd = 0.0
            for k, pairs in enumerate(b):
                even = fma(row[2 * k], pairs[2 * n], even)
                odd = fma(row[2 * k + 1], pairs[2 * n + 1], odd)
            out.append(fma(1.0, before, fma(1.0, even, odd)))
        result.append(out)
    return result


Bytes = list[list[int]]


def dot_of_quads(c: Bytes, a: Bytes, b: Bytes, of_a: Callable[[int], int], of_b: Callable[[int], int]) -> Bytes:
    """TDPB??D: c [M, N] + a [M, 4K] @ b [K, 4N], modulo 2^32; `of_a`, `of_b` tell what a byte means."""

    def sum_of(row: list[int], n: int) -> int:
        return sum(of_a(row[4 * k + i]) * of_b(b[k][4 * n + i]) for k in range(len(b)) for i in range(4))

    rows = zip(a, c, strict=True)
    return [[(before + sum_of(row, n)) % 2**32 for n, before in enumerate(sums)] for row, sums in rows]

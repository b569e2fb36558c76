"""Packing is a copy: every bit comes back, padding is zero, and the panels lie as pack.hpp draws them."""

import itertools
import math
from typing import Literal

import guard
import native
import pytest
import torch
from torch import Tensor

import fastlinear._weights as _weights
from fastlinear._weights import Packed

every_layout = pytest.mark.parametrize(
    ("layout", "dtype", "nr", "kr"), native.LAYOUTS, ids=[name for name, *_ in native.LAYOUTS]
)


def any_bits(dtype: torch.dtype, *shape: int) -> Tensor:
    """All kinds of numbers: NaN with payloads, infinities, denormals, -0."""
    values = native.of_bits(torch.randint(-(2**31), 2**31, shape), dtype)
    if not dtype.is_floating_point:
        return values
    infinity = native.bits(torch.tensor(torch.inf, dtype=dtype))
    special = native.of_bits(torch.tensor([infinity + 1, infinity - 1, infinity, -1, 1]), dtype)
    special = torch.cat([special, torch.tensor([-0.0], dtype=dtype)])
    flat = values.flatten()
    flat[: len(special)] = special[: len(flat)]
    return values


def panels(w: Tensor, nr: int, kr: int) -> Tensor:
    """What pack.hpp promises: W[p * nr + j, g * kr + i] at [p, g, j, i], zeros beyond W."""
    n, k = w.shape
    count, groups = math.ceil(n / nr), math.ceil(k / kr)
    padded = torch.zeros(count * nr, groups * kr, dtype=w.dtype)
    padded[:n, :k] = w
    return padded.reshape(count, nr, groups, kr).transpose(1, 2)


def beside(layout: str, n: int) -> dict[str, Tensor]:
    """What a weight of n channels in this layout may have beside its values, with all kinds of numbers."""
    scale, zero = torch.rand(n), torch.randint(-128, 128, (n,), dtype=torch.int32)
    zero[:1] = 127  # there is one, where there are channels
    named = {"int8": {"scale": scale, "zero": zero}, "w8f": {"scale": scale}}
    return named.get(layout.split("/")[0], {})


@every_layout
def test_every_bit_comes_back(layout: str, dtype: torch.dtype, nr: int, kr: int) -> None:
    """unpack(pack(w)) is w, and the panels are the documented ones, for sizes around the panel, on 1 and 2 threads."""
    sizes_n = sorted({0, 1, 2, nr - 1, nr, nr + 1, 2 * nr, 17 * nr + 3})
    sizes_k = sorted({0, 1, kr - 1, kr, kr + 1, 15, 16, 17, 97})
    for n, k, threads in itertools.product(sizes_n, sizes_k, (1, 2)):
        torch.set_num_threads(threads)
        w = any_bits(dtype, n, k)
        channels = beside(layout, n)
        packed = Packed(w, layout, **channels)
        assert (packed.n, packed.k, packed.layout) == (n, k, layout)
        assert (packed.dtype, packed.format) == (dtype, layout.split("/")[0])
        padded, arrays = math.ceil(n / nr) * nr, {"int8": 3, "w8f": 1}.get(packed.format, 0)
        in_panels = dtype.itemsize * padded * math.ceil(k / kr) * kr
        assert packed.nbytes == packed.data.nbytes == in_panels + 4 * arrays * padded
        assert packed.nbytes == _weights.packed_nbytes(layout, n, k)
        assert native.same_bits(packed.unpack(), w)
        assert native.same_bits(packed.data[:in_panels].view(dtype), panels(w, nr, kr).flatten())
        behind = packed.data[in_panels:].view(torch.int32).reshape(arrays, padded)
        assert not behind[:, n:].any()  # padding is 0, and so are its scales, sums and zero points
        other = Packed.over(packed.data.clone().numpy(), layout, n, k)
        for read in (packed, other, packed.head(n)):
            for name, values in {"scale": read.scale, "zero": read.zero}.items():
                if name in channels and (n > 0 or name == "scale"):  # of no channels it has none, but has them
                    assert native.same_bits(values, channels[name])
                else:
                    assert values is None
        if packed.format == "int8":
            assert torch.equal(behind[1, :n], w.int().sum(1, dtype=torch.int32))


@every_layout
def test_weights_with_any_strides(layout: str, dtype: torch.dtype, nr: int, kr: int) -> None:
    """Transposed, sliced, stepped, expanded and misaligned weights pack as their contiguous copies do."""
    n, k = nr + 5, 2 * kr + 19
    channels = beside(layout, n)
    weights = {
        "transposed": any_bits(dtype, k, n).T,
        "sliced": any_bits(dtype, n + 3, k + 5)[2:-1, 4:-1],
        "stepped": any_bits(dtype, 2 * n, 3 * k)[::2, ::3],
        "one row expanded": any_bits(dtype, 1, k).expand(n, k),
        "one column expanded": any_bits(dtype, n, 1).expand(n, k),
        "misaligned": any_bits(dtype, 1, n * k + 1)[0, 1:].view(n, k),
        "a parameter": torch.nn.Parameter(any_bits(dtype, n, k), requires_grad=False),
    }
    for name, w in weights.items():
        packed = Packed(w, layout, **channels)
        assert native.same_bits(packed.unpack(), w.detach()), name
        assert torch.equal(packed.data, Packed(w.detach().contiguous(), layout, **channels).data), name


@every_layout
def test_packing_reads_the_weight_alone(layout: str, dtype: torch.dtype, nr: int, kr: int) -> None:
    """A weight flush against forbidden pages, with and without gaps between its rows, packs without a fault."""
    w = any_bits(dtype, nr + 1, 17 * kr + 1)
    channels = beside(layout, len(w))

    def action(note: native.Note) -> None:
        edges: tuple[Literal["start", "end"], ...] = ("start", "end")
        for at, gap, transposed in itertools.product(edges, (0, 5), (False, True)):
            note(f"at its {at}, gap {gap}, transposed {transposed}")
            source = w.T.contiguous() if transposed else w
            near = guard.guarded(source, at, stride=source.shape[1] + gap)
            fenced = {name: guard.guarded(values, at) for name, values in channels.items()}
            packed = Packed(near.T if transposed else near, layout, **fenced)
            assert native.same_bits(packed.unpack(), w)
            assert torch.equal(packed.data, Packed(w, layout, **channels).data)

    native.in_child(action)


@every_layout
def test_head_is_the_first_panels(layout: str, dtype: torch.dtype, nr: int, kr: int) -> None:
    """head(n): at least n channels in whole panels, at most what there is; the same memory, the same weights."""
    w = any_bits(dtype, 3 * nr + 5, 7)
    channels = beside(layout, len(w))
    packed = Packed(w, layout, **channels)
    for n, expected in {0: 0, 1: nr, nr: nr, nr + 1: 2 * nr, 3 * nr + 1: len(w), len(w): len(w), 10**6: len(w)}.items():
        head = packed.head(n)
        assert (head.n, head.k, head.layout) == (expected, 7, layout)
        assert head.data.data_ptr() == packed.data.data_ptr() or head.n == 0
        assert native.same_bits(head.unpack(), w[:expected])
        for name in channels if expected else ():
            assert native.same_bits(getattr(head, name), channels[name][:expected])


@native.every_kernel
def test_a_head_computes_the_first_columns(kernel: native.Kernel) -> None:
    """A product with head(n) has the bits of the first columns of the whole product."""
    nr = kernel["nr"]
    x, w, _ = native.random_case(kernel["mr"] + 1, 5 * nr + 3, 33, kernel["dtypes"][0])
    packed = native.pack(w, kernel["layout"])
    whole = native.product(kernel, packed, x, None, (), 1, 1, torch.empty(len(x), packed.n))
    for panels_wanted in range(1, 7):
        head = packed.head(panels_wanted * nr)
        assert head.dtype == packed.dtype
        out = native.product(kernel, head, x, None, (), 1, 1, torch.empty(len(x), head.n))
        assert native.same_bits(out, whole[:, : head.n])


@every_layout
def test_a_pack_outlives_its_weight(layout: str, dtype: torch.dtype, nr: int, kr: int) -> None:
    """The panels, and a head of them, are their own memory: they do not follow or need the weight."""
    w = any_bits(dtype, nr + 1, 9)
    copy, head = w.clone(), native.pack(w, layout).head(1)
    w.zero_()
    assert native.same_bits(head.unpack(), copy[:nr])

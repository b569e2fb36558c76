"""What holds to the last bit: integer sums, repetition, any threads, any batch, and what algebra says of one kernel.

The promise: the bits of an output depend on its row of x, its row of W, its bias, the kernel and the number of K
slices, and on nothing else: not on threads, not on M, N or the place in the batch, not on the run.
"""

import itertools
import zlib
from collections.abc import Callable
from typing import Any

import hypothesis
import hypothesis.strategies as st
import native
import pytest
import torch
from native import Kernel, every_kernel
from oracle import Dtypes
from torch import Tensor

SLICES = (1, 2, 3, 7)
THREADS = (1, 2, 3, 8)


@pytest.mark.parametrize("k_slices", [1, 3, 150])
@every_kernel
@native.meetings
def test_sums_of_integers_are_exact(meeting: native.Meeting, kernel: Kernel, k_slices: int) -> None:
    """Zero tolerance for every tile edge, any formats, any threads, any slices (150: more than K)."""
    nr, columns, mr = kernel["nr"], kernel["columns"], kernel["mr"]
    rows, channels = (1, mr - 1, mr, 2 * mr + 1), (1, nr - 1, nr + 1, columns, 2 * columns + 1)
    for m, n, k, threads, dtypes in meeting(rows, channels, (1, 2, 31, 97), THREADS, kernel["dtypes"]):
        x, w, b = native.exact_case(kernel, m, n, k, dtypes)
        y = native.run(kernel, x, w, b, [("relu", ())], threads=threads, k_slices=k_slices)
        native.check(kernel, y, x, w, b, "relu", exact=True)


@pytest.mark.parametrize("k_slices", SLICES)
@every_kernel
def test_same_bits_for_any_threads_and_every_run(kernel: Kernel, k_slices: int) -> None:
    """Sums of nothing but what was rounded off, so that another order of summation shows in outputs of 16 bits, too: 1,
    2, 3 and 8 threads, and again."""
    half = 165
    for dtypes in kernel["dtypes"]:
        x, w, b = native.random_case(3 * kernel["mr"] + 1, 3 * kernel["columns"] + 5, 2 * half + 1, dtypes)
        if w.dtype == torch.int8:
            w.clamp_(min=-127)
        x *= torch.exp2(torch.randint(0, 8, (x.shape[1],)))  # products of few bits are summed exactly, else
        x[:, half:], w[:, half:], b[:] = x[:, : half + 1], -w[:, : half + 1], 0
        x[:, -1] = 0
        expected = native.run(kernel, x, w, b, [("gelu", ())], k_slices=k_slices)
        otherwise = native.run(kernel, x, w, b, [("gelu", ())], k_slices=k_slices % 3 + 1)
        assert (otherwise != expected).sum() > expected.numel() // 4
        torch.set_num_threads(2)
        for threads in (*THREADS, *THREADS[1:]):
            y = native.run(kernel, x, w, b, [("gelu", ())], threads=threads, k_slices=k_slices)
            assert native.same_bits(y, expected)
        torch.set_num_threads(1)


@pytest.mark.parametrize(("k", "k_slices"), list(itertools.product((97, 9001), SLICES)))
@every_kernel
def test_a_row_of_a_batch_is_the_row_alone(kernel: Kernel, k: int, k_slices: int) -> None:
    """The bits of an output do not depend on the rows and channels beside it, with one K block or with several."""
    m, n = 2 * kernel["mr"] + 1, kernel["columns"] + 3
    x, w, b = native.random_case(m, n, k, kernel["dtypes"][k_slices % len(kernel["dtypes"])])
    y = native.run(kernel, x, w, b, k_slices=k_slices)
    for row in {0, kernel["mr"] - 1, m // 2, m - 1}:
        alone = native.run(kernel, x[row : row + 1], w, b, k_slices=k_slices)
        assert native.same_bits(alone, y[row : row + 1])
    for column in {0, kernel["nr"] - 1, n // 2, n - 1}:
        alone = native.run(kernel, x, w[column : column + 1], b[column : column + 1], k_slices=k_slices)
        assert native.same_bits(alone, y[:, column : column + 1])


@every_kernel
def test_random_data_shows_another_order(kernel: Kernel) -> None:
    """The data of the tests above really tells two orders of summation apart: slices change its bits."""
    x, w, b = native.random_case(3, 5, 2331, kernel["dtypes"][0])
    one, seven = torch.empty(2, 3, 5)
    native.run(kernel, x, w, b, out=one)
    native.run(kernel, x, w, b, k_slices=7, out=seven)
    assert not native.same_bits(one, seven)


# Of each property, for each kernel examples of its own: the same ones in every run.
examples = pytest.mark.parametrize("examples", [6, pytest.param(100, marks=pytest.mark.exhaustive)])


def hold(kernel: Kernel, examples: int, holds: Callable[..., None], **drawn: st.SearchStrategy[Any]) -> None:
    """`holds` of so many draws."""
    settings = hypothesis.settings(max_examples=examples, deadline=None, database=None)
    hypothesis.seed(zlib.crc32(kernel["id"].encode()))(settings(hypothesis.given(**drawn)(holds)))()


# Hypothesis draws before it knows the kernel: `which` becomes one of its combinations of formats.
shapes = st.tuples(st.integers(1, 40), st.integers(1, 80), st.integers(1, 70))
slices, which, seeds = st.sampled_from(SLICES), st.integers(0, 11), st.integers(0, 999)


def formats(kernel: Kernel, which: int) -> Dtypes:
    return kernel["dtypes"][which % len(kernel["dtypes"])]


def middling(values: Tensor) -> Tensor:
    """The same signs, with absolute values from 1/2 to 1: products, sums and what powers of two make of them are as
    far from the ends of fp16 as numbers can be. Integers as they are."""
    if not values.is_floating_point():
        return values
    return values.sign() * (0.5 + values.abs() % 0.5)


@examples
@every_kernel
def test_scaling_by_a_power_of_two(kernel: Kernel, examples: int) -> None:
    """f(2^p x, 2^p b) = 2^p f(x, b), bit for bit, before the output is rounded."""

    def holds(shape: tuple[int, int, int], power: int, k_slices: int, which: int, seed: int) -> None:
        torch.default_generator.manual_seed(seed)
        dtypes = formats(kernel, which)
        x, w, b = map(middling, native.random_case(*shape, dtypes))
        factor = 2.0 ** (power % 7 if torch.float16 in dtypes else power)
        y, scaled = torch.empty(2, len(x), len(w))
        native.run(kernel, x, w, b, [("relu", ())], k_slices=k_slices, out=y)
        native.run(kernel, x * factor, w, b * factor, [("relu", ())], k_slices=k_slices, out=scaled)
        assert native.same_bits(scaled, y * factor)

    hold(kernel, examples, holds, shape=shapes, power=st.integers(-30, 30), k_slices=slices, which=which, seed=seeds)


@examples
@every_kernel
def test_permuting_rows_and_channels(kernel: Kernel, examples: int) -> None:
    """Permuted rows of x and permuted output channels permute the bits of y."""

    def holds(shape: tuple[int, int, int], k_slices: int, which: int, seed: int) -> None:
        torch.default_generator.manual_seed(seed)
        x, w, b = native.random_case(*shape, formats(kernel, which))
        rows, channels = torch.randperm(shape[0]), torch.randperm(shape[1])
        y = native.run(kernel, x, w, b, k_slices=k_slices)
        permuted = native.run(kernel, x[rows], w[channels], b[channels], k_slices=k_slices)
        assert native.same_bits(permuted, y[rows][:, channels])

    hold(kernel, examples, holds, shape=shapes, k_slices=slices, which=which, seed=seeds)


@examples
@every_kernel
def test_the_identity_returns_x(kernel: Kernel, examples: int) -> None:
    """W = I without a bias gives x, for any finite numbers, denormals included where the kernel does not flush them."""

    def holds(m: int, k: int, k_slices: int, which: int, seed: int) -> None:
        dtypes, generator = formats(kernel, which), torch.Generator().manual_seed(seed)
        x = native.of_bits(torch.empty(m, k, dtype=torch.int32).random_(generator=generator), dtypes.x)
        x = torch.where(x.isfinite(), x, torch.ones((), dtype=dtypes.x)) * torch.randn(1, k).sign().to(dtypes.x)
        y = native.run(kernel, x, torch.eye(k, dtype=dtypes.weight), k_slices=k_slices)
        assert y.dtype == x.dtype and torch.equal(y.double(), kernel["sums"].flushed(x.double()))

    m, k = st.integers(1, 40), st.integers(1, 80)
    hold(kernel, examples, holds, m=m, k=k, k_slices=slices, which=which, seed=seeds)


@examples
@every_kernel
def test_zeros_at_the_end_of_k(kernel: Kernel, examples: int) -> None:
    """Zeros appended to K, in x and in W, change nothing within one slice."""

    def holds(shape: tuple[int, int, int], more: int, which: int, seed: int) -> None:
        torch.default_generator.manual_seed(seed)
        x, w, b = native.random_case(*shape, formats(kernel, which))
        longer_x, longer_w = (torch.cat([side, torch.zeros(len(side), more, dtype=side.dtype)], 1) for side in (x, w))
        assert native.same_bits(native.run(kernel, longer_x, longer_w, b), native.run(kernel, x, w, b))

    hold(kernel, examples, holds, shape=shapes, more=st.integers(1, 40), which=which, seed=seeds)

"""What holds to the last bit: integer sums, repetition, any threads, any batch, and what algebra says of one kernel.

The promise: the bits of an output depend on its row of x, its row of W, its bias, the kernel and the number of K
slices, and on nothing else: not on threads, not on M, N or the place in the batch, not on the run.
"""

import itertools

import hypothesis
import hypothesis.strategies as st
import native
import oracle
import pytest
import torch
from native import Kernel, every_kernel

SLICES = (1, 2, 3, 7)
THREADS = (1, 2, 3, 8)
quick = hypothesis.settings(max_examples=25, deadline=None, derandomize=True)


@pytest.mark.parametrize("k_slices", [*SLICES, 150])
@every_kernel
def test_sums_of_integers_are_exact(kernel: Kernel, k_slices: int) -> None:
    """Zero tolerance for every tile edge, any threads, any slices (150: more than K)."""
    nr, columns, mr = kernel["nr"], kernel["columns"], kernel["mr"]
    shapes = itertools.product(
        (1, mr - 1, mr, 2 * mr + 1), (1, nr - 1, nr + 1, columns, 2 * columns + 1), (1, 2, 31, 97)
    )
    for (m, n, k), threads in zip(shapes, itertools.cycle(THREADS), strict=False):
        x, w, b = oracle.exact_case(m, n, k)
        y = native.run(kernel, x, w, b, [("relu", ())], threads=threads, k_slices=k_slices)
        oracle.check(y, x, w, b, "relu", exact=True)


@pytest.mark.parametrize("k_slices", SLICES)
@every_kernel
def test_same_bits_for_any_threads_and_every_run(kernel: Kernel, k_slices: int) -> None:
    """Random data, so that another order of summation would show: 1, 2, 3 and 8 threads, three times each."""
    x, w, b = oracle.random_case(3 * kernel["mr"] + 1, 3 * kernel["columns"] + 5, 331)
    expected = native.run(kernel, x, w, b, [("gelu", ())], k_slices=k_slices)
    torch.set_num_threads(2)
    for threads, _ in itertools.product(THREADS, range(3)):
        y = native.run(kernel, x, w, b, [("gelu", ())], threads=threads, k_slices=k_slices)
        assert native.same_bits(y, expected)


@pytest.mark.parametrize("k_slices", SLICES)
@pytest.mark.parametrize("k", [97, 9001])
@every_kernel
def test_a_row_of_a_batch_is_the_row_alone(kernel: Kernel, k: int, k_slices: int) -> None:
    """The bits of an output do not depend on the rows and channels beside it, with one K block or with several."""
    m, n = 2 * kernel["mr"] + 1, kernel["columns"] + 3
    x, w, b = oracle.random_case(m, n, k)
    assert b is not None
    y = native.run(kernel, x, w, b, k_slices=k_slices)
    for row in {0, kernel["mr"] - 1, m // 2, m - 1}:
        alone = native.run(kernel, x[row : row + 1], w, b, k_slices=k_slices)
        assert native.same_bits(alone, y[row : row + 1])
    for column in {0, kernel["nr"] - 1, n // 2, n - 1}:
        alone = native.run(kernel, x, w[column : column + 1], b[column : column + 1], k_slices=k_slices)
        assert native.same_bits(alone, y[:, column : column + 1])


def test_random_data_shows_another_order() -> None:
    """The data of the tests above really tells two orders of summation apart: slices change its bits."""
    kernel = native.RUNNABLE[0]
    x, w, b = oracle.random_case(3, 5, 331)
    one, seven = (native.run(kernel, x, w, b, k_slices=slices) for slices in (1, 7))
    assert not native.same_bits(one, seven)


shapes = st.tuples(st.integers(1, 40), st.integers(1, 80), st.integers(1, 70))


@every_kernel
@hypothesis.given(shape=shapes, power=st.integers(-30, 30), k_slices=st.sampled_from(SLICES), seed=st.integers(0, 999))
@quick
def test_scaling_by_a_power_of_two(
    kernel: Kernel, shape: tuple[int, int, int], power: int, k_slices: int, seed: int
) -> None:
    """f(2^p x, 2^p b) = 2^p f(x, b), bit for bit."""
    torch.manual_seed(seed)
    x, w, b = oracle.random_case(*shape)
    assert b is not None
    y = native.run(kernel, x, w, b, [("relu", ())], k_slices=k_slices)
    scaled = native.run(kernel, x * 2.0**power, w, b * 2.0**power, [("relu", ())], k_slices=k_slices)
    assert native.same_bits(scaled, y * 2.0**power)


@every_kernel
@hypothesis.given(shape=shapes, k_slices=st.sampled_from(SLICES), seed=st.integers(0, 999))
@quick
def test_permuting_rows_and_channels(kernel: Kernel, shape: tuple[int, int, int], k_slices: int, seed: int) -> None:
    """Permuted rows of x and permuted output channels permute the bits of y."""
    torch.manual_seed(seed)
    x, w, b = oracle.random_case(*shape)
    assert b is not None
    rows, channels = torch.randperm(shape[0]), torch.randperm(shape[1])
    y = native.run(kernel, x, w, b, k_slices=k_slices)
    permuted = native.run(kernel, x[rows], w[channels], b[channels], k_slices=k_slices)
    assert native.same_bits(permuted, y[rows][:, channels])


@every_kernel
@hypothesis.given(
    m=st.integers(1, 40), k=st.integers(1, 80), k_slices=st.sampled_from(SLICES), seed=st.integers(0, 999)
)
@quick
def test_the_identity_returns_x(kernel: Kernel, m: int, k: int, k_slices: int, seed: int) -> None:
    """W = I without a bias gives x, for any finite floats, denormals included."""
    x = torch.empty(m, k, dtype=torch.int32).random_(generator=torch.Generator().manual_seed(seed)).view(torch.float32)
    x = torch.where(x.isfinite(), x, torch.ones(())) * torch.randn(1, k).sign()
    assert torch.equal(native.run(kernel, x, torch.eye(k), k_slices=k_slices), x)


@every_kernel
@hypothesis.given(shape=shapes, more=st.integers(1, 40), seed=st.integers(0, 999))
@quick
def test_zeros_at_the_end_of_k(kernel: Kernel, shape: tuple[int, int, int], more: int, seed: int) -> None:
    """Zeros appended to K, in x and in W, change nothing within one slice."""
    torch.manual_seed(seed)
    m, n, k = shape
    x, w, b = oracle.random_case(m, n, k)
    longer_x, longer_w = (torch.cat([side, torch.zeros(len(side), more)], 1) for side in (x, w))
    assert native.same_bits(native.run(kernel, longer_x, longer_w, b), native.run(kernel, x, w, b))

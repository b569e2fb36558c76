"""Every kernel of the table, over its tile's edges: each output is within the componentwise bound of the fp64 value."""

import itertools
import math
from typing import Any

import native
import oracle
import pytest
import torch
from native import Kernel, every_kernel
from torch import Tensor

SLICES = (1, 2, 3, 7)
THREADS = (1, 2)
IDENTITY = native.ACTIVATIONS[0][0]


def around(*tiles: int) -> list[int]:
    """0, 1, one less and one more than each tile, two primes and 1000."""
    near = {tile + step for tile in tiles for step in (-1, 0, 1)}
    return sorted({0, 1, 7, 97, 1000} | near)


def factors(kernel: Kernel) -> list[list[Any]]:
    """The values of M, N, K, activation, bias, threads and K slices that a kernel is tested with."""
    return [
        around(kernel["mr"], 2 * kernel["mr"]),
        around(kernel["nr"], kernel["columns"]),
        around(kernel["kr"]),
        [name for name, _ in native.ACTIVATIONS],
        [True, False],
        list(THREADS),
        list(SLICES),
    ]


Case = tuple[int, int, int, str, bool, int, int]


def held_to_the_bound(kernel: Kernel, case: Case) -> None:
    m, n, k, name, with_bias, threads, k_slices = case
    params = dict(native.ACTIVATIONS)[name]
    torch.set_num_threads(threads)
    x, w, b = oracle.random_case(m, n, k, bias=with_bias)
    y = native.run(kernel, x, w, b, [(name, params)], threads=threads, k_slices=k_slices)
    torch.set_num_threads(1)
    result = oracle.check(y, x, w, b, None if name == IDENTITY else (name, *params))
    assert result.compared == m * n
    assert not result.mistrusted or min(m, n) < 10 or k == 0  # a few columns may all be negative before relu


def covering(kernel: Kernel) -> list[Any]:
    marks = [] if kernel["runnable"] else [pytest.mark.skip(reason=f"{kernel['isa']} does not run here")]
    cases = native.pairwise(*factors(kernel)) if kernel["runnable"] else [()]
    return [pytest.param(kernel, c, id="-".join(map(str, (kernel["name"], *c))), marks=marks) for c in cases]


@pytest.mark.parametrize(("kernel", "case"), [case for param in native.TABLE for case in covering(param.values[0])])
def test_edges_of_the_tile(kernel: Kernel, case: Case) -> None:
    """Every two of (M, N, K, activation, bias, threads, K slices) meet on every kernel; K slices may outnumber K."""
    held_to_the_bound(kernel, case)


@pytest.mark.exhaustive
@every_kernel
def test_the_whole_product_of_edges(kernel: Kernel) -> None:
    """All combinations of M, N, K, bias, threads and K slices; the activations take turns."""
    choices = factors(kernel)
    turns = itertools.cycle(choices.pop(3))
    for m, n, k, *rest in itertools.product(*choices):
        held_to_the_bound(kernel, (m, n, k, next(turns), *rest))


@every_kernel
def test_adversarial_values(kernel: Kernel) -> None:
    """Cancellation, overflow, underflow, denormals, signed zeros, infinities and NaN, in one and in three K slices."""
    for k in (1, 24, 97):
        for _, x, w, b in oracle.adversarial_cases(k, m=kernel["mr"] + 1, n=kernel["nr"] + 3):
            for k_slices in (1, 3):
                oracle.check(native.run(kernel, x, w, b, k_slices=k_slices), x, w, b)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan], ids=str)
@every_kernel
def test_a_special_value_stays_in_its_row(kernel: Kernel, value: float) -> None:
    """inf or NaN at any (row, k) of x makes exactly the outputs non-finite that fp64 does; inf * 0 is NaN."""
    m, n, k = kernel["mr"] + 2, kernel["nr"] + 1, 3
    x, w, b = oracle.random_case(m, n, k)
    w[1::3] = 0.0
    for row, column in itertools.product(range(m), range(k)):
        special = x.clone()
        special[row, column] = value
        y = native.run(kernel, special, w, b)
        assert oracle.check(y, special, w, b).nonfinite == n
        assert y[torch.arange(m) != row].isfinite().all()


@pytest.mark.parametrize("value", [math.inf, math.nan], ids=str)
@every_kernel
def test_a_special_weight_stays_in_its_channel(kernel: Kernel, value: float) -> None:
    """inf or NaN in any output channel of the weight, or of the bias, reaches that column only."""
    m, k = kernel["mr"] + 1, 3
    n = kernel["columns"] + 2
    x, w, b = oracle.random_case(m, n, k)
    assert b is not None
    for column in range(n):
        special, bias = w.clone(), b.clone()
        special[column, column % k] = value
        bias[(column + 1) % n] = value
        y = native.run(kernel, x, special, bias)
        assert oracle.check(y, x, special, bias).nonfinite == 2 * m


@pytest.mark.parametrize("value", [-0.0, 1e-45, -3e-39, 2.0**-126, 3.4e38], ids=str)
@every_kernel
def test_tiny_and_huge_values_survive(kernel: Kernel, value: float) -> None:
    """W = I returns denormals and the largest floats as they are, on every thread: nothing is flushed to zero."""
    k = kernel["columns"] + 1
    x = torch.full((kernel["mr"] + 1, k), value)
    torch.set_num_threads(2)
    for k_slices in SLICES:
        assert torch.equal(native.run(kernel, x, torch.eye(k), threads=2, k_slices=k_slices), x)


@pytest.mark.parametrize("k_slices", [1, 3])
@every_kernel
def test_blocks_of_k_and_of_rows(kernel: Kernel, k_slices: int) -> None:
    """K so long that the driver cuts it into three blocks, M so large that it cuts the rows, with rows that collide."""
    k_block = native.driver_constant("panel_block_bytes") // (4 * kernel["columns"])
    k = (2 * k_block + 1024) * k_slices
    rows_a_block = native.driver_constant("row_block_bytes") // (4 * k)
    m, n = 2 * rows_a_block + kernel["mr"] + 1, kernel["nr"] + 1
    x, w, b = oracle.exact_case(m, n, k)
    for threads in THREADS:
        torch.set_num_threads(threads)
        y = native.run(kernel, x, w, b, [("relu", ())], threads=threads, k_slices=k_slices)
        torch.set_num_threads(1)
        oracle.check(y, x, w, b, "relu", exact=True)


@pytest.mark.parametrize("k", [512, 1024, 4096])
@every_kernel
def test_rows_that_collide_in_the_cache(kernel: Kernel, k: int) -> None:
    """Rows a multiple of 4096 bytes apart are copied for tall tiles: the same bits as for rows that are not."""
    x, w, b = oracle.random_case(2 * kernel["mr"] + 1, kernel["columns"] + 1, k)
    y = native.run(kernel, x, w, b)
    oracle.check(y, x, w, b)
    apart = torch.empty(len(x), k + 17)[:, :k].copy_(x)
    assert native.same_bits(native.run(kernel, apart, w, b), y)


CHAINS: list[list[tuple[str, tuple[float, ...]]]] = [
    [("relu", ()), ("tanh", ())],
    [("identity", ()), ("hardtanh", (-0.5, 0.25)), ("gelu", ())],
    [("leaky_relu", (0.1,)), ("softplus", (1.0, 20.0)), ("identity", ()), ("sigmoid", ())],
]


@pytest.mark.parametrize("chain", CHAINS, ids=lambda chain: "-".join(name for name, _ in chain))
@every_kernel
def test_chains_of_steps(kernel: Kernel, chain: list[tuple[str, tuple[float, ...]]]) -> None:
    """A chain gives the bits of its steps one after another, the bias being added once, before the first."""
    for (m, n, k), k_slices in itertools.product([(1, 1, 5), (kernel["mr"] + 1, kernel["columns"] + 3, 97)], (1, 3)):
        x, w, b = oracle.random_case(m, n, k)
        expected = native.run(kernel, x, w, b, chain[:1], k_slices=k_slices)
        for step in chain[1:]:
            expected = pointwise(kernel, step, expected)
        assert native.same_bits(native.run(kernel, x, w, b, chain, k_slices=k_slices), expected)


def pointwise(kernel: Kernel, step: tuple[str, tuple[float, ...]], values: Tensor) -> Tensor:
    """One step alone: the values are the weight of a product with K = 1 and x = 1."""
    return native.run(kernel, torch.ones(1, 1), values.reshape(-1, 1), None, [step]).reshape(values.shape)


def test_the_covering_covers() -> None:
    """`pairwise` meets every pair, with far fewer rows than the product."""
    choices = [range(7), "abcde", [True, False], range(3)]
    rows = native.pairwise(*choices)
    for i, j in itertools.combinations(range(4), 2):
        assert {(row[i], row[j]) for row in rows} == set(itertools.product(choices[i], choices[j]))
    assert len(rows) < 60

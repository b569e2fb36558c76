"""Every kernel of the table, over its tile's edges: each output is within the componentwise bound of the fp64 value."""

import itertools
import math
import os
from collections.abc import Iterable
from typing import Any

import library
import native
import oracle
import pytest
import torch
from native import Kernel, every_kernel
from oracle import Dtypes
from torch import Tensor

import fastlinear._kernels as _kernels
import fastlinear._tensors as _tensors

SLICES = (1, 2, 3, 7)
THREADS = (1, 2)
SHARE = 5  # of the channels, one in so many
IDENTITY = native.ACTIVATIONS[0][0]


def around(*tiles: int, largest: int) -> list[int]:
    """0, 1, one less and one more than each tile, two primes and the largest."""
    near = {tile + step for tile in tiles for step in (-1, 0, 1)}
    return sorted({0, 1, 7, 97, largest} | near)


Form = tuple[str, torch.dtype, torch.dtype | None]


def forms(name: str) -> list[Form]:
    """(layout, format of x, format of the bias or None) of all products that a kernel of the table computes."""
    rows = [kernel for kernel in native.ALL if kernel["name"] == name]
    return [(kernel["layout"], x, b) for kernel in rows for x in kernel["of_x"] for b in (*kernel["of_bias"], None)]


def factors(kernel: Kernel, largest: int = 1000) -> list[list[Any]]:
    """The values of M, N, K, activation, form, threads and K slices that a kernel of the table is tested with.

    Activations are steps of the ISA, whatever the formats: its fp32 kernels meet all of them, the others a few.
    """
    return [
        around(kernel["mr"], 2 * kernel["mr"], largest=largest),
        around(kernel["nr"], kernel["columns"], largest=largest),
        around(1, 2, largest=1000),
        [name for name, _ in native.ACTIVATIONS][:: 1 if kernel["own"] == "fp32" else 4],
        forms(kernel["name"]),
        list(THREADS),
        list(SLICES),
    ]


Case = tuple[int, int, int, str, Form, int, int]


def held_to_the_bound(kernel: Kernel, case: Case) -> None:
    m, n, k, name, (layout, of_x, of_bias), threads, k_slices = case
    params = dict(native.ACTIVATIONS)[name]
    torch.set_num_threads(threads)
    dtypes = Dtypes(of_x, native.DTYPES[layout.split("/")[0]], of_bias or torch.float32)
    x, w, b = oracle.random_case(m, n, k, dtypes, bias=of_bias is not None)
    y = native.run(native.on(kernel, layout), x, w, b, [(name, params)], threads=threads, k_slices=k_slices)
    torch.set_num_threads(1)
    result = native.check(kernel, y, x, w, b, None if name == IDENTITY else (name, *params))
    assert result.compared == m * n
    few = min(m, n) < 10 or k == 0  # columns may all be negative before relu
    assert not result.mistrusted or few or kernel["sums"].block  # long sums in fp16 may be as wrong as they are large


def name_of(case: Case) -> str:
    m, n, k, name, (layout, of_x, of_bias), threads, k_slices = case
    b = "none" if of_bias is None else _tensors.FORMATS[of_bias]
    return f"{layout}-{m}-{n}-{k}-{name}-{_tensors.FORMATS[of_x]}-{b}-{threads}-{k_slices}"


every_row = pytest.mark.parametrize("kernel", [native.parameter(kernel) for kernel in native.TABLE])


def hold(kernel: Kernel, cases: Iterable[Case]) -> None:
    """Every case is held to the bound; fails once for all, with names and reasons."""
    failures = []
    for case in cases:
        try:
            held_to_the_bound(kernel, case)
        except AssertionError as error:
            failures.append(f"{kernel['name']} on {name_of(case)}: {error}")
    assert not failures, f"{len(failures)} cases fail\n" + "\n".join(failures[:8])


@every_row
def test_edges_of_the_tile(kernel: Kernel) -> None:
    """A sixth of the cases below, another one for each kernel of an ISA, and up to 331 rows and columns, which are
    several panels; slices may outnumber K."""
    hold(kernel, native.pairwise(*factors(kernel, 331))[native.TABLE.index(kernel) % 6 :: 6])


@pytest.mark.exhaustive
@every_row
def test_every_two_edges(kernel: Kernel) -> None:
    """Every two of (M, N, K, activation, form, threads, K slices) meet on every kernel."""
    hold(kernel, native.pairwise(*factors(kernel)))


@pytest.mark.exhaustive
@every_row
def test_the_whole_product_of_edges(kernel: Kernel) -> None:
    """All combinations of M, N, K, formats, threads and K slices; the activations take turns."""
    choices = factors(kernel)
    turns = itertools.cycle(choices.pop(3))
    for m, n, k, *rest in itertools.product(*choices):
        held_to_the_bound(kernel, (m, n, k, next(turns), *rest))


@pytest.mark.parametrize(("k", "k_slices"), list(itertools.product((1, 24, 97), (1, 3))))
@every_kernel
def test_adversarial_values(kernel: Kernel, k: int, k_slices: int) -> None:
    """Cancellation, overflow, underflow, denormals, signed zeros, infinities and NaN, in one and in three K slices."""
    for dtypes in kernel["dtypes"]:
        for _, x, w, b in oracle.adversarial_cases(k, m=kernel["mr"] + 1, n=kernel["nr"] + 3, dtypes=dtypes):
            native.check(kernel, native.run(kernel, x, w, b, k_slices=k_slices), x, w, b)


@pytest.mark.parametrize(
    ("value", "column"), list(itertools.product((math.inf, -math.inf, math.nan), range(3))), ids=str
)
@every_kernel
def test_a_special_value_stays_in_its_row(kernel: Kernel, value: float, column: int) -> None:
    """inf or NaN at any (row, k) of x makes exactly the outputs non-finite that fp64 does; inf * 0 is NaN."""
    m, n, k = kernel["mr"] + 2, kernel["nr"] + 1, 3
    for dtypes in kernel["dtypes"]:
        x, w, b = native.random_case(m, n, k, dtypes)
        w[1::3] = 0.0
        for row in range(m):
            special = x.clone()
            special[row, column] = value
            y = native.run(kernel, special, w, b)
            assert native.check(kernel, y, special, w, b).nonfinite == n
            assert y[torch.arange(m) != row].isfinite().all()


@pytest.mark.parametrize(("value", "first"), list(itertools.product((math.inf, math.nan), range(SHARE))), ids=str)
@every_kernel
def test_a_special_weight_stays_in_its_channel(kernel: Kernel, value: float, first: int) -> None:
    """inf or NaN in any output channel of the weight, or of the bias, reaches that column only."""
    m, k = kernel["mr"] + 1, 3
    n = kernel["columns"] + 2
    for dtypes in kernel["dtypes"]:
        x, w, b = native.random_case(m, n, k, dtypes)
        for column in range(first, n, SHARE):
            special, bias = w.clone(), b.clone()
            if dtypes.weight.is_floating_point:
                special[column, column % k] = value
            bias[(column + 1) % n] = value
            y = native.run(kernel, x, special, bias)
            columns = 1 + dtypes.weight.is_floating_point
            assert native.check(kernel, y, x, special, bias).nonfinite == columns * m


@pytest.mark.parametrize("k_slices", SLICES)
@every_kernel
def test_tiny_and_huge_values_survive(kernel: Kernel, k_slices: int) -> None:
    """W = I returns denormals and the largest numbers of every format as they are, on every thread.

    Nothing is flushed to zero, but by the kernels that say so.
    """
    k = kernel["columns"] + 1
    torch.set_num_threads(2)
    for dtypes in kernel["dtypes"]:
        of_x = torch.finfo(dtypes.x)
        smallest = of_x.tiny * of_x.eps
        for value in (-0.0, smallest, -3 * smallest, of_x.tiny - smallest, of_x.tiny, of_x.max):
            x = torch.full((kernel["mr"] + 1, k), value, dtype=dtypes.x)
            y = native.run(kernel, x, torch.eye(k, dtype=dtypes.weight), threads=2, k_slices=k_slices)
            assert torch.equal(y.double(), kernel["sums"].flushed(x.double())), value


# L1d, L2 and L3 of a client Skylake, a Zen 2, a Sapphire Rapids, and of a hypervisor that does not say.
CACHES = [
    (32 << 10, 256 << 10, 8 << 20),
    (32 << 10, 512 << 10, 16 << 20),
    (48 << 10, 2 << 20, 105 << 20),
    (0, 0, 0),
]


def test_blocks_follow_the_caches() -> None:
    """Half of L2 for panels and rows, 1 MB if it is unknown, but an eighth for rows of fp32; for prepared rows an
    eighth of L3, at least L2 and at most 4 MB."""
    mb = 1 << 20
    prepared = {mb // 4: mb, mb // 2: 2 * mb, 2 * mb: 4 * mb, 0: 4 * mb}
    for caches in CACHES:
        l2 = caches[1] or mb
        with library.caches_of(*caches):
            for rows, share in (("fp32", 8), ("uint8", 2), ("bf16", 2)):
                assert native.blocks(rows) == (l2 // 2, l2 // share, prepared[caches[1]])


@pytest.mark.parametrize("caches", CACHES, ids=lambda caches: f"L2 {caches[1] >> 10} KB")
@pytest.mark.parametrize("isa", [isa for isa in _kernels.cpu_info()["isas"] if isa != "scalar"])
def test_other_machines(isa: str, caches: tuple[int, int, int]) -> None:
    """The blocks of smaller and larger caches change no exact sum, and none of fp32, which they cut in one order."""
    for kernel in [k for k in native.RUNNABLE if k["isa"] == isa and k["id"] == k["name"]][:2]:
        with library.caches_of(*caches):
            blocks_are_exact(kernel, 1)
        x, w, b = native.random_case(kernel["mr"] + 1, kernel["nr"] + 1, 9000, kernel["dtypes"][0])
        with library.caches_of(*caches):
            there = native.run(kernel, x, w, b)
        assert kernel["sums"].block or native.same_bits(there, native.run(kernel, x, w, b))


@pytest.mark.parametrize("k_slices", [1, 3])
@every_kernel
def test_blocks_of_k_and_of_rows(kernel: Kernel, k_slices: int) -> None:
    """K so long that the driver cuts it into three blocks, M so large that it cuts the rows, with rows that collide."""
    with library.caches_of(32 << 10, 32 << 10, 1 << 20):
        blocks_are_exact(kernel, k_slices)


def blocks_are_exact(kernel: Kernel, k_slices: int) -> None:
    panels, block_of_rows, _ = native.blocks(kernel["rows"])
    row_bytes, weight_bytes = (native.DTYPES[kernel[form]].itemsize for form in ("rows", "own"))
    k_block = panels // (weight_bytes * kernel["columns"])
    collide = 4096 // row_bytes  # k between rows that do, or a multiple
    k = -(-(2 * k_block + 1) // collide) * collide * k_slices
    rows_a_block = max(block_of_rows // (row_bytes * k), 128)
    m, n = 2 * rows_a_block + kernel["mr"] + 1, kernel["nr"] + 1
    for threads, dtypes in zip(THREADS, (kernel["dtypes"][0], kernel["dtypes"][-1]), strict=True):
        x, w, b = native.exact_case(kernel, m, n, k, dtypes)
        torch.set_num_threads(threads)
        y = native.run(kernel, x, w, b, [("relu", ())], threads=threads, k_slices=k_slices)
        torch.set_num_threads(1)
        native.check(kernel, y, x, w, b, "relu", exact=True)


@pytest.mark.parametrize("row_bytes", [2048, 4096, 16384])
@every_kernel
def test_rows_that_collide_in_the_cache(kernel: Kernel, row_bytes: int) -> None:
    """Rows a multiple of 4096 bytes apart are copied for tall tiles: the same bits as for rows that are not."""
    k = row_bytes // native.DTYPES[kernel["rows"]].itemsize
    for dtypes in kernel["dtypes"]:
        x, w, b = native.random_case(2 * kernel["mr"] + 1, kernel["columns"] + 1, k, dtypes)
        y = native.run(kernel, x, w, b)
        native.check(kernel, y, x, w, b)
        apart = torch.empty(len(x), k + 17, dtype=dtypes.x)[:, :k].copy_(x)
        assert native.same_bits(native.run(kernel, apart, w, b), y)


CHAINS: list[list[tuple[str, tuple[float, ...]]]] = [
    [("relu", ()), ("tanh", ())],
    [("identity", ()), ("hardtanh", (-0.5, 0.25)), ("gelu", ())],
    [("leaky_relu", (0.1,)), ("softplus", (1.0, 20.0)), ("identity", ()), ("sigmoid", ())],
]


@pytest.mark.parametrize("chain", CHAINS, ids=lambda chain: "-".join(name for name, _ in chain))
@every_kernel
def test_chains_of_steps(kernel: Kernel, chain: list[tuple[str, tuple[float, ...]]]) -> None:
    """A chain gives the values of its steps one after another, the bias being added once, before the first."""
    for (m, n, k), k_slices in itertools.product([(1, 1, 5), (kernel["mr"] + 1, kernel["columns"] + 3, 97)], (1, 3)):
        x, w, b = native.random_case(m, n, k, kernel["dtypes"][0])
        whole, expected = torch.empty(m, n), torch.empty(m, n)
        native.run(kernel, x, w, b, chain, k_slices=k_slices, out=whole)
        native.run(kernel, x, w, b, chain[:1], k_slices=k_slices, out=expected)
        for step in chain[1:]:
            expected = pointwise(kernel, step, expected)
        assert torch.equal(whole, expected)


def pointwise(kernel: Kernel, step: tuple[str, tuple[float, ...]], values: Tensor) -> Tensor:
    """One step alone, of fp32 values: they are the bias of a product with zeros."""
    of_x, of_weight, _ = kernel["dtypes"][0]
    w, out = torch.zeros(values.numel(), 1, dtype=of_weight), torch.empty(1, values.numel())
    native.run(kernel, torch.zeros(1, 1, dtype=of_x), w, values.flatten(), [step], out=out)
    return out.reshape(values.shape)


@every_kernel
def test_every_row_is_executed(kernel: Kernel) -> None:
    """An exact product on every kernel and layout, by the way that the report at the end of the tests shows."""
    before = native.products[kernel["id"]]
    x, w, b = native.exact_case(kernel, 3, 5, 7, kernel["dtypes"][0])
    native.check(kernel, native.run(kernel, x, w, b), x, w, b, exact=True)
    assert native.products[kernel["id"]] == before + 1


def test_no_row_is_skipped_on_an_avx512_machine() -> None:
    """What CPUID hides is run natively or emulated; elsewhere, or below FASTLINEAR_MAX_ISA, a skip has its reason."""
    if "avx512" in _kernels.cpu_info()["isas"] and "FASTLINEAR_MAX_ISA" not in os.environ:
        assert native.EXECUTED == native.ALL
    for kernel in native.ALL:
        assert kernel["way"] in (library.NATIVELY, library.HIDDEN, library.EMULATED) or "skipped: " in kernel["way"]
        assert (kernel["way"] == library.NATIVELY) == kernel["runnable"]


def test_the_probe_tells_instructions_apart() -> None:
    """Bytes that return do, an undefined instruction does not, and what CPUID shows is executed."""
    assert library.executes(bytes.fromhex("c3"))
    assert not library.executes(bytes.fromhex("0f0b c3"))  # ud2
    assert all(library.executes(code) for isa, code in library.PROBES.items() if isa in _kernels.cpu_info()["isas"])


@pytest.mark.parametrize(
    ("isa", "known", "executed", "way"),
    [
        ("avx512_fp16", ["avx512", "avx512_fp16"], True, library.NATIVELY),
        ("avx512_fp16", ["avx512"], True, library.HIDDEN),
        ("avx512_fp16", ["avx512"], False, library.EMULATED),
        ("avx512_fp16", ["avx2"], False, "skipped: this CPU has no avx512_fp16"),
        ("avx512_bf16", ["avx512"], False, "skipped: this CPU has no avx512_bf16"),
        ("avx512_vnni", ["avx512"], True, library.HIDDEN),
        ("avx512_vnni", ["avx512"], False, "skipped: this CPU has no avx512_vnni"),
        ("avx_vnni", ["avx2"], True, library.HIDDEN),
        ("avx_vnni", ["avx2"], False, library.EMULATED),
        ("avx_vnni", [], False, "skipped: this CPU has no avx_vnni"),
        ("avx512", ["avx2"], True, "skipped: this CPU has no avx512"),
    ],
)
def test_how_an_isa_is_executed(
    isa: str, known: list[str], executed: bool, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What CPUID shows, else what a probe executes, else what can be emulated, else nothing, with the reason."""
    monkeypatch.setattr(_kernels, "cpu_info", lambda: {"isas": ["scalar", *known]})
    monkeypatch.setattr(library, "executes", lambda code: executed)
    monkeypatch.delenv("FASTLINEAR_MAX_ISA", raising=False)
    assert library.way.__wrapped__(isa) == way
    if isa not in known:
        monkeypatch.setenv("FASTLINEAR_MAX_ISA", "avx2")
        assert library.way.__wrapped__(isa) == "skipped: FASTLINEAR_MAX_ISA is avx2"


def test_the_covering_covers() -> None:
    """`pairwise` meets every pair, with far fewer rows than the product."""
    choices = [range(7), "abcde", [True, False], range(3)]
    rows = native.pairwise(*choices)
    for i, j in itertools.combinations(range(4), 2):
        assert {(row[i], row[j]) for row in rows} == set(itertools.product(choices[i], choices[j]))
    assert len(rows) < 60

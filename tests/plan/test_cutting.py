"""Products are shared fairly among more threads than any machine here has: by calculation, with the code that cuts."""

import sys
from types import SimpleNamespace

import pytest
import torch
from library import ROOT

import fastlinear._plans as _plans
import fastlinear._products as _products
from fastlinear.plan import decide
from fastlinear.plan.candidates import Chosen, native_candidates

sys.path.insert(0, str(ROOT / "benchmarks"))

import cutting
import shapes

GRID = [(m, n, k) for k, n in shapes.GRID.shapes for m in shapes.GRID.ms]
DTYPE = torch.bfloat16


@pytest.mark.parametrize("threads", [2, *cutting.THREADS])
def test_no_thread_has_more_than_a_tenth_above_the_mean(threads: int) -> None:
    """On every shape of the benchmark whose tiles are enough to be shared so; that is a third of them at least."""
    cuts = [cutting.best(cutting.problem(*shape, threads, "bf16"), DTYPE) for shape in GRID]
    for shape, cut in zip(GRID, cuts, strict=True):
        assert cut.busiest <= cutting.FAIR or not cut.shareable, (shape, cut)
    assert 3 * sum(cut.shareable for cut in cuts) >= len(cuts)


def test_blocks_of_rows_become_single_tiles_where_that_is_fairer() -> None:
    """86 times 24 tiles for 128 threads are at most 17 for each; blocks of two tiles would be 18 for some."""
    m, n, k = 86 * 4, 24 * 16, 384
    plan = Chosen(m, 128, "fp32", "fp32/scalar/4x16", 128, 1, "forced")
    cut = cutting.cut(plan, cutting.problem(m, n, k, 128, "fp32"), torch.float32)
    assert cut.busiest == pytest.approx(17 * 128 / (86 * 24))


@pytest.mark.parametrize("name", ["fp32/scalar/4x16", "bf16/scalar/4x16"])
@pytest.mark.parametrize("threads", [1, 3, 16])
@pytest.mark.parametrize("k_slices", [1, 3])
def test_the_pieces_are_the_product(name: str, threads: int, k_slices: int) -> None:
    """Every sum of every output is in one of them, and in no other."""
    m, n, k = 37, 70, 50
    met = torch.zeros(m, n, k, dtype=torch.int32)
    plan = _plans.Plan(name, threads, k_slices)
    x = torch.float32 if name.startswith("fp32") else DTYPE
    for _, thread, rows, columns, ks in _products.pieces(plan, plan.layout, x, m, n, k):
        assert 0 <= thread < threads
        met[slice(*rows), slice(*columns), slice(*ks)] += 1
    assert (met == 1).all()


def operands(n: int) -> decide.Operands:
    """Of a weight of which nothing but the number of its channels is asked."""
    packed = SimpleNamespace(n=n, dtype=DTYPE, head=lambda wanted: operands(min(n, -(-wanted // 32) * 32)).packed)
    return decide.Operands(None, None, packed)  # type: ignore[arg-type]


@pytest.mark.parametrize("threads", [2, *cutting.THREADS])
def test_what_a_tuning_measures_gives_every_thread_work(threads: int) -> None:
    """Its smaller product keeps as many threads busy as the layer's own does, with each candidate."""
    for shape in [*GRID, (4096, 4096, 4096), (512, 14336, 4096)]:
        whole = cutting.problem(*shape, threads, "bf16")
        small, _ = decide._proxy(whole, operands(whole.n))
        for plan in native_candidates(whole):
            if plan.plan_threads == threads:
                working = cutting.cut(plan, whole, DTYPE).working
                assert cutting.cut(plan, small, DTYPE).working >= working, (shape, plan.name, small.m, small.n)

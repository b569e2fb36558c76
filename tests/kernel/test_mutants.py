"""The tests can fail: the library's own sources, broken in one place, are caught by the very checks that guard them."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import guard
import library
import native
import pytest
import torch
from native import Kernel
from torch import Tensor

from kernel import test_exact, test_formats, test_int8, test_kernels, test_memory


class Mutant(NamedTuple):
    """One change of one header; `row`, a kernel or "kernel on layout", shows it."""

    name: str
    file: str
    old: str
    new: str
    row: str = "fp32/scalar/4x16"

    @property
    def unit(self) -> str:
        """The source that has to be compiled again: the driver's, or that of the row's ISA, or of its vectors."""
        isa, (_, _, room, *inner) = self.row.split("/")[1], self.file.split("/")
        if room == "driver":
            return "product"
        return inner[0] if room == "isa" else isa.removesuffix("_bf16") if inner[0] in OF_VECTORS else isa


OF_VECTORS = ("convert.hpp", "quantize.hpp")  # generic code that an ISA with vectors of its own compiles
DRIVER, WORKER, GRID, PLAN, PROLOGUE, PROBLEM, FINISH = (
    f"include/fastlinear/driver/{name}.hpp"
    for name in ("gemm", "worker", "grid", "plan", "prologue", "problem", "finish")
)
TILE, CONVERT, QUANTIZE = (f"include/fastlinear/generic/{name}.hpp" for name in ("tile", "convert", "quantize"))
SCALAR, BF16, PAIRS, HALVES, VEC, TILES = (
    f"include/fastlinear/isa/{path}.hpp"
    for path in ("scalar/kernels", "avx512/bf16", "avx512_bf16/bf16", "avx512_fp16/fp16", "avx512/vec", "amx/tiles")
)
TALL = "fp32/avx512/14x32"
TALL_BF16, TALL_PAIRS, WIDENING = "bf16/avx512/14x32", "bf16/avx512_bf16/14x32", "fp32/avx512/14x32 on bf16/32x2"
TILED, TILED_BYTES = "bf16/amx/32x32", "int8/amx/16x64"
PAIRING = "bf16/avx512_bf16/14x32 on int8wo/32x1"

WORDS, QUADS, BYTES = "int8/avx512/6x32", "int8/avx512_vnni/14x32", "int8/scalar/4x8"
INTEGERS = [
    ("symmetric rows reach to 126", PROLOGUE, "-127.0f, 127.0f", "-127.0f, 126.0f", QUADS),
    ("symmetric rows divide by 128", PROLOGUE, "/ 127.0f", "/ 128.0f", QUADS),
    ("asymmetric zero points are cut off", PROLOGUE, "nearest(-e.least", "std::floor(-e.least", QUADS),
    ("asymmetric rows saturate at 254", PROLOGUE, "255.0f - zero, row.zero}", "254.0f - zero, row.zero}", QUADS),
    ("tiny rows keep a scale", PROLOGUE, "scale < std::numeric_limits<float>::min()", "scale <= 0.0f", QUADS),
    (
        "NaN is overlooked",
        PROLOGUE,
        "finite ? plan_.form->finite : plan_.form->any",
        "plan_.form->finite",
        QUADS,
    ),
    ("smoothing is forgotten in fp32", PROLOGUE, "wide && smooth == nullptr", "wide", QUADS),
    ("s8 rows are taken as u8", PROLOGUE, "if (flip != 0) prologue_detail", "if (false) prologue_detail", QUADS),
    ("s8 rows are taken as u8, int16", PROLOGUE, "(from[k] ^ flip)", "from[k]", WORDS),
    ("int16 rows keep their zero point", PROLOGUE, "scale.zero = 0;  //", ";  //", WORDS),
    ("rows are summed without their zero point", PROLOGUE, "row)[k] - zero;", "row)[k];", QUADS),
    ("column sums are those of the first tile", FINISH, "w.sums + column", "w.sums", QUADS),
    ("zero points are those of the first tile", FINISH, "w.zeros + column", "w.zeros", QUADS),
    ("the zero points of x are not subtracted", QUANTIZE, "t.ld_in + c) - shift;", "t.ld_in + c);", BYTES),
    ("all rows have the first one's zero point", QUANTIZE, "if (row.zero != zero) shift", "if (false) shift", BYTES),
    ("ReLU lets -1 pass", FINISH, "relu ? 0.0f", "relu ? -1.0f", QUADS),
    (
        "ReLU is done and the next step with it",
        FINISH,
        "i = relu || function == kIdentity;",
        "i = 2 * relu + (function == kIdentity);",
        QUADS,
    ),
    ("the zero points of W are not subtracted", QUANTIZE, "if (t.zeros != nullptr)", "if (false)", BYTES),
    ("scales are fused", QUANTIZE, "rounded(rounded(to_float(sum) * scale)", "rounded((to_float(sum) * scale)", BYTES),
    ("the bias is fused", QUANTIZE, "rounded(rounded(to_float(sum) * scale)", "(rounded(to_float(sum) * scale)", BYTES),
    (
        "ties go up",
        VEC,
        "cvtps_epi32(kAll, a.v)",
        "cvt_roundps_epi32(kAll, a.v + 0.5f, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)",
        WORDS,
    ),
    ("slices are added as floats", DRIVER, "if (is_float(job.plan.kernel->accumulate))", "if (true)", QUADS),
    (
        "integer rows of a second block begin at the first",
        PROLOGUE,
        "(this->*make_)(first_ + r, to)",
        "(this->*make_)(r, to)",
        QUADS,
    ),
    ("the bias is added twice", FINISH, "s.bias = nullptr;\n  }\n  if (", "}\n  if (", QUADS),
    ("s8 outputs are u8", FINISH, "if (to.flip != 0)", "if (false)", QUADS),
    ("scales of the first tile serve all", FINISH, "w.scales + column", "w.scales", QUADS),
    ("rows of the first tile serve all", FINISH, "job.x.scales + first_row", "job.x.scales", QUADS),
]

BROKEN = [
    Mutant("tiles lose the last groups of K", TILES, "rest + Op::layout.kr - 1", "rest - 1", TILED),
    Mutant("tiles overwrite K blocks", TILES, "if (t.accumulate)", "if (false)", TILED),
    Mutant("the second row block is the first", TILES, "rows + r * kRows * lda, lda", "rows, lda", TILED),
    Mutant("column blocks are swapped", TILES, "sum % C * kBytes", "(C - 1 - sum % C) * kBytes", TILED_BYTES),
    Mutant(
        "rows are not filled up",
        PROLOGUE,
        "ends = round_up(p.k, kernel.k_step) == p.k && round_up(m_, kernel.row_step) == m_",
        "ends = true",
        TILED,
    ),
    Mutant("garbage follows the last k", PROLOGUE, "((filled - made) * element)", "(0 * filled)", TILED),
    Mutant("the last k is dropped", SCALAR, "k < t.k;", "k + 1 < t.k;"),
    Mutant("the last k is dropped, AVX2", TILE, "k + kr <= t.k;", "k + kr < t.k;", "fp32/avx2/6x16"),
    Mutant(
        "the first two rows are swapped", SCALAR, "a[r * t.lda + k]", "a[(t.rows > 1 && r < 2 ? 1 - r : r) * t.lda + k]"
    ),
    Mutant(
        "the first two rows are swapped, AVX-512",
        TILE,
        "const Vector x = last ? Op::last_row(a + r * lda) : Op::row(a + r * lda);",
        "const Vector x = Op::row(a + (R > 1 && r < 2 ? 1 - r : r) * lda);",
        TALL,
    ),
    Mutant("K blocks overwrite each other", SCALAR, "t.accumulate ? tile[r * Columns + j] : Sum{}", "Sum{}"),
    Mutant(
        "K blocks overwrite each other, driver",
        WORKER,
        "a.accumulate = block.begin > slice.begin",
        "a.accumulate = false",
    ),
    Mutant("the bias is skipped", FINISH, "job.bias != nullptr && !p.epilogue.gated", "false"),
    Mutant("the bias is added in every step", FINISH, "function](s);\n    s.bias = nullptr;", "function](s);"),
    Mutant(
        "a column too many is stored",
        FINISH,
        "sums = std::min(columns, p.n - first_sum)",
        "sums = std::min(columns, p.n - first_sum + 1)",
    ),
    Mutant(
        "a column too few is stored",
        FINISH,
        "sums = std::min(columns, p.n - first_sum)",
        "sums = std::min(columns, p.n - first_sum - 1)",
    ),
    Mutant("the second K slice is lost", DRIVER, "slice = 1; slice < ", "slice = 2; slice < "),
    Mutant(
        "K slices overlap", GRID, "std::min(k_, (u.slice + 1) * slice_k_)", "std::min(k_, (u.slice + 1) * slice_k_ + 1)"
    ),
    Mutant(
        "copied rows are one k short",
        PROLOGUE,
        "p_.k * element_bytes(p_.x.format), to",
        "(p_.k - 1) * element_bytes(p_.x.format), to",
        TALL,
    ),
    Mutant(
        "copied 16-bit rows are one k short",
        PROLOGUE,
        "p_.k * element_bytes(p_.x.format), to",
        "(p_.k - 1) * element_bytes(p_.x.format), to",
        TALL_PAIRS,
    ),
    Mutant(
        "widened rows are one k short",
        PROLOGUE,
        "(p_.x.at(row, 0), reinterpret_cast<float*>(to), p_.k)",
        "(p_.x.at(row, 0), reinterpret_cast<float*>(to), p_.k - 1)",
        TALL_BF16,
    ),
    Mutant(
        "widened rows are those of the next row",
        PROLOGUE,
        "widen(p_.x.at(row, 0), reinterpret_cast",
        "widen(p_.x.at(2 * first_ + m_ - 1 - row, 0), reinterpret_cast",
        TALL_BF16,
    ),
    Mutant("the odd last k is dropped", TILE, "if (kr > 1 && k < t.k)", "if (false)", TALL_BF16),
    Mutant(
        "the odd last k brings its neighbor, 0 times",
        PAIRS,
        "_mm512_castsi512_ps(_mm512_set1_epi32(a->bits))",
        "row(a)",
        TALL_PAIRS,
    ),
    Mutant("even and odd k are swapped", BF16, "step == 0", "step == 1", TALL_BF16),
    Mutant("even and odd k are swapped in pairing", CONVERT, "(g + 1) * nr + j) : V", "g * nr + j) : V", PAIRING),
    Mutant("even and odd k are swapped in widening", CONVERT, "even, odd);", "odd, even);", WIDENING),
    Mutant(
        "odd k are not masked in widening",
        VEC,
        "_mm512_and_si512(both, _mm512_set1_epi32(static_cast<int>(0xffff0000u)))",
        "both",
        WIDENING,
    ),
    Mutant("widening skips the last pair's odd k", CONVERT, "if (g + 1 < k)", "if (g + 2 < k)", WIDENING),
    Mutant(
        "widening writes an odd k that is not there",
        CONVERT,
        "if (g + 1 < k) V::store(out + (g + 1)",
        "if (true) V::store(out + (g + 1) % k",
        WIDENING,
    ),
    Mutant(
        "widened panels lie as far apart as packed ones",
        WORKER,
        "a.panel_stride = bytes",
        "a.panel_stride = job.panel_bytes",
        "fp32/avx512/6x64 on bf16/32x2",
    ),
    Mutant("only the first panel is widened", WORKER, "i < a.panels", "i < 1", "fp32/avx512/6x64 on fp16/32x1"),
    Mutant(
        "the bias is of the other 16-bit format",
        DRIVER,
        "(job.p.bias.format)].widen",
        "(job.p.bias.format) % 2 + 1].widen",
        TALL_BF16,
    ),
    Mutant(
        "outputs are narrowed one column too far",
        FINISH,
        "p.y[first].stride, s.rows, cols)",
        "p.y[first].stride, s.rows, cols + 1)",
        TALL_BF16,
    ),
    Mutant(
        "bf16 outputs are cut off",
        VEC,
        "_mm512_add_epi32(bits, _mm512_add_epi32(last, _mm512_set1_epi32(0x7fff)))",
        "bits",
        TALL_BF16,
    ),
    Mutant(
        "bf16 ties go up",
        VEC,
        "_mm512_add_epi32(last, _mm512_set1_epi32(0x7fff))",
        "_mm512_set1_epi32(0x8000)",
        TALL_BF16,
    ),
    Mutant(
        "bf16 ties go up, scalar",
        "include/fastlinear/formats/bf16.hpp",
        "0x7fff + (bits >> 16 & 1)",
        "0x8000",
        "bf16/scalar/4x16",
    ),
    Mutant(
        "NaN rounds to a number",
        VEC,
        "_mm512_mask_blend_epi32(_mm512_cmp_ps_mask(x.v, x.v, _CMP_ORD_Q), quiet, nearest)",
        "nearest",
        TALL_BF16,
    ),
    Mutant(
        "fp16 outputs are cut off",
        VEC,
        "_mm512_maskz_cvtps_ph(kAll, x.v, _MM_FROUND_TO_NEAREST_INT)",
        "_mm512_maskz_cvtps_ph(kAll, x.v, _MM_FROUND_TO_ZERO)",
        "fp16/avx512/14x32",
    ),
    Mutant(
        "fp16 denormals are flushed, scalar",
        "include/fastlinear/formats/fp16.hpp",
        "sign | scaled |",
        "sign | (magnitude < 0x00800000u ? 0u : scaled) |",
        "fp16/scalar/4x16",
    ),
    Mutant(
        "fp16 sums are never promoted",
        HALVES,
        "promote_after = 64",
        "promote_after = 1 << 30",
        "fp16/avx512_fp16/12x64",
    ),
    *(Mutant(*changed) for changed in INTEGERS),
    Mutant("fp16 sums are lost when promoted", HALVES, "add = true;", "add = t.accumulate;", "fp16/avx512_fp16/12x64"),
]
# Changes that may cost time and nothing else.
HARMLESS = [
    Mutant("the last tile has garbage below", PROLOGUE, "made = r < m_ ? p_.k : 0", "made = p_.k", TILED),
    Mutant(
        "prefetches the wrong place",
        WORKER,
        "a.prefetch_stride = prefetches ? ",
        "a.prefetch_stride = prefetches ? 17 * ",
    ),
    Mutant("what follows the last k is not cleared", PROLOGUE, "((filled - made) * element)", "(0 * filled)", WORDS),
    Mutant("a unit a thread", GRID, "units_per_thread = 4", "units_per_thread = 1"),
    Mutant("small blocks", PLAN, "return {l2 / 2,", "return {l2 / 256,"),
]


def edges(kernel: Kernel) -> None:
    for case in native.pairwise(*test_kernels.factors(kernel, 331))[::5]:
        test_kernels.held_to_the_bound(kernel, case)


KINDS = test_int8.KINDS.items()
# The tests a mutant has to get past; each is called with a kernel: those of numbers, those of integers.
CHECKS: dict[str, Callable[[Kernel], None]] = {
    "edges": edges,
    "blocks": partial(test_kernels.test_blocks_of_k_and_of_rows, k_slices=1),
    "chains": partial(test_kernels.test_chains_of_steps, chain=test_kernels.CHAINS[1]),
    "collisions": partial(test_kernels.test_rows_that_collide_in_the_cache, row_bytes=4096),
    "exact": partial(test_exact.test_sums_of_integers_are_exact, k_slices=1),
    "exact slices": partial(test_exact.test_sums_of_integers_are_exact, k_slices=3),
    "row alone": partial(test_exact.test_a_row_of_a_batch_is_the_row_alone, k=97, k_slices=1),
    "canaries": partial(test_memory.test_only_the_output_is_written, size="ragged", k_slices=1),
    "neighbors": partial(test_memory.test_what_lies_around_x_never_leaks, size="ragged"),
    "weights": test_formats.test_every_weight_is_widened_exactly,
    "biases": test_formats.test_every_bias_is_widened_exactly,
    "bf16 outputs": partial(test_formats.test_outputs_are_rounded_as_torch_rounds, dtype=torch.bfloat16),
    "fp16 outputs": partial(test_formats.test_outputs_are_rounded_as_torch_rounds, dtype=torch.float16),
    "promotion": test_formats.test_fp16_sums_are_promoted,
}
OF_INTEGERS: dict[str, Callable[[Kernel], None]] = {
    **{f"layers {i}": partial(test_int8.test_layers_are_the_specifications, share=i) for i in range(test_int8.SHARES)},
    **{f"odd {kind} rows": partial(test_int8.test_odd_rows, rows=rows, of_x=torch.float32) for kind, rows in KINDS},
    "blocks of rows": partial(test_int8.test_more_rows_than_a_block, rows=test_int8.KINDS["symmetric"]),
    "smoothed rows": partial(test_int8.test_smoothed_rows, rows=test_int8.KINDS["symmetric"]),
    "integer scratch": test_memory.test_integer_scratch_never_leaks,
}


def row(name: str) -> Kernel:
    found = next(kernel for kernel in native.ALL if kernel["id"] == name)
    if found not in native.EXECUTED:
        pytest.skip(f"{name} {found['way']}")
    return found


def caught_by(path: Path, kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> str | None:
    """The first check that the library there does not pass; dying of a signal is failing."""
    monkeypatch.setattr(native, "product", library.product_of(path))
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)  # torch has no other threads in a forked child
    for name, check in (OF_INTEGERS if kernel in native.INTEGER else CHECKS).items():
        try:
            native.in_child(lambda note, check=check: check(kernel))
        except AssertionError as error:
            assert "the child ended with -" in str(error) or "AssertionError" in str(error), error
            return name
    return None


def built(m: Mutant) -> Path:
    return library.build().changed(m.name, m.file, m.old, m.new, m.unit)


def test_no_mutant_is_stale() -> None:
    """What it changes stands in the source once."""
    for mutant in (*BROKEN, *HARMLESS):
        assert (library.ROOT / mutant.file).read_text().count(mutant.old) == 1, mutant.name


@pytest.mark.parametrize("mutant", BROKEN, ids=lambda mutant: mutant.name)
def test_a_broken_source_is_caught(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    """At least one check fails; which one is printed (pytest -s)."""
    kernel = row(mutant.row)
    check = caught_by(built(mutant), kernel, monkeypatch)
    print(f"\n{mutant.name}: caught by {check}")
    assert check


@pytest.mark.parametrize("mutant", HARMLESS, ids=lambda mutant: mutant.name)
def test_a_harmless_change_passes(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefetches and block sizes are no part of the result: the checks do not fail for nothing."""
    kernel = row(mutant.row)
    assert not caught_by(built(mutant), kernel, monkeypatch)


def against_a_page(panels: Tensor, at: Literal["start", "end"]) -> Tensor:
    return guard.guarded(panels, at)


@native.every_kernel
def test_panels_are_not_left(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The packed panels flush against forbidden pages at both ends: no kernel reads a byte beyond them."""
    unchanged = library.build().unchanged

    def action(note: native.Note) -> None:
        for at in ("start", "end"):
            monkeypatch.setattr(native, "product", library.product_of(unchanged, partial(against_a_page, at=at)))
            for n in (1, kernel["nr"], kernel["columns"], 2 * kernel["columns"] + 1):
                for m, k, k_slices in [(1, 1, 1), (kernel["mr"] + 1, 23, 1), (2 * kernel["mr"], 23, 3)]:
                    note(f"panels at their {at}: {m} x {n} x {k}, {k_slices} slices")
                    x, w, _ = native.exact_case(kernel, m, n, k, kernel["dtypes"][0])
                    native.check(kernel, native.run(kernel, x, w, k_slices=k_slices), x, w, exact=True)

    native.in_child(action)


@native.every_integer_kernel
def test_integer_panels_are_not_left(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor beyond the scales, sums and zero points behind the panels of integer products."""
    unchanged = library.build().unchanged

    def action(note: native.Note) -> None:
        for at in ("start", "end"):
            monkeypatch.setattr(native, "product", library.product_of(unchanged, partial(against_a_page, at=at)))
            for n in (1, kernel["nr"], kernel["columns"], 2 * kernel["columns"] + 1):
                for m, k, k_slices in [(1, 1, 1), (kernel["mr"] + 1, 23, 1), (2 * kernel["mr"], 23, 3)]:
                    note(f"panels at their {at}: {m} x {n} x {k}, {k_slices} slices")
                    q = test_int8.weight(n, k, zeros=True)
                    test_int8.held(kernel, torch.randn(m, k), q, test_int8.KINDS["asymmetric"], k_slices=k_slices)

    native.in_child(action)

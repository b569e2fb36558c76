"""The tests can fail: the library's own sources, broken in one place, are caught by the very checks that guard them."""

import ctypes
import fcntl
import os
import re
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import library
import native
import pytest
import torch
from native import Kernel

import fastlinear._tensors as _tensors
from kernel import test_exact, test_formats, test_int8, test_kernels, test_memory


class Mutant(NamedTuple):
    """One change of one header: what stands between « and », an expression or a statement, becomes `new`. `row`, a
    kernel or "kernel on layout", shows it."""

    name: str
    file: str
    place: str
    new: str
    row: str = "fp32/scalar/4x16"


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
PAIRING = "bf16/avx512_bf16/14x32 on w8f/32x1"

WORDS, QUADS, BYTES = "int8/avx512/6x32", "int8/avx512_vnni/14x32", "int8/scalar/4x8"
INTEGERS = [
    ("symmetric rows reach to 126", PROLOGUE, "-127.0f, «127.0f», row.zero", "126.0f", QUADS),
    ("symmetric rows divide by 128", PROLOGUE, "/ «127.0f» :", "128.0f", QUADS),
    (
        "asymmetric zero points are cut off",
        PROLOGUE,
        "«nearest(-e.least * (1.0f / scale))»",
        "std::floor(-e.least * (1.0f / scale))",
        QUADS,
    ),
    ("asymmetric rows saturate at 254", PROLOGUE, "«255.0f - zero», row.zero}", "254.0f - zero", QUADS),
    ("tiny rows keep a scale", PROLOGUE, "«scale < std::numeric_limits<float>::min()»", "scale <= 0.0f", QUADS),
    (
        "NaN is overlooked",
        PROLOGUE,
        "«finite ? form.finite : form.any»",
        "form.finite",
        QUADS,
    ),
    ("smoothing is forgotten in fp32", PROLOGUE, "«wide && smooth == nullptr»", "wide", QUADS),
    ("s8 rows are taken as u8", PROLOGUE, "if («flip != 0») prologue_detail", "false", QUADS),
    ("s8 rows are taken as u8, int16", PROLOGUE, "«(from[k] ^ flip)»", "from[k]", WORDS),
    ("int16 rows keep their zero point", PROLOGUE, "«scale.zero = 0;»  //", "", WORDS),
    ("rows are summed without their zero point", PROLOGUE, "row)[k] - «zero»;", "0", QUADS),
    ("column sums are those of the first tile", FINISH, "«w.sums + first_sum_»", "w.sums", QUADS),
    ("zero points are those of the first tile", FINISH, "«w.zeros + first_sum_»", "w.zeros", QUADS),
    ("the zero points of x are not subtracted", QUANTIZE, "t.ld_in + c) - «shift»;", "I::set(0)", BYTES),
    ("all rows have the first one's zero point", QUANTIZE, "if («row.zero != zero») shift", "false", BYTES),
    ("ReLU lets -1 pass", FINISH, "relu_ ? «0.0f» :", "-1.0f", QUADS),
    (
        "ReLU is done and the next step with it",
        FINISH,
        "first_step_ = «relu_ || adds_ || step.function == kIdentity ? 1 : 0»;",
        "2 * relu_ + (step.function == kIdentity)",
        QUADS,
    ),
    ("the zero points of W are not subtracted", QUANTIZE, "if («t.zeros != nullptr»)", "false", BYTES),
    ("scales are fused", QUANTIZE, "rounded(«rounded(to_float(sum) * scale)» * F", "(to_float(sum) * scale)", BYTES),
    (
        "the bias is fused",
        QUANTIZE,
        "«rounded(rounded(to_float(sum) * scale) * F::set(row.scale))»",
        "rounded(to_float(sum) * scale) * F::set(row.scale)",
        BYTES,
    ),
    (
        "ties go up",
        VEC,
        "«_mm512_maskz_cvtps_epi32(kAll, a.v)»",
        "_mm512_maskz_cvt_roundps_epi32(kAll, a.v + 0.5f, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)",
        WORDS,
    ),
    ("slices are added as floats", DRIVER, "if («is_float(job.plan.kernel->accumulate)»)", "true", QUADS),
    (
        "integer rows of a second block begin at the first",
        PROLOGUE,
        "(this->*make_)(«first_ + r», to)",
        "r",
        QUADS,
    ),
    ("the bias is added twice", FINISH, "«s.bias = nullptr;»\n    }\n    if (", "", QUADS),
    ("s8 outputs are u8", FINISH, "if («to.flip != 0»)", "false", QUADS),
    ("scales of the first tile serve all", FINISH, "«w.scales + first_sum_»", "w.scales", QUADS),
    ("rows of the first tile serve all", FINISH, "«job_.x.scales + rows.begin»", "job_.x.scales", QUADS),
]

BROKEN = [
    Mutant("tiles lose the last groups of K", TILES, "(«rest + Op::layout.kr - 1») / Op", "rest - 1", TILED),
    Mutant("tiles overwrite K blocks", TILES, "if («t.accumulate»)", "false", TILED),
    Mutant("the second row block is the first", TILES, "(«rows + r * kRows * lda», lda)", "rows", TILED),
    Mutant("column blocks are swapped", TILES, "«sum % C * kBytes»", "(C - 1 - sum % C) * kBytes", TILED_BYTES),
    Mutant(
        "rows are not filled up",
        PROLOGUE,
        "ends = «round_up(p.k, kernel.k_step) == p.k && round_up(m_, kernel.row_step) == m_»",
        "true",
        TILED,
    ),
    Mutant("garbage follows the last k", PROLOGUE, "(«(filled - made) * element»)", "0 * filled", TILED),
    Mutant("the last k is dropped", SCALAR, "«k < t.k»; ++k", "k + 1 < t.k"),
    Mutant("the last k is dropped, AVX2", TILE, "left = «t.k / kr»;", "t.k / kr - 1", "fp32/avx2/6x16"),
    Mutant("the first two rows are swapped", SCALAR, "a[«r» * t.lda + k]", "(t.rows > 1 && r < 2 ? 1 - r : r)"),
    Mutant(
        "the first row serves all, AVX-512",
        TILE,
        "«r % reach * lda»",
        "0",
        TALL,
    ),
    Mutant("K blocks overwrite each other", SCALAR, "«t.accumulate ? tile[r * Columns + j] : Sum{}»", "Sum{}"),
    Mutant(
        "K blocks overwrite each other, driver",
        WORKER,
        "a.accumulate = «block.begin > slice.begin»",
        "false",
    ),
    Mutant("the bias is skipped", FINISH, "«job_.bias != nullptr && !p_.epilogue.gated»", "false"),
    Mutant("the bias is added in every step", FINISH, "function](s);\n      «s.bias = nullptr;»", ""),
    Mutant(
        "a column too many is stored",
        FINISH,
        "sums_ = «std::min(ld_, p_.n - first_sum_)»",
        "std::min(ld_, p_.n - first_sum_ + 1)",
    ),
    Mutant(
        "a column too few is stored",
        FINISH,
        "sums_ = «std::min(ld_, p_.n - first_sum_)»",
        "std::min(ld_, p_.n - first_sum_ - 1)",
    ),
    Mutant("the second K slice is lost", DRIVER, "slice = «1»; slice < ", "2"),
    Mutant(
        "K slices overlap",
        GRID,
        "«std::min(k_, (u.slice + 1) * slice_k_)»",
        "std::min(k_, (u.slice + 1) * slice_k_ + 1)",
    ),
    Mutant(
        "copied rows are one k short",
        PROLOGUE,
        "«p_.k» * element_bytes(p_.x.format), to",
        "(p_.k - 1)",
        TALL,
    ),
    Mutant(
        "copied 16-bit rows are one k short",
        PROLOGUE,
        "«p_.k» * element_bytes(p_.x.format), to",
        "(p_.k - 1)",
        TALL_PAIRS,
    ),
    Mutant(
        "widened rows are one k short",
        PROLOGUE,
        "(elements(row), reinterpret_cast<float*>(to), «p_.k»)",
        "p_.k - 1",
        TALL_BF16,
    ),
    Mutant(
        "widened rows are those of the next row",
        PROLOGUE,
        "widen(elements(«row»), reinterpret_cast",
        "2 * first_ + m_ - 1 - row",
        TALL_BF16,
    ),
    Mutant("the odd last k is dropped", TILE, "if («kr > 1 && t.k % kr > 0»)", "false", TALL_BF16),
    Mutant(
        "the odd last k brings its neighbor, 0 times",
        PAIRS,
        "«_mm512_castsi512_ps(_mm512_set1_epi32(a->bits))»",
        "row(a)",
        TALL_PAIRS,
    ),
    Mutant("even and odd k are swapped", BF16, "«step == 0»", "step == 1", TALL_BF16),
    Mutant("even and odd k are swapped in pairing", CONVERT, "«(g + 1) * nr + j») : V", "g * nr + j", PAIRING),
    Mutant(
        "even and odd k are swapped in widening",
        CONVERT,
        "«V::load_pairs(in + g * nr + 2 * j, even, odd);»",
        "V::load_pairs(in + g * nr + 2 * j, odd, even);",
        WIDENING,
    ),
    Mutant(
        "odd k are not masked in widening",
        VEC,
        "«_mm512_and_si512(both, _mm512_set1_epi32(static_cast<int>(0xffff0000u)))»",
        "both",
        WIDENING,
    ),
    Mutant("widening skips the last pair's odd k", CONVERT, "if («g + 1 < k») V::store", "g + 2 < k", WIDENING),
    Mutant(
        "widening writes an odd k that is not there",
        CONVERT,
        "«if (g + 1 < k) V::store(out + (g + 1) * nr + j, odd);»",
        "V::store(out + (g + 1) % k * nr + j, odd);",
        WIDENING,
    ),
    Mutant(
        "widened panels lie as far apart as packed ones",
        WORKER,
        "a.panel_stride = «bytes»",
        "job.panel_bytes",
        "fp32/avx512/6x64 on bf16/32x2",
    ),
    Mutant("only the first panel is widened", WORKER, "«i < a.panels»", "i < 1", "fp32/avx512/6x64 on fp16/32x1"),
    Mutant(
        "the bias is of the other 16-bit format",
        DRIVER,
        "conversions[«static_cast<std::size_t>(job.p.bias.format)»].widen",
        "static_cast<std::size_t>(job.p.bias.format) % 2 + 1",
        TALL_BF16,
    ),
    Mutant(
        "outputs are narrowed one column too far",
        FINISH,
        "rows.size(), «columns_»)",
        "columns_ + 1",
        TALL_BF16,
    ),
    Mutant(
        "bf16 outputs are cut off",
        VEC,
        "«_mm512_add_epi32(bits, _mm512_add_epi32(last, _mm512_set1_epi32(0x7fff)))»",
        "bits",
        TALL_BF16,
    ),
    Mutant(
        "bf16 ties go up",
        VEC,
        "«_mm512_add_epi32(last, _mm512_set1_epi32(0x7fff))»",
        "_mm512_set1_epi32(0x8000)",
        TALL_BF16,
    ),
    Mutant(
        "bf16 ties go up, scalar",
        "include/fastlinear/formats/bf16.hpp",
        "bits + «0x7fff + (bits >> 16 & 1)»",
        "0x8000",
        "bf16/scalar/4x16",
    ),
    Mutant(
        "NaN rounds to a number",
        VEC,
        "«_mm512_mask_blend_epi32(_mm512_cmp_ps_mask(x.v, x.v, _CMP_ORD_Q), quiet, nearest)»",
        "nearest",
        TALL_BF16,
    ),
    Mutant(
        "fp16 outputs are cut off",
        VEC,
        "«_mm512_maskz_cvtps_ph(kAll, x.v, _MM_FROUND_TO_NEAREST_INT)»",
        "_mm512_maskz_cvtps_ph(kAll, x.v, _MM_FROUND_TO_ZERO)",
        "fp16/avx512/14x32",
    ),
    Mutant(
        "fp16 denormals are flushed, scalar",
        "include/fastlinear/formats/fp16.hpp",
        "sign | «scaled» |",
        "(magnitude < 0x00800000u ? 0u : scaled)",
        "fp16/scalar/4x16",
    ),
    Mutant(
        "fp16 sums are never promoted",
        HALVES,
        "end = «t.k - k < promote_after ? t.k : k + promote_after»",
        "t.k",
        "fp16/avx512_fp16/12x64",
    ),
    *(Mutant(*changed) for changed in INTEGERS),
    Mutant("fp16 sums are lost when promoted", HALVES, "add = «true»;", "t.accumulate", "fp16/avx512_fp16/12x64"),
]
# Changes that may cost time and nothing else.
HARMLESS = [
    Mutant("the last tile has garbage below", PROLOGUE, "made = «r < m_ ? p_.k : 0»", "p_.k", TILED),
    Mutant(
        "prefetches the wrong place",
        WORKER,
        "prefetches ? «job.group_bytes / tiles.size()»",
        "17 * job.group_bytes / tiles.size()",
    ),
    Mutant("what follows the last k is not cleared", PROLOGUE, "(«(filled - made) * element»)", "0 * filled", WORDS),
    Mutant("a unit a thread", GRID, "plan.threads * «units_per_thread» : 1", "1"),
    Mutant("small blocks", PLAN, "return {«l2 / 2», l2 / share", "l2 / 256"),
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
    "exact": partial(test_exact.test_sums_of_integers_are_exact, native.pairwise, k_slices=1),
    "exact slices": partial(test_exact.test_sums_of_integers_are_exact, native.pairwise, k_slices=3),
    "row alone": partial(test_exact.test_a_row_of_a_batch_is_the_row_alone, k=97, k_slices=1),
    "canaries": partial(test_memory.test_only_the_output_is_written, size="ragged", k_slices=1),
    "neighbors": partial(test_memory.test_what_lies_around_x_never_leaks, size="ragged"),
    "scratch": partial(test_memory.test_scratch_of_an_earlier_call_never_leaks, k_slices=1),
    "weights": partial(test_formats.test_every_weight_is_widened_exactly, test_formats.SOME),
    "biases": partial(test_formats.test_every_bias_is_widened_exactly, test_formats.SOME),
    **{
        f"{_tensors.FORMATS[dtype]} outputs": partial(
            test_formats.test_outputs_are_rounded_as_torch_rounds, test_formats.SOME, dtype=dtype
        )
        for dtype in (torch.bfloat16, torch.float16)
    },
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


# ---- one library for all mutants -------------------------------------------------------------------------------------

ALL = (*BROKEN, *HARMLESS)
SWITCH = "mutant"  # a number in the library: 0, or which of ALL it is, from 1 on


class Change(NamedTuple):
    """Of the characters [begin, end) of a header, by the mutant of that number."""

    begin: int
    end: int
    number: int
    new: str


def change(text: str, number: int, mutant: Mutant) -> Change:
    """Where a mutant's place lies in its header; AssertionError where it does not stand there once."""
    before, old, _ = mutant.place.replace("»", "«").split("«")
    plain = mutant.place.replace("«", "").replace("»", "")
    assert text.count(plain) == 1, f"{mutant.file} has {text.count(plain)} times {plain!r}: {mutant.name!r} is stale"
    begin = text.index(plain) + len(before)
    return Change(begin, begin + len(old), number, mutant.new)


def switched(text: str, changes: list[Change], begin: int, end: int) -> str:
    """`text[begin:end]` with all changes that lie in it, each made while the switch has its number. Places may be the
    same, or lie within one another."""
    done, at = [], begin
    for first in sorted(changes, key=lambda each: (each.begin, -each.end)):
        if first.begin < at:  # done with the one around it
            continue
        same = [each for each in changes if each[:2] == first[:2]]
        inner = [each for each in changes if first.begin <= each.begin and each.end <= first.end and each not in same]
        old, is_statement = switched(text, inner, first.begin, first.end), text[first.end - 1] == ";"
        for each in same:
            if is_statement:
                old = f"{{ if ({SWITCH} == {each.number}) {{ {each.new} }} else {{ {old} }} }}"
            else:
                old = f"({SWITCH} == {each.number} ? ({each.new}) : ({old}))"
        done += [text[at : first.begin], old]
        at = first.end
    return "".join([*done, text[at:end]])


def units(folder: Path) -> list[Path]:
    """The sources of the ISAs that mutants are shown on here, and of those that they name, below and above; written to
    the folder, a table of these alone."""
    texts = {unit: unit.read_text() for unit in library.ROOT.glob("csrc/*.cpp") if unit.stem != "registry"}
    found = {name: unit for unit, text in texts.items() for name in re.findall(r'\.name = "(\w+)",\s+\.base', text)}
    rows = {mutant.row for mutant in ALL}
    kept = {kernel["isa"] for kernel in native.EXECUTED if kernel["id"] in rows}
    while more := {name for isa in kept for name in re.findall(r"&(\w+)::kIsa", texts[found[isa]])} - kept:
        kept |= more
    table = (library.ROOT / "csrc/registry.cpp").read_text()
    for name in found.keys() - kept:
        entry = f"    &{name}::kIsa,\n"
        assert table.count(entry) == 1
        table = table.replace(entry, "")
    (folder / "registry.cpp").write_text(table)
    return [folder / "registry.cpp", *(library.of_products(found[name], folder) for name in sorted(kept))]


@cache
def built() -> Path:
    """The library's own sources behind `library.product_of`, with a switch for each mutant: compiled once a run."""
    folder = Path(os.environ["TESTS_BUILD_FOLDER"])
    made = folder / "mutants.so"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the workers of pytest-xdist share the folder
        if not made.exists():
            shutil.copytree(library.ROOT / "include", folder / "include")
            for table in folder.glob("include/fastlinear/isa/*/*.hpp"):
                table.write_text(library.of_kernels(table.read_text(), {mutant.row.split()[0] for mutant in ALL}))
            for file in {mutant.file for mutant in ALL}:
                text = (folder / file).read_text()
                changes = [change(text, i, mutant) for i, mutant in enumerate(ALL, 1) if mutant.file == file]
                (folder / file).write_text(switched(text, changes, 0, len(text)))
            names = {name for unit in library.ROOT.rglob("include/**/*.hpp") for name in library.system_headers(unit)}
            declared = "".join(f"#include <{name}>\n" for name in sorted(names)) + f'extern "C" int {SWITCH};\n'
            (folder / "common.hpp").write_text(declared)
            (folder / "switch.cpp").write_text(f'extern "C" {{ [[gnu::visibility("default")]] int {SWITCH} = 0; }}\n')
            library.compile(folder / "common.hpp", folder, folder / "common.hpp.gch", "-x", "c++-header")
            more = ("-include", folder / "common.hpp")  # which is precompiled
            sources = [*units(folder), library.PRODUCT, folder / "switch.cpp"]
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = list(
                    pool.map(lambda unit: library.compile(unit, folder, folder / f"{unit.stem}.o", *more), sources)
                )
            library.link(made, objects)
    return made


def died_in(number: int, kernel: Kernel, checks: dict[str, Callable[[Kernel], None]]) -> str | None:
    """The first check that the mutant of this number does not pass; dying of a signal is failing, and so is whatever
    a write to memory that is Python's or torch's makes them raise."""

    def action(note: native.Note) -> None:
        ctypes.c_int.in_dll(ctypes.CDLL(str(built())), SWITCH).value = number
        for name, check in checks.items():
            note(name)
            check(kernel)

    try:
        native.in_child(action)
    except AssertionError as error:
        return re.findall(r"^at (\D.*)$", str(error), re.MULTILINE)[-1]
    return None


@pytest.fixture
def on_this_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products are computed by the library with the switch."""
    monkeypatch.setattr(native, "product", library.product_of(built()))
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)  # torch has no other threads in a forked child


def checks_of(kernel: Kernel) -> dict[str, Callable[[Kernel], None]]:
    return OF_INTEGERS if kernel in native.INTEGER else CHECKS


def numbered(mutants: Sequence[Mutant], exhaustive: Sequence[Mutant] = ()) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        "number",
        [
            pytest.param(ALL.index(m) + 1, id=m.name, marks=[pytest.mark.exhaustive] if m in exhaustive else [])
            for m in (*mutants, *exhaustive)
        ],
    )


def test_no_mutant_is_stale() -> None:
    """What it changes stands in the source once, and no two are the same."""
    assert len(set(ALL)) == len(ALL)
    for i, mutant in enumerate(ALL, 1):
        change((library.ROOT / mutant.file).read_text(), i, mutant)


def test_switches_within_one_another() -> None:
    """Of changes at one place and within each other's each is made while the switch has its number."""
    text = "x = f(a + b); g();"
    changes = [Change(4, 12, 1, "p"), Change(4, 12, 2, "q"), Change(6, 11, 3, "c"), Change(14, 18, 4, "")]
    assert switched(text, changes, 0, len(text)) == (
        "x = (mutant == 2 ? (q) : ((mutant == 1 ? (p) : (f((mutant == 3 ? (c) : (a + b)))))));"
        " { if (mutant == 4) {  } else { g(); } }"
    )


@cache
def passes(id: str, name: str) -> bool:
    """Whether this kernel passes a check without any change."""
    kernel = row(id)
    return died_in(0, kernel, {name: checks_of(kernel)[name]}) is None


@numbered(BROKEN)
@pytest.mark.usefixtures("on_this_library")
def test_a_broken_source_is_caught(number: int) -> None:
    """At least one check fails, which passes without the change; which one is printed (pytest -s)."""
    mutant = ALL[number - 1]
    kernel = row(mutant.row)
    name = died_in(number, kernel, checks_of(kernel))
    print(f"\n{mutant.name}: caught by {name}")
    assert name and passes(mutant.row, name)


@numbered(HARMLESS[:2], HARMLESS[2:])
@pytest.mark.usefixtures("on_this_library")
def test_a_harmless_change_passes(number: int) -> None:
    """Prefetches and block sizes are no part of the result: the checks do not fail for nothing."""
    kernel = row(ALL[number - 1].row)
    assert not died_in(number, kernel, checks_of(kernel))

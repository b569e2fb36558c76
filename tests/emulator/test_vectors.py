"""AVX512-FP16 and AVX-VNNI under the emulator, the loops around them, and that nothing of what ships is missing."""

import itertools
import random
import re
import struct
import subprocess
from collections.abc import Iterator

import library
import pytest
import torch
from kernel import test_symbols

import emulator
import fastlinear._kernels as _kernels
import fastlinear._plans as _plans
import fastlinear._products as _products
import fastlinear._weights as _weights
from emulator import scalar
from emulator.code import assembled, call, dies_of
from emulator.test_tiles import SILICON, configure

needs_avx512 = pytest.mark.skipif(
    "avx512" not in _kernels.cpu_info()["isas"], reason="fp16 is emulated in registers of AVX-512"
)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    if SILICON:
        configure()
    emulator.reset()
    yield
    if SILICON:
        call("tilerelease")
    emulator.reset()


# ---- fused multiply-adds of fp16 -------------------------------------------------------------------------------------

# Zeros, denormals, the least normal, ones and neighbors, large, infinities, NaN with payloads.
PATTERNS = [0, 0x8000, 1, 0x8001, 0x3FF, 0x83FF, 0x400, 0x8400, 0x3C00, 0xBC00, 0x3C01, 0x3BFF, 0x1400, 0x0801, 0x6800]
PATTERNS += [0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7E01, 0xFE02, 0x7D03]
TRIPLES = list(itertools.product(PATTERNS, repeat=3))


def fused(x: int, y: int, z: int) -> int:
    """x * y + z of fp16 patterns; of NaN the first of these, made quiet, or the default one."""
    for h in (x, y, z):
        if h & 0x7FFF > 0x7C00:
            return h | 0x200
    value = scalar.fma(*(scalar.of_fp16(h) for h in (x, y, z)), scalar.FP16, flush=False)
    return 0xFE00 if value != value else int(struct.unpack("<H", struct.pack("<e", value))[0])


FORMS = {"132": (0, 2, 1), "213": (1, 0, 2), "231": (1, 2, 0)}  # which operands are x, y, z


@needs_avx512
@pytest.mark.parametrize("form", FORMS)
def test_fused_multiply_adds(form: str) -> None:
    """Every triple of the patterns in every form: rounded once, denormals kept, NaN as the manual picks them."""
    whole = torch.tensor([*TRIPLES, *TRIPLES[: -len(TRIPLES) % 32]], dtype=torch.int32).to(torch.int16)
    of = [whole[:, i].contiguous() for i in range(3)]
    found = of[0].clone()
    call(
        f"1: vmovdqu16 (%rdi),%zmm1; vmovdqu16 (%rsi),%zmm2; vmovdqu16 (%rdx),%zmm3; vfmadd{form}ph %zmm3,%zmm2,%zmm1;"
        "vmovdqu16 %zmm1,(%rdi); add $64,%rdi; add $64,%rsi; add $64,%rdx; sub $1,%rcx; jne 1b; vzeroupper",
        *(t.data_ptr() for t in (found, *of[1:])),
        len(whole) // 32,
    )
    expected = [fused(*(triple[i] for i in FORMS[form])) for triple in TRIPLES]
    assert [x % 2**16 for x in found[: len(TRIPLES)].tolist()] == expected


@needs_avx512
@pytest.mark.parametrize("register", range(32))
def test_every_register_in_every_form_of_operand(register: int) -> None:
    """As destination, as a factor, beside memory in whole vectors and in one element for all; other bits become 0."""
    one = torch.tensor([2.0] * 32 + [3.0] * 32 + [0.5] * 32 + [7.0] * 32, dtype=torch.float16)
    other = (register + 13) % 32
    for bits, name in ((512, "zmm"), (256, "ymm"), (128, "xmm")):
        for source, expected in (
            ("(%rsi)", 2 + 3 * 0.5),
            ("-64(%rsi)", 2 + 3 * 3.0),
            ("64(%rsi,%rdx,2)", 2 + 3 * 7.0),
            (f"62(%rsi){{1to{bits // 16}}}", 2 + 3 * 0.5),
            (f"%{name}{other}", 2 + 3 * 3.0),
        ):
            out = torch.zeros(32, dtype=torch.float16)
            load = f"vmovdqu16 -128(%rsi),%zmm{register}; vmovdqu16 -64(%rsi),%zmm{other}"
            text = f"{load}; vfmadd231ph {source},%{name}{other},%{name}{register}; vmovdqu16 %zmm{register},(%rdi)"
            call(f"{text}; vzeroupper", out.data_ptr(), one[64:].data_ptr())
            lanes = bits // 16
            assert out.tolist() == [expected] * lanes + [0.0] * (32 - lanes), text


@needs_avx512
def test_masked_forms_are_not_known() -> None:
    """What the library does not use is no silent nonsense but a SIGILL, where it faults."""
    if library.way("avx512_fp16") == library.EMULATED:
        assert dies_of("kxnorw %k1,%k1,%k1; vfmadd231ph %zmm0,%zmm1,%zmm2{%k1}") != 0
    assert emulator.knows(assembled("vaddph %zmm0,%zmm1,%zmm2")) == 0


# ---- AVX-VNNI --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "name"), [(256, "ymm"), (128, "xmm")])
@pytest.mark.parametrize("memory", [False, True])
def test_dot_products_of_bytes(bits: int, name: str, memory: bool) -> None:
    """Unsigned by signed bytes, four to a sum, wrapping; the upper half of the register becomes 0."""
    generator = torch.Generator().manual_seed(bits)
    x = torch.randint(0, 256, (32,), generator=generator).to(torch.uint8)
    w = torch.randint(-128, 128, (32,), generator=generator).to(torch.int8)
    x[:4], w[:4] = 255, 127
    c = torch.full((8,), 2**31 - 1, dtype=torch.int32)
    expected = (x.long() * w.long()).view(8, 4).sum(1) + c.long()
    expected[bits // 32 :] = 0
    operand = "(%rdx)" if memory else f"%{name}9"
    call(
        f"vmovdqu (%rdi),%ymm15; vmovdqu (%rsi),%ymm8; vmovdqu (%rdx),%ymm9; {{vex}} vpdpbusd {operand},%{name}8,"
        f"%{name}15; vmovdqu %ymm15,(%rdi); vzeroupper",
        *(t.data_ptr() for t in (c, x, w)),
    )
    assert torch.equal(c.long() % 2**32, expected % 2**32)


# ---- what stands between ---------------------------------------------------------------------------------------------

# After a fault the handler goes on with what it knows. A CPU that has tiles faults for products that it has not.
START = {False: "nop", True: "tdpfp16ps %tmm2,%tmm1,%tmm0" if SILICON else "tilerelease"}
nothing_faults = library.way("amx_fp16") == library.NATIVELY
VALUES = [0, 1, -1, 2**31 - 1, -(2**31), 2**63 - 1, -(2**63), 0x0F, 0x10, 255, 256, 2**32]


@pytest.mark.parametrize("operation", ["add", "sub", "cmp"])
@pytest.mark.parametrize("wide", [True, False])
def test_arithmetic_sets_registers_and_flags(operation: str, wide: bool) -> None:
    """With and without a fault in front the same sums, and all six flags, in each encoding."""
    a, b = ("rdi", "rsi") if wide else ("edi", "esi")
    operands = (f".s %{b},%{a}", f" %{b},%{a}", f" $-7,%{a}", f" $300,%{a}")
    finish = "pushfq; pop %rax; and $0x8d5,%rax; mov %rdi,(%rdx)"
    for text in (operation + tail for tail in operands):
        for x, y in itertools.product(VALUES, repeat=2):
            outcomes = set()
            for faults, start in START.items():
                out = torch.zeros(1, dtype=torch.int64)
                flags = call(f"{start}; {text}; {finish}", x % 2**64, y % 2**64, out.data_ptr())
                outcomes.add((flags, int(out)))
                assert not faults or nothing_faults or emulator.faults() > 0
            assert len(outcomes) == 1, (text, x, y, outcomes)


CONDITIONS = ["o", "no", "b", "ae", "e", "ne", "be", "a", "s", "ns", "p", "np", "l", "ge", "le", "g"]


@pytest.mark.parametrize("condition", CONDITIONS)
def test_jumps(condition: str) -> None:
    """Every condition, near and far, is met for the same pairs of numbers as natively."""
    for distance, (x, y) in itertools.product((0, 200), itertools.product(VALUES[:6], repeat=2)):
        outcomes = set()
        for start in START.values():
            tail = f"cmp %rsi,%rdi; j{condition} 1f; mov %rdx,%rax; .skip {distance}, 0x90; 1: nop"
            outcomes.add(call(f"mov %rcx,%rax; {start}; {tail}", x % 2**64, y % 2**64, 5, 9))
        assert len(outcomes) == 1, (condition, x, y)


@pytest.mark.parametrize(
    "text",
    [
        "mov %rdi,%rax",
        "mov.s %rdi,%rax",
        "mov %edi,%eax",
        "lea 1f(%rip),%rcx; mov (%rcx),%rax; mov 1(%rcx),%edx; add %rdx,%rax; 1: nopw 0(%rax,%rax,1)",
        "lea -5(%rdi,%rsi,8),%rax",
        "lea 1f(%rip),%rcx; sub %rcx,%rax; add %rcx,%rax; 1:",
        "prefetcht1 (%rdi); prefetchw 64(%rdi,%rsi,2); mov %rsi,%rax",
        "nop; nopw 0(%rax,%rax,1); cs nopw 64(%rax); xchg %ax,%ax; mov %rsi,%rax",
        "mov %r13,%rax",
    ],
)
def test_moves_and_addresses(text: str) -> None:
    """The same as natively."""
    found = {call(f"mov %rsi,%rax; {start}; {text}", 0x123456789ABC, 77) for start in START.values()}
    assert len(found) == 1


@needs_avx512
def test_a_loop_costs_one_fault() -> None:
    """A product of a kernel is carried out in about one fault a tile, though it has thousands of instructions."""
    generator = random.Random(0)
    x = torch.tensor([[generator.random() for _ in range(500)] for _ in range(12)], dtype=torch.float16)
    w = torch.rand(64, 500).half()
    if library.way("avx512_fp16") != library.EMULATED:
        pytest.skip("AVX512-FP16 runs natively here")
    out, plan = torch.empty(12, 64), None
    with emulator.running():
        plan = _plans.Plan("fp16/avx512_fp16/12x64")
        _products.run(_weights.Packed(w, plan.layout), plan, _plans.Epilogue(), x, None, out)
    assert emulator.counts() == {"vfmadd231ph": 500 * 24}
    assert emulator.faults() <= 2 * -(-500 // 64)


# ---- what ships ------------------------------------------------------------------------------------------------------


def test_every_instruction_that_may_be_missing_is_known() -> None:
    """Whatever of the emulated ISAs stands in the built library, in whatever form, the emulator carries out."""
    command = ["objdump", "--disassemble", "--wide", "--insn-width=16", _kernels.__file__]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    seen: dict[str, int] = {}
    for raw, text in re.findall(r"^\s+[0-9a-f]+:\t((?:[0-9a-f]{2} )+)\s*\t(.+)$", listing, re.MULTILINE):
        isa = test_symbols.isa_needed(text.split("#")[0].strip())
        if isa in library.EMULATIONS:
            code = bytes.fromhex(raw)
            assert emulator.knows(code) == len(code), text
            seen[isa] = seen.get(isa, 0) + 1
    assert seen.keys() == library.EMULATIONS.keys() and min(seen.values()) > 20

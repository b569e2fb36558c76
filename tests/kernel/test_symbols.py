"""The built library, disassembled: wide registers stay inside their ISA, and inner loops stay inside registers."""

import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

import fastlinear._kernels as _kernels

# What a symbol of each may use, its own first; "baseline" is every symbol that names none of them.
MAY_USE = {"baseline": ["baseline"]}
MAY_USE["avx2"] = ["avx2", *MAY_USE["baseline"]]
MAY_USE["avx_vnni"] = ["avx_vnni", *MAY_USE["avx2"]]
MAY_USE["avx512"] = ["avx512", *MAY_USE["avx2"]]
MAY_USE["avx512_vnni"] = ["avx512_vnni", *MAY_USE["avx512"]]
MAY_USE["avx512_bf16"] = ["avx512_bf16", *MAY_USE["avx512"]]
MAY_USE["avx512_fp16"] = ["avx512_fp16", *MAY_USE["avx512"]]
MAY_USE["amx"] = ["amx", *MAY_USE["avx512"]]
MAY_USE["amx_fp16"] = ["amx_fp16", *MAY_USE["amx"]]
ISAS = list(MAY_USE)[:0:-1]  # widest first: a symbol that names several may use what the widest may

# What AT&T syntax shows of an instruction set.
AMX_FP16_ONLY = re.compile(r"^tdpfp16ps\b")
AMX_ONLY = re.compile(r"^(tile|tdp|ldtilecfg|sttilecfg)")
AVX_VNNI_ONLY = re.compile(r"^\{vex\} vpdp")
VNNI_ONLY = re.compile(r"^vpdp(bu|ws)sds?\b")
BF16_ONLY = re.compile(r"^v(dpbf16ps|cvtne2?ps2bf16)")
FP16_ONLY = re.compile(r"^v(?!cvtph2ps\b|cvtps2ph\b)(\w+(ph|sh)|cvt\w*(ph|sh)\w*|movw)\b")  # but F16C's two
AVX512_ONLY = re.compile(r"%zmm|%[xy]mm(1[6-9]|2\d|3[01])|%k[0-7]\b|\{1to\d+\}")
# tzcnt is not here: GCC writes bsf with a prefix that older CPUs ignore.
AVX_OR_WIDER = re.compile(r"%ymm|^v[a-z]|^(andn|bextr|bls\w+|bzhi|lzcnt|mulx|pdep|pext|rorx|sarx|shlx|shrx)\b")
NOT_AVX = re.compile(r"^ver[rw]\b|^vm[a-z]+\b(?!.*%[xyz]mm)")  # v... mnemonics older than AVX

MOST_ROWS = 16  # of an inner loop; a kernel of more takes some of them at a time

SYMBOL = re.compile(r"^[0-9a-f]+ <(.+)>:$")
INSTRUCTION = re.compile(r"^\s+([0-9a-f]+):\s+(\S.*)$")
JUMP = re.compile(r"^(?:bnd )?j[a-z]+\s+([0-9a-f]+)\b")
MULTIPLY_ADD = re.compile(r"^(\{vex\} )?v(fmadd\w*p[sh]|dpbf16ps|pdpbusd|pmaddwd)\b|^tdp")

Instructions = list[tuple[int, str]]


@cache
def functions() -> dict[str, Instructions]:
    """Demangled symbol, behind the name of the module unless it has the kernels -> its (address, instruction) pairs."""
    assert shutil.which("objdump"), "this test reads the library with objdump, which comes with the compiler's binutils"
    found: dict[str, Instructions] = {}
    for library in sorted(Path(_kernels.__file__).parent.glob("_*.so")):
        command = ["objdump", "--disassemble", "--demangle", "--no-show-raw-insn", str(library)]
        module = "" if library.samefile(_kernels.__file__) else f"{library.name.split('.')[0]}: "
        for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():
            if symbol := SYMBOL.match(line):
                current = found.setdefault(module + symbol[1], [])
            elif instruction := INSTRUCTION.match(line):
                current.append((int(instruction[1], 16), instruction[2].split("#")[0].strip()))
    return found


def isa_of(symbol: str) -> str:
    return next((isa for isa in ISAS if f"fastlinear::{isa}::" in symbol), "baseline")


@cache
def isa_needed(instruction: str) -> str:
    if AMX_FP16_ONLY.search(instruction):
        return "amx_fp16"
    if AMX_ONLY.search(instruction):
        return "amx"
    if AVX_VNNI_ONLY.search(instruction):
        return "avx_vnni"
    if VNNI_ONLY.search(instruction):
        return "avx512_vnni"
    if BF16_ONLY.search(instruction):
        return "avx512_bf16"
    if FP16_ONLY.search(instruction):
        return "avx512_fp16"
    if AVX512_ONLY.search(instruction):
        return "avx512"
    if AVX_OR_WIDER.search(instruction) and not NOT_AVX.search(instruction):
        return "avx2"
    return "baseline"


def loops_of_fma(instructions: Instructions) -> list[Instructions]:
    """The innermost loops that multiply and add vectors."""
    first = instructions[0][0]
    spans = [
        (int(jump[1], 16), address)
        for address, text in instructions
        if (jump := JUMP.match(text)) and first <= int(jump[1], 16) < address
    ]
    innermost = [s for s in spans if not any(s != t and s[0] <= t[0] and t[1] <= s[1] for t in spans)]
    bodies = [[(a, text) for a, text in instructions if start <= a <= end] for start, end in innermost]
    return [body for body in bodies if any(MULTIPLY_ADD.match(text) for _, text in body)]


def kernels_of(isa: str) -> dict[str, Instructions]:
    """The functions of an ISA that compute tiles."""
    return {s: body for s, body in functions().items() if isa_of(s) == isa and "fastlinear::TileArgs const&" in s}


def stack_traffic(instructions: Instructions, loop: Instructions) -> list[str]:
    """Loads and stores of vectors and tiles on the stack in a loop; %rbp is it only where the function makes it so."""
    frame = any(re.match(r"mov\s+%rsp,%rbp", text) for _, text in instructions)
    stack = re.compile(r"\(%r(sp|bp)\b" if frame else r"\(%rsp\b")
    return [text for _, text in loop if stack.search(text) and re.search(r"%[xyzt]mm", text)]


def test_wide_registers_stay_in_their_isa() -> None:
    """No instruction of an ISA stands in a symbol that a CPU without it may run."""
    leaks = {
        symbol: text
        for symbol, instructions in functions().items()
        for may_use in [MAY_USE[isa_of(symbol)]]
        for _, text in instructions
        if isa_needed(text) not in may_use
    }
    assert leaks == {}
    for isa in ISAS:  # the search sees what it looks for
        seen = sum(isa_needed(text) == isa for s, body in functions().items() if isa_of(s) == isa for _, text in body)
        assert seen >= 24, f"only {seen} instructions of {isa} in its own symbols: were the symbols stripped?"


def test_every_isa_of_the_table_is_known() -> None:
    """A new ISA has to say here what it may use."""
    assert {kernel["isa"] for kernel in _kernels.kernels()} - {"scalar"} == set(ISAS)


@pytest.mark.parametrize(
    ("instruction", "isa"),
    [
        ("vfmadd231ps (%rax),%zmm1,%zmm2", "avx512"),
        ("vmovups %xmm17,(%rax)", "avx512"),
        ("kmovw  %eax,%k1", "avx512"),
        ("vaddps (%rax){1to8},%ymm1,%ymm2", "avx512"),
        ("vaddps %ymm0,%ymm1,%ymm2", "avx2"),
        ("vaddss %xmm0,%xmm1,%xmm2", "avx2"),
        ("vzeroupper", "avx2"),
        ("shlx   %rax,%rcx,%rdx", "avx2"),
        ("vcvtph2ps (%rax),%ymm1", "avx2"),
        ("vcvtps2ph $0x0,%xmm1,(%rax)", "avx2"),
        ("vcvtph2ps (%rax),%zmm1{%k1}{z}", "avx512"),
        ("vphaddd %ymm0,%ymm1,%ymm2", "avx2"),
        ("vpmaddwd %ymm0,%ymm1,%ymm2", "avx2"),
        ("{vex} vpdpbusd %ymm0,%ymm1,%ymm2", "avx_vnni"),
        ("vpdpbusd %zmm0,%zmm1,%zmm2", "avx512_vnni"),
        ("vpdpwssds %zmm0,%zmm1,%zmm2", "avx512_vnni"),
        ("vdpbf16ps %zmm1,%zmm2,%zmm3", "avx512_bf16"),
        ("vcvtneps2bf16 %zmm1,%ymm2", "avx512_bf16"),
        ("vcvtne2ps2bf16 %zmm1,%zmm2,%zmm3", "avx512_bf16"),
        ("vfmadd231ph %zmm1,%zmm2,%zmm3", "avx512_fp16"),
        ("vfmadd132sh %xmm1,%xmm2,%xmm3", "avx512_fp16"),
        ("vcvtph2psx %ymm1,%zmm2", "avx512_fp16"),
        ("vcvtsh2ss %xmm0,%xmm1,%xmm2", "avx512_fp16"),
        ("vmovw  %eax,%xmm0", "avx512_fp16"),
        ("tdpbf16ps %tmm2,%tmm1,%tmm0", "amx"),
        ("tileloadd (%rax,%rcx,1),%tmm4", "amx"),
        ("sttilecfg (%rdi)", "amx"),
        ("tdpfp16ps %tmm2,%tmm1,%tmm0", "amx_fp16"),
        ("addps  %xmm0,%xmm1", "baseline"),
        ("verr   %ax", "baseline"),
    ],
)
def test_instructions_are_told_apart(instruction: str, isa: str) -> None:
    """The classification itself, on instructions whose ISA is known."""
    assert isa_needed(instruction) == isa


@pytest.mark.parametrize("isa", ISAS)
def test_inner_loops_do_not_spill(isa: str) -> None:
    """The accumulators of every micro-kernel stay in registers: its innermost loop never touches the stack."""
    kernels = kernels_of(isa)
    loops = {symbol: loops_of_fma(body) for symbol, body in kernels.items()}
    rows = [row for row in _kernels.rows() if row["isa"] == isa]
    instances = sum(min(row["mr"] // row["row_step"], MOST_ROWS) * row["panels"] for row in rows)
    assert sum(bool(found) for found in loops.values()) >= instances > 0
    spills = {
        s: traffic for s, found in loops.items() for loop in found if (traffic := stack_traffic(kernels[s], loop))
    }
    assert spills == {}


MULTIPLY_ADDS = ["vfmadd231ps", "vdpbf16ps", "vfmadd132ph", "vpmaddwd", "vpdpbusd", "{vex} vpdpbusd"]
SAVES = ["vmovups %zmm0,0x80(%rsp)", "tilestored %tmm0,(%rsp,%rax,1)"]


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("multiply_add", MULTIPLY_ADDS)
def test_a_spill_is_seen(multiply_add: str, save: str) -> None:
    """The search for stack traffic can fail."""
    body = [
        (0, "mov    %rsp,%rbp"),
        (4, "vmovups -0x40(%rbp),%zmm0"),
        (8, f"{multiply_add} (%rax),%zmm1,%zmm0"),
        (12, save),
        (16, "jne    4 <f+0x4>"),
        (20, "vmovups %zmm0,0xc0(%rsp)"),
    ]
    (loop,) = loops_of_fma(body)
    assert stack_traffic(body, loop) == [body[1][1], body[3][1]]

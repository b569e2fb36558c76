"""AMX under the emulator: every rule of the manual, against cases done by hand and against plain scalar arithmetic.

A CPU that has tiles is held to the same cases instead: so they are right, and with them the emulator elsewhere.
"""

import ctypes
import math
import os
import random
import signal
import struct
import threading
import time
from collections.abc import Iterator
from functools import cache

import library
import pytest
import torch
from torch import Tensor

import emulator
from emulator import scalar
from emulator.code import call, dies_of

FLOATS = {"tdpbf16ps": scalar.of_bf16, "tdpfp16ps": scalar.of_fp16}
BYTES = {"tdpbssd": "ss", "tdpbsud": "su", "tdpbusd": "us", "tdpbuud": "uu"}
SILICON = library.executes(bytes.fromhex("c4e27849c0 c3"))  # tilerelease, which needs no permission
faulting = pytest.mark.skipif(SILICON, reason="this CPU has tiles: what does not fault is not seen")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """No counts, reports or watched rows of other tests; no tiles left to others. Tiles that there are may be used."""
    if SILICON:
        request, tile_data = 0x1023, 18  # ARCH_REQ_XCOMP_PERM
        assert ctypes.CDLL(None).syscall(ctypes.c_long(158), request, tile_data) == 0  # arch_prctl
    emulator.reset()
    yield
    call("tilerelease")
    emulator.reset()


def config(shapes: dict[int, tuple[int, int]] | None = None, palette: int = 1, start_row: int = 0, **odd: int) -> bytes:
    """64 bytes for LDTILECFG: {tile: (rows, bytes a row)}, all tiles of 16 x 64 where None; odd: b<offset>=value."""
    colsb, rows = [0] * 16, [0] * 16
    for tile, (r, c) in (dict.fromkeys(range(8), (16, 64)) if shapes is None else shapes).items():
        rows[tile], colsb[tile] = r, c
    raw = bytearray(struct.pack("<BB14x16H16B", palette, start_row, *colsb, *rows))
    for name, value in odd.items():
        raw[int(name[1:])] = value
    return bytes(raw)


@cache
def pinned(data: bytes) -> "ctypes.Array[ctypes.c_char]":
    return ctypes.create_string_buffer(data, len(data))


def configure(*args: object, **kw: int) -> None:
    call("ldtilecfg (%rdi)", ctypes.addressof(pinned(config(*args, **kw))))  # type: ignore[arg-type]


def stored_config() -> bytes:
    out = ctypes.create_string_buffer(64)
    call("sttilecfg (%rdi)", ctypes.addressof(out))
    return out.raw


def load(tile: int, values: Tensor) -> None:
    assert values.is_contiguous()
    call(f"tileloadd (%rdi,%rsi,1),%tmm{tile}", values.data_ptr(), values.stride(0) * values.element_size())


def store(tile: int, rows: int = 16, columns: int = 64) -> Tensor:
    """The tile's bytes [rows, columns]."""
    out = torch.full((rows, columns), 0xEE, dtype=torch.uint8)
    call(f"tilestored %tmm{tile},(%rdi,%rsi,1)", out.data_ptr(), columns)
    return out


def noise(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (rows, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@cache
def probe() -> ctypes.CDLL:
    return emulator.shared_object(emulator.HERE / "probe.cpp", "-O2")


# ---- configuration ---------------------------------------------------------------------------------------------------


@faulting
def test_a_configuration_is_kept_until_it_is_released() -> None:
    """STTILECFG gives back what LDTILECFG took, and zeros where nothing is configured."""
    assert stored_config() == bytes(64)
    wanted = config({0: (3, 8), 5: (16, 64), 7: (1, 4)})
    call("ldtilecfg (%rdi)", ctypes.addressof(pinned(wanted)))
    assert stored_config() == wanted and emulator.live() == 1
    call("tilerelease")
    assert stored_config() == bytes(64) and emulator.live() == 0


@faulting
def test_palette_0_is_the_initial_state() -> None:
    """Whatever else stands beside it."""
    configure()
    configure({0: (99, 999)}, palette=0, b2=1)
    assert stored_config() == bytes(64) and emulator.live() == 0


def test_a_new_configuration_zeroes_the_tiles() -> None:
    configure()
    load(3, noise(16, 64))
    configure()
    assert not store(3).any()


PROTECTION = {
    "palette 2": config(palette=2),
    "a reserved byte in front": config(b2=1),
    "the last reserved byte in front": config(b15=1),
    "rows longer than 64 bytes": config({0: (1, 65)}),
    "more than 16 rows": config({7: (17, 4)}),
    "rows without columns": config({2: (4, 0)}),
    "columns without rows": config({2: (0, 4)}),
    "a ninth tile": config({8: (1, 4)}),
    "columns of a ninth tile": config(b32=4),
    "rows of a ninth tile": config(b56=1),
    "the last reserved byte": config(b63=1),
}


@pytest.mark.parametrize("odd", PROTECTION)
def test_a_faulty_configuration_is_refused(odd: str) -> None:
    """#GP, which Linux makes a SIGSEGV of."""
    assert dies_of("ldtilecfg (%rdi)", ctypes.addressof(pinned(PROTECTION[odd]))) == signal.SIGSEGV


LOAD = "mov %rdi,%rax; tileloadd (%rax,%rsi,1),%tmm1"
# The assembler refuses tiles that are not three different ones.
UNDEFINED: dict[str, tuple[bytes, str | bytes]] = {
    "a load without a configuration": (config({}, palette=0), LOAD),
    "a store without a configuration": (config({}, palette=0), "tilestored %tmm1,(%rdi,%rsi,1)"),
    "zeroing without a configuration": (config({}, palette=0), "tilezero %tmm0"),
    "a product without a configuration": (config({}, palette=0), "tdpbf16ps %tmm2,%tmm1,%tmm0"),
    "a tile without rows": (config({0: (1, 4)}), LOAD),
    "zeroing a tile without rows": (config({0: (1, 4)}), "tilezero %tmm1"),
    "columns that are no dwords": (config({1: (1, 6)}), LOAD),
    "a start row past the rows": (config({1: (2, 64)}, start_row=2), LOAD),
    "a start row past those stored": (config({1: (2, 64)}, start_row=2), "tilestored %tmm1,(%rdi,%rsi,1)"),
    "result and left tile the same": (config(), bytes.fromhex("c4e26a5cc0")),
    "result and right tile the same": (config(), bytes.fromhex("c4e2795ec1")),
    "both factors the same": (config(), bytes.fromhex("c4e2735cc1")),
    "rows that differ": (config({0: (8, 64), 1: (9, 64), 2: (16, 64)}), "tdpbf16ps %tmm2,%tmm1,%tmm0"),
    "columns that differ": (config({0: (8, 64), 1: (8, 64), 2: (16, 60)}), "tdpbssd %tmm2,%tmm1,%tmm0"),
    "depths that differ": (config({0: (8, 64), 1: (8, 60), 2: (16, 64)}), "tdpbuud %tmm2,%tmm1,%tmm0"),
    "tmm8": (config(), bytes.fromhex("c4627b49c0")),  # tilezero with R
    "VEX.W 1": (config(), bytes.fromhex("c4e2fb49c0")),
    "VEX.L 1": (config(), bytes.fromhex("c4e27f49c0")),
    "VEX.vvvv used": (config(), bytes.fromhex("c4e27349c0")),
    "a load without SIB": (config(), bytes.fromhex("c4e27b4b0f")),
    "a load from a register": (config(), bytes.fromhex("c4e27b4bcf")),
    "tilerelease of something": (config(), bytes.fromhex("c4e27849c1")),
    "ldtilecfg with a register": (config(), bytes.fromhex("c4e278490f")),
}


@pytest.mark.parametrize("odd", UNDEFINED)
def test_undefined_uses_are_refused(odd: str) -> None:
    """#UD: the SIGILL goes on to whoever was there before."""
    wanted, text = UNDEFINED[odd]
    values = noise(16, 64)
    call("ldtilecfg (%rdi)", ctypes.addressof(pinned(wanted)))
    assert dies_of(text, values.data_ptr(), 64) == signal.SIGILL


def test_what_is_unknown_dies_as_ever() -> None:
    """The emulator takes no instruction that is not its own."""
    assert dies_of("ud2") == signal.SIGILL
    assert dies_of("tilerelease; ud2") == signal.SIGILL
    assert dies_of("tilerelease; mov (%rdi),%rax") == signal.SIGSEGV
    assert dies_of("tilerelease") == 0


@faulting
def test_use_without_a_configuration_is_reported() -> None:
    """SIGILL says little to the handler of before, which may be content; the report says which tile."""
    emulator.remove()
    handler, old = ctypes.CDLL(None).signal, ctypes.c_void_p
    handler.restype, skip = old, ctypes.cast(probe().skip_five_bytes, old)
    before = handler(signal.SIGILL, skip)
    call("tilezero %tmm5")
    assert emulator.reports() == ["tmm5 is used without a configuration"]
    emulator.remove()
    handler(signal.SIGILL, old(before))


# ---- loads and stores ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "columns"), [(16, 64), (1, 4), (7, 36), (16, 4), (1, 64)])
def test_loads_zero_the_rest_and_stores_leave_it(rows: int, columns: int) -> None:
    """rows x columns bytes pass; a full store afterwards shows zeros beyond; a narrow one writes nothing else."""
    full, narrow = noise(16, 64), noise(rows, columns, 1)
    configure({0: (rows, columns), 1: (16, 64)})
    load(0, narrow)
    out = torch.full((17, 80), 0xEE, dtype=torch.uint8)
    call("tilestored %tmm0,(%rdi,%rsi,1)", out.data_ptr(), 80)
    expected = torch.full_like(out, 0xEE)
    expected[:rows, :columns] = narrow
    assert torch.equal(out, expected)
    load(1, full)
    assert torch.equal(store(1), full)
    call("tilezero %tmm1")
    assert not store(1).any()


def test_strides_go_both_ways_and_may_be_absent() -> None:
    """Backwards, far apart, and 0 where the encoding has no index."""
    values = noise(64, 64)
    configure()
    call("tileloadd (%rdi,%rsi,1),%tmm0", values[15].data_ptr(), -64 % 2**64)
    assert torch.equal(store(0), values[:16].flip(0))
    call("tileloaddt1 (%rdi,%rsi,4),%tmm0", values.data_ptr(), 64)
    assert torch.equal(store(0), values[::4])
    call("tileloadd (%rdi),%tmm0", values[5].data_ptr())
    assert torch.equal(store(0), values[5].expand(16, 64))


GENERAL = ["rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{i}" for i in range(8, 16))]


@pytest.mark.parametrize("base", GENERAL)
def test_every_base_index_scale_and_displacement(base: str) -> None:
    """Each as the assembler encodes them, with a load in one and a store back in another form."""
    headroom = 1 << 17  # rsp as a base is also where the handler's frame goes, below it
    memory = torch.zeros(headroom + 16384, dtype=torch.uint8)
    memory[headroom:] = noise(1, 16384)[0]
    configure()
    emulator.reset()
    indices = [register for register in GENERAL if register not in (base, "rsp")]
    save = ["rbx", "rbp", "r12", "r13", "r14", "r15"]
    rng = random.Random(base)
    for index in indices:
        scale, displacement = rng.choice((1, 2, 4, 8)), rng.choice((0, 1, -7, 127, -128, 128, -300, 5000, 0x1234))
        kept = next(r for r in ("rbx", "r12", "r13") if r not in (base, index))  # old rsp
        text = [f"push %{r}" for r in save] + [f"mov %rsp,%{kept}"]
        text += ["push %rdi", "push %rsi", f"pop %{index}", f"pop %{base}"]
        text += [f"tileloadd {displacement}(%{base},%{index},{scale}),%tmm4", f"mov %{kept},%rsp"]
        text += [f"pop %{r}" for r in reversed(save)]
        stride, start = 64 // scale * 3, headroom + 2048
        call("; ".join(text), memory.data_ptr() + start - displacement, stride)
        rows = memory[start:].as_strided((16, 64), (stride * scale, 1), start)
        assert torch.equal(store(4), rows), f"{displacement}(%{base},%{index},{scale})"
    assert SILICON or emulator.counts()["tileloadd"] == len(indices)


def test_an_address_may_be_relative_to_rip() -> None:
    """ldtilecfg of 64 bytes that stand behind the code."""
    bytes_ = ",".join(map(str, config({2: (5, 12)})))
    call(f"ldtilecfg 1f(%rip); jmp 2f; 1: .byte {bytes_}; 2: nop")
    assert stored_config() == config({2: (5, 12)})


@faulting
@pytest.mark.parametrize("mends", [True, False], ids=["mended in place", "left and begun again"])
def test_a_load_goes_on_after_a_page_fault(mends: bool) -> None:
    """The fault leaves start_row at its row; what was loaded is not loaded again, and what is stored is right."""
    emulator.install()
    memory = torch.zeros(4 * 4096, dtype=torch.uint8)
    page = (memory.data_ptr() + 2 * 4096 - 1) // 4096 * 4096
    at = page - memory.data_ptr()
    memory[at - 512 : at + 512] = noise(1, 1024)[0]
    out, row = torch.zeros(16, 64, dtype=torch.uint8), ctypes.c_int(-1)
    addresses = [ctypes.c_void_p(a) for a in (page, page - 5 * 64, out.data_ptr())]
    assert probe().load_across(*addresses, mends, ctypes.byref(row)) == 1
    assert row.value == 5
    assert torch.equal(out, memory[at - 5 * 64 : at + 11 * 64].view(16, 64))


# ---- products --------------------------------------------------------------------------------------------------------


def bits(values: list[list[float]]) -> Tensor:
    """fp32 bit patterns; every NaN alike."""
    found = torch.tensor(values, dtype=torch.float64).float()
    return torch.where(found.isnan(), torch.tensor(math.nan), found).view(torch.int32)


def product(name: str, c: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """c [M, N] of dwords += a [M, 4 K bytes] b [K, 4 N bytes], under a configuration of just these shapes."""
    (m, n), k = c.shape, len(b)
    configure({0: (m, 4 * n), 1: (m, 4 * k), 2: (k, 4 * n), 3: (16, 64)})
    for tile, values in enumerate((c, a, b)):
        load(tile, values)
    call(f"{name} %tmm2,%tmm1,%tmm0")
    return store(0, m, 4 * n).view(torch.int32)


def of_dwords(values: Tensor) -> list[list[float]]:
    return [[scalar.of_fp32(x % 2**32) for x in row] for row in values.tolist()]


def floats_of(name: str, values: Tensor) -> list[list[float]]:
    return [[FLOATS[name](x % 2**16) for x in row] for row in values.view(torch.int16).tolist()]


# Bit patterns that meet every rule: zeros, the smallest and largest denormals and normals, ones, halves, infinities,
# NaN, and neighbors whose products and sums round.
ODD = {
    "tdpbf16ps": [0, 0x8000, 1, 0x7F, 0x80, 0x8080, 0x100, 0x3F80, 0xBF80, 0x3F81, 0x3F7F, 0x2000, 0x5F80, 0x7F7F],
    "tdpfp16ps": [0, 0x8000, 1, 0x8001, 0x3FF, 0x400, 0x3C00, 0xBC00, 0x3C01, 0x3BFF, 0x7BFF, 0xFBFF, 0x1400, 0x0801],
}
SPECIAL = {"tdpbf16ps": [0x7F80, 0xFF80, 0x7FC1], "tdpfp16ps": [0x7C00, 0xFC00, 0x7E01]}
ODD_SUMS = [0, -(2**31), 1, 0x7FFFFF, 0x800000, 0x3F800000, 0x3F800001, -0x40800000, 0x4B800000, 0x7F7FFFFF, 0x00800001]


def operands(name: str, m: int, n: int, k: int, patterns: list[int], seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tiles half of random numbers near 1, half of these patterns."""
    rng = random.Random(seed)
    near = (lambda: rng.randrange(0x3E00, 0x4100) ^ rng.choice((0, 0x8000))) if patterns else None

    def words(rows: int, columns: int) -> Tensor:
        drawn = [[rng.choice((near(), rng.choice(patterns))) for _ in range(columns)] for _ in range(rows)]
        return torch.tensor(drawn, dtype=torch.int32).to(torch.int16).view(torch.uint8)

    sums = torch.tensor([[rng.choice(ODD_SUMS) for _ in range(n)] for _ in range(m)], dtype=torch.int64)
    return sums.to(torch.int32), words(m, 2 * k), words(k, 2 * n)


@pytest.mark.parametrize(("m", "n", "k"), [(16, 16, 16), (1, 1, 1), (5, 16, 3), (16, 3, 16), (2, 7, 11)])
@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("special", [False, True], ids=["finite", "infinities and NaN"])
def test_products_of_floats(name: str, m: int, n: int, k: int, special: bool) -> None:
    """Every bit is that of two chains of fused multiply-adds a column, rounded and flushed as the manual says."""
    c, a, b = operands(name, m, n, k, ODD[name] + SPECIAL[name] * special, m * n * k)
    expected = scalar.dot_of_pairs(of_dwords(c), floats_of(name, a), floats_of(name, b))
    found = product(name, c, a, b)
    assert torch.equal(bits(of_dwords(found)), bits(expected))


def one(x: int) -> Tensor:
    return torch.tensor([[x - 2**32 if x >= 2**31 else x]], dtype=torch.int32)


def pairs(*values: int) -> Tensor:
    """16-bit patterns, as the bytes of one row."""
    return torch.tensor([values], dtype=torch.int32).to(torch.int16).view(torch.uint8)


# name, C, (A's pair), (B's pair), C afterwards: fp32 patterns and 16-bit ones, worked out by hand.
BY_HAND = {
    "1 + 2 * 3 + 4 * 5 = 27": ("tdpbf16ps", 0x3F800000, (0x4000, 0x4080), (0x4040, 0x40A0), 0x41D80000),
    "the same in fp16": ("tdpfp16ps", 0x3F800000, (0x4000, 0x4400), (0x4200, 0x4500), 0x41D80000),
    # 2^24 + (1 + 1) keeps both ones; one after the other they would be lost to ties
    "the chains meet before the tile": ("tdpbf16ps", 0x4B800000, (0x3F80, 0x3F80), (0x3F80, 0x3F80), 0x4B800001),
    # 2^24 + (1 + 0): a tie, to even
    "a tie goes to even": ("tdpbf16ps", 0x4B800000, (0x3F80, 0), (0x3F80, 0), 0x4B800000),
    "denormal bf16 factors are zeros": ("tdpbf16ps", 0, (0x007F, 0), (0x7F00, 0), 0),
    "denormal fp16 factors are numbers": ("tdpfp16ps", 0, (0x0001, 0), (0x3C00, 0), 0x33800000),
    "a denormal tile is zero": ("tdpbf16ps", 0x007FFFFF, (0, 0), (0, 0), 0),
    "a denormal product is zero": ("tdpbf16ps", 0, (0x0080, 0), (0x3F00, 0), 0),  # 2^-126 * 0.5
    "the least normal product stays": ("tdpbf16ps", 0, (0x0080, 0), (0x3F80, 0), 0x00800000),
    "overflow is infinity": ("tdpbf16ps", 0, (0x7F7F, 0), (0x4000, 0), 0x7F800000),
    # -0 + (+0 + +0): the chains begin at +0
    "minus zero does not survive": ("tdpbf16ps", 0x80000000, (0x8000, 0), (0x3F80, 0), 0),
}


@pytest.mark.parametrize("case", BY_HAND)
def test_products_done_by_hand(case: str) -> None:
    name, c, a, b, expected = BY_HAND[case]
    assert int(product(name, one(c), pairs(*a), pairs(*b))) % 2**32 == expected


def test_the_mode_of_the_thread_plays_no_part() -> None:
    """MXCSR set to round upwards and to flush nothing changes no bit, and is the same afterwards."""
    c, a, b = operands("tdpbf16ps", 16, 16, 16, ODD["tdpbf16ps"], 7)
    expected = product("tdpbf16ps", c, a, b)
    load(0, c)
    csr = torch.tensor([0x5F80, 0x1F80, 0], dtype=torch.int32)
    text = "ldmxcsr (%rdi); tdpbf16ps %tmm2,%tmm1,%tmm0; stmxcsr 8(%rdi); ldmxcsr 4(%rdi)"
    call(text, csr.data_ptr())
    assert torch.equal(store(0).view(torch.int32), expected) and csr[2] == 0x5F80


@pytest.mark.parametrize(("m", "n", "k"), [(16, 16, 16), (1, 1, 1), (5, 16, 3), (16, 3, 16)])
@pytest.mark.parametrize("name", BYTES)
def test_products_of_bytes(name: str, m: int, n: int, k: int) -> None:
    """Exact, of the signs that the name says (left, right), modulo 2^32."""
    of = {"s": lambda x: x - 256 * (x > 127), "u": lambda x: x}
    c = torch.tensor([[random.Random(i * n + j).choice(ODD_SUMS) for j in range(n)] for i in range(m)])
    c = c.to(torch.int32)
    a, b = noise(m, 4 * k, 2), noise(k, 4 * n, 3)
    a[0, :4], b[0, :4] = 255, 128
    signs = [of[sign] for sign in BYTES[name]]
    expected = scalar.dot_of_quads(c.tolist(), a.tolist(), b.tolist(), *signs)
    assert torch.equal(product(name, c, a, b).to(torch.int64) % 2**32, torch.tensor(expected))


@pytest.mark.parametrize(
    ("name", "expected"),
    [("tdpbssd", 4), ("tdpbsud", -4 * 255), ("tdpbusd", -4 * 255), ("tdpbuud", 4 * 255 * 255)],
)
def test_signs_by_hand(name: str, expected: int) -> None:
    """Four times 0xff by 0xff: -1 or 255 on either side, left from ModRM.rm, right from VEX.vvvv."""
    ones = torch.full((1, 4), 255, dtype=torch.uint8)
    assert int(product(name, one(0), ones, ones)) == expected
    left, right = torch.full((1, 4), 255, dtype=torch.uint8), torch.full((1, 4), 1, dtype=torch.uint8)
    assert int(product(name, one(0), left, right)) == (-4 if name in ("tdpbssd", "tdpbsud") else 4 * 255)
    assert int(product("tdpbuud", one(0xFFFFFFFF), right, right)) == 3  # it wraps


def test_products_zero_what_is_beyond() -> None:
    """A product clears the rows and columns that its tile does not have; the next, wider view shows zeros."""
    configure({0: (2, 8), 1: (2, 4), 2: (1, 8)})
    a, b = torch.ones(2, 4, dtype=torch.uint8), torch.ones(1, 8, dtype=torch.uint8)
    load(1, a)
    load(2, b)
    call("tilezero %tmm0; tdpbuud %tmm2,%tmm1,%tmm0")
    assert store(0, 2, 8).view(torch.int32).tolist() == [[4, 4], [4, 4]]


# ---- programs, threads, reports --------------------------------------------------------------------------------------


@faulting
def test_a_program_of_intrinsics() -> None:
    """Two by two tiles as GCC compiles them: one load a multiply, values within fp32's bound, one configuration."""
    emulator.install()
    depth, generator = 64, torch.Generator().manual_seed(1)
    a = torch.randn(32, depth, generator=generator).bfloat16()
    w = torch.randn(32, depth, generator=generator).bfloat16()
    c = torch.randn(32, 32, generator=generator)
    panel = w.view(32, depth // 2, 2).transpose(0, 1).contiguous()
    expected = c.double() + a.double() @ w.double().T
    bound = c.double().abs() + a.double().abs() @ w.double().abs().T
    addresses = (ctypes.c_void_p(t.data_ptr()) for t in (a, panel, c))
    probe().multiply_bf16(*addresses, ctypes.c_size_t(depth // 2))
    assert ((c - expected).abs() <= depth * 2.0**-24 * bound).all()
    loads = {"tileloadd": 3 * 2 + 4, "tileloaddt1": 2}
    assert emulator.counts() == {**loads, "tdpbf16ps": 8, "tilestored": 4, "ldtilecfg": 1, "tilerelease": 1}
    assert emulator.live() == 0 and emulator.reports() == []


@faulting
def test_each_thread_has_tiles_of_its_own() -> None:
    """Eight threads that load, wait for one another and store get back what they loaded, and take it with them."""
    barrier, found = threading.Barrier(8), {}

    def work(number: int) -> None:
        configure()
        load(1, noise(16, 64, number))
        barrier.wait(30)
        found[number] = store(1), emulator.live()
        barrier.wait(30)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, (values, live) in found.items():
        assert torch.equal(values, noise(16, 64, number)) and live == 8
    assert len(found) == 8
    deadline = time.monotonic() + 30
    while emulator.live() and time.monotonic() < deadline:  # Python's join does not wait for the very end of a thread
        time.sleep(0.01)
    assert emulator.live() == 0


def test_a_fork_clears_the_tiles() -> None:
    """Linux does not copy tile data into a child."""
    configure()
    load(0, noise(16, 64))
    child = os.fork()
    if child == 0:
        os._exit(int(store(0).any()))
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(store(0), noise(16, 64))


@faulting
def test_loads_beyond_the_rows_are_reported() -> None:
    """Nothing, as long as tiles stay in the rows; else where and how much."""
    memory = torch.zeros(20, 80, dtype=torch.uint8)
    rows = memory[2:18, 8:72]
    emulator.watch(rows, "A")
    configure()
    call("tileloadd (%rdi,%rsi,1),%tmm0", rows.data_ptr(), 80)
    assert emulator.reports() == []
    call("tileloadd (%rdi,%rsi,1),%tmm0", rows.data_ptr() + 1, 80)
    assert emulator.reports()[0] == "64 bytes are loaded from byte 1 of row 0 of A, which has 64"
    assert len(emulator.reports()) == 16
    emulator.reset()
    emulator.watch(rows, "A")
    call("tileloadd (%rdi,%rsi,1),%tmm0", memory[3].data_ptr() - 0, 80)
    assert len(emulator.reports()) > 0


@faulting
def test_running_fails_for_tiles_left_live() -> None:
    """And for reports, and never leaves the package on the pretended machine."""
    real = emulator._kernels.cpu_info()
    with pytest.raises(AssertionError, match="1 threads were left"), emulator.running():
        assert emulator._kernels.cpu_info() != real
        configure()
    assert emulator._kernels.cpu_info() == real

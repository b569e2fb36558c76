"""CPUIDs of machines we do not own, as `_kernels.detect` and `_kernels.pretend` take them."""

import struct
from typing import Any

Leaf = tuple[int, int, int, int]
Machine = dict[Any, Any]

# Bits of leaf 1 ecx; of leaf 7 ebx; of leaf 7 ecx; of leaf 7 edx; of leaf 7, subleaf 1, eax.
FMA, OSXSAVE, AVX, F16C = 1 << 12, 1 << 27, 1 << 28, 1 << 29
AVX2, F, DQ, BW, VL = 1 << 5, 1 << 16, 1 << 17, 1 << 30, 1 << 31
VNNI = 1 << 11
FP16 = 1 << 23
AVX_VNNI, BF16 = 1 << 4, 1 << 5
SSE_ONLY, YMM, ZMM = 0x3, 0x7, 0xE7  # XCR0; bit 0 is x87, which is always set


def text(words: str) -> dict[tuple[int, int], Leaf]:
    """Leaves 0x80000002 to 4: the brand string."""
    raw = words.encode().ljust(48, b"\0")
    return {(0x80000002 + i, 0): struct.unpack_from("<4I", raw, 16 * i) for i in range(3)}


def vendor(name: str, max_leaf: int) -> Leaf:
    b, d, c = struct.unpack("<3I", name.encode())
    return max_leaf, b, c, d


def cache(level: int, kind: int, ways: int, line: int, sets: int) -> Leaf:
    """A subleaf of leaf 4 or 0x8000001d; kind 1: data, 2: instructions, 3: both."""
    return level << 5 | kind, (ways - 1) << 22 | (line - 1), sets - 1, 0


def caches(leaf: int, *described: Leaf) -> dict[tuple[int, int], Leaf]:
    return {(leaf, i): c for i, c in enumerate(described)}


def machine(maker: str, name: str, leaf1: int, leaf7: int, xcr0: int, max_leaf: int, **extra: Any) -> Machine:
    """`extra`: caches; ecx and edx, of leaf 7; and subleaves and eax1, its highest subleaf and eax of its first."""
    return {
        (0, 0): vendor(maker, max_leaf),
        (1, 0): (0, 0, leaf1, 0),
        (7, 0): (extra.get("subleaves", 1), leaf7, extra.get("ecx", 0), extra.get("edx", 0)),
        (7, 1): (extra.get("eax1", 0), 0, 0, 0),
        (0x80000000, 0): (0x80000020, 0, 0, 0),
        **text(name),
        **extra.get("caches", {}),
        "xcr0": xcr0,
    }


INTEL, AMD = "GenuineIntel", "AuthenticAMD"
# Palette 1, with 8 tiles of 16 rows of 64 bytes, and a unit that takes them whole.
TILES = {(0x1D, 0): (1, 0, 0, 0), (0x1D, 1): (0x04002000, 0x00080040, 16, 0), (0x1E, 0): (0, 0x4010, 0, 0)}
# Registers as such machines report them, reduced to the leaves and bits that matter.
LEAF1_INTEL, LEAF1_AMD = 0x7FFEFBFF, 0x7ED8320B
SKX, ADL, SPR, ZEN2, ZEN4 = 0xD39FFFFB, 0x239CA7EB, 0xF3BFBFFF, 0x219C91A9, 0xF1BF97A9
SPR_ECX, SPR_EDX, SPR_EAX1 = 0xFB417FFE, 0xFFDD4412, 0x1C30
SPR_MORE = {"ecx": SPR_ECX, "edx": SPR_EDX, "eax1": SPR_EAX1}
KB, MB = 1 << 10, 1 << 20

SKX_CACHES = caches(
    4, cache(1, 1, 8, 64, 64), cache(1, 2, 8, 64, 64), cache(2, 3, 16, 64, 1024), cache(3, 3, 11, 64, 28672)
)
ZEN2_CACHES = caches(
    0x8000001D, cache(1, 1, 8, 64, 64), cache(1, 2, 8, 64, 64), cache(2, 3, 8, 64, 1024), cache(3, 3, 16, 64, 16384)
)

SPR_WITH_TILES = machine(INTEL, "Intel(R) Xeon(R) Platinum 8480+", LEAF1_INTEL, SPR, 0x602E7, 32, **SPR_MORE) | TILES


def without(bit: int) -> Machine:
    """Of leaf 7, edx."""
    return {(7, 0): (1, SPR, SPR_ECX, SPR_EDX & ~(1 << bit))}


# What takes AMX from it, and nothing else.
NO_TILES: dict[str, Machine] = {
    "AMX-BF16 hidden": without(22),
    "AMX-TILE hidden": without(24),
    "AMX-INT8 hidden": without(25),
    "tile data not saved": {"xcr0": 0x202E7},
    "tile configuration not saved": {"xcr0": 0x402E7},
    "no tile state saved at all, as under gVisor": {"xcr0": 0x2E7},
    "a hypervisor that shows no palette": {(0x1D, 0): (0, 0, 0, 0)},
    "palettes beyond the highest leaf": {(0, 0): vendor(INTEL, 0x1C)},
    "a palette of 4 tiles": {(0x1D, 1): (0x04001000, 0x00040040, 16, 0)},
    "a palette of 8 rows": {(0x1D, 1): (0x02001000, 0x00080040, 8, 0)},
    "a palette of 32-byte rows": {(0x1D, 1): (0x02001000, 0x00080020, 16, 0)},
    "a unit of half the depth": {(0x1E, 0): (0, 0x4008, 0, 0)},
    "a unit of half the columns": {(0x1E, 0): (0, 0x2010, 0, 0)},
}

# name, machine, ISAs, (L1d, L2, L3)
RECORDED: list[tuple[str, Machine, list[str], tuple[int, int, int]]] = [
    (
        "Zen 2: AVX2 alone, caches in AMD's leaf",
        machine(AMD, "AMD EPYC 7702 64-Core Processor", LEAF1_AMD, ZEN2, YMM, 16, caches=ZEN2_CACHES),
        ["scalar", "avx2"],
        (32 * KB, 512 * KB, 16 * MB),
    ),
    (
        "Zen 4",
        machine(AMD, "AMD EPYC 9654 96-Core Processor", LEAF1_AMD, ZEN4, 0x2E7, 16, ecx=0x405FCE, eax1=BF16),
        ["scalar", "avx2", "avx512", "avx512_vnni", "avx512_bf16"],
        (0, 0, 0),
    ),
    (
        "Haswell",
        machine(INTEL, "Intel(R) Xeon(R) CPU E5-2680 v3 @ 2.50GHz", LEAF1_INTEL, 0x37AB, YMM, 15, subleaves=0),
        ["scalar", "avx2"],
        (0, 0, 0),
    ),
    (
        "Zen 3",
        machine(AMD, "AMD EPYC 7763 64-Core Processor", LEAF1_AMD, ZEN2, YMM, 16, caches=ZEN2_CACHES),
        ["scalar", "avx2"],
        (32 * KB, 512 * KB, 16 * MB),
    ),
    (
        "Zen 5: AVX-VNNI, too",
        machine(
            AMD, "AMD EPYC 9755 128-Core Processor", LEAF1_AMD, ZEN4, 0x2E7, 16, ecx=0x405FCE, eax1=BF16 | AVX_VNNI
        ),
        ["scalar", "avx2", "avx_vnni", "avx512", "avx512_vnni", "avx512_bf16"],
        (0, 0, 0),
    ),
    (
        "Granite Rapids",
        machine(INTEL, "Intel(R) Xeon(R) 6980P", LEAF1_INTEL, SPR, 0x602E7, 36, **SPR_MORE | {"eax1": 0x201C30})
        | TILES,
        ["scalar", "avx2", "avx_vnni", "avx512", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx", "amx_fp16"],
        (0, 0, 0),
    ),
    (
        "a VM on Granite Rapids that shows everything and saves no AVX-512 state",
        machine(INTEL, "Intel(R) Xeon(R) Processor", LEAF1_INTEL, SPR, YMM, 36, **SPR_MORE),
        ["scalar", "avx2", "avx_vnni"],
        (0, 0, 0),
    ),
    (
        "Skylake-X, caches in Intel's leaf",
        machine(INTEL, "Intel(R) Xeon(R) Platinum 8180 CPU @ 2.50GHz", LEAF1_INTEL, SKX, 0xFF, 22, caches=SKX_CACHES),
        ["scalar", "avx2", "avx512"],
        (32 * KB, 1 * MB, 19712 * KB),
    ),
    (
        "Alder Lake: AVX-512 fused off, AVX-VNNI",
        machine(INTEL, "12th Gen Intel(R) Core(TM) i9-12900K", LEAF1_INTEL, ADL, 0x207, 32, eax1=0x400810),
        ["scalar", "avx2", "avx_vnni"],
        (0, 0, 0),
    ),
    (
        "Cooper Lake: BF16 and VNNI without FP16",
        machine(
            INTEL, "Intel(R) Xeon(R) Platinum 8380H CPU @ 2.90GHz", LEAF1_INTEL, SKX, 0xE7, 22, ecx=VNNI, eax1=BF16
        ),
        ["scalar", "avx2", "avx512", "avx512_vnni", "avx512_bf16"],
        (0, 0, 0),
    ),
    (
        "Ice Lake: VNNI alone",
        machine(
            INTEL, "Intel(R) Xeon(R) Platinum 8380 CPU @ 2.30GHz", LEAF1_INTEL, SPR, 0xE7, 27, subleaves=0, ecx=VNNI
        ),
        ["scalar", "avx2", "avx512", "avx512_vnni"],
        (0, 0, 0),
    ),
    (
        "Sapphire Rapids, AMX state enabled",
        SPR_WITH_TILES,
        ["scalar", "avx2", "avx_vnni", "avx512", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx"],
        (0, 0, 0),
    ),
    *(
        (
            f"Sapphire Rapids, {name}",
            {**SPR_WITH_TILES, **changed},
            ["scalar", "avx2", "avx_vnni", "avx512", "avx512_vnni", "avx512_bf16", "avx512_fp16"],
            (0, 0, 0),
        )
        for name, changed in NO_TILES.items()
    ),
    (
        "a VM on it that hides BF16 and FP16",
        machine(INTEL, "Intel(R) Xeon(R) Processor", LEAF1_INTEL, SPR, 0xE7, 32, edx=SPR_EDX & ~FP16),
        ["scalar", "avx2", "avx512"],
        (0, 0, 0),
    ),
    (
        "a VM on it that hides BF16 alone",
        machine(INTEL, "Intel(R) Xeon(R) Processor", LEAF1_INTEL, SPR, 0xE7, 32, edx=SPR_EDX),
        ["scalar", "avx2", "avx512", "avx512_fp16"],
        (0, 0, 0),
    ),
    (
        "highest subleaf 0: what subleaf 1 returns means nothing",
        machine(INTEL, "Xeon", LEAF1_INTEL, SPR, 0xE7, 32, subleaves=0, eax1=SPR_EAX1),
        ["scalar", "avx2", "avx512"],
        (0, 0, 0),
    ),
    (
        "FP16, BF16 and VNNI on a system that does not save ZMM registers",
        machine(INTEL, "Xeon", LEAF1_INTEL, SPR, YMM, 32, **SPR_MORE),
        ["scalar", "avx2", "avx_vnni"],
        (0, 0, 0),
    ),
    (
        "Sandy Bridge: AVX without AVX2 and FMA",
        machine(INTEL, "Intel(R) Core(TM) i7-2600K CPU @ 3.40GHz", LEAF1_INTEL & ~FMA, 0, YMM, 13),
        ["scalar"],
        (0, 0, 0),
    ),
    (
        "Nehalem: no AVX",
        machine(INTEL, "Intel(R) Core(TM) i7 CPU 920", 0x0098E3BD, 0, 0, 11),
        ["scalar"],
        (0, 0, 0),
    ),
    (
        "AVX-VNNI and VNNI on a system that saves SSE registers alone",
        machine(INTEL, "Xeon", LEAF1_INTEL, SPR, SSE_ONLY, 32, **SPR_MORE),
        ["scalar"],
        (0, 0, 0),
    ),
    ("AVX2 without FMA", machine(AMD, "", LEAF1_AMD & ~FMA, ZEN2, YMM, 16), ["scalar"], (0, 0, 0)),
    ("AVX2 without F16C", machine(AMD, "", LEAF1_AMD & ~F16C, ZEN2, YMM, 16), ["scalar"], (0, 0, 0)),
    (
        "a VM that shows AVX-512 and does not save its registers",
        machine(INTEL, "Intel Xeon Processor (Skylake, IBRS)", LEAF1_INTEL, SKX, YMM, 22),
        ["scalar", "avx2"],
        (0, 0, 0),
    ),
    (
        "a system that saves opmasks and not the upper ZMM registers",
        machine(INTEL, "Xeon", LEAF1_INTEL, SKX, 0x67, 22),
        ["scalar", "avx2"],
        (0, 0, 0),
    ),
    (
        "a system that saves SSE registers alone",
        machine(INTEL, "Xeon", LEAF1_INTEL, SKX, SSE_ONLY, 22),
        ["scalar"],
        (0, 0, 0),
    ),
    (
        "OSXSAVE off: XCR0 must not even be read",
        machine(INTEL, "Xeon", LEAF1_INTEL & ~OSXSAVE, SKX, ZMM, 22),
        ["scalar"],
        (0, 0, 0),
    ),
    (
        "highest leaf 6: what leaf 7 returns means nothing",
        machine(INTEL, "Xeon", LEAF1_INTEL, SKX, ZMM, 6),
        ["scalar"],
        (0, 0, 0),
    ),
    (
        "Knights Landing: AVX-512 F without DQ, BW and VL",
        machine(INTEL, "Intel(R) Xeon Phi(TM) CPU 7250 @ 1.40GHz", LEAF1_INTEL, SKX & ~(DQ | BW | VL), ZMM, 13),
        ["scalar", "avx2"],
        (0, 0, 0),
    ),
    ("nothing known", {}, ["scalar"], (0, 0, 0)),
]

# One that has everything, for tests which run what this machine lacks.
EVERYTHING = SPR_WITH_TILES | {(7, 1): (SPR_EAX1 | 1 << 21, 0, 0, 0)} | text("a machine that tests pretend")

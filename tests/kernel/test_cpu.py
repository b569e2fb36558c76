"""What may run where: recorded CPUIDs of machines we do not own, and this machine against /proc/cpuinfo."""

import errno
import os
import re
from pathlib import Path

import native
import pytest
import zygote
from machines import (
    AMD,
    AVX,
    AVX2,
    BW,
    DQ,
    F16C,
    FMA,
    INTEL,
    KB,
    LEAF1_INTEL,
    NO_TILES,
    OSXSAVE,
    RECORDED,
    SKX,
    SPR,
    SPR_MORE,
    SPR_WITH_TILES,
    VL,
    ZMM,
    F,
    Machine,
    cache,
    caches,
    machine,
)

import fastlinear._cpu as _cpu
import fastlinear._kernels as _kernels
import fastlinear._plans as _plans


@pytest.mark.parametrize(("name", "described", "isas", "sizes"), RECORDED, ids=[row[0] for row in RECORDED])
def test_recorded_machines(name: str, described: Machine, isas: list[str], sizes: tuple[int, int, int]) -> None:
    """ISAs and cache sizes are those of the machine; an ISA needs the silicon and the system's consent."""
    found = _kernels.detect(described)
    assert found["isas"] == isas
    assert (found["l1d"], found["l2"], found["l3"]) == sizes


def test_names_are_read() -> None:
    """Vendor and model are the strings of leaves 0 and 0x80000002 to 4."""
    found = _kernels.detect(RECORDED[0][1])
    assert (found["vendor"], found["model"]) == (AMD, "AMD EPYC 7702 64-Core Processor")
    assert _kernels.detect({})["model"] == ""


@pytest.mark.parametrize(
    ("version", "family", "number", "stepping"),
    [
        (0x00A60F12, 25, 97, 2),
        (0x00830F10, 23, 49, 0),
        (0x000806F8, 6, 143, 8),
        (0x00000F4A, 15, 4, 10),
        (0x591, 5, 9, 1),
    ],
    ids=["Raphael", "Rome", "Sapphire Rapids", "Pentium 4", "a family without extended models"],
)
def test_numbers_are_decoded(version: int, family: int, number: int, stepping: int) -> None:
    """Family, model and stepping of leaf 1 as the vendors count them, with the extended fields where these count."""
    found = _kernels.detect({**RECORDED[0][1], (1, 0): (version, 0, 0, 0)})
    assert (found["family"], found["number"], found["stepping"]) == (family, number, stepping)
    assert _kernels.detect({})["family"] == 0


@pytest.mark.parametrize("missing", [FMA, AVX, F16C, OSXSAVE], ids=["FMA", "AVX", "F16C", "OSXSAVE"])
def test_each_bit_of_leaf_1_is_needed(missing: int) -> None:
    """Without any one of them nothing but scalar code may run."""
    assert _kernels.detect(machine(INTEL, "", LEAF1_INTEL & ~missing, SKX, ZMM, 22))["isas"] == ["scalar"]


@pytest.mark.parametrize("missing", [F, DQ, BW, VL], ids=["F", "DQ", "BW", "VL"])
def test_each_bit_of_avx512_is_needed(missing: int) -> None:
    """Without any one of them AVX2 and what needs no more are the best, whatever is built on AVX-512."""
    described = machine(INTEL, "", LEAF1_INTEL, SPR & ~missing, ZMM, 32, **SPR_MORE)
    assert _kernels.detect(described)["isas"] == ["scalar", "avx2", "avx_vnni"]


def test_no_avx2_means_no_avx512() -> None:
    """An ISA is offered only with what it is built on."""
    described = machine(INTEL, "", LEAF1_INTEL, SPR & ~AVX2, ZMM, 32, **SPR_MORE)
    assert _kernels.detect(described)["isas"] == ["scalar"]


def test_ceilings() -> None:
    """FASTLINEAR_MAX_ISA leaves what an ISA is built on and what came before it; every ISA is a ceiling."""
    here = _kernels.cpu_info()["isas"]

    def limited(highest: str, left: list[str]) -> None:
        os.environ["FASTLINEAR_MAX_ISA"] = highest
        _kernels.pretend(None)  # as when it is imported
        assert _kernels.cpu_info()["isas"] == left

    for place, highest in enumerate(_kernels.isas()):
        left = [isa for isa in _kernels.isas()[: place + 1] if isa in here]
        native.in_child(lambda _, highest=highest, left=left: limited(highest, left))


def test_an_endless_list_of_caches_ends() -> None:
    """A CPU (or hypervisor) that never says "no more caches" does not hang the detection."""
    endless = {(4, i): cache(1, 1, 8, 64, 64) for i in range(1000)}
    assert _kernels.detect(machine(INTEL, "", LEAF1_INTEL, SKX, ZMM, 22, caches=endless))["l1d"] == 32 * KB


def test_this_machine_agrees_with_the_kernel() -> None:
    """The flags of /proc/cpuinfo, which are those the system lets programs use, give the same ISAs and names."""
    info = Path("/proc/cpuinfo").read_text()
    flags = set(re.findall(r"^flags\s*:\s*(.*)$", info, re.M)[0].split())
    needs = {
        "scalar": set(),
        "avx2": {"avx", "avx2", "fma", "f16c"},
        "avx_vnni": {"avx", "avx2", "fma", "f16c", "avx_vnni"},
        "avx512": {"avx2", "fma", "f16c", "avx512f", "avx512dq", "avx512bw", "avx512vl"},
    }
    needs |= {isa: needs["avx512"] | {isa} for isa in ("avx512_vnni", "avx512_bf16", "avx512_fp16")}
    needs["amx"] = needs["avx512"] | {"amx_tile", "amx_bf16", "amx_int8"}  # and the system must have said yes
    needs["amx_fp16"] = needs["amx"] | {"amx_fp16"}
    found = _kernels.cpu_info()
    allowed = [isa for isa, needed in needs.items() if needed <= flags]
    assert found["isas"] == allowed[: len(found["isas"])] and found["isas"][0] == "scalar"
    assert found["vendor"] == re.findall(r"^vendor_id\s*:\s*(.*)$", info, re.M)[0]
    assert found["model"] == re.findall(r"^model name\s*:\s*(.*?)\s*$", info, re.M)[0]
    numbers = {"family": "cpu family", "number": "model", "stepping": "stepping"}
    for ours, theirs in numbers.items():
        assert found[ours] == int(re.findall(rf"^{theirs}\s*:\s*(\d+)$", info, re.M)[0])


def test_runnable_kernels_are_those_of_the_isas() -> None:
    """A row of the table is runnable exactly if its ISA is."""
    isas = _kernels.cpu_info()["isas"]
    assert all(row["runnable"] == (row["isa"] in isas) for row in _kernels.kernels())
    assert any(row["runnable"] for row in _kernels.kernels())


@pytest.mark.parametrize("which", ["l1d", "l2", "l3"])
def test_cache_sizes_of_this_machine(which: str) -> None:
    """The sizes are those of /sys where it tells, else 0 or plausible."""
    level, kinds = {"l1d": ("1", {"Data"}), "l2": ("2", {"Unified"}), "l3": ("3", {"Unified"})}[which]
    told = {}
    for folder in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        words = {name: (folder / name).read_text().strip() for name in ("level", "type", "size")}
        told[words["level"], words["type"]] = int(words["size"].rstrip("K")) * KB
    expected = [size for (at, kind), size in told.items() if at == level and kind in kinds]
    found = _kernels.cpu_info()[which]
    assert found == expected[0] if expected else found >= 0


def test_a_pretended_machine_decides_what_may_run() -> None:
    """Until this one comes back, info and table are those of the other; nothing else is asked."""
    before = _kernels.cpu_info(), _kernels.kernels()
    try:
        _kernels.pretend(RECORDED[0][1])
        assert _kernels.cpu_info()["model"] == "AMD EPYC 7702 64-Core Processor"
        isas = {"scalar", "avx2"} & {*before[0]["isas"]}  # FASTLINEAR_MAX_ISA still counts
        assert {row["isa"] for row in _kernels.kernels() if row["runnable"]} == isas
    finally:
        _kernels.pretend(None)
    assert (_kernels.cpu_info(), _kernels.kernels()) == before


REFUSALS = [
    (RECORDED[0][1], "CPUID does not show it"),
    (SPR_WITH_TILES | {"xcr0": 0x2E7}, "the system does not save its registers (XCR0)"),
    (SPR_WITH_TILES | NO_TILES["a palette of 8 rows"], "CPUID shows tiles of less than 16 rows of 64 bytes"),
    (SPR_WITH_TILES | {"tiles": [errno.ENOSPC]}, "a thread's signal stack is too small for tiles"),
    (SPR_WITH_TILES | {"tiles": [errno.EINVAL]}, "the system does not know tiles; Linux does from 5.16 on"),
    (SPR_WITH_TILES | {"tiles": [errno.EPERM]}, "the system refuses it (Operation not permitted)"),
]


@pytest.mark.skipif("FASTLINEAR_MAX_ISA" in os.environ, reason="that is the reason then")
@pytest.mark.parametrize(("described", "why"), REFUSALS, ids=[why for _, why in REFUSALS])
def test_a_refusal_has_its_reason(described: Machine, why: str) -> None:
    """No AMX then, and nothing else is lost; `info` says which of CPUID, XCR0, palette and system said no."""
    try:
        _kernels.pretend(described)
        found = _kernels.cpu_info()
        assert found["refused"]["amx"] == why and "amx" not in found["isas"]
        assert found["isas"] == [isa for isa in _kernels.detect(described)["isas"] if isa != "amx"]
        assert {row["runnable"] for row in _kernels.kernels() if row["isa"] == "amx"} == {False}
        with pytest.raises(ValueError, match="no kernel 'bf16/amx/32x32' runs here"):
            _plans.Plan("bf16/amx/32x32")
    finally:
        _kernels.pretend(None)


@pytest.mark.skipif("FASTLINEAR_MAX_ISA" in os.environ, reason="nothing is asked for below the limit")
def test_the_system_is_asked_once_and_late() -> None:
    """Not when the machine is looked at, but when somebody wants to know what may run; then never again."""
    answers = [errno.EPERM, 0]
    try:
        _kernels.pretend(SPR_WITH_TILES | {"tiles": answers})
        assert len(_kernels.rows()) > 0 and _plans.Plan("fp32/scalar/4x16") and answers == [errno.EPERM, 0]
        assert any(row["isa"] == "amx" and row["runnable"] for row in _kernels.kernels())
        assert "amx" in _kernels.cpu_info()["isas"] and _plans.Plan("bf16/amx/32x32")
        assert answers == [errno.EPERM]
    finally:
        _kernels.pretend(None)


CPUID_OF_CACHES = {
    "nothing": ((), (48 * KB, 2048 * KB, 16384 * KB)),
    "L1d alone": ((cache(1, 1, 8, 64, 64),), (32 * KB, 2048 * KB, 16384 * KB)),
    "an L2 smaller than L1d": ((cache(1, 1, 8, 64, 64), cache(2, 3, 1, 64, 64)), (32 * KB, 2048 * KB, 16384 * KB)),
    "all": (
        (cache(1, 1, 8, 64, 64), cache(2, 3, 8, 64, 1024), cache(3, 3, 16, 64, 8192)),
        (32 * KB, 512 * KB, 8192 * KB),
    ),
}


@pytest.mark.parametrize("told", CPUID_OF_CACHES)
def test_caches_that_cpuid_does_not_tell_are_the_systems(told: str, tmp_path: Path) -> None:
    """What CPUID tells is believed, level by level; the rest is what Linux says; without either it is unknown."""
    described, sizes = CPUID_OF_CACHES[told]
    known = machine(INTEL, "", LEAF1_INTEL, SKX, ZMM, 22, caches=caches(4, *described))
    for i, (kind, level, size) in enumerate(
        [("Data", 1, "48K"), ("Instruction", 1, "32K"), ("Unified", 2, "2048K"), ("Unified", 3, "16384K")]
    ):
        (tmp_path / f"index{i}").mkdir()
        for name, text in (("type", kind), ("level", str(level)), ("size", size)):
            (tmp_path / f"index{i}" / name).write_text(f"{text}\n")
    found = _kernels.detect(known | {"system": str(tmp_path)})
    assert (found["l1d"], found["l2"], found["l3"]) == sizes
    alone = _kernels.detect(known)
    assert {alone["l1d"], alone["l2"], alone["l3"]} <= {0, *sizes}
    (tmp_path / "index0/size").write_text("a lot")
    assert _cpu.caches_of_system(str(tmp_path)) == (0, 2048 * KB, 16384 * KB)


def test_below_the_limit_nothing_is_asked() -> None:
    """FASTLINEAR_MAX_ISA decides before the system does, and is the reason that is given."""
    script = """
from machines import SPR_WITH_TILES
from fastlinear import _kernels
answers = [0]
_kernels.pretend(SPR_WITH_TILES | {"tiles": answers})
print(_kernels.cpu_info()["refused"]["amx"], answers)
"""
    said = zygote.checked(script, FASTLINEAR_MAX_ISA="avx512_bf16")
    assert said == "FASTLINEAR_MAX_ISA is avx512_bf16 [0]\n"

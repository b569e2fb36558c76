"""The grid of the benchmark and the speeds it is to reach."""

from __future__ import annotations

import math
from typing import NamedTuple


class Grid(NamedTuple):
    ms: tuple[int, ...]
    shapes: tuple[tuple[int, int], ...]  # (K, N)


GRID = Grid(
    (1, 2, 4, 8, 16, 32, 64, 128, 512),
    ((384, 384), (384, 1536), (768, 768), (768, 3072), (3072, 768), (1024, 1024), (1024, 4096), (4096, 4096)),
)
INT8 = Grid((1, 4, 8, 16, 32, 64, 128, 512), ((768, 768), (768, 3072), (3072, 768), (1024, 4096), (4096, 4096)))
INT4 = Grid((1, 4, 8, 16, 128), ((2048, 5632), (5632, 2048), (4096, 4096)))
GRIDS = {"int8": INT8, "w8f": INT8, "int4": INT4, "int4g128": INT4, "int4wo": INT4}  # by format; others have GRID
QUICK = Grid((1, 16, 64), ((384, 384), (768, 768)))
SMALL = (64, 16, 32)  # M, K, N of a layer so small that the call around the kernel decides

OURS, LINEAR, FP32 = "fastlinear", "nn.Linear", "fp32"  # the last: the fp32 FastLinear beside one of fewer bits
RIVALS = (LINEAR, "mkl", "onednn")  # "the best of them"; Inductor and fp32 are shown beside
ONNX, TORCH = ("onnxruntime",), ("torch_x86", "torch_onednn")
INT8_RIVALS = (*ONNX, *TORCH, "openvino")
INT4_ONNX, INT4_OPENVINO, LLAMA, INT4PACK = ("onnxruntime_int4",), ("openvino_int4",), ("llama_cpp",), ("int4pack",)
INT4_RIVALS = (*INT4_ONNX, *INT4_OPENVINO, *LLAMA, *INT4PACK)
INT8_PACKS = "at most 0.255 of fp32, plus scales"
INT4_PACKS = "at most 0.141 of fp32, scales included"


class Band(NamedTuple):
    """A range of M and the share of the roofline that is wanted there, by ISA; an ISA not named has no target."""

    name: str
    least: int
    most: float
    targets: dict[str, float]


class Goal(NamedTuple):
    """How many times as fast as a rival, or as the best of several, FastLinear is to be."""

    name: str
    rivals: tuple[str, ...]
    wanted: float
    everywhere: bool  # on every shape; else by geometric mean
    least: int = 1  # M
    most: float = math.inf
    beyond_l2: bool = False  # only where the weight is larger than the L2 of all threads, or cold


class Targets(NamedTuple):
    bands: tuple[Band, ...]
    goals: tuple[Goal, ...]
    rivals: tuple[str, ...] = RIVALS
    packs: str = "at most 1"  # bytes of packed weights over those of the layers they came from


def _sixteen_bit(small: float, medium: float, large: float, over_linear: float) -> Targets:
    return Targets(
        (
            Band("M = 1", 1, 1, {"avx512": 0.88}),
            Band("M = 2..3", 2, 3, {}),
            Band("M = 4..16", 4, 16, {"avx512": small}),
            Band("M = 32..64", 32, 64, {"avx512": medium, "avx2": 0.80}),
            Band("M >= 128", 128, math.inf, {"avx512": large, "avx2": 0.80}),
        ),
        (
            Goal("nn.Linear", (LINEAR,), over_linear, everywhere=False),
            Goal("onednn on every shape", ("onednn",), 1.0, everywhere=True),
            Goal("fp32 on every shape beyond L2, M = 1", (FP32,), 1.8, everywhere=True, most=1, beyond_l2=True),
            Goal("inductor, M >= 16", ("inductor",), 3.0, everywhere=False, least=16),
        ),
    )


def _four_bit(isa: str, many_rows: dict[str, float], *goals: Goal) -> Targets:
    return Targets(
        (
            Band("M = 1", 1, 1, {isa: 0.90}),
            Band("M = 2..127", 2, 127, {}),
            Band("M >= 128", 128, math.inf, many_rows),
        ),
        (
            *goals,
            Goal("int4pack, M = 1", INT4PACK, 1.5, everywhere=False, most=1),
            Goal("int4pack, M > 1", INT4PACK, 2.0, everywhere=False, least=2),
        ),
        (LINEAR, *INT4_RIVALS) if goals else (LINEAR, *INT4PACK, "openvino_int4_fp32"),
        INT4_PACKS,
    )


_DYNAMIC = (  # against others that quantize their inputs, too
    Goal("ONNX Runtime, M = 1", INT4_ONNX, 1.2, everywhere=False, most=1),
    Goal("ONNX Runtime, M > 1", INT4_ONNX, 2.0, everywhere=False, least=2),
    Goal("OpenVINO", INT4_OPENVINO, 1.05, everywhere=False),
    Goal("llama.cpp, M = 4..16", LLAMA, 1.3, everywhere=False, least=4, most=16),
)

TARGETS = {
    "fp32": Targets(
        (
            Band("M = 1", 1, 1, {"avx512": 0.90}),
            Band("M = 2..16", 2, 16, {"avx512": 0.85}),
            Band("M >= 32", 32, math.inf, {"avx512": 0.90, "avx2": 0.88}),
        ),
        (
            Goal("nn.Linear", (LINEAR,), 1.4, everywhere=False),
            Goal("the best", RIVALS, 1.08, everywhere=False),
            Goal("the best on every shape", RIVALS, 0.98, everywhere=True),
        ),
    ),
    "bf16": _sixteen_bit(0.80, 0.88, 0.92, over_linear=5.0),
    "fp16": _sixteen_bit(0.75, 0.85, 0.90, over_linear=9.0),
    "int8": Targets(
        (
            Band("M = 1", 1, 1, {"avx512_vnni": 0.90, "avx_vnni": 0.90}),
            Band("M = 2..15", 2, 15, {}),
            Band("M >= 16", 16, math.inf, {"avx512_vnni": 0.90, "avx_vnni": 0.90}),
        ),
        (
            Goal("ONNX Runtime, M >= 64", ONNX, 1.3, everywhere=False, least=64),
            Goal("quantize_dynamic, M >= 64", TORCH, 1.4, everywhere=False, least=64),
            Goal("the best of int8, M <= 16", INT8_RIVALS, 1.25, everywhere=False, most=16),
            Goal("the best on every shape, M <= 16", INT8_RIVALS, 0.95, everywhere=True, most=16),
            Goal("fp32, M >= 32", (FP32,), 1.3, everywhere=False, least=32),
        ),
        (LINEAR, *INT8_RIVALS),
        INT8_PACKS,
    ),
    "w8f": Targets(
        (
            Band("M = 1", 1, 1, {"avx512": 0.85, "avx2": 0.85}),
            Band("M = 2..31", 2, 31, {}),
            Band("M >= 32", 32, math.inf, {"avx512": 0.75, "avx2": 0.75}),
        ),
        (),
        (LINEAR, "int8pack", "openvino_fp32"),
        INT8_PACKS,
    ),
    "int4": _four_bit("avx512_vnni", {"avx512_vnni": 0.45}, *_DYNAMIC),
    "int4g128": _four_bit("avx512_vnni", {"avx512_vnni": 0.60}, *_DYNAMIC),
    "int4wo": _four_bit("avx512", {}),
}


def parse_shapes(text: str) -> tuple[tuple[int, int], ...]:
    """ "384x1536,768x768" -> ((K, N), ...); ValueError where it is none."""
    shapes = tuple(tuple(int(part) for part in item.split("x")) for item in text.split(","))
    if any(len(shape) != 2 or min(shape) < 1 for shape in shapes):
        raise ValueError(f"shapes are KxN,KxN,..., all at least 1, not {text!r}")
    return shapes  # type: ignore[return-value]


def parse_numbers(text: str) -> tuple[int, ...]:
    """ "1,2,4" -> (1, 2, 4); ValueError where it is none."""
    numbers = tuple(int(part) for part in text.split(","))
    if min(numbers) < 1:
        raise ValueError(f"numbers must be at least 1, not {text!r}")
    return numbers

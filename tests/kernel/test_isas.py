"""An ISA is a folder, a unit and a row: an eighth, of the tests alone, builds, is found and computes."""

import shutil
from pathlib import Path

import library
import native
import torch

import fastlinear._kernels as _kernels

KERNELS = """
#pragma once
#include "fastlinear/isa/scalar/kernels.hpp"

namespace fastlinear::toy {

extern const Isa kIsa;

inline constexpr Kernel kFp32Kernels[] = {
    {"fp32/toy/3x16", kIsa, Format::fp32, {Format::fp32, 16, 1}, 3, 1, scalar::tile<float, 16, 1>},
};

}  // namespace fastlinear::toy
"""

UNIT = """
#include "fastlinear/contract/isa.hpp"
#include "fastlinear/isa/toy/kernels.hpp"

namespace fastlinear {

namespace scalar {
extern const Isa kIsa;
}

namespace toy {

constexpr std::span<const Kernel> kKernels[] = {kFp32Kernels};

const Isa kIsa{
    .name = "toy",
    .base = &scalar::kIsa,
    .needs = {},
    .saved = 0,
    .above = {},
    .kernels = kKernels,
    .vectors = nullptr,
};

}  // namespace toy
}  // namespace fastlinear
"""


def test_an_eighth_isa(tmp_path: Path) -> None:
    """A header, a unit and a row beside the other ISAs', of which nothing else knows, multiply with every epilogue."""
    for folder in ("include", "csrc"):
        shutil.copytree(library.ROOT / folder, tmp_path / folder)
    (tmp_path / "include/fastlinear/isa/toy").mkdir()
    (tmp_path / "include/fastlinear/isa/toy/kernels.hpp").write_text(KERNELS)
    (tmp_path / "csrc/toy.cpp").write_text(UNIT)
    registry = tmp_path / "csrc/registry.cpp"
    text = registry.read_text()
    first = "namespace scalar { extern const Isa kIsa; }\n"
    assert text.count(first) == text.count("kIsas[] = {") == 1
    text = text.replace(first, f"{first}{first.replace('scalar', 'toy')}")
    registry.write_text(text.replace("kIsas[] = {", "kIsas[] = {&toy::kIsa, "))

    build = library.build()
    others = [made for unit, made in zip(build.units, build.objects, strict=True) if unit.stem != "registry"]
    own = [
        build.compile(tmp_path / f"csrc/{name}.cpp", tmp_path, tmp_path / f"{name}.o") for name in ("registry", "toy")
    ]
    multiply = library.product_of(build.link("toy", [*others, *own]))

    (scalar,) = (kernel for kernel in native.ALL if kernel["id"] == "fp32/scalar/4x16")
    kernel = scalar | {"name": "fp32/toy/3x16"}
    for name, params in _kernels.activations().items():
        x, w, b = native.random_case(7, 37, 11, kernel["dtypes"][0])
        packed, y, expected = native.pack(w, kernel["layout"]), torch.empty(7, 37), torch.empty(7, 37)
        multiply(kernel, packed, x, b, [(name, params)], 2, 3, y)
        native.run(scalar, x, w, b, [(name, params)], threads=2, k_slices=3, out=expected)
        assert native.same_bits(y, expected), name
    x, w, b = native.exact_case(scalar, 7, 37, 11, scalar["dtypes"][0])
    native.check(
        scalar, multiply(kernel, native.pack(w, "fp32/16x1"), x, b, [], 1, 1, torch.empty(7, 37)), x, w, b, exact=True
    )

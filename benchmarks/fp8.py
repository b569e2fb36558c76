"""What a layer of an fp8 checkpoint takes, beside the same weight in bf16 and in fp32, in turn; weights from memory.

    python benchmarks/fp8.py [--threads 1] [--ms 1,4,16,128] [--dtype float32] [--shape 2048x5632] [--seconds 4]

All are frozen and tuned; shape: in x out features; dtype: of x. Times are lower quartiles of a call, with the GB of
weight that it reads a second, and its time over that of fp8.
"""

from __future__ import annotations

import argparse
from typing import Any

import timing
import torch
from torch import nn

import fastlinear
from fastlinear.plan import measuring

BLOCK = 128
BYTES = 256 << 20  # of the weights of each kind, more than the caches hold


def of_checkpoint(k: int, n: int) -> nn.Linear:
    """A layer as transformers has it of an fp8 checkpoint."""
    layer: Any = nn.Linear(k, n, bias=False)
    values = torch.randn(n, k).mul_(64).to(torch.float8_e4m3fn)
    scales = torch.rand(-(-n // BLOCK), -(-k // BLOCK)) / 4096
    layer.weight = nn.Parameter(values, requires_grad=False)
    layer.weight_scale_inv = nn.Parameter(scales, requires_grad=False)
    layer.block_size = (BLOCK, BLOCK)
    return layer.eval()  # type: ignore[no-any-return]


def kinds(k: int, n: int) -> dict[str, list[Any]]:
    """Copies of a frozen layer, of each kind."""

    def copies(nbytes: int) -> range:
        return range(max(2, BYTES // (nbytes * k * n)))

    def plain(dtype: torch.dtype) -> Any:
        return fastlinear.freeze(fastlinear.FastLinear.from_linear(nn.Linear(k, n, bias=False, dtype=dtype).eval()))

    return {
        "fp8": [fastlinear.FastLinear.from_linear(of_checkpoint(k, n)) for _ in copies(1)],
        "bf16": [plain(torch.bfloat16) for _ in copies(2)],
        "fp32": [plain(torch.float32) for _ in copies(4)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--ms", default="1,4,16,128")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--shape", default="2048x5632")
    parser.add_argument("--seconds", type=float, default=4.0, help="for each M")
    told = parser.parse_args()
    torch.set_num_threads(told.threads)
    torch.manual_seed(0)
    k, n = map(int, told.shape.split("x"))
    with torch.inference_mode():
        layers, dtype = kinds(k, n), getattr(torch, told.dtype)
        for m in map(int, told.ms.split(",")):
            x = torch.randn(m, k).to(dtype)
            able = {kind: copies for kind, copies in layers.items() if kind != "fp32" or dtype is torch.float32}
            with measuring.process.thorough():
                for copies in able.values():
                    for layer in copies:
                        layer(x)
            rotations = {kind: timing.Rotation(copies, x) for kind, copies in able.items()}
            times = timing.race(rotations, lambda: None, told.seconds, 5, 400)
            for kind, (seconds, *_) in times.items():
                rate, over = able[kind][0].pack_nbytes / seconds / 1e9, seconds / times["fp8"].quartile
                runs = ", ".join(plan.name for plan in able[kind][0].plans if plan.bucket == m)
                print(
                    f"{m} x {told.shape} {kind}: {1e6 * seconds:.1f} us  {rate:.1f} GB/s  {over:.2f}  {runs}",
                    flush=True,
                )


if __name__ == "__main__":
    main()

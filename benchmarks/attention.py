"""Attention of short sequences, ours and torch's, alternating: microseconds, ratios, and errors.

    python benchmarks/attention.py [threads]

Where scores are capped, or there are sinks, which torch has no function for, it is torch's ops as models spell them.
Ours is twice there: in fp32, and, of bf16, in products of bf16. Inputs are transposes of [B, L, H * D], as linear
layers make them. A time is the lower quartile of 40 calls; an error is the rms of what the result is off from fp64,
over the rms of that.
"""

import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastlinear._attention as _attention
from fastlinear.plan.attention import rounding_kernel
from fastlinear.spec import attention as spec

# name: B, H, L, D, causal, mask
SHAPES = {
    "MiniLM, batch 1": (1, 12, 32, 32, False, False),
    "MiniLM, batch 8": (8, 12, 32, 32, False, False),
    "MiniLM, batch 32": (32, 12, 32, 32, False, False),
    "MiniLM, batch 32, padded": (32, 12, 32, 32, False, True),
    "CLIP's text": (1, 8, 77, 64, True, False),
    "BERT": (1, 12, 128, 64, False, False),
    "ViT-B/16": (1, 12, 197, 64, False, False),
    "256 of 128": (1, 8, 256, 128, False, False),
    "512": (1, 12, 512, 64, False, False),
    "512, causal": (1, 12, 512, 64, True, False),
    "Gemma 2: a cap": (1, 8, 256, 256, False, True),
    "gpt-oss: sinks": (1, 64, 256, 64, False, True),
}
CAPS, SINKS = {"Gemma 2: a cap": 50.0}, ("gpt-oss: sinks",)
CALLS = 40
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def quartiles(*runs: Callable[[], object]) -> list[float]:
    seconds: list[list[float]] = [[] for _ in runs]
    for _ in range(CALLS):
        for run, taken in zip(runs, seconds, strict=True):
            began = time.perf_counter()
            run()
            taken.append(time.perf_counter() - began)
    return [sorted(taken)[CALLS // 4] for taken in seconds]


def spelled(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, cap: float = 0.0, sinks: Tensor | None = None) -> Tensor:
    """As models have it, of which torch has no function; the mask is added."""
    s = torch.matmul(q, k.transpose(2, 3)) * q.shape[-1] ** -0.5
    s = (s / cap).tanh() * cap + mask if cap else s + mask
    if sinks is not None:
        s = torch.cat([s, sinks.to(s.dtype).view(1, -1, 1, 1).expand(*s.shape[:3], 1)], -1)
        s = s - s.max(-1, keepdim=True).values
    w = F.softmax(s, -1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(w if sinks is None else w[..., :-1], v).transpose(1, 2).contiguous()


def error(y: Tensor, want: Tensor) -> float:
    return float((y.double() - want).square().mean().sqrt() / want.square().mean().sqrt())


def main() -> None:
    torch.set_num_threads(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
    torch.manual_seed(0)
    print(f"{'':<28}{'dtype':<10}{'torch us':>10}{'ours us':>10}{'in bf16':>10}{'ratio':>8}  rms errors")
    for dtype in DTYPES:
        for name, (b, h, length, size, causal, padded) in SHAPES.items():
            q, k, v = (torch.randn(b, length, h, size).to(dtype).transpose(1, 2) for _ in range(3))
            mask = torch.rand(b, 1, 1, length) < 0.9 if padded else None
            more: dict[str, Any] = {"cap": CAPS[name]} if name in CAPS else {}
            more |= {"sinks": torch.randn(h)} if name in SINKS else {}
            if more:
                mask = torch.zeros(b, 1, length, length, dtype=dtype).masked_fill(
                    torch.ones(length, length).tril() == 0, -1e4
                )
            kernels = [None, rounding_kernel()] if dtype is torch.bfloat16 and rounding_kernel() else [None]

            stock = partial(F.scaled_dot_product_attention, q, k, v, mask, is_causal=causal)
            if more:
                stock = partial(spelled, q, k, v, mask, **more)
            ours = [partial(_attention.attention, q, k, v, mask, causal, products=kernel, **more) for kernel in kernels]
            want = spec.exact(q, k, v, mask, causal, **more)[0]
            ys = [stock().transpose(1, 2) if more else stock(), *(run() for run in ours)]
            errors = "".join(f"{error(y, want):9.1e}" for y in ys)
            theirs, *own = quartiles(stock, *ours)
            in_bf16 = f"{own[1] * 1e6:10.1f}" if len(own) > 1 else f"{'':10}"
            print(
                f"{name:<28}{str(dtype)[6:]:<10}{theirs * 1e6:10.1f}{own[0] * 1e6:10.1f}{in_bf16}"
                f"{theirs / min(own):8.2f}{errors}"
            )


if __name__ == "__main__":
    with torch.inference_mode():
        main()

"""What calls of several layers, and of a layer with what follows it, gain or cost over plain layers, in turn.

    python benchmarks/blocks.py [swiglu|group|chain|mlp ...] [--threads 1] [--forms fp32,bf16,int8,int4] [--seconds 0.5]

swiglu  a gated MLP: FastGatedLinear and a FastLinear, over three FastLinears with eager silu and mul; and these three
        without silu and mul, which is what a gate can gain
group   query, key and value: one FastLinearGroup over three calls
chain   a FastLinear with each activation and operand over the bare one
mlp     two layers on many rows, in blocks of rows such as graphs cut them into and in others, over all at once

bf16 are products in bf16 of fp32 rows and weights. Times are lower quartiles; a ratio above 1 is a gain, for chains
what they cost.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator
from typing import Any

import timing
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastlinear
from fastlinear.plan import measuring
from fastlinear.spec import activations

FORMS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"products": torch.bfloat16},
    "int8": {"quantize": fastlinear.Int8Dynamic()},
    "int4": {"quantize": fastlinear.Int4Dynamic()},
}
MLPS = ((2048, 5632), (4096, 11008))  # hidden, between
WIDTHS = (384, 768)
MANY_ROWS = ((1024, 384, 1536), (1024, 768, 3072), (4096, 768, 3072), (2048, 1024, 4096))  # M, hidden, between
CHAINS = ((32, 384, 384), (128, 256, 1024), (128, 768, 768), (128, 768, 3072))  # M, K, N

Call = Callable[[Tensor], object]
Case = tuple[str, Tensor, dict[str, Call]]  # its name, x, and calls, the first of which the others are held against


def fast(layer: nn.Linear, form: str, **more: Any) -> Any:
    return fastlinear.FastLinear.from_linear(layer, **FORMS[form], **more)


def linear(k: int, n: int) -> nn.Linear:
    return nn.Linear(k, n, bias=False).eval()


def swiglu(form: str) -> Iterator[Case]:
    for hidden, between in MLPS:
        layers = (linear(hidden, between), linear(hidden, between), linear(between, hidden))
        gated = fastlinear.freeze(fastlinear.FastGatedLinear.from_linears(*layers[:2], **FORMS[form]))
        gate, up, down = (fastlinear.freeze(fast(layer, form)) for layer in layers)
        calls: dict[str, Call] = {
            "three layers": lambda x, g=gate, u=up, d=down: d(F.silu(g(x)) * u(x)),  # type: ignore[misc]
            "gated": lambda x, g=gated, d=down: d(g(x)),  # type: ignore[misc]
            "three products": lambda x, g=gate, u=up, d=down: (g(x), d(u(x))),  # type: ignore[misc]
        }
        for m in (1, 4, 32, 128):
            yield f"{m} x {hidden} to {between}", torch.randn(m, hidden), calls


class Siblings(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.q(x), self.k(x), self.v(x)


def group(form: str) -> Iterator[Case]:
    for width in WIDTHS:
        three = Siblings(width).eval()
        q, k, v = (fast(layer, form) for layer in three.children())
        calls: dict[str, Call] = {
            "three calls": lambda x, q=q, k=k, v=v: (q(x), k(x), v(x)),  # type: ignore[misc]
            "group": fastlinear.FastLinearGroup(three.children(), **FORMS[form]),  # type: ignore[arg-type]
        }
        for m in (1, 4, 8, 16, 32):
            yield f"{m} x {width}", torch.randn(m, width), calls


def chain(form: str) -> Iterator[Case]:
    for m, k, n in CHAINS:
        layer, x, dense, row = nn.Linear(k, n).eval(), torch.randn(m, k), torch.randn(m, n), torch.randn(n)
        calls: dict[str, Call] = {"bare": fast(layer, form)}
        for name in activations.names():
            calls[name] = fast(layer, form, activation=name)
        for name, operand in (("add, dense", dense), ("mul, row", row)):
            calls[name] = functools.partial(_with, fast(layer, form, epilogue=(name.split(",")[0],)), operand)
        yield f"{m} x {k} x {n}", x, calls


def _with(layer: Any, operand: Tensor, x: Tensor) -> object:
    return layer(x, operand)


def mlp(form: str) -> Iterator[Case]:
    for m, hidden, between in MANY_ROWS:
        up, down = fast(nn.Linear(hidden, between), form, activation="gelu"), fast(nn.Linear(between, hidden), form)
        calls = {
            f"{rows} rows": functools.partial(_in_blocks, up.eval(), down.eval(), rows)
            for rows in (m, 512, 256, 128, 64)
        }
        yield f"{m} x {hidden} to {between}", torch.randn(m, hidden), calls


def _in_blocks(up: Any, down: Any, rows: int, x: Tensor) -> object:
    return [down(up(block)) for block in x.split(rows)]


BLOCKS: dict[str, Callable[[str], Iterator[Case]]] = {"swiglu": swiglu, "group": group, "chain": chain, "mlp": mlp}


def race(calls: dict[str, Call], x: Tensor, seconds: float) -> dict[str, float]:
    """Microseconds of each, tuned thoroughly first."""
    with measuring.process.thorough():
        for call in calls.values():
            call(x)
    rotations = {name: timing.Rotation([call], x) for name, call in calls.items()}
    timings = timing.race(rotations, lambda: None, seconds * len(calls), 5, 400)
    return {name: 1e6 * each.quartile for name, each in timings.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("blocks", nargs="*", choices=[*BLOCKS, []], default=[*BLOCKS])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--forms", default=",".join(FORMS))
    parser.add_argument("--seconds", type=float, default=0.5, help="for each way in each case")
    told = parser.parse_args()
    torch.set_num_threads(told.threads)
    torch.manual_seed(0)
    with torch.inference_mode():
        for block in told.blocks:
            for form in told.forms.split(","):
                for case, x, calls in BLOCKS[block](form):
                    times = race(calls, x, told.seconds)
                    first = next(iter(times))
                    others = "  ".join(
                        f"{name} {us:.1f} ({us / times[first] if block == 'chain' else times[first] / us:.2f})"
                        for name, us in times.items()
                    )
                    print(f"{block} {form} t{told.threads} {case}: {others}", flush=True)


if __name__ == "__main__":
    main()

"""A Mixtral-like block of experts, fastlinear's beside transformers' eager and grouped_mm.

    python benchmarks/experts.py [--rows 1,4,32,128] [--threads 2] [--seconds 0.4] [--ways fp32,bf16,int8,int4,compiled]

Experts are chosen at random, others in each call, so that at few rows their weights come from memory. Milliseconds are
lower quartiles; behind them, how many times as fast as the faster of transformers' ways in the same dtype of
activations.
"""

from __future__ import annotations

import argparse
import copy
import functools
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
import timing

HIDDEN, EXPERTS, BETWEEN, TOP_K = 1024, 8, 3584, 2
ROUTINGS = 8


def block(dtype: torch.dtype) -> Any:
    """The experts of transformers' MixtralForCausalLM, with random weights."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    config = MixtralConfig(hidden_size=HIDDEN, intermediate_size=BETWEEN, num_local_experts=EXPERTS)
    experts = MixtralExperts(config).to(dtype).eval()
    with torch.no_grad():
        for weight in experts.parameters():
            weight.uniform_(-0.02, 0.02)
    return experts


def ways(names: list[str]) -> dict[str, Any]:
    """By name: "fp32 eager", "fp32 grouped_mm", "fp32 compiled", "fp32", "int8" ..."""
    import fastlinear

    found: dict[str, Any] = {}
    for name, dtype in {"fp32": torch.float32, "bf16": torch.bfloat16}.items():
        if name in names:
            stock = block(dtype)
            for way in ("eager", "grouped_mm"):
                found[f"{name} {way}"] = twin = copy.copy(stock)
                twin.config = copy.copy(stock.config)
                twin.config._experts_implementation = way
            if "compiled" in names:
                found[f"{name} compiled"] = torch.compile(found[f"{name} grouped_mm"], backend="fastlinear")
            found[name] = fastlinear.freeze(fastlinear.convert(stock))
    for name, scheme in {"int8": fastlinear.Int8Dynamic(), "int4": fastlinear.Int4Dynamic()}.items():
        if name in names:
            found[name] = fastlinear.convert(block(torch.float32), quantize=scheme, freeze=True, inplace=True)
    return found


def race(found: dict[str, Any], rows: int, seconds: float) -> dict[str, float]:
    """Milliseconds of each way."""
    rotations = {}
    for name, experts in found.items():
        dtype = torch.bfloat16 if name.startswith("bf16") else torch.float32
        x, calls = torch.randn(rows, HIDDEN).to(dtype), []
        for _ in range(ROUTINGS):
            weights, ids = torch.randn(rows, EXPERTS).softmax(-1).topk(TOP_K)
            calls.append(functools.partial(_call, experts, ids, weights.to(dtype)))
        rotations[name] = timing.Rotation(calls, x)
    timings = timing.race(rotations, lambda: None, seconds * len(found), 5, 200)
    return {name: 1e3 * each.quartile for name, each in timings.items()}


def _call(experts: Any, ids: torch.Tensor, weights: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    y: torch.Tensor = experts(x, ids, weights)
    return y


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rows", default="1,4,32,128")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=0.4)
    parser.add_argument("--ways", default="fp32,bf16,int8,int4")
    told = parser.parse_args()
    torch.set_num_threads(told.threads)
    torch.manual_seed(0)
    with torch.no_grad():
        found = ways(told.ways.split(","))
        for rows in map(int, told.rows.split(",")):
            times = race(found, rows, told.seconds)
            print(f"{rows} rows, {told.threads} threads")
            for name, milliseconds in times.items():
                dtype = "bf16" if name.startswith("bf16") else "fp32"
                rivals = [times[way] for way in (f"{dtype} eager", f"{dtype} grouped_mm") if way in times]
                ratio = f"{min(rivals) / milliseconds:6.2f}x" if rivals else ""
                print(f"  {name:16} {milliseconds:9.3f} ms {ratio}")


if __name__ == "__main__":
    main()

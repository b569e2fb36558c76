"""`fastlinear tune`: the kernels of a user's model are chosen now, so that later processes find them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastlinear.cli import tables
from fastlinear.cli.loading import load_model, run
from fastlinear.cli.options import SCHEMES, UsageError, check_files, check_override
from fastlinear.file.plans import save_plans
from fastlinear.file.safetensors import FormatError
from fastlinear.model import tuning
from fastlinear.model.arguments import tensors_in
from fastlinear.model.convert import convert
from fastlinear.model.reporting import Report, report
from fastlinear.model.selection import linear_layers
from fastlinear.model.table import sides_of
from fastlinear.plan import decide


def tune(options: argparse.Namespace) -> int:
    """Converts and tunes the model that module:function returns, and prints the report; shows or clears the cache."""
    check_override()
    if options.model is None and not (options.show or options.clear):
        raise UsageError("tune takes a module:function, --show or --clear")
    check_files(out=options.out, html=options.html)
    if options.clear:
        tuning.clear_cache()
    if options.model is not None:
        _tune(options)
    if options.show:
        _show()
    return 0


def _tune(options: argparse.Namespace) -> None:
    model, example = load_model(options.model)
    if not linear_layers(model):
        raise UsageError(f"the {type(model).__name__} that {options.model} returns has no linear layer")
    fast = convert(model, quantize=SCHEMES.get(options.quantize))
    for batch in options.batch or [None]:
        run(options.model, tuning.tune, fast, example if batch is None else _of_batch(example, batch))
    found = report(fast)
    _print(found)
    try:
        if options.html is not None:
            found.to_html(options.html)
        if options.out is not None:
            print(f"\n{save_plans(fast, options.out)} plans in {options.out}")
    except (OSError, FormatError) as error:
        raise UsageError(str(error)) from None
    if any(plan.provisional for layer in found for plan in layer.buckets):
        print("some plans are provisional, and in no file: run this again while nothing else runs", file=sys.stderr)


def _print(found: Report) -> None:
    if tables.are_drawn():
        above, (head, *rows), below = found.parts()
        print(*above, sep="\n")
        tables.show(head, rows, sides_of(head))
        print(*below, sep="\n")
    else:
        print(found)


def _of_batch(example: Any, batch: int) -> Any:
    """The example with so many rows: those that it has, over and over. Tensors with another first size than the first
    of them stay."""
    first = next((tensor for tensor in tensors_in(example) if tensor.dim() > 0), None)
    if first is None or len(first) == 0:
        raise UsageError("--batch needs an example with a tensor whose first dimension is the batch")
    rows = len(first)
    index = torch.arange(batch, device="cpu") % rows

    def sized(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[index] if value.dim() > 0 and len(value) == rows else value
        if isinstance(value, Mapping):
            return {key: sized(each) for key, each in value.items()}
        return type(value)(map(sized, value)) if type(value) in (tuple, list) else value

    return sized(example)


def _show() -> None:
    entries = decide.cache().entries()
    rows = [(plan.name, "" if plan.speedup is None else f"{plan.speedup:.2f}x", key) for key, plan in entries.items()]
    tables.show(("runs on", "speed-up", "for"), sorted(rows, key=lambda row: row[2]))
    print(f"{len(rows)} plans in {decide.cache().path or 'memory'}")

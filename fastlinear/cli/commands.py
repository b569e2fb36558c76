"""The command line as a whole: `fastlinear info | bench | tune | inspect | check`, and what each of them takes."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import torch

from fastlinear.cli import bench, check, info, inspect, tune
from fastlinear.cli.options import (
    DTYPES,
    UsageError,
    add_quantize,
    add_threads,
    check_max_isa,
    to_batches,
    to_dtype,
    to_shapes,
    to_threads,
)
from fastlinear.spec import activations

SHAPES = "64x16x32,1x768x3072,16x768x3072,128x768x3072,1x1024x1024,16x1024x1024"


class _Parser(argparse.ArgumentParser):
    """Refuses in one line, without the usage, which --help has."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; 0, 1 if `check` found an error, 2 if the command cannot be done, 130 after Ctrl-C. A pipe that
    closes ends it."""
    parser = _Parser(prog="fastlinear", description="Fast linear layers for PyTorch on CPUs.")
    commands = parser.add_subparsers(required=True, metavar="command")
    command = commands.add_parser("info", help="what runs here: to be pasted into an issue")
    command.add_argument("--json", action="store_true", help="as data, for programs")
    command.set_defaults(run=info.info)
    _add_bench(commands)
    _add_tune(commands)

    command = commands.add_parser("inspect", help="what a frozen file holds, and whether this CPU runs it as it is")
    command.add_argument("file", help="a file that fastlinear.save wrote")
    command.set_defaults(run=inspect.inspect)

    command = commands.add_parser("check", help="test every kernel that runs here against fp64")
    command.set_defaults(run=check.check, threads=1)  # to share products this small costs more than they do

    options = parser.parse_args(arguments)
    before = torch.get_num_threads()
    try:
        check_max_isa()
        threads = getattr(options, "threads", None)
        torch.set_num_threads(threads if isinstance(threads, int) else before)
        code = int(options.run(options))
        sys.stdout.flush()
        return code
    except UsageError as error:
        print(f"fastlinear: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is flushed at exit
        return 0
    except KeyboardInterrupt:
        print("fastlinear: interrupted", file=sys.stderr)
        return 130
    finally:
        torch.set_num_threads(before)


def _add_bench(commands: Any) -> None:
    command = commands.add_parser("bench", help="FastLinear against nn.Linear and the activation, on a few shapes")
    command.add_argument("--shapes", type=to_shapes, default=SHAPES, help="MxKxN,...: rows x inputs x outputs")
    command.add_argument("--like", metavar="module:function", help="the shapes of a run of (model, example_inputs)")
    command.add_argument("--cold", action="store_true", help="weights come from memory, as in a large model")
    command.add_argument(
        "--against",
        type=bench.rivals_of,
        default=[],
        metavar="NAMES",
        help="further columns: torch,mkl,onednn,inductor",
    )
    command.add_argument("--plot", metavar="FILE", help="a picture of the shares of the roofline; needs matplotlib")
    command.add_argument("--threads", type=to_threads, help="numbers of threads, as 1,2 (default: torch's own choice)")
    command.add_argument("--isa", type=bench.isa_of, metavar="NAME", help="only kernels of this instruction set")
    names = ", ".join(DTYPES)
    command.add_argument("--dtype", type=to_dtype, default="float32", metavar="NAME", help=f"of weights and x: {names}")
    add_quantize(command)
    allowed = ("none", *activations.names())
    command.add_argument("--activation", choices=allowed, default="relu", metavar="NAME", help=", ".join(allowed))
    command.add_argument("--json", metavar="FILE", help="where the figures go as well")
    command.set_defaults(run=bench.bench)


def _add_tune(commands: Any) -> None:
    command = commands.add_parser("tune", help="choose the kernels of a model, so that later processes find them")
    command.add_argument(
        "model", metavar="module:function", nargs="?", help="function() returns (model, example_inputs)"
    )
    add_threads(command)
    add_quantize(command)
    command.add_argument("--batch", type=to_batches, default=[], help="1,8,32: rows to repeat the example to")
    command.add_argument("--out", metavar="FILE", help="write the plans there, for fastlinear.load_plans; it may grow")
    command.add_argument("--html", metavar="FILE", help="write the report there, as a page")
    command.add_argument("--show", action="store_true", help="list what is known already, of all models")
    command.add_argument("--clear", action="store_true", help="first forget all that is known")
    command.set_defaults(run=tune.tune)

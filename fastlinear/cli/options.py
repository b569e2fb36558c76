"""What the options of several commands mean."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import fastlinear._environment as environment
import fastlinear._kernels as _kernels
import fastlinear._tensors as _tensors
from fastlinear.plan import table
from fastlinear.spec.schemes import Int4Dynamic, Int4WeightOnly, Int8Dynamic, Int8WeightOnly, Scheme

SCHEMES: dict[str, Scheme] = {
    "int8": Int8Dynamic(),
    "w8f": Int8WeightOnly(),
    "int4": Int4Dynamic(),
    "w4f": Int4WeightOnly(),
}
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in _tensors.FORMATS}


_SHORT = {format: str(dtype).removeprefix("torch.") for dtype, format in _tensors.FORMATS.items()}  # fp32 ...


class UsageError(Exception):
    """What the user asked for cannot be done; the message says why in one sentence."""


def add_quantize(command: argparse.ArgumentParser) -> None:
    command.add_argument("--quantize", choices=SCHEMES, help="pack the weights in 8 or 4 bits: %(choices)s")


def add_threads(command: argparse.ArgumentParser) -> None:
    command.add_argument("--threads", type=to_thread, help="threads of torch's pool (default: torch's own choice)")


def check_max_isa() -> None:
    try:
        environment.check_max_isa(_kernels.isas(), severe=True)
    except ValueError as error:
        raise UsageError(str(error)) from None


def check_override() -> None:
    try:
        table.override()
    except ValueError as error:
        raise UsageError(str(error)) from None


def check_files(**files: str | None) -> None:
    """UsageError where a file of an option cannot be written, before minutes go by; by the option's name."""
    for option, file in files.items():
        if file is None:
            continue
        folder = Path(file).absolute().parent
        if Path(file).is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
            what = (
                "is a folder" if Path(file).is_dir() else f"cannot be written: there is no folder {folder} to write to"
            )
            raise UsageError(f"--{option}: {file} {what}")


def to_dtype(text: str) -> str:
    """The name of a dtype as torch has it, given that or the short one of the kernels."""
    name = _SHORT.get(text, text)
    if name not in DTYPES:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(DTYPES)}, or {', '.join(_SHORT)} for short")
    return name


def to_shapes(text: str) -> list[tuple[int, ...]]:
    shapes = [tuple(map(positive, shape.split("x"))) for shape in text.split(",")]
    if any(len(shape) != 3 for shape in shapes):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form MxKxN,MxKxN,... as 1x768x3072,32x768x3072")
    return shapes


def to_batches(text: str) -> list[int]:
    return [positive(each) for each in text.split(",")]


_MOST_THREADS = max(64, 4 * (os.cpu_count() or 1))  # of some hundred thousand OpenMP makes a crash


def to_thread(text: str) -> int:
    """A number of threads."""
    if (number := positive(text)) > _MOST_THREADS:
        raise argparse.ArgumentTypeError(f"{text} threads are more than the {_MOST_THREADS} that are allowed here")
    return number


def to_threads(text: str) -> list[int]:
    return [to_thread(each) for each in text.split(",")]


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)

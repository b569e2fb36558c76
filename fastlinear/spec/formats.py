"""The formats of numbers, as the kernel table names them: "fp32", "bf16", "int8" ...; and the dtypes they are.

Nothing here, or in those who read it, asks which format it is.
"""

from __future__ import annotations

import torch

import fastlinear._kernels as _kernels
import fastlinear._tensors as _tensors
from fastlinear.spec.int8 import BYTES

FP32 = _tensors.FORMATS[torch.float32]  # what any row and panel can be widened to
INTEGER_ROWS = {row["rows"] for row in _kernels.rows()} - {*_tensors.FORMATS.values()}
PRODUCTS = {row["format"] for row in _kernels.rows()} - {  # weights that these alone multiply
    row["format"] for row in _kernels.rows() if row["rows"] not in INTEGER_ROWS
}
DTYPES = {name: dtype for dtype, name in _tensors.FORMATS.items()}
FORMERLY = {"int8wo": "w8f"}  # in version 0.1: its files, pickles and exported programs have these


def present(name: str) -> str:
    """What a format, or a layout of it, is called today."""
    form, slash, sizes = name.partition("/")
    return FORMERLY.get(form, form) + slash + sizes


def name_of(dtype: torch.dtype) -> str:
    """What kernels and plans call a dtype: "fp32", "uint8"; torch's name where no kernel has it."""
    return _tensors.FORMATS.get(dtype) or str(dtype).removeprefix("torch.")


def dtype_of_rows(name: str) -> torch.dtype:
    """The dtype of x that `name_of` calls so."""
    return DTYPES.get(name) or next(dtype for dtype in BYTES if name_of(dtype) == name)


def long_name(form: str) -> str:
    """What torch calls a format, if it has it: "float32"."""
    return str(DTYPES[form]).removeprefix("torch.") if form in DTYPES else form


def told(held: torch.dtype, packed: str, products: str) -> str:
    """The dtype of a weight and, where it is another one, what it is packed in: "float32 as bfloat16"; and what x is
    rounded to: "float32 as bfloat16 products"."""
    text = " as ".join(dict.fromkeys((long_name(name_of(held)), long_name(packed))))
    if products == FP32:
        return text
    return f"{text} products" if products == packed else f"{text}, {long_name(products)} products"

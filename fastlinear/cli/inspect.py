"""`fastlinear inspect`: what a frozen file holds, and whether this CPU runs it as it is."""

from __future__ import annotations

import argparse

from fastlinear.cli.options import UsageError, check_override
from fastlinear.file import inspection
from fastlinear.file.safetensors import FormatError


def inspect(options: argparse.Namespace) -> int:
    """Prints what a frozen file holds; no more than its header is read."""
    check_override()
    try:
        print(inspection.describe(options.file))
    except FormatError as error:
        raise UsageError(str(error)) from None
    except OSError as error:
        raise UsageError(f"{options.file} cannot be read: {error.strerror}") from None
    return 0

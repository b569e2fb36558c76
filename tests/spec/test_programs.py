"""Epilogue programs: their one spelling, and what is refused."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from fastlinear.spec import programs
from fastlinear.spec.activations import Activation

STEPS: dict[Any, Activation | None] = {
    (): None,
    ("relu",): Activation("relu"),
    (nn.GELU(approximate="tanh"),): Activation("gelu_tanh"),
    (("leaky_relu", 0.1),): Activation("leaky_relu", (0.1,)),
    ("add",): Activation("add@0"),
    (("mul", 2),): Activation("mul", (2.0,)),
    (("clamp", None, 6),): Activation("hardtanh", (-math.inf, 6.0)),
    ("mul", "gelu", "add", ("div", 3.0)): Activation("mul@0+gelu+add@1+div", (3.0,)),
}


@pytest.mark.parametrize("steps", STEPS, ids=str)
def test_spelling(steps: Any) -> None:
    """What a user writes has one spelling, from which the same steps are read again."""
    program = programs.resolve(steps)
    assert program == STEPS[steps]
    if program is not None:
        assert programs.spelled(programs.steps_of(program)) == program == programs.parsed(*program)
        assert programs.count_operands(program) == sum(step in programs.BINARY for step in steps)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ("relu", "epilogue is a tuple of steps"),
        (("relu", "nosuch"), "epilogue step 'nosuch' is unknown .* allowed are add, sub, .*, clamp, relu"),
        ((("add", 1, 2),), r"epilogue step \('add', 1, 2\) takes one number, or none"),
        ((("mul", math.nan),), "takes one number"),
        ((("clamp", 1, 0),), "low <= high"),
        ((("clamp", 1),), "low <= high"),
        ((("gelu", 1.0),), "has other parameters"),
        ((None,), "does nothing"),
        (("swiglu",), "is unknown"),
        (("relu",) * 9, "has 9 steps, but at most 8 are allowed"),
    ],
)
def test_bad_steps_are_refused(steps: Any, message: str) -> None:
    """The message names the step and what is allowed."""
    with pytest.raises((TypeError, ValueError), match=message):
        programs.resolve(steps)


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("relu+nosuch", []),
        ("relu+", []),
        ("add@1", []),
        ("add@0+add@2", []),
        ("relu@0", []),
        ("add@x", []),
        ("mul", []),
        ("mul", [1.0, 2.0]),
        ("relu+hardtanh", [1.0, -1.0]),
        ("relu+swiglu", []),
        ("+".join(["relu"] * 9), []),
        ("relu+mul", [1]),
    ],
)
def test_a_file_says_only_what_is_ever_written(name: str, params: list[Any]) -> None:
    """What `spelled` never makes is refused when it is read."""
    with pytest.raises(ValueError, match=r"epilogue program|unknown|needs min_val"):
        programs.parsed(name, params)


def test_operands_keep_the_dtype_of_the_sums() -> None:
    """Operands of other dtypes are cast, and do not widen the answer."""
    y, program = torch.ones(2, 3, dtype=torch.bfloat16), programs.resolve(("add", "max"))
    assert programs.apply(program, y, [torch.ones(2, 3), torch.zeros(())]).dtype is torch.bfloat16

"""A FastLinear whose calls bring the operands of its epilogue: layer(x, residual).

It is a class of its own, so that a layer without operands has nothing to look for in a call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlinear.layer.fallback import label
from fastlinear.layer.module import FastModule
from fastlinear.spec import programs


class TakesOperands(FastModule):
    """Mixed in before the class of a layer whose epilogue program has operands."""

    _operands: int  # of a call

    def forward(self, input: Tensor, *operands: Any) -> Tensor:
        return self._run(input, self._tensors(operands))

    def _run(self, input: Tensor, operands: tuple[Tensor, ...] = ()) -> Tensor:
        if torch.compiler.is_dynamo_compiling():
            self._check(input, operands)
        return super()._run(input, operands)

    def _slow(self, x: Tensor, why: str, bare: bool, operands: tuple[Tensor, ...] = ()) -> Tensor:
        self._check(x, operands)
        return super()._slow(x, why, bare, operands)

    def _tensors(self, operands: tuple[Any, ...]) -> tuple[Tensor, ...]:
        """The operands with a tensor for each number."""
        for operand in operands:
            if not isinstance(operand, Tensor):
                return tuple(map(self._tensor, operands))
        return operands

    def _tensor(self, operand: Any) -> Any:
        if isinstance(operand, (int, float)) and not isinstance(operand, bool):
            return torch.full((), operand, dtype=torch.float32, device=self.weight.device)
        if not isinstance(operand, (Tensor, torch.fx.Proxy)):
            raise TypeError(f"{label(self)} takes tensors and numbers as operands, but was given {operand!r}")
        return operand

    def _check(self, x: Any, operands: tuple[Tensor, ...]) -> None:
        """TypeError or ValueError where a call cannot have these operands."""
        if not isinstance(x, Tensor) or x.dim() == 0:
            return  # nn.Linear's own code knows what to say
        if torch.jit.is_tracing() and len(operands) == self._operands:  # type: ignore[attr-defined,no-untyped-call]
            return  # which warns of every look at a shape
        if x.is_nested:
            raise TypeError(f"{label(self)} takes no nested tensors, since its epilogue has operands")
        y = (*x.shape[:-1], self.out_features)
        assert self.activation is not None
        reason = programs.why_not_operands(self.activation, self._operands, operands, y, x)
        if reason is not None:
            raise ValueError(f"{label(self)} {reason}")

    def __prepare_scriptable__(self) -> FastModule:
        raise TypeError(f"{label(self)} cannot be scripted, since its epilogue has operands: trace or export it")


FastModule._forwards.add(TakesOperands.forward)

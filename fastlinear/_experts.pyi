from collections.abc import Sequence

from torch import Tensor

from fastlinear._plans import Epilogue, Plan, RowQuantizer
from fastlinear._weights import Packed

class Projection:
    packs: tuple[Packed, ...]
    n: int
    k: int
    epilogue: Epilogue
    @property
    def columns(self) -> int: ...
    @property
    def layout(self) -> str: ...
    def __init__(self, packs: Sequence[Packed], epilogue: Epilogue, bias: Tensor | None = None) -> None: ...

def run(
    first: Projection,
    second: Projection,
    first_plan: Plan,
    second_plan: Plan,
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    rows: RowQuantizer | None = None,
) -> Tensor: ...

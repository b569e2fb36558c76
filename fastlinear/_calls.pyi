from collections.abc import Callable
from types import CodeType

from torch import Tensor

def read_with(reader: Callable[[CodeType], dict[int, str]]) -> None: ...
def redeem(tickets: list[Tensor], y: object) -> bool: ...

from collections.abc import Callable
from types import CodeType

from torch import Tensor

def read_with(reader: Callable[[CodeType], dict[int, str]]) -> None: ...

class Tickets:
    def __len__(self) -> int: ...
    def redeem(self, y: object) -> bool: ...

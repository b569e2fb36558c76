from collections.abc import Callable
from typing import Any

def tell_times(done: Callable[[Any, float], object] | None) -> None: ...

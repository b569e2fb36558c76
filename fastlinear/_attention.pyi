from torch import Tensor

def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = ...,
    causal: bool = ...,
    scale: float | None = ...,
    grouped: bool = ...,
    isa: str | None = ...,
    rows: tuple[int, int] = ...,
    joined: bool = ...,
    products: str | None = ...,
    length_first: bool = ...,
    sinks: Tensor | None = ...,
    cap: float | None = ...,
) -> Tensor | None: ...
def store(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    at: int,
    full: bool = ...,
    isa: str | None = ...,
    rows: tuple[int, int] = ...,
) -> Tensor | None: ...

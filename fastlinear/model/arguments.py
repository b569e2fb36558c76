"""What functions on models are given: a model, and an example to call it with."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn


def check_module(function: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}() takes an nn.Module, but was given {type(model).__name__}")


def call(model: nn.Module, example: Any) -> Any:
    """Runs the model on what `check_example` has nothing against."""
    if isinstance(example, Mapping):
        if (reason := _why_not_keywords(model, example)) is not None:
            raise TypeError(reason)
        return model(**example)
    return model(*example) if isinstance(example, tuple) else model(example)


def _why_not_keywords(model: nn.Module, example: Mapping[Any, Any]) -> str | None:
    """Why a mapping cannot be the model's keyword arguments, where it would be its one argument (as the features of
    sentence-transformers are)."""
    try:
        signature = inspect.signature(model.forward)
        signature.bind(**example)
    except ValueError:
        return None  # it tells no signature
    except TypeError as error:
        name = type(model).__name__
        return (
            f"a mapping is taken for keyword arguments, which {name}.forward does not have ({error}); where it is the "
            "one argument, as with sentence-transformers, give it in a tuple: (features,)"
        )
    return None


def check_example(example: object) -> None:
    if not isinstance(example, (Tensor, tuple, Mapping)):
        raise TypeError(
            "the example must be a tensor, a tuple of arguments or a mapping of keyword arguments, "
            f"but is of type {type(example).__name__}"
        )


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors of an example, or of an output, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (Mapping, tuple, list)):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(each)

"""Rows of a report as no model has them."""

import dataclasses

from fastlinear.model.rows import LayerReport
from fastlinear.plan.candidates import Chosen
from fastlinear.spec.activations import Activation


def answer(
    bucket: int,
    name: str,
    source: str,
    speedup: float | None = None,
    x: str = "fp32",
    refused: str = "",
    **rest: object,
) -> Chosen:
    return Chosen(bucket, 1, x, name, 1, 1, source, speedup=speedup, refused=refused, **rest)  # type: ignore[arg-type]


def entry(name: str, *buckets: Chosen, **changes: object) -> LayerReport:
    decision = "fast" if buckets else "untuned"
    layer = LayerReport(name, 768, 3072, "float32", Activation("gelu"), decision, buckets, 9.0)  # type: ignore[arg-type]
    return dataclasses.replace(layer, **changes)  # type: ignore[arg-type]

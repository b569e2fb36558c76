"""torch's fused encoder kernels, which would bypass converted layers, are closed while there are any."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastlinear.layer import linear

# Attributes by which torch's fused encoder kernels bypass the layers below them, and the value that forbids it. With a
# padding mask nn.TransformerEncoder hands on nested tensors, which nothing but those kernels needs.
_BYPASSES: tuple[tuple[type[nn.Module], str, Any], ...] = (
    (nn.TransformerEncoderLayer, "activation_relu_or_gelu", 0),
    (nn.TransformerEncoder, "use_nested_tensor", False),
)
_SAVED = "_fastlinear_saved"  # on such a module: the attribute's own value


def forbid_bypasses(model: nn.Module) -> list[nn.Module]:
    """Close torch's fast path of encoders that contain a fast layer; returns those that were open."""
    closed = []
    for module in model.modules():
        for cls, attribute, value in _BYPASSES:
            open_here = isinstance(module, cls) and getattr(module, attribute, value) != value
            if open_here and any(map(linear.is_fast, module.modules())):
                vars(module)[_SAVED] = {attribute: getattr(module, attribute)}
                setattr(module, attribute, value)
                closed.append(module)
    return closed


def allow_bypass(module: nn.Module) -> None:
    """Open what `forbid_bypasses` closed on this module."""
    for attribute, value in vars(module).pop(_SAVED, {}).items():
        setattr(module, attribute, value)

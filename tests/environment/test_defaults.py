"""The public functions under a default device, meta most of all, where nothing has memory, and a default dtype."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlinear
import fastlinear._weights as _weights
from fastlinear.cli import check
from fastlinear.layer import frozen, linear
from fastlinear.plan import table

X = torch.linspace(-1, 1, 5 * 24).reshape(5, 24)


def stock() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 16)).eval().requires_grad_(False)


@contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


MODES: dict[str, Callable[[], Any]] = {
    "with meta": lambda: torch.device("meta"),
    "with cpu": lambda: torch.device("cpu"),
    "default meta": lambda: default_device("meta"),
    "default fp64": lambda: default_dtype(torch.float64),
    "default bf16": lambda: default_dtype(torch.bfloat16),
}


def _convert(model: nn.Module, **options: Any) -> nn.Module:
    return fastlinear.convert(model, tune="off", **options)


def _quantized(model: nn.Module, path: Path) -> nn.Module:
    values = torch.arange(40 * 24, dtype=torch.int8, device="cpu").reshape(40, 24)
    first = fastlinear.FastLinear.from_quantized(values, torch.full((40,), 0.01, dtype=torch.float32, device="cpu"))
    return nn.Sequential(first, nn.ReLU(), model[2])  # type: ignore[index]


def _calibrated(model: nn.Module, path: Path) -> nn.Module:
    static = fastlinear.Int8Static(fastlinear.calibrate(model, [X], smooth=0.5))
    return _convert(model, quantize=static, freeze=True)


def _loaded(model: nn.Module, path: Path) -> nn.Module:
    fastlinear.save(_convert(model, freeze=True), path / "file")
    return fastlinear.load(path / "file", stock().float())


def _tuned(model: nn.Module, path: Path) -> nn.Module:
    fast = fastlinear.convert(model, example_inputs=X, tune="now")
    fastlinear.tune(fast, X)
    return fast


def _around(model: nn.Module, path: Path) -> nn.Module:
    fast = fastlinear.freeze(_convert(model))
    fastlinear.refresh(fastlinear.unfreeze(fast))
    return fastlinear.unconvert(fast)


DOORS: dict[str, Callable[[Any, Path], nn.Module]] = {
    "convert": lambda model, path: _convert(model),
    "freeze": lambda model, path: fastlinear.freeze(_convert(model)),
    "bf16": lambda model, path: _convert(model, dtype=torch.bfloat16, freeze=True),
    "Int8Dynamic": lambda model, path: _convert(model, quantize=fastlinear.Int8Dynamic(), freeze=True),
    "Int8WeightOnly": lambda model, path: _convert(model, quantize=fastlinear.Int8WeightOnly(), freeze=True),
    "Int4WeightOnly": lambda model, path: _convert(model, quantize=fastlinear.Int4WeightOnly(), freeze=True),
    "calibrate": _calibrated,
    "from_quantized": _quantized,
    "save and load": _loaded,
    "tune": _tuned,
    "unfreeze and unconvert": _around,
}


def answer(model: nn.Module) -> Tensor:
    with torch.inference_mode():
        y: Tensor = model(X)
    return y


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("door", DOORS)
def test_a_model_made_under_defaults(door: str, mode: str, tmp_path: Path) -> None:
    """It has its tensors on the CPU, in fp32, and the bits of one that was made without, and `report` reads it."""
    expected, model = answer(DOORS[door](stock(), tmp_path)), stock()
    with MODES[mode]():
        fast = DOORS[door](model, tmp_path)
        assert "16" in str(fastlinear.report(fast))
    assert {(t.device.type, t.dtype) for t in fast.state_dict().values()} <= {("cpu", torch.float32)}
    tolerance = 1e-4 if door in ("tune", "convert") else 0.0  # another kernel may have won
    torch.testing.assert_close(answer(fast), expected, rtol=tolerance, atol=tolerance)


def test_a_repacking_load_within_meta(tmp_path: Path) -> None:
    """A file in a layout that this machine packs otherwise loads in the very block that made the model on meta."""
    layouts = sorted({k["layout"] for k in fastlinear.kernels() if k["format"] == "fp32"} - {table.layout("fp32")})
    if not layouts:
        pytest.skip("there is one fp32 layout")
    model = stock()
    expected = answer(model)
    packed = _weights.Packed(model[0].weight, layouts[0])
    linear.adopt(model[0], None, "off", "0", over=frozen.Frozen(packed, torch.float32))
    fastlinear.save(model, tmp_path / "file")
    with torch.device("meta"):
        loaded = fastlinear.load(tmp_path / "file", stock())
    assert f"repacked from {layouts[0]}" in str(fastlinear.report(loaded))
    torch.testing.assert_close(answer(loaded), expected)


def test_selfcheck_under_meta() -> None:
    """The check of the kernels, which makes all of its tensors, finds nothing wrong there."""
    with torch.device("meta"):
        assert max(worst for _, _, worst in itertools.islice(check.results(), 8)) <= 1

"""What int8 costs in accuracy: a small net, trained here on scikit-learn's bundled digits, before and after."""

import functools

import pytest
import torch
import torch.nn.functional as F
from models import OFF
from torch import Tensor, nn

import fastlinear
from fastlinear import FastLinear, Int8Dynamic, Int8Static, Int8WeightOnly
from fastlinear.spec import int8
from fastlinear.spec.schemes import Scheme

LOST = 0.005  # at most half a point of accuracy
SCHEMES = {
    "dynamic": lambda calibrate: Int8Dynamic(),
    "dynamic, asymmetric": lambda calibrate: Int8Dynamic(asymmetric=True),
    "dynamic, smoothed": lambda calibrate: Int8Dynamic(calibration=calibrate(smooth=0.5)),
    "weight-only": lambda calibrate: Int8WeightOnly(),
    "static": lambda calibrate: Int8Static(calibrate()),
    "static, symmetric": lambda calibrate: Int8Static(calibrate(symmetric=True)),
    "static, percentile": lambda calibrate: Int8Static(calibrate(method="percentile", percentile=99.99)),
    "static, smoothed": lambda calibrate: Int8Static(calibrate(smooth=0.5)),
    "static, chained": lambda calibrate: Int8Static(calibrate(), chain=True),
}


@functools.cache
def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images and labels to train on (1000), and to test with (797)."""
    from sklearn.datasets import load_digits  # takes a second, which collecting the tests does not want

    digits = load_digits()
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
    images, labels = torch.tensor(digits.data).float()[order] / 16, torch.tensor(digits.target)[order]
    return images[:1000], labels[:1000], images[1000:], labels[1000:]


@functools.cache
def trained() -> nn.Sequential:
    """64 pixels to 10 digits, through two hidden layers."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
    images, labels, *_ = data()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(60):
        for batch in torch.randperm(1000).split(100):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    return model.eval().requires_grad_(False)


def accuracy(model: nn.Module) -> float:
    *_, images, labels = data()
    with torch.no_grad():
        return (model(images).argmax(1) == labels).float().mean().item()


def test_the_net_has_something_to_lose() -> None:
    """It was trained to at least 96 %, on images that it is not tested with."""
    assert accuracy(trained()) >= 0.96


def by_specification(scheme: Scheme, x: Tensor) -> Tensor:
    """What the converted net returns, in plain torch."""
    for name, layer in trained().named_children():
        if isinstance(layer, nn.Linear):
            rows = scheme.rows(name)
            weight = int8.quantize_weight(layer.weight, None if rows is None else rows.smooth)
            x = int8.linear(x, weight, rows, layer.bias)
        else:
            x = layer(x)
    return x


@pytest.mark.parametrize("name", SCHEMES)
def test_int8_keeps_the_accuracy(name: str) -> None:
    """At most 0.5 points below fp32, with every layer in int8, calibrated on training data; to the bit what the
    specification says, where products are of integers."""
    train, _, test, _ = data()
    scheme: Scheme = SCHEMES[name](functools.partial(fastlinear.calibrate, trained(), [train[:200], train[200:400]]))
    fast = OFF(trained(), quantize=scheme)
    lost = accuracy(trained()) - accuracy(fast)
    assert lost <= LOST, f"{name} loses {100 * lost:.2f} points"
    layers = [layer for layer in fast.modules() if isinstance(layer, FastLinear)]
    assert [layer._engine.packed.format for layer in layers] == [scheme.packed] * 3
    assert not any(plan.name.startswith("torch/") for layer in layers for plan in layer.plans)
    y, expected = fast(test), by_specification(scheme, test)
    assert torch.equal(y, expected) if scheme.rows("0") else torch.allclose(y, expected, rtol=1e-5, atol=1e-4)
